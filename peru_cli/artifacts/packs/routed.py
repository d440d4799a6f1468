"""What all artifacts of kind `routed` share: several tasks on one base, among which inputs choose. Each method has a module of its own.

Byte layout: docs/routing.md. Tasks, their own tensors and side files are stored as in a pack (artifacts/packs/superposed.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.container import FORMAT, ContainerWriter, opening
from peru_cli.artifacts.index import STORED
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.superposed import METADATA as PACK_METADATA
from peru_cli.artifacts.packs.superposed import OPTIONAL, PackIndex, PackMode, TaskRecord, check_metadata, decode_index, encode_index
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.files import open_random, read_header
from peru_cli.checkpoints.places import Place
from peru_cli.errors import BadFile
from peru_cli.methods.compact.routed import ROUTED, of_method

KIND = "routed"
INDEX_VERSION = 1
FLOATS = ("F32", "BF16", "F16")  # dtypes of experts and routers
TRANSPOSED, HAS_BIAS = 1, 2  # flags of a layer
COMMON = {key: PACK_METADATA[key] for key in ("peru.format", "peru.base", "peru.base.files")} | {"peru.kind": KIND}


@dataclass
class LinearLayer:
    """A linear layer of the base: its weight and bias. `transposed` says that the weight is stored as (in, out)."""

    weight: TensorInfo
    bias: TensorInfo | None
    transposed: bool

    @property
    def outputs(self) -> int:
        """Number of output features."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def inputs(self) -> int:
        """Number of input features."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def held(self) -> list[TensorInfo]:
        """Its tensors."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


def encode_tasks(sink: Sink, pack: PackIndex) -> None:
    """Begin an index: its version, the base's tensors and the tasks."""
    sink.byte(INDEX_VERSION)
    sink.text(encode_index(pack))


def decode_tasks(cursor: Cursor) -> PackIndex:
    """Inverse of `encode_tasks`. BadFile if it is invalid."""
    if (version := cursor.byte()) != INDEX_VERSION:
        raise BadFile(f"the index of routed experts has version {version}, this peru reads {INDEX_VERSION}", "pip install -U peru-cli")
    pack = decode_index(cursor.take(cursor.count()))
    if pack.residuals or any(tensor.mode != PackMode.BASE for tensor in pack.tensors):
        raise BadFile("the index of routed experts has sums or residuals, which only packs have")
    return pack


def decode_floats(cursor: Cursor, what: str) -> Dtype:
    """Read the dtype of what is stored. BadFile for another one than `FLOATS`."""
    dtype = cursor.dtype()
    if dtype.name not in FLOATS:
        raise BadFile(f"its {what} are {dtype.name}, not {', '.join(FLOATS)}")
    return dtype


def encode_layer(sink: Sink, layer: LinearLayer, places: Mapping[str, int], more: int = 0) -> None:
    """Write a layer; `places` numbers the pack's tensors, `more` are a method's own flags."""
    sink.number(places[layer.weight.name])
    sink.byte(TRANSPOSED * layer.transposed + HAS_BIAS * (layer.bias is not None) + more)
    if layer.bias is not None:
        sink.number(places[layer.bias.name])


def decode_layer(cursor: Cursor, pack: PackIndex, after: int, more: int = 0) -> tuple[LinearLayer, int, int]:
    """Read a layer, its number among the pack's tensors, and its flags. BadFile if it is invalid, or not behind `after`."""
    place = cursor.number(len(pack.tensors) - 1) if pack.tensors else 0
    if place <= after or not pack.tensors:
        raise BadFile("the layers of the index of routed experts are not in order")
    weight = pack.tensors[place].info
    if len(weight.shape) != 2 or not weight.dtype.compressible:
        raise BadFile(f"tensor {weight.name!r} is not the weight of a linear layer")
    flags = cursor.one_of(tuple(range(2 * max(more, HAS_BIAS))), "kind of layer")
    bias = pack.tensors[cursor.number(len(pack.tensors) - 1)].info if flags & HAS_BIAS else None
    layer = LinearLayer(weight, bias, bool(flags & TRANSPOSED))
    if bias is not None and (bias.shape != (layer.outputs,) or not bias.dtype.compressible):
        raise BadFile(f"tensor {bias.name!r} is not the bias of {weight.name!r}")
    return layer, place, flags


