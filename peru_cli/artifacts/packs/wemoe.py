"""Artifacts of kind `routed`, method `wemoe`: differences of MLPs that routers weigh, and one difference for all other tensors.

Byte layout: docs/routing.md. Differences are whole artifacts of kind `mixed` (docs/mixed.md) inside of this one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.index import Mode
from peru_cli.artifacts.mixed.index import ULPS
from peru_cli.artifacts.mixed.reader import Mixed
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
from peru_cli.artifacts.packs.superposed import METADATA as PACK_METADATA
from peru_cli.artifacts.packs.superposed import PackIndex, TaskRecord
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.local.files import BytesFile
from peru_cli.checkpoints.places import Place
from peru_cli.console import plural
from peru_cli.errors import BadFile

METHOD = "wemoe"
ENTRY = 4  # flag of a layer that takes the MLP's own input
REST = "all other tensors"  # the name of the first difference
_NUMBER = "0|[1-9][0-9]{0,8}"
METADATA = COMMON | {
    "peru.method": METHOD,
    "peru.scale": PACK_METADATA["peru.scale"],
    "peru.layers": "[12]",
    "peru.bits": PACK_METADATA["peru.scale"].removeprefix("-?"),
    "peru.steps": _NUMBER,
    "peru.seed": PACK_METADATA["peru.seed"],
}


@dataclass
class GatedMlp:
    """The linear layers of one MLP in the order of their weights; which of them take its input; the digest of its router's block."""

    layers: list[LinearLayer]
    entries: list[bool]
    digest: bytes = bytes(SHORT)

    @property
    def width(self) -> int:
        """Number of input features of the MLP, and of its router."""
        return next(layer.inputs for layer, entry in zip(self.layers, self.entries, strict=True) if entry)

    def numbers(self, tasks: int, depth: int) -> int:
        """How many numbers its router has."""
        return (self.width + 1) * (tasks + (self.width if depth == 2 else 0))


def known_numbers(tasks: int) -> int:
    """How many float32 numbers say what a trained router says of each task's inputs: their mean gates, and the variances."""
    return (tasks + 1) * tasks


@dataclass
class Seen:
    """What a task's router made of its examples: how many there were, and how many it sent to each task, in the order of the tasks."""

    digest: bytes  # of the examples
    examples: int
    sent: list[int]


@dataclass
class WemoeIndex:
    """The contents of the artifact. `dtype` is that of the routers. `parts` are sizes and digests of the differences: of all other
    tensors first, then of each task's MLPs. `seen` has a record for each task, or none without data."""

    pack: PackIndex
    dtype: Dtype
    mlps: list[GatedMlp]
    parts: list[tuple[int, bytes]]
    seen: list[Seen] = field(default_factory=list)


def encode_wemoe(index: WemoeIndex) -> bytes:
    """Serialise an index. MLPs come in the order of their first weights, layers in that of their weights."""
    places = {tensor.info.name: number for number, tensor in enumerate(index.pack.tensors)}
    sink = Sink()
    encode_tasks(sink, index.pack)
    sink.byte(index.dtype.code)
    sink.number(len(index.mlps))
    for mlp in index.mlps:
        sink.number(len(mlp.layers))
        for layer, entry in zip(mlp.layers, mlp.entries, strict=True):
            encode_layer(sink, layer, places, ENTRY * entry)
        sink.data += mlp.digest
    for size, digest in index.parts:
        sink.number(size)
        sink.data += digest
    sink.byte(bool(index.seen))
    for seen in index.seen:
        sink.data += seen.digest
        sink.number(seen.examples)
        for sent in seen.sent:
            sink.number(sent)
    return bytes(sink.data)


def decode_wemoe(data: bytes) -> WemoeIndex:
    """Parse and check an index. BadFile if it is invalid."""
    cursor = Cursor(data)
    pack = decode_tasks(cursor)
    dtype = decode_floats(cursor, "routers")
    mlps: list[GatedMlp] = []
    first, held = -1, set[str]()
    for _ in range(cursor.count()):
        mlp, first = _decode_mlp(cursor, pack, first)
        names = {info.name for layer in mlp.layers for info in layer.held}
        if names & held:
            raise BadFile(f"two MLPs of its index have the tensor {min(names & held)!r}")
        held |= names
        mlps.append(mlp)
    parts = [(cursor.number(), cursor.take(SHORT)) for _ in range(1 + len(pack.tasks))]
    seen = []
    if cursor.one_of((0, 1), "record of examples"):
        for _ in pack.tasks:
            digest, examples = cursor.take(SHORT), cursor.number()
            seen.append(Seen(digest, examples, [cursor.number(examples) for _ in pack.tasks]))
            if sum(seen[-1].sent) != examples:
                raise BadFile("its index counts other examples than it had")
    if not cursor.done():
        raise BadFile("the index of gated MLPs has trailing bytes")
    return WemoeIndex(pack, dtype, mlps, parts, seen)


def _decode_mlp(cursor: Cursor, pack: PackIndex, after: int) -> tuple[GatedMlp, int]:
    """An MLP, and the place of its first weight, which must lie behind `after`."""
    mlp, last, first = GatedMlp([], []), after, after
    for number in range(cursor.count()):
        layer, last, flags = decode_layer(cursor, pack, last, ENTRY)
        first = last if number == 0 else first
        mlp.layers.append(layer)
        mlp.entries.append(bool(flags & ENTRY))
    widths = {layer.inputs for layer, entry in zip(mlp.layers, mlp.entries, strict=True) if entry}
    if len(widths) != 1:
        raise BadFile("an MLP of its index has no layer, or layers of different widths, for its input")
    mlp.digest = cursor.take(SHORT)
    return mlp, first


