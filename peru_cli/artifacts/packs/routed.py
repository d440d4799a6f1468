"""Artifacts of kind `routed`: low-rank experts of several tasks for the linear layers of one base. Inputs choose among them.

Byte layout: docs/routing.md. Tasks, their own tensors and side files are stored as in a pack (artifacts/packs/superposed.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.container import FORMAT, ContainerWriter
from peru_cli.artifacts.index import STORED
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.superposed import METADATA as PACK_METADATA
from peru_cli.artifacts.packs.superposed import OPTIONAL, PackIndex, PackMode, TaskRecord, check_metadata, decode_index, encode_index
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place
from peru_cli.errors import BadFile

KIND, SMILE = "routed", "smile"
INDEX_VERSION = 1
FACTOR_DTYPES = ("F32", "BF16", "F16")
_TRANSPOSED, _HAS_BIAS = 1, 2
_NUMBER = "[1-9][0-9]{0,5}"

METADATA = {key: PACK_METADATA[key] for key in ("peru.format", "peru.base", "peru.base.files")} | {
    "peru.kind": KIND,
    "peru.method": SMILE,
    "peru.rank": _NUMBER,
    "peru.gate": _NUMBER,
    "peru.top": _NUMBER,
}


@dataclass
class ExpertRecord:
    """One task's expert of a layer: the rank of its factors (0 if the weight is the base's), and the digest of its block."""

    rank: int
    digest: bytes


@dataclass
class RoutedLayer:
    """A linear layer of the base: its weight and bias, and an expert for each task, in the order of the tasks.

    `transposed` says that the weight is stored as (in, out)."""

    weight: TensorInfo
    bias: TensorInfo | None
    transposed: bool
    experts: list[ExpertRecord]

    @property
    def outputs(self) -> int:
        """Number of output features."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def inputs(self) -> int:
        """Number of input features."""
        return self.weight.shape[0 if self.transposed else 1]

    def numbers(self, task: int) -> int:
        """How many numbers a task's expert has."""
        return self.experts[task].rank * (self.inputs + self.outputs) + (self.outputs if self.bias is not None else 0)


@dataclass
class RoutedIndex:
    """The contents of the artifact: `pack` has the base's tensors and the tasks, `dtype` is that of the experts."""

    pack: PackIndex
    dtype: Dtype
    layers: list[RoutedLayer]


def encode_routed(index: RoutedIndex) -> bytes:
    """Serialise an index. Layers come in the order of their weights' names."""
    places = {tensor.info.name: number for number, tensor in enumerate(index.pack.tensors)}
    sink = Sink()
    sink.byte(INDEX_VERSION)
    sink.text(encode_index(index.pack))
    sink.byte(index.dtype.code)
    sink.number(len(index.layers))
    for layer in index.layers:
        sink.number(places[layer.weight.name])
        sink.byte(_TRANSPOSED * layer.transposed + _HAS_BIAS * (layer.bias is not None))
        if layer.bias is not None:
            sink.number(places[layer.bias.name])
        for expert in layer.experts:
            sink.number(expert.rank)
            sink.data += expert.digest
    return bytes(sink.data)


def decode_routed(data: bytes) -> RoutedIndex:
    """Parse and check an index. BadFile if it is invalid."""
    cursor = Cursor(data)
    if (version := cursor.byte()) != INDEX_VERSION:
        raise BadFile(f"the index of routed experts has version {version}, this peru reads {INDEX_VERSION}", "pip install -U peru-cli")
    pack = decode_index(cursor.take(cursor.count()))
    if pack.residuals or any(tensor.mode != PackMode.BASE for tensor in pack.tensors):
        raise BadFile("the index of routed experts has sums or residuals, which only packs have")
    dtype = cursor.dtype()
    if dtype.name not in FACTOR_DTYPES:
        raise BadFile(f"its experts are {dtype.name}, not {', '.join(FACTOR_DTYPES)}")
    layers: list[RoutedLayer] = []
    last = -1
    for _ in range(cursor.count()):
        place = cursor.number(len(pack.tensors) - 1) if pack.tensors else 0
        if place <= last or not pack.tensors:
            raise BadFile("the layers of the index of routed experts are not in order")
        last = place
        layers.append(_decode_layer(cursor, pack, place))
    if not cursor.done():
        raise BadFile("the index of routed experts has trailing bytes")
    return RoutedIndex(pack, dtype, layers)


