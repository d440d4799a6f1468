"""The index of packs (kind `superposed`): which tensors are sums, how their blocks move, and what belongs to one task.

Byte layout: docs/packs.md."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.codecs import PCO, RAW
from peru_cli.artifacts.index import FROM_BASE, MAX_BLOCK_ENTRIES, STORED, SideFile
from peru_cli.artifacts.packs.residual import Residual, decode_residual, encode_residual
from peru_cli.artifacts.sparse_delta import METADATA as SPARSE_METADATA
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import MAX_ENTRIES, TensorInfo
from peru_cli.checkpoints.pairing import Prefix
from peru_cli.checkpoints.sidefiles import MAX_SIDE_FILE_BYTES, is_side_file_name
from peru_cli.errors import BadFile
from peru_cli.methods.compact.superpose import DECORRELATE, MOST_TASKS

KIND = "superposed"
INDEX_VERSION, WITH_RESIDUALS = 1, 2  # versions of the index
BLOCK_ENTRIES = 1 << 17
MOST_EXPONENT = 1074
UNKNOWN = 32767  # a cosine that was never measured: the two tasks were not available together
_STREAM_SLACK = 1 << 16

_DECIMAL = SPARSE_METADATA["peru.threshold"]
METADATA = {
    "peru.format": "1",
    "peru.kind": KIND,
    "peru.seed": "0|[1-9][0-9]{0,18}",
    "peru.decorrelate": "|".join(DECORRELATE),
    "peru.signs": "yes|no",
    "peru.scale": "-?" + _DECIMAL.removeprefix("inf|"),
    "peru.precision": "[1-9]?[0-9]",
    "peru.entries": SPARSE_METADATA["peru.entries"],
    "peru.sums": "[0-9a-f]{64}",
    "peru.base": "(?s:.+)",
    "peru.base.files": SPARSE_METADATA["peru.base.files"],
}
OPTIONAL = {"peru.base", "peru.base.files"}


def check_metadata(metadata: Mapping[str, str], forms: Mapping[str, str] = METADATA, optional: Collection[str] = OPTIONAL) -> None:
    """Reject metadata that is invalid for packs (or for another kind, given its forms). Unknown keys are ignored."""
    for key, form in forms.items():
        if key not in metadata and key not in optional:
            raise BadFile(f"its metadata lacks {key!r}")
        if key in metadata and not re.fullmatch(form, metadata[key]):
            raise BadFile(f"its metadata has {key!r} as {metadata[key][:80]!r}")


class PackMode(IntEnum):
    """How a pack stores a tensor of the base."""

    BASE = 0  # the base's bytes
    SUM = 1  # a plain sum
    TARGET = 2  # a sum of vectors that were moved and flipped
    WEIGHTS = 3  # as TARGET, but of whole weights (PSP): the base is not added


@dataclass
class PackedTensor:
    """A base tensor that all tasks share. `info` has the base's name and the tasks' dtype."""

    info: TensorInfo
    mode: PackMode
    base_dtype: Dtype
    base_digest: bytes = b""
    exponent: int = 0  # sums: the step is 2^exponent
    group: int = 0  # targets: index of the group
    place: int = 0  # targets: index of the block in the group

    @property
    def is_sum(self) -> bool:
        """Whether the stream of sums has entries of it."""
        return self.mode != PackMode.BASE

    @property
    def is_target(self) -> bool:
        """Whether its sums are of vectors that were moved and flipped."""
        return self.mode in (PackMode.TARGET, PackMode.WEIGHTS)


@dataclass
class BlockGroup:
    """Tensors that may be permuted among themselves: the name's prefix before the block number, and the number of blocks."""

    prefix: str
    depth: int


@dataclass
class SumBlock:
    """Sums that decode on their own."""

    nbytes: int
    digest: bytes


@dataclass
class TaskTensor:
    """A tensor of one task only, stored whole."""

    info: TensorInfo
    digest: bytes


