"""The binary index of a sparse-delta artifact: how each tensor is stored and where its entries are.

Byte layout: docs/format.md, "Index". Numbers are LEB128 varints. Names are front-coded, which needs no codec and takes a
third of their bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import pairwise
from typing import TypeVar

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.codecs import PCO, RAW
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import MAX_ENTRIES, TensorInfo
from peru_cli.checkpoints.sidefiles import MAX_SIDE_FILE_BYTES, is_side_file_name
from peru_cli.errors import BadFile

INDEX_VERSION = 1
EXACT, ROUNDED, SIGN = 0, 1, 2  # how values are coded: ULP differences; bf16 differences; signs, with one scale a tensor
NOT_ROUNDED = 0x7FC0  # marks a value whose exact difference is stored apart (never an encoded difference)
STORED, FROM_BASE = 0, 1  # where a side file is: inside the artifact; equal to the base's
BLOCK_ENTRIES = 1 << 17  # kept entries per block: smaller blocks cost bytes, larger ones cost memory and latency
MAX_BLOCK_ENTRIES = 1 << 22
_STREAM_SLACK = 1 << 16  # bytes by which an encoded stream may exceed its integers


class Mode(IntEnum):
    """How an artifact of one fine-tune stores a tensor."""

    WHOLE = 0  # stored whole
    DELTA = 1  # the base's tensor and what changes in it
    COPY = 2  # the base's bytes, unchanged


_MODES = {int(mode): mode for mode in Mode}
_CODES = tuple(_MODES)


@dataclass(slots=True)
class TensorRecord:
    """One tensor of the fine-tune. `base_*` and `kept` are unused in mode WHOLE."""

    info: TensorInfo
    mode: Mode
    whole_digest: bytes = b""
    base_dtype: Dtype | None = None
    base_rows: int = 0  # 0: the base has the fine-tune's shape; otherwise the number of rows that the base has
    base_digest: bytes = b""
    kept: int = 0

    @property
    def base_shape(self) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        return (self.base_rows, *self.info.shape[1:]) if self.base_rows else self.info.shape

    @property
    def base_entries(self) -> int:
        """Leading entries that come from the base."""
        if self.mode == Mode.WHOLE:
            return 0
        return math.prod(self.base_shape) if self.base_rows else self.info.entries

    @property
    def changes(self) -> bool:
        """Whether a tensor that is not stored whole may differ from the base's."""
        return bool(self.kept or self.base_rows) or self.info.dtype is not self.base_dtype

    @property
    def whole_bytes(self) -> int:
        """Bytes of this tensor in the role `whole`: all of it, or the rows that the base lacks."""
        return self.info.dtype.nbytes(self.info.entries - self.base_entries)


R = TypeVar("R", bound=TensorRecord)


@dataclass
class Block:
    """Kept entries of one stream that decode on their own.

    `origin` is the stream position that the first gap counts from: one past the previous block."""

    stream: int
    origin: int
    count: int
    wide_gaps: bool
    positions_bytes: int
    values_bytes: int
    apart: int
    digest: bytes

    def nbytes(self, dtype: Dtype) -> int:
        """Size of the block in the role `blocks`."""
        return self.positions_bytes + self.values_bytes + self.apart * dtype.bits // 8


@dataclass
class Stream:
    """The kept entries of all delta tensors of one dtype, in canonical order."""

    dtype: Dtype
    values: int
    positions_codec: int = PCO
    values_codec: int = PCO
    block_entries: int = BLOCK_ENTRIES
    kept: int = 0
    scales: list[float] = field(default_factory=list)  # SIGN only: of each of its tensors with kept entries, in canonical order

    @property
    def value_type(self) -> str:
        """NumPy type of the decoded values."""
        return "int16" if self.values != EXACT or self.dtype.bits == 8 else f"int{self.dtype.bits}"

    @property
    def scale_form(self) -> str:
        """How a scale is packed, as `struct` names it: a float64 for F64, else a float32."""
        return "<d" if self.dtype.name == "F64" else "<f"


@dataclass
class SideFile:
    """A small file of the fine-tune: stored in the artifact, or equal to the base's."""

    name: str
    origin: int
    size: int
    digest: bytes


@dataclass
class Index:
    """The contents of a sparse-delta artifact."""

    tensors: list[TensorRecord]
    streams: list[Stream]
    blocks: list[Block]  # in file order
    files: list[SideFile]


def encode_index(index: Index) -> bytes:
    """Serialise an index. Tensors must be in canonical order."""
    sink = Sink()
    sink.byte(INDEX_VERSION)
    encode_tensors(sink, index.tensors, _encode_record)
    encode_streams(sink, index.streams, index.blocks)
    encode_files(sink, index.files)
    return bytes(sink.data)


