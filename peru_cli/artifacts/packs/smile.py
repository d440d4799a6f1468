"""Artifacts of kind `routed`, method `smile`: low-rank experts of several tasks for the linear layers of one base.

Byte layout: docs/routing.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.packs.routed import (
    COMMON,
    LinearLayer,
    Routed,
    decode_floats,
    decode_layer,
    decode_tasks,
    encode_layer,
    encode_tasks,
)
from peru_cli.artifacts.packs.superposed import PackIndex, TaskRecord
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.places import Place
from peru_cli.console import count
from peru_cli.errors import BadFile

METHOD = "smile"
_NUMBER = "[1-9][0-9]{0,5}"
METADATA = COMMON | {"peru.method": METHOD, "peru.rank": _NUMBER, "peru.gate": _NUMBER, "peru.top": _NUMBER}


@dataclass
class ExpertRecord:
    """One task's expert of a layer: the rank of its factors (0 if the weight is the base's), and the digest of its block."""

    rank: int
    digest: bytes


@dataclass
class RoutedLayer(LinearLayer):
    """A linear layer, and an expert for each task, in the order of the tasks."""

    experts: list[ExpertRecord] = field(default_factory=list)

    def numbers(self, task: int) -> int:
        """How many numbers a task's expert has."""
        return self.experts[task].rank * (self.inputs + self.outputs) + (self.outputs if self.bias is not None else 0)


@dataclass
class SmileIndex:
    """The contents of the artifact: `pack` has the base's tensors and the tasks, `dtype` is that of the experts."""

    pack: PackIndex
    dtype: Dtype
    layers: list[RoutedLayer]


def encode_smile(index: SmileIndex) -> bytes:
    """Serialise an index. Layers come in the order of their weights' names."""
    places = {tensor.info.name: number for number, tensor in enumerate(index.pack.tensors)}
    sink = Sink()
    encode_tasks(sink, index.pack)
    sink.byte(index.dtype.code)
    sink.number(len(index.layers))
    for layer in index.layers:
        encode_layer(sink, layer, places)
        for expert in layer.experts:
            sink.number(expert.rank)
            sink.data += expert.digest
    return bytes(sink.data)


def decode_smile(data: bytes) -> SmileIndex:
    """Parse and check an index. BadFile if it is invalid."""
    cursor = Cursor(data)
    pack = decode_tasks(cursor)
    dtype = decode_floats(cursor, "experts")
    layers: list[RoutedLayer] = []
    last = -1
    for _ in range(cursor.count()):
        layer, last, _ = decode_layer(cursor, pack, last)
        experts = [ExpertRecord(cursor.number(min(layer.weight.shape)), cursor.take(SHORT)) for _ in pack.tasks]
        layers.append(RoutedLayer(layer.weight, layer.bias, layer.transposed, experts))
    if not cursor.done():
        raise BadFile("the index of routed experts has trailing bytes")
    return SmileIndex(pack, dtype, layers)


class Smile(Routed):
    """An opened artifact: experts and ranks. Thread-safe."""

    method, forms = METHOD, METADATA

    def __init__(self, path: Place) -> None:
        self._expert_at: list[list[int]] = []
        super().__init__(path)

    def _read_method(self) -> None:
        found = decode_smile(self.container.index)
        self.index, self.dtype, self.layers = found.pack, found.dtype, found.layers
        self.rank, self.gate, self.top = (int(self.metadata[f"peru.{key}"]) for key in ("rank", "gate", "top"))
        if self.gate > self.rank or self.top > len(self.index.tasks):
            raise BadFile(f"its router takes {self.gate} of {self.rank} directions and {self.top} of {len(self.index.tasks)} tasks")
        if any(expert.rank > self.rank for layer in self.layers for expert in layer.experts):
            raise BadFile(f"an expert has more than {self.rank} directions")

    def _lay_out(self) -> int:
        at = 0
        for layer in self.layers:
            places = []
            for task in range(len(layer.experts)):
                places.append(at)
                at += self.dtype.nbytes(layer.numbers(task))
            self._expert_at.append(places)
        return at

    @property
    def held(self) -> set[str]:
        return {info.name for layer in self.layers for info in layer.held}

    def task_bytes(self, task: TaskRecord) -> int:
        number = self.index.tasks.index(task)
        return sum(self.dtype.nbytes(layer.numbers(number)) for layer in self.layers)

    def read_expert(self, layer: int, task: int) -> bytearray:
        """An expert's numbers in the artifact's dtype: right (rank, in), left transposed (rank, out), bias (out) if there is one.

        BadFile if they were altered."""
        found = self.layers[layer]
        what = f"the expert of {self.index.tasks[task].name} for {found.weight.name!r}"
        return self.read_block(self._expert_at[layer][task], self.dtype.nbytes(found.numbers(task)), found.experts[task].digest, what)

    def check_blocks(self) -> None:
        for number, layer in enumerate(self.layers):
            for task in range(len(layer.experts)):
                self.read_expert(number, task)

    def how(self) -> str:
        return f"rank {self.rank}, router of {self.gate} directions, top {self.top}, experts in {self.dtype.name}"

    def parts(self) -> str:
        return f"{len(self.layers):,} layers' experts"

    def card(self) -> str:
        return f"experts of rank {self.rank} for {count(len(self.layers))} layers, among which inputs choose"

    def figures(self) -> dict[str, Any]:
        return {"rank": self.rank, "gate": self.gate, "top": self.top}


Opened = Smile