@dataclass
class TaskRecord:
    """A pack's record of one task. Decimals were measured at packing time, with `together` tasks including this one."""

    name: str
    prefix: Prefix
    shift: int
    digest: bytes  # of the whole fine-tune, 32 bytes
    together: int = 1
    norm: str = "0.0"  # of its task vector
    error: str = "0.0"  # ||retrieved - tau|| / ||tau||
    cosine: str = "0.0"  # between the two
    rounding: str = "0.0"  # error of rounding to steps, relative to the norm
    cosines: dict[str, tuple[int, int]] = field(default_factory=dict)  # to earlier tasks: as they are, moved apart; in 1/10,000
    tensors: list[TaskTensor] = field(default_factory=list)
    files: list[SideFile] = field(default_factory=list)

    def fine_name(self, base_name: str) -> str:
        """The fine-tune's name of a packed tensor."""
        return self.prefix.added + base_name.removeprefix(self.prefix.removed)

    @property
    def whole_bytes(self) -> int:
        """Bytes of its own tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors)


@dataclass
class PackIndex:
    """The contents of a pack. `contents` are sizes and digests of the stored side files, each stored once."""

    groups: list[BlockGroup]
    tensors: list[PackedTensor]
    blocks: list[SumBlock]
    tasks: list[TaskRecord]
    contents: list[tuple[int, bytes]]
    codec: int = PCO
    block_entries: int = BLOCK_ENTRIES
    residuals: list[Residual] = field(default_factory=list)  # empty, or one for each task

    @property
    def entries(self) -> int:
        """Number of sums."""
        return sum(tensor.info.entries for tensor in self.tensors if tensor.is_sum)

    @property
    def floating(self) -> list[TensorInfo]:
        """Tensors that residuals can correct."""
        return [tensor.info for tensor in self.tensors if tensor.info.dtype.compressible]


def encode_index(index: PackIndex) -> bytes:
    """Serialise an index. Tensors, tasks and contents must be sorted."""
    sink = Sink()
    sink.byte(WITH_RESIDUALS if index.residuals else INDEX_VERSION)
    sink.number(len(index.groups))
    for group in index.groups:
        sink.text(group.prefix.encode("utf-8"))
        sink.number(group.depth)
    sink.number(len(index.tensors))
    previous = b""
    for tensor in index.tensors:
        previous = sink.name(tensor.info.name, previous)
        _encode_tensor(sink, tensor)
    sink.byte(index.codec)
    sink.number(index.block_entries)
    sink.number(len(index.blocks))
    for block in index.blocks:
        sink.number(block.nbytes)
        sink.data += block.digest
    sink.number(len(index.contents))
    for size, digest in index.contents:
        sink.number(size)
        sink.data += digest
    sink.number(len(index.tasks))
    for number, task in enumerate(index.tasks):
        _encode_task(sink, task, [other.name for other in index.tasks[:number]], index)
    for residual in index.residuals:
        encode_residual(sink, residual)
    return bytes(sink.data)


def _encode_tensor(sink: Sink, tensor: PackedTensor) -> None:
    sink.byte(tensor.mode)
    sink.byte(tensor.info.dtype.code)
    sink.shape(tensor.info.shape)
    sink.byte(tensor.base_dtype.code)
    sink.data += tensor.base_digest
    if tensor.is_sum:
        sink.signed(tensor.exponent)
    if tensor.is_target:
        sink.number(tensor.group)
        sink.number(tensor.place)


def _encode_task(sink: Sink, task: TaskRecord, before: list[str], index: PackIndex) -> None:
    for text in (task.name, task.prefix.encode()):
        sink.text(text.encode("utf-8"))
    sink.number(task.shift)
    sink.data += task.digest
    sink.number(task.together)
    for text in (task.norm, task.error, task.cosine, task.rounding):
        sink.text(text.encode("ascii"))
    for other in before:
        for cosine in task.cosines.get(other, (UNKNOWN, UNKNOWN)):
            sink.data += cosine.to_bytes(2, "little", signed=True)
    sink.number(len(task.tensors))
    previous = b""
    for tensor in task.tensors:
        previous = sink.name(tensor.info.name, previous)
        sink.byte(tensor.info.dtype.code)
        sink.shape(tensor.info.shape)
        sink.data += tensor.digest
    sink.number(len(task.files))
    for file in task.files:
        sink.text(file.name.encode())
        sink.byte(file.origin)
        if file.origin == STORED:
            sink.number(index.contents.index((file.size, file.digest)))
        else:
            sink.number(file.size)
            sink.data += file.digest


def decode_index(data: bytes) -> PackIndex:
    """Parse and check an index. BadFile if it is invalid."""
    cursor = Cursor(data)
    if (version := cursor.byte()) not in (INDEX_VERSION, WITH_RESIDUALS):
        raise BadFile(
            f"the pack's index has version {version}, this peru reads {INDEX_VERSION} and {WITH_RESIDUALS}", "pip install -U peru-cli"
        )
    groups = [BlockGroup(cursor.text(), cursor.number()) for _ in range(cursor.count())]
    tensors = [_decode_tensor(cursor, name, len(groups)) for name in cursor.names()]
    _check_groups(groups, tensors)
    index = PackIndex(groups, tensors, [], [], [], cursor.one_of((RAW, PCO), "codec"), cursor.number(MAX_BLOCK_ENTRIES))
    if index.entries > MAX_ENTRIES or not index.block_entries:
        raise BadFile("the pack's index has too many sums, or empty blocks")
    if (blocks := cursor.count()) != -(-index.entries // index.block_entries):
        raise BadFile(f"the pack's index has {blocks} blocks for {index.entries} sums")
    index.blocks = [SumBlock(cursor.number(4 * index.block_entries + _STREAM_SLACK), cursor.take(SHORT)) for _ in range(blocks)]
    index.contents = [(cursor.number(MAX_SIDE_FILE_BYTES), cursor.take(SHORT)) for _ in range(cursor.count())]
    if any(a[1] >= b[1] for a, b in pairwise(index.contents)):
        raise BadFile("the files that the pack carries are not in order")
    for _ in range(cursor.number(MOST_TASKS)):
        index.tasks.append(_decode_task(cursor, index))
    if version == WITH_RESIDUALS:
        infos = index.floating
        index.residuals = [decode_residual(cursor, infos, f"-?({_DECIMAL})") for _ in index.tasks]
    if not cursor.done():
        raise BadFile("the pack's index has trailing bytes")
    _check_tasks(index)
    return index


def _decode_tensor(cursor: Cursor, name: str, groups: int) -> PackedTensor:
    mode = PackMode(cursor.one_of(tuple(PackMode), "tensor mode"))
    dtype = cursor.dtype()
    info = TensorInfo(name, dtype, cursor.shape(name, dtype))
    tensor = PackedTensor(info, mode, cursor.dtype(), cursor.take(SHORT))
    if tensor.is_sum and not (dtype.compressible and tensor.base_dtype.compressible):
        raise BadFile(f"tensor {name!r} is a sum of {dtype.name}, which has none")
    if mode == PackMode.BASE and tensor.base_dtype is not dtype:
        raise BadFile(f"tensor {name!r} is a copy of another dtype")
    if tensor.is_sum:
        tensor.exponent = cursor.signed(MOST_EXPONENT)
    if tensor.is_target:
        if not groups:
            raise BadFile(f"tensor {name!r} belongs to a missing group")
        tensor.group, tensor.place = cursor.number(groups - 1), cursor.number()
    return tensor


def _check_groups(groups: list[BlockGroup], tensors: list[PackedTensor]) -> None:
    """Check that tensors of one shape take every place of every group exactly once."""
    members: list[list[PackedTensor]] = [[] for _ in groups]
    for tensor in tensors:
        if tensor.is_target:
            members[tensor.group].append(tensor)
    for group, found in zip(groups, members, strict=True):
        if sorted(t.place for t in found) != list(range(len(found))) or len(found) != group.depth or not found:
            raise BadFile(f"the group {group.prefix!r} of the pack's index does not have {group.depth} blocks")
        if len({t.info.shape for t in found}) > 1:
            raise BadFile(f"the group {group.prefix!r} of the pack's index holds tensors of several shapes")


def decimal(cursor: Cursor) -> str:
    """Read a decimal in canonical form. BadFile for anything else."""
    text = cursor.text()
    if not re.fullmatch(f"-?({_DECIMAL})", text):
        raise BadFile(f"the pack's index has {text[:80]!r} instead of a decimal")
    return text


def _decode_task(cursor: Cursor, index: PackIndex) -> TaskRecord:
    name, prefix = cursor.text(), cursor.text()
    if not re.fullmatch(SPARSE_METADATA["peru.task"], name):
        raise BadFile(f"the pack has a task named {name[:80]!r}")
    if not re.fullmatch(SPARSE_METADATA["peru.prefix"], prefix):
        raise BadFile(f"the pack's task {name} has the prefix {prefix[:80]!r}")
    task = TaskRecord(name, Prefix.decode(prefix), cursor.number(MOST_TASKS), cursor.take(32), cursor.number(MOST_TASKS))
    task.norm, task.error, task.cosine, task.rounding = (decimal(cursor) for _ in range(4))
    for other in index.tasks:
        before, apart = (int.from_bytes(cursor.take(2), "little", signed=True) for _ in range(2))
        task.cosines[other.name] = before, apart
    for tensor_name in cursor.names():
        dtype = cursor.dtype()
        info = TensorInfo(tensor_name, dtype, cursor.shape(tensor_name, dtype))
        task.tensors.append(TaskTensor(info, cursor.take(SHORT)))
    task.files = [_decode_file(cursor, index) for _ in range(cursor.count())]
    return task


def _decode_file(cursor: Cursor, index: PackIndex) -> SideFile:
    name = cursor.text()
    if not is_side_file_name(name):
        raise BadFile(f"the pack carries a file named {name!r}, which peru does not write")
    if cursor.one_of((STORED, FROM_BASE), "origin of a file") == FROM_BASE:
        return SideFile(name, FROM_BASE, cursor.number(MAX_SIDE_FILE_BYTES), cursor.take(SHORT))
    if not index.contents:
        raise BadFile(f"the pack lacks its file {name!r}")
    return SideFile(name, STORED, *index.contents[cursor.number(len(index.contents) - 1)])


def _check_tasks(index: PackIndex) -> None:
    names = [task.name for task in index.tasks]
    if not names or any(a >= b for a, b in pairwise(names)) or len({name.lower() for name in names}) < len(names):
        raise BadFile("the pack has no tasks, or they are unsorted or share a name")
    for task in index.tasks:
        if not all(tensor.info.name.startswith(task.prefix.removed) for tensor in index.tensors):
            raise BadFile(f"the pack's task {task.name} has a prefix that its tensors do not have")
        own = {tensor.info.name for tensor in task.tensors}
        if any(task.fine_name(tensor.info.name) in own for tensor in index.tensors):
            raise BadFile(f"the pack's task {task.name} has a tensor twice")
        if any(a.name >= b.name for a, b in pairwise(task.files)):
            raise BadFile(f"the files of the pack's task {task.name} are not in order")