def encode_tensors(sink: Sink, tensors: Sequence[R], encode: Callable[[Sink, R], None]) -> None:
    """Write the tensors of an index, each under its name."""
    sink.number(len(tensors))
    previous = b""
    for record in tensors:
        previous = sink.name(record.info.name, previous)
        encode(sink, record)


def encode_files(sink: Sink, files: Sequence[SideFile]) -> None:
    """Write side files, sorted by name."""
    sink.number(len(files))
    for file in files:
        sink.text(file.name.encode())
        sink.byte(file.origin)
        sink.number(file.size)
        sink.data += file.digest


def encode_streams(sink: Sink, streams: Sequence[Stream], blocks: Sequence[Block]) -> None:
    """Write the streams, then the blocks."""
    sink.number(len(streams))
    for stream in streams:
        sink.byte(stream.dtype.code)
        sink.byte(stream.values)
        sink.byte(stream.positions_codec)
        sink.byte(stream.values_codec)
        sink.number(stream.block_entries)
        sink.number(stream.kept)
        for scale in stream.scales:
            sink.data += struct.pack(stream.scale_form, scale)
    sink.number(len(blocks))
    origins = [0] * len(streams)
    for block in blocks:
        _encode_block(sink, block, origins[block.stream], streams[block.stream])
        origins[block.stream] = block.origin


def _encode_record(sink: Sink, record: TensorRecord) -> None:
    encode_record(sink, record, lambda: sink.number(record.kept))


def encode_record(sink: Sink, record: TensorRecord, encode_changes: Callable[[], None]) -> None:
    """Write the part of a record that all artifacts of one fine-tune share, then what changes (mode DELTA only)."""
    sink.byte(record.mode)
    sink.byte(record.info.dtype.code)
    sink.shape(record.info.shape)
    if record.mode != Mode.WHOLE:
        assert record.base_dtype is not None
        sink.byte(record.base_dtype.code)
        sink.data += record.base_digest
    if record.mode == Mode.DELTA:
        sink.number(record.base_rows)
        encode_changes()
    if record.mode == Mode.WHOLE or record.base_rows:
        sink.data += record.whole_digest


def _encode_block(sink: Sink, block: Block, origin: int, stream: Stream) -> None:
    sink.byte(block.stream)
    sink.number(block.origin - origin)
    sink.byte(int(block.wide_gaps))
    sink.number(block.positions_bytes)
    sink.number(block.values_bytes)
    if stream.values != EXACT:
        sink.number(block.apart)
    sink.data += block.digest


def decode_index(data: bytes) -> Index:
    """Parse and check an index. BadFile if it is invalid."""
    cursor = Cursor(data)
    if (version := cursor.byte()) != INDEX_VERSION:
        raise BadFile(f"the artifact's index has version {version}, this peru reads {INDEX_VERSION}", "pip install -U peru-cli")
    tensors = [_decode_record(cursor, name) for name in cursor.names()]
    streams, blocks = decode_streams(cursor, tensors)
    index = Index(tensors, streams, blocks, decode_files(cursor))
    if not cursor.done():
        raise BadFile("the artifact's index has trailing bytes")
    check_streams(index.tensors, index.streams, index.blocks)
    return index


def _decode_record(cursor: Cursor, name: str) -> TensorRecord:
    def decode_changes(record: TensorRecord) -> None:
        record.kept = cursor.number(record.base_entries)

    return decode_record(cursor, name, TensorRecord, decode_changes)


def decode_record(cursor: Cursor, name: str, kind: Callable[[TensorInfo, Mode], R], decode_changes: Callable[[R], None]) -> R:
    """Inverse of `encode_record`. BadFile if the record is invalid."""
    mode = _MODES[cursor.one_of(_CODES, "tensor mode")]
    dtype = cursor.dtype()
    record = kind(TensorInfo(name, dtype, cursor.shape(name, dtype)), mode)
    shape = record.info.shape
    if mode != Mode.WHOLE:
        record.base_dtype = cursor.dtype()
        record.base_digest = cursor.take(SHORT)
    if mode == Mode.COPY and record.base_dtype is not dtype:
        raise BadFile(f"tensor {name!r} is a copy of another dtype")
    if mode == Mode.DELTA:
        assert record.base_dtype is not None
        codes = dtype.is_code and record.base_dtype is dtype
        if not (codes or (dtype.compressible and record.base_dtype.compressible)):
            raise BadFile(f"tensor {name!r} is a difference of {dtype.name}, which has none")
        record.base_rows = cursor.number()
        if record.base_rows and not (shape and record.base_rows < shape[0]):
            raise BadFile(f"tensor {name!r} grew from {record.base_rows} rows to the shape {list(shape)}")
        decode_changes(record)
    if mode == Mode.WHOLE or record.base_rows:
        record.whole_digest = cursor.take(SHORT)
    return record