def _decode_layer(cursor: Cursor, pack: PackIndex, place: int) -> RoutedLayer:
    weight = pack.tensors[place].info
    if len(weight.shape) != 2 or not weight.dtype.compressible:
        raise BadFile(f"tensor {weight.name!r} is not the weight of a linear layer")
    flags = cursor.one_of((0, _TRANSPOSED, _HAS_BIAS, _TRANSPOSED + _HAS_BIAS), "kind of layer")
    bias = pack.tensors[cursor.number(len(pack.tensors) - 1)].info if flags & _HAS_BIAS else None
    layer = RoutedLayer(weight, bias, bool(flags & _TRANSPOSED), [])
    if bias is not None and (bias.shape != (layer.outputs,) or not bias.dtype.compressible):
        raise BadFile(f"tensor {bias.name!r} is not the bias of {weight.name!r}")
    layer.experts = [ExpertRecord(cursor.number(min(weight.shape)), cursor.take(SHORT)) for _ in pack.tasks]
    return layer


class RoutedWriter:
    """Writes the artifact: experts in order (all tasks of a layer, then the next layer), whole tensors, and `finish`."""

    def __init__(self, target: Path, metadata: Mapping[str, str], sync: bool) -> None:
        self._metadata = {"peru.format": FORMAT, "peru.kind": KIND, "peru.method": SMILE, **metadata}
        self._container = ContainerWriter(target, self._metadata, sync)

    def append_expert(self, data: bytes) -> bytes:
        """Append one expert's block. Returns its digest."""
        self._container.append("blocks", data)
        return short_digest(data)

    def append_whole(self, data: memoryview) -> None:
        """Append bytes of tasks' own tensors, in index order."""
        self._container.append("whole", data)

    def finish(self, index: RoutedIndex, contents: Sequence[bytes]) -> int:
        """Write side files, index and header, and rename the file into place. Returns its size in bytes."""
        for content in contents:
            self._container.append("files", content)
        return self._container.finish(self._metadata, encode_routed(index))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._container.__exit__(*exc)


class Routed(Pack):
    """An opened artifact of kind `routed`: a pack that holds experts in place of sums. Thread-safe."""

    kind = KIND

    def __init__(self, path: Place) -> None:
        self._expert_at: list[list[int]] = []
        super().__init__(path)

    def _read_index(self) -> None:
        check_metadata(self.metadata, METADATA, OPTIONAL)
        found = decode_routed(self.container.index)
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
    def has_own_base(self) -> bool:
        """False: the base is the one that the fine-tunes were made from."""
        return False

    def expert_bytes(self, task: TaskRecord) -> int:
        """Bytes of a task's experts."""
        number = self.index.tasks.index(task)
        return sum(self.dtype.nbytes(layer.numbers(number)) for layer in self.layers)

    def own_bytes(self, task: TaskRecord) -> int:
        """Bytes of the file that only this task needs: its own tensors and its experts."""
        return task.whole_bytes + self.expert_bytes(task)

    def files_of(self, task: TaskRecord, of_base: Mapping[str, Place]) -> dict[str, bytes]:
        """A task's side files: those stored here, and those of the base that are still the same. BadFile if one was altered."""
        found = {file.name: self.side_file(file) for file in task.files if file.origin == STORED}
        for file in task.files:
            if file.origin != STORED and file.name in of_base:
                content = of_base[file.name].read_bytes()
                found |= {file.name: content} if short_digest(content) == file.digest else {}
        return found

    def read_expert(self, layer: int, task: int) -> bytearray:
        """An expert's numbers in the artifact's dtype: right (rank, in), left transposed (rank, out), bias (out) if there is one.

        BadFile if they were altered."""
        found = self.layers[layer]
        data = bytearray(self.dtype.nbytes(found.numbers(task)))
        if data:
            self.container.read_into("blocks", self._expert_at[layer][task], memoryview(data))
        if short_digest(bytes(data)) != found.experts[task].digest:
            name = self.index.tasks[task].name
            raise BadFile(f"{self.path}: the expert of {name} for {found.weight.name!r} was altered", "fetch or make it again")
        return data

    def verify(self) -> None:
        """Read all of it and compare it with its digests: everything that needs no base. BadFile if it was altered."""
        for number, layer in enumerate(self.layers):
            for task in range(len(layer.experts)):
                self.read_expert(number, task)
        for record in self.index.tasks:
            for tensor in record.tensors:
                self.verify_whole(record, tensor)
        for size, digest in self.index.contents:
            self.content(size, digest)
