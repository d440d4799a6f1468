"""The binary index of a mixed artifact: how each tensor is represented and where its integers are.

Byte layout: docs/mixed.md, "Index". Each stream is a sequence of integers; tensors take their share of it in canonical order."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.codecs import PCO, RAW
from peru_cli.artifacts.index import SideFile, TensorRecord, decode_files, decode_record, encode_files, encode_record, encode_tensors
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.header import MAX_ENTRIES
from peru_cli.errors import BadFile
from peru_cli.methods.mixed.scales import MAX_SCALE

INDEX_VERSION = 1
LOW_RANK, DENSE, ULPS = 1, 2, 4  # parts of a tensor, in any combination
CONTEXTS = 32  # streams 0 to 31 hold factors and dense integers, grouped by magnitude
ROWS, LEFT, RIGHT, SCALES, ULPS_16, ULPS_32, ULPS_64 = range(CONTEXTS, CONTEXTS + 7)
KINDS = {
    **dict.fromkeys(range(CONTEXTS), "int16"),
    ROWS: "uint32", LEFT: "int16", RIGHT: "int16", SCALES: "int16", ULPS_16: "int16", ULPS_32: "int32", ULPS_64: "int64",
}  # fmt: skip
ULPS_OF = {16: ULPS_16, 32: ULPS_32, 64: ULPS_64}  # by the number of bits of the dtype
BLOCK = 1 << 17  # integers in each block of a stream, except the last
MAX_BLOCK = 1 << 22
MAX_RANK = 1 << 20
_SLACK = 1 << 16  # bytes by which an encoded block may exceed its integers


@dataclass
class MixedRecord(TensorRecord):
    """One tensor of the fine-tune. Each field after `parts` belongs to the part named beside it."""

    parts: int = 0
    columns: int = 0  # LOW_RANK: number of columns of the matrix
    rank: int = 0
    kept_rows: int = 0  # 0: all rows; otherwise the number of rows listed in the stream ROWS
    context: int = 0  # DENSE: the stream of its integers
    scale: int = 0  # DENSE: index of the scale

    @property
    def changes(self) -> bool:
        return bool(self.parts or self.base_rows) or self.info.dtype is not self.base_dtype

    @property
    def rows(self) -> int:
        """Rows of the matrix that the base has."""
        return self.base_entries // self.columns if self.columns else 0

    @property
    def factor_rows(self) -> int:
        """Rows of the left factor."""
        return self.kept_rows or self.rows


@dataclass
class IntegerBlock:
    """Integers of one stream that decode on their own."""

    nbytes: int
    digest: bytes


@dataclass
class IntegerStream:
    """Integers of one kind, in canonical order of their tensors."""

    number: int
    codec: int = PCO
    block: int = BLOCK
    count: int = 0
    blocks: list[IntegerBlock] = field(default_factory=list)


@dataclass
class MixedIndex:
    """The contents of a mixed artifact. `order` is the stream of each block in the file."""

    tensors: list[MixedRecord]
    streams: list[IntegerStream]
    order: list[int]
    files: list[SideFile]


def encode_mixed(index: MixedIndex) -> bytes:
    """Serialise an index. Tensors must be in canonical order, streams ascending."""
    sink = Sink()
    sink.byte(INDEX_VERSION)
    encode_tensors(sink, index.tensors, _encode_record)
    sink.number(len(index.streams))
    for stream in index.streams:
        sink.byte(stream.number)
        sink.byte(stream.codec)
        sink.number(stream.block)
        sink.number(stream.count)
    sink.number(len(index.order))
    following = [iter(stream.blocks) for stream in index.streams]
    for number in index.order:
        block = next(following[number])
        sink.byte(number)
        sink.number(block.nbytes)
        sink.data += block.digest
    encode_files(sink, index.files)
    return bytes(sink.data)


def _encode_record(sink: Sink, record: MixedRecord) -> None:
    def encode_parts() -> None:
        sink.byte(record.parts)
        if record.parts & LOW_RANK:
            sink.number(record.columns)
            sink.number(record.rank)
            sink.number(record.kept_rows)
        if record.parts & DENSE:
            sink.byte(record.context)
            sink.signed(record.scale)

    encode_record(sink, record, encode_parts)


def decode_mixed(data: bytes) -> MixedIndex:
    """Parse and check an index. BadFile if it is invalid."""
    cursor = Cursor(data)
    if (version := cursor.byte()) != INDEX_VERSION:
        raise BadFile(f"the artifact's index has version {version}, this peru reads {INDEX_VERSION}", "pip install -U peru-cli")
    tensors = [decode_record(cursor, name, MixedRecord, partial(_decode_parts, cursor)) for name in cursor.names()]
    streams = [_decode_stream(cursor) for _ in range(cursor.count())]
    if any(a.number >= b.number for a, b in pairwise(streams)):
        raise BadFile("the streams of the artifact's index are not in order")
    order = _decode_blocks(cursor, streams)
    index = MixedIndex(tensors, streams, order, decode_files(cursor))
    if not cursor.done():
        raise BadFile("the artifact's index has trailing bytes")
    _check_counts(index)
    return index


def _decode_parts(cursor: Cursor, record: MixedRecord) -> None:
    name, shape = record.info.name, record.info.shape
    record.parts = cursor.one_of(tuple(range(8)), "set of parts")
    if record.parts & LOW_RANK:
        record.columns = cursor.number()
        record.rank = cursor.number(MAX_RANK)
        if not record.columns or not record.rank or not record.base_entries or record.base_entries % record.columns:
            raise BadFile(f"tensor {name!r} of the shape {list(shape)} has no factors with {record.columns} columns and rank {record.rank}")
        record.kept_rows = cursor.number(record.rows)
    if record.parts & DENSE:
        record.context = cursor.one_of(tuple(range(CONTEXTS)), "context")
        record.scale = cursor.signed(MAX_SCALE)
    if record.parts and not record.base_entries:
        raise BadFile(f"tensor {name!r} has parts and no entries")


def _decode_stream(cursor: Cursor) -> IntegerStream:
    number = cursor.one_of(tuple(KINDS), "stream")
    codec = cursor.one_of((RAW, PCO), "codec")
    stream = IntegerStream(number, codec, cursor.number(MAX_BLOCK), cursor.number())
    if not stream.block or not stream.count:
        raise BadFile("the artifact's index has a stream without integers")
    return stream


def _decode_blocks(cursor: Cursor, streams: Sequence[IntegerStream]) -> list[int]:
    order = []
    for _ in range(cursor.count()):
        number = cursor.byte()
        if number >= len(streams) or len(streams[number].blocks) * streams[number].block >= streams[number].count:
            raise BadFile("the artifact's index has a block that belongs to no stream")
        stream = streams[number]
        count = min(stream.count - len(stream.blocks) * stream.block, stream.block)
        stream.blocks.append(IntegerBlock(cursor.number(8 * count + _SLACK), cursor.take(SHORT)))
        order.append(number)
    if any(len(stream.blocks) != -(-stream.count // stream.block) for stream in streams):
        raise BadFile("the artifact's index lists fewer integers than its streams have")
    return order


def _check_counts(index: MixedIndex) -> None:
    """Check the streams whose length follows from the tensors. Streams of factors are checked with their tables."""
    wanted: Counter[int] = Counter()
    for record in index.tensors:
        if record.parts & LOW_RANK:
            wanted[ROWS] += record.kept_rows
            for table in (LEFT, RIGHT, SCALES):
                wanted[table] += record.rank
        if record.parts & ULPS:
            wanted[ULPS_OF[record.info.dtype.bits]] += record.base_entries
    factors = sum(r.rank * (r.factor_rows + r.columns) for r in index.tensors) + sum(
        r.base_entries for r in index.tensors if r.parts & DENSE
    )
    found = {stream.number: stream.count for stream in index.streams}
    wrong = next((n for n in range(CONTEXTS, CONTEXTS + 7) if wanted[n] != found.get(n, 0)), None)
    if wrong is not None:
        raise BadFile(f"stream {wrong} of the artifact has {found.get(wrong, 0)} integers, its tensors {wanted[wrong]}")
    if factors > MAX_ENTRIES or math.fsum(found.get(n, 0) for n in range(CONTEXTS)) != factors:
        raise BadFile("the artifact's streams hold other factors than its tensors have")