def decode_streams(cursor: Cursor, signed: Sequence[TensorRecord] | None = None) -> tuple[list[Stream], list[Block]]:
    """Inverse of `encode_streams`. Call `check_streams` afterwards. `signed` are the tensors, if values may be SIGN."""
    streams = [_decode_stream(cursor, signed) for _ in range(cursor.count())]
    return streams, _decode_blocks(cursor, streams)


def _decode_stream(cursor: Cursor, signed: Sequence[TensorRecord] | None) -> Stream:
    dtype = cursor.dtype()
    values = cursor.one_of((EXACT, ROUNDED) if signed is None else (EXACT, ROUNDED, SIGN), "kind of values")
    if not (dtype.compressible or (dtype.is_code and values == EXACT)):
        raise BadFile(f"a stream of {dtype.name} entries is impossible")
    codecs = [cursor.one_of((RAW, PCO), "codec") for _ in range(2)]
    stream = Stream(dtype, values, codecs[0], codecs[1], cursor.number(MAX_BLOCK_ENTRIES))
    if stream.block_entries < 1:
        raise BadFile("a stream's blocks hold no entries")
    stream.kept = cursor.number()
    for record in signed or () if values == SIGN else ():
        if record.kept and record.info.dtype is dtype:
            (scale,) = struct.unpack(stream.scale_form, cursor.take(struct.calcsize(stream.scale_form)))
            if not 0 <= scale < math.inf:
                raise BadFile(f"tensor {record.info.name!r} has {scale} as the scale of its signs")
            stream.scales.append(scale)
    return stream


def _decode_blocks(cursor: Cursor, streams: list[Stream]) -> list[Block]:
    left = [stream.kept for stream in streams]
    origins = [0] * len(streams)
    blocks = []
    for _ in range(cursor.count()):
        number = cursor.byte()
        if number >= len(streams) or not left[number]:
            raise BadFile("the artifact's index has a block that belongs to no stream")
        stream = streams[number]
        step, before = cursor.number(), stream.kept - left[number]
        if step < min(before, stream.block_entries) or (step and not before):
            raise BadFile("the artifact's index has a block that does not follow the one before it")
        origins[number] += step
        count = min(left[number], stream.block_entries)
        left[number] -= count
        wide = bool(cursor.one_of((0, 1), "width of gaps"))
        sizes = cursor.number(8 * count + _STREAM_SLACK), cursor.number(8 * count + _STREAM_SLACK)
        apart = cursor.number(count) if stream.values != EXACT else 0
        blocks.append(Block(number, origins[number], count, wide, *sizes, apart, cursor.take(SHORT)))
    if any(left):
        raise BadFile("the artifact's index lists fewer kept entries than its streams have")
    return blocks


def decode_files(cursor: Cursor) -> list[SideFile]:
    """Inverse of `encode_files`. BadFile if a name or the order is invalid."""
    files = [_decode_file(cursor) for _ in range(cursor.count())]
    if any(a.name >= b.name for a, b in pairwise(files)):
        raise BadFile("the files that the artifact carries are not in order")
    return files


def _decode_file(cursor: Cursor) -> SideFile:
    name = cursor.text()
    if not is_side_file_name(name):
        raise BadFile(f"the artifact carries a file named {name!r}, which peru does not write")
    origin = cursor.one_of((STORED, FROM_BASE), "origin of a file")
    return SideFile(name, origin, cursor.number(MAX_SIDE_FILE_BYTES), cursor.take(SHORT))


def check_streams(tensors: Sequence[TensorRecord], streams: Sequence[Stream], blocks: Sequence[Block]) -> None:
    """BadFile unless streams and blocks hold exactly what the tensors declare."""
    dtypes = [stream.dtype for stream in streams]
    if len(set(dtypes)) != len(dtypes):
        raise BadFile("the artifact's index has two streams of one dtype")
    for record in tensors:
        if record.kept and record.info.dtype not in dtypes:
            raise BadFile(f"tensor {record.info.name!r} has kept entries and no stream")
    for stream in streams:
        kept = sum(record.kept for record in tensors if record.info.dtype is stream.dtype)
        if kept != stream.kept:
            raise BadFile(f"the stream of {stream.dtype.name} holds {stream.kept} entries, its tensors {kept}")
        length = sum(r.base_entries for r in tensors if r.mode == Mode.DELTA and r.info.dtype is stream.dtype)
        if length > MAX_ENTRIES or any(block.origin >= length for block in blocks if streams[block.stream] is stream):
            raise BadFile(f"the stream of {stream.dtype.name} is too long, or has blocks beyond its end")