class RoutedWriter:
    """Writes the artifact: a method's blocks in order, whole tensors, and `finish`."""

    def __init__(self, target: Path, method: str, metadata: Mapping[str, str], sync: bool) -> None:
        self._metadata = {"peru.format": FORMAT, "peru.kind": KIND, "peru.method": method, **metadata}
        self._container = ContainerWriter(target, self._metadata, sync)

    def append_block(self, data: bytes) -> bytes:
        """Append a block. Returns its digest."""
        self._container.append("blocks", data)
        return short_digest(data)

    def append_whole(self, data: memoryview) -> None:
        """Append bytes of tasks' own tensors, in index order."""
        self._container.append("whole", data)

    def finish(self, index: bytes, contents: Sequence[bytes]) -> int:
        """Write side files, index and header, and rename the file into place. Returns its size in bytes."""
        for content in contents:
            self._container.append("files", content)
        return self._container.finish(self._metadata, index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._container.__exit__(*exc)


class Routed(Pack, ABC):
    """An opened artifact of kind `routed`: a pack that holds a method's blocks in place of sums. Thread-safe."""

    kind = KIND
    method: ClassVar[str]
    forms: ClassVar[Mapping[str, str]]  # what metadata must look like

    def _read_index(self) -> None:
        check_metadata(self.metadata, self.forms, OPTIONAL)
        self._read_method()

    @abstractmethod
    def _read_method(self) -> None:
        """Decode the index, and set `index`. BadFile if it is invalid."""

    @property
    def has_own_base(self) -> bool:
        """False: the base is the one that the fine-tunes were made from."""
        return False

    @property
    @abstractmethod
    def held(self) -> set[str]:
        """The base's tensors that a model must have."""

    @abstractmethod
    def task_bytes(self, task: TaskRecord) -> int:
        """Bytes of a method's blocks that belong to one task."""

    @abstractmethod
    def check_blocks(self) -> None:
        """Read all blocks and compare them with their digests. BadFile if one was altered."""

    @abstractmethod
    def how(self) -> str:
        """How it chooses, in words."""

    @abstractmethod
    def parts(self) -> str:
        """What its blocks are, in words."""

    @abstractmethod
    def card(self) -> str:
        """What it holds, for a model card."""

    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """A method's own numbers, for --json."""

    def own_bytes(self, task: TaskRecord) -> int:
        """Bytes of the file that only this task needs: its own tensors and its blocks."""
        return task.whole_bytes + self.task_bytes(task)

    def files_of(self, task: TaskRecord, of_base: Mapping[str, Place]) -> dict[str, bytes]:
        """A task's side files: those stored here, and those of the base that are still the same. BadFile if one was altered."""
        found = {file.name: self.side_file(file) for file in task.files if file.origin == STORED}
        for file in task.files:
            if file.origin != STORED and file.name in of_base:
                content = of_base[file.name].read_bytes()
                found |= {file.name: content} if short_digest(content) == file.digest else {}
        return found

    def read_block(self, offset: int, nbytes: int, digest: bytes, what: str) -> bytearray:
        """Read a block. BadFile if it was altered; `what` names it."""
        data = bytearray(nbytes)
        if data:
            self.container.read_into("blocks", offset, memoryview(data))
        if short_digest(bytes(data)) != digest:
            raise BadFile(f"{self.path}: {what} was altered", "fetch or make it again")
        return data

    def verify(self) -> None:
        """Read all of it and compare it with its digests: everything that needs no base. BadFile if it was altered."""
        self.check_blocks()
        for record in self.index.tasks:
            for tensor in record.tensors:
                self.verify_whole(record, tensor)
        for size, digest in self.index.contents:
            self.content(size, digest)


def open_routed(path: Place) -> Routed:
    """Open an artifact of any method. BadFile if it is damaged, or of a method that this peru does not have."""
    file = open_random(path)
    with opening(path, file.close):
        method = read_header(file).metadata.get("peru.method", "")
        if method not in ROUTED:
            raise BadFile(f"routed experts of the method {method[:80]!r}, this peru has {', '.join(ROUTED)}", "pip install -U peru-cli")
    file.close()
    opened: Routed = of_method(method, "artifact").Opened(path)
    return opened