class Wemoe(Routed):
    """An opened artifact: gated MLPs, their routers, and differences. Thread-safe."""

    method, forms = METHOD, METADATA

    def __init__(self, path: Place) -> None:
        self._router_at: list[int] = []
        self._part_at: list[int] = []
        super().__init__(path)

    def _read_method(self) -> None:
        found = decode_wemoe(self.container.index)
        self.index, self.dtype, self.mlps, self.sizes, self.seen = found.pack, found.dtype, found.mlps, found.parts, found.seen
        self.depth, self.steps = int(self.metadata["peru.layers"]), int(self.metadata["peru.steps"])
        self.bits = float(self.metadata["peru.bits"])
        if bool(self.steps) != bool(self.seen):
            raise BadFile(
                f"its routers were trained for {self.steps} steps, and it has {'a' if self.seen else 'no'} record of their examples"
            )

    def _lay_out(self) -> int:
        at = 0
        for number in range(len(self.mlps)):
            self._router_at.append(at)
            at += self._router_bytes(number)
        for size, _ in self.sizes:
            self._part_at.append(at)
            at += size
        return at

    def router_numbers(self, number: int) -> int:
        """How many numbers of the artifact's dtype an MLP's router has."""
        return self.mlps[number].numbers(len(self.index.tasks), self.depth)

    def _router_bytes(self, number: int) -> int:
        return self.dtype.nbytes(self.router_numbers(number)) + (4 * known_numbers(len(self.index.tasks)) if self.seen else 0)

    @cached_property
    def gated(self) -> set[str]:
        """The tensors of all MLPs."""
        return {info.name for mlp in self.mlps for layer in mlp.layers for info in layer.held}

    @cached_property
    def held(self) -> set[str]:
        with self.part(0) as rest:
            return self.gated | {record.info.name for record in rest.index.tensors if record.parts}

    def read_router(self, number: int) -> bytearray:
        """An MLP's router: for each of its layers the weight (out, in), then the bias (out,), in the artifact's dtype. If it was trained,
        then float32: the mean gates of each task's inputs (tasks, tasks), and the variances within tasks (tasks,).

        BadFile if they were altered."""
        mlp = self.mlps[number]
        name = mlp.layers[0].weight.name
        return self.read_block(self._router_at[number], self._router_bytes(number), mlp.digest, f"the router of {name!r}")

    def part(self, number: int) -> Mixed:
        """A difference: that of all other tensors, or of the MLPs of task `number` - 1. BadFile if it was altered, or does not fit."""
        size, digest = self.sizes[number]
        name = self.index.tasks[number - 1].name if number else REST
        opened = Mixed(BytesFile(memoryview(self.read_block(self._part_at[number], size, digest, f"the difference of {name}")), self.path))
        known = {tensor.info.name: tensor for tensor in self.index.tensors}
        for record in opened.index.tensors:
            here = known.get(record.info.name)
            if here is None or opened.metadata["peru.prefix"] or (record.info.name in self.gated) != bool(number):
                raise BadFile(f"{self.path}: the difference of {name} has {record.info.name!r}, which does not belong there")
            fits = record.mode == Mode.DELTA and not record.base_rows and not record.parts & ULPS
            if not fits or (record.info.shape, record.base_dtype, record.base_digest) != (
                here.info.shape,
                here.base_dtype,
                here.base_digest,
            ):
                raise BadFile(f"{self.path}: the difference of {name} for {record.info.name!r} does not fit the base")
        return opened

    def task_bytes(self, task: TaskRecord) -> int:
        return self.sizes[1 + self.index.tasks.index(task)][0]

    @property
    def router_bytes(self) -> int:
        """Bytes of all routers."""
        return sum(map(self._router_bytes, range(len(self.mlps))))

    def check_blocks(self) -> None:
        for number in range(len(self.mlps)):
            self.read_router(number)
        for number in range(len(self.sizes)):
            self.part(number).close()

    def how(self) -> str:
        trained = f"trained for {plural(self.steps, 'step')}" if self.steps else "not trained"
        layers = plural(self.depth, "layer")
        return f"scale {self.metadata['peru.scale']}, routers of {layers} in {self.dtype.name}, {trained}; {self.bits:g} bits a parameter"

    def parts(self) -> str:
        return f"{plural(len(self.mlps), 'router')}, differences of {plural(len(self.index.tasks), 'task')}"

    def card(self) -> str:
        return f"differences of {plural(len(self.mlps), 'MLP')}, which routers weigh for each input"

    def figures(self) -> dict[str, Any]:
        sent = {
            task.name: dict(zip(self.tasks, (count / max(seen.examples, 1) for count in seen.sent), strict=True))
            for task, seen in zip(self.index.tasks, self.seen, strict=False)
        }
        found = {"scale": float(self.metadata["peru.scale"]), "router_layers": self.depth, "steps": self.steps, "bits": self.bits}
        return found | {"router_bytes": self.router_bytes, "rest_bytes": self.sizes[0][0], "routed_to": sent}


Opened = Wemoe
