"""Streams, the index and whole artifacts: what is written is read back, and damage raises BadFile and nothing else."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peru_cli.artifacts import bytestream
from peru_cli.artifacts.codecs import PCO, RAW, decode, encode
from peru_cli.artifacts.container import ContainerWriter
from peru_cli.artifacts.index import (
    EXACT,
    FROM_BASE,
    NOT_ROUNDED,
    ROUNDED,
    STORED,
    Block,
    Index,
    Mode,
    SideFile,
    Stream,
    TensorRecord,
    decode_index,
    encode_index,
)
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.artifacts.sparse_delta import Entries, SparseDeltaWriter, short_digest
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.errors import BadFile
from tests.support.damage import damaged

TYPES = ["int16", "int32", "int64", "uint32", "uint64"]
DIGEST = bytes(range(16))
RESULT = "0" * 64


@st.composite
def integers(draw: st.DrawFn) -> np.ndarray:
    """Arrays that are random, constant, clustered or full of extremes."""
    kind = np.dtype(draw(st.sampled_from(TYPES)))
    size = draw(st.integers(1, 600))
    low, high = np.iinfo(kind).min, np.iinfo(kind).max
    palette = draw(st.lists(st.integers(low, high) | st.sampled_from([low, high, 0]) | st.integers(0, 40), min_size=1, max_size=50))
    picks = np.random.default_rng(draw(st.integers(0, 2**32))).integers(0, len(palette), size)
    return np.array(palette, dtype=kind)[picks]


@settings(max_examples=200, deadline=None)
@given(integers() | hnp.arrays(st.sampled_from([np.int16, np.uint64]), st.integers(1, 40)), st.sampled_from([RAW, PCO]))
def test_codecs_round_trip(values: np.ndarray, codec: int) -> None:
    data = encode(values, codec)
    back = decode(data, codec, values.dtype.name, len(values))
    assert back.dtype == values.dtype and back.tolist() == values.tolist()
    assert encode(values.copy(), codec) == data  # the bytes depend on nothing but the values


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, (1 << 17) - 1, 1 << 17, 300_001])
def test_pco_keeps_every_number_at_the_sizes_that_matter(kind: str, size: int) -> None:
    values = np.random.default_rng(size).integers(0, 2**63, size, dtype=np.uint64).astype(kind)
    assert np.array_equal(decode(encode(values, PCO), PCO, kind, size), values)


@settings(max_examples=300, deadline=None)
@given(integers(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3), st.integers(-700, 700))
def test_damaged_streams_raise_badfile_or_give_as_many_numbers(values: np.ndarray, changes: list[tuple[int, int]], shift: int) -> None:
    data = bytearray(encode(values, PCO))
    for where, byte in changes:
        data[where % len(data)] = byte
    cut = bytes(data[: max(len(data) + min(shift, 0), 0)])
    for count in {len(values), max(len(values) + shift, 1)}:
        for kind in {values.dtype.name, "int32"}:
            try:
                back = decode(cut, PCO, kind, count)
            except BadFile:
                continue
            assert back.dtype == np.dtype(kind) and back.shape == (count,)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(TYPES), st.integers(1, 5000), st.integers(0, 255))
def test_random_bytes_are_not_a_stream(data: bytes, kind: str, count: int, codec: int) -> None:
    try:
        back = decode(data, codec, kind, count)
    except BadFile:
        return
    assert back.dtype == np.dtype(kind) and back.shape == (count,)


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=10).map(
    lambda text: text.replace("..", "x").lstrip("/\\") or "y"
)
FLOATS = [d for d in BY_NAME.values() if d.compressible]
SIDE_NAMES = ["config.json", "tokenizer.json", "vocab.txt", "spiece.model", "chat_template.jinja"]


@st.composite
def indexes(draw: st.DrawFn) -> Index:
    """Valid indexes: streams hold as much as their tensors keep, blocks follow each other."""
    tensors = []
    for name in sorted(draw(st.lists(NAMES, unique=True, max_size=6))):
        mode = draw(st.sampled_from([Mode.WHOLE, Mode.DELTA, Mode.COPY]))
        dtype = draw(st.sampled_from(FLOATS if mode == Mode.DELTA else list(BY_NAME.values())))
        shape = tuple(draw(st.lists(st.integers(0, 300), max_size=3)))
        if np.prod(shape) * dtype.bits % 8:
            shape = (8, *shape)
        record = TensorRecord(TensorInfo(name, dtype, shape), mode)
        if mode != Mode.WHOLE:
            record.base_dtype, record.base_digest = (
                (draw(st.sampled_from(FLOATS)) if mode == Mode.DELTA else dtype),
                draw(st.binary(min_size=16, max_size=16)),
            )
        if mode == Mode.DELTA:
            record.base_rows = draw(st.integers(0, max(shape[0] - 1, 0))) if shape else 0
            record.kept = draw(st.integers(0, min(record.base_entries, 1000)))
        if mode == Mode.WHOLE or record.base_rows:
            record.whole_digest = draw(st.binary(min_size=16, max_size=16))
        tensors.append(record)
    streams, blocks = [], []
    for dtype in {r.info.dtype: None for r in tensors if r.kept}:
        length = sum(r.base_entries for r in tensors if r.mode == Mode.DELTA and r.info.dtype is dtype)
        stream = Stream(
            dtype, ROUNDED if dtype.bits > 16 and draw(st.booleans()) else EXACT, *draw(st.sampled_from([(0, 1), (1, 1), (1, 0)]))
        )
        stream.block_entries, stream.kept = draw(st.integers(100, 1000)), sum(r.kept for r in tensors if r.info.dtype is dtype)
        origin, left = 0, stream.kept
        while left:
            count = min(left, stream.block_entries)
            apart = draw(st.integers(0, count)) if stream.values == ROUNDED else 0
            sizes = draw(st.tuples(st.integers(0, 8 * count), st.integers(0, 8 * count)))
            blocks.append(Block(len(streams), origin, count, draw(st.booleans()), *sizes, apart, DIGEST))
            left -= count
            origin += count + draw(st.integers(0, length - origin - count - left))
        streams.append(stream)
    names = sorted(draw(st.lists(st.sampled_from(SIDE_NAMES), unique=True)))
    files = [SideFile(name, draw(st.sampled_from([STORED, FROM_BASE])), draw(st.integers(0, 64_000_000)), DIGEST) for name in names]
    return Index(tensors, streams, blocks, files)


@settings(max_examples=200, deadline=None)
@given(indexes())
def test_the_index_round_trips(index: Index) -> None:
    encoded = encode_index(index)
    assert decode_index(encoded) == index
    assert encode_index(decode_index(encoded)) == encoded


@settings(max_examples=400, deadline=None)
@given(indexes(), st.integers(0, 2**32), st.integers(1, 3))
def test_a_damaged_index_raises_badfile_or_is_another_valid_one(index: Index, seed: int, mutations: int) -> None:
    data = damaged(encode_index(index), random.Random(seed), mutations)
    try:
        decoded = decode_index(data)
    except BadFile:
        return
    assert decode_index(encode_index(decoded)) == decoded


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=120))
def test_random_bytes_are_not_an_index(data: bytes) -> None:
    try:
        decode_index(b"\1" + data)
    except BadFile:
        return


def metadata_for(records: list[TensorRecord]) -> dict[str, str]:
    kept = str(sum(r.kept for r in records))
    return {
        "peru.format": "1",
        "peru.kind": "sparse-delta",
        "peru.task": "t",
        "peru.prefix": "",
        "peru.density": "lossless",
        "peru.entries": str(sum(r.base_entries for r in records)),
        "peru.kept": kept,
        "peru.changed": kept,
        "peru.result": RESULT,
    }


def delta_record(name: str, dtype: str, entries: int, kept: int) -> TensorRecord:
    return TensorRecord(TensorInfo(name, BY_NAME[dtype], (entries,)), Mode.DELTA, base_dtype=BY_NAME[dtype], base_digest=DIGEST, kept=kept)


def write_artifact(
    path: Path, tensors: dict[str, tuple[int, list[int]]], dtype: str, block_entries: int, rounded: bool, parts: int, wide_every: int = 7
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write positions of several tensors in uneven parts. Returns all positions, values and differences stored apart."""
    noise = np.random.default_rng(len(tensors))
    stream = Stream(BY_NAME[dtype], ROUNDED if rounded else EXACT, block_entries=block_entries)
    offset, all_positions = 0, []
    for entries, positions in tensors.values():
        all_positions += [offset + p for p in sorted(positions)]
        offset += entries
    positions = np.array(all_positions, dtype=np.int64)
    values = noise.integers(-(2**15), 2**15, len(positions)).astype(stream.value_type)
    exact = noise.integers(-(2**31), 2**31, len(positions)).astype(f"int{BY_NAME[dtype].bits}")
    if rounded:
        values[values == NOT_ROUNDED] = 0
        values[::wide_every] = NOT_ROUNDED
    marked = values == NOT_ROUNDED if rounded else np.zeros(len(values), dtype=bool)
    records = [delta_record(name, dtype, n, len(p)) for name, (n, p) in sorted(tensors.items())]
    metadata = metadata_for(records)
    with SparseDeltaWriter(path, [stream], metadata, sync=False) as writer:
        waiting = []
        for part in np.array_split(np.arange(len(positions)), parts):
            if len(part):
                waiting += writer.add(0, Entries(positions[part], values[part], exact[part][marked[part]]))
        waiting += writer.rest()
        for block in waiting[::-1]:  # encoded in any order, written in canonical order
            writer.write(block)
        writer.finish(metadata, records, [])
    return positions, values, exact[marked]


def read_back(artifact: SparseDelta, cuts: list[float]) -> tuple[list[int], list[int], list[int]]:
    """All kept entries, read in runs that end at these shares of each tensor."""
    positions, values, apart, offset = [], [], [], 0
    for record in artifact.index.tensors:
        n = record.info.entries
        edges = sorted({0, n, *(int(cut * n) for cut in cuts)})
        for start, stop in pairwise(edges):
            _, found = artifact.entries(record, start, stop)
            assert np.all((found.positions >= 0) & (found.positions < stop - start))
            positions += (found.positions + (offset + start)).tolist()
            values += found.values.tolist()
            apart += found.apart.tolist()
        offset += n
    return positions, values, apart


@st.composite
def kept_positions(draw: st.DrawFn) -> dict[str, tuple[int, list[int]]]:
    tensors = {}
    for i in range(draw(st.integers(1, 4))):
        entries = draw(st.sampled_from([1, 5, 100, 1 << 14, 1 << 33, (1 << 40) + 3]))
        tensors[f"t{i}"] = (
            entries,
            draw(st.lists(st.integers(0, entries - 1) | st.sampled_from([0, entries - 1]), unique=True, max_size=60)),
        )
    return tensors


@settings(max_examples=120, deadline=None)
@given(
    kept_positions(), st.sampled_from(["BF16", "F16", "F32", "F64"]), st.integers(1, 40), st.booleans(), st.integers(1, 5),
    st.lists(st.floats(0, 1), max_size=4),
)  # fmt: skip
def test_kept_entries_are_read_from_any_range(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[int, list[int]]],
    dtype: str,
    block_entries: int,
    rounded: bool,
    parts: int,
    cuts: list[float],
) -> None:
    """Positions beyond 2^32, gaps wider than 32 bits, blocks with arbitrary ends, differences stored apart."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    positions, values, apart = write_artifact(path, tensors, dtype, block_entries, rounded and dtype in ("F32", "F64"), parts)
    with SparseDelta(path) as artifact:
        got = read_back(artifact, cuts)
    assert got == (positions.tolist(), values.tolist(), apart.tolist())


@pytest.mark.parametrize("kept", [1, 15, 16, 17, 32, 33, 160])
def test_blocks_hold_exactly_the_set_number_of_entries(tmp_path: Path, kept: int) -> None:
    positions, _, _ = write_artifact(tmp_path / "a.safetensors", {"t": (1 << 35, [i << 27 for i in range(kept)])}, "BF16", 16, False, 3)
    with SparseDelta(tmp_path / "a.safetensors") as artifact:
        blocks = artifact.index.blocks
        assert [b.count for b in blocks] == [16] * (kept // 16) + ([kept % 16] if kept % 16 else [])
        assert [b.origin for b in blocks] == [0] + [int(positions[i - 1]) + 1 for i in range(16, kept, 16)]
        assert not any(b.wide_gaps for b in blocks)


def test_only_gaps_of_2_to_the_32_are_wide(tmp_path: Path) -> None:
    for gap, wide in (((1 << 32) - 1, False), (1 << 32, True)):
        write_artifact(tmp_path / f"{gap}.safetensors", {"t": (1 << 34, [0, gap + 1])}, "F16", 16, False, 1)
        with SparseDelta(tmp_path / f"{gap}.safetensors") as artifact:
            assert [b.wide_gaps for b in artifact.index.blocks] == [wide]
            assert read_back(artifact, [])[0] == [0, gap + 1]


def sealed(path: Path, index: Index, blocks: bytes, **changes: str | None) -> Path:
    """A container with a valid seal and arbitrary content: what a stranger could send."""
    metadata = {k: v for k, v in {**metadata_for(index.tensors), **changes}.items() if v is not None}
    with ContainerWriter(path, metadata, sync=False) as writer:
        writer.append("blocks", blocks)
        writer.finish(metadata, encode_index(index))
    return path


def one_block(gaps: list[int], length: int, **changes: object) -> tuple[Index, bytes]:
    positions, values = encode(np.array(gaps, dtype=np.uint64), PCO), encode(np.ones(len(gaps), dtype=np.int16), PCO)
    block = Block(0, 0, len(gaps), True, len(positions), len(values), 0, short_digest(positions + values))
    for name, value in changes.items():
        setattr(block, name, value)
    kept = len(gaps)
    return Index([delta_record("t", "BF16", length, kept)], [Stream(BY_NAME["BF16"], EXACT, kept=kept)], [block], []), positions + values


@pytest.mark.parametrize(
    "gaps,length,changes",
    [
        ([0, 100], 100, {}),  # outside of the tensor
        ([2**64 - 1, 3], 100, {}),
        ([1, 2**64 - 2, 1], 100, {}),  # their sum is small modulo 2^64
        ([2**62 - 9] * 4 + [0], 2**62 - 1, {}),  # wraps around although no gap is too long
        ([0, 1], 100, {"origin": 50}),  # would skip entries before it
        ([0, 1], 100, {"origin": 101}),
        ([0, 1], 100, {"origin": 2**62}),
        ([0, 1], 100, {"digest": bytes(16)}),
        ([0, 1], 100, {"positions_bytes": 0}),
        ([0, 1], 100, {"values_bytes": 2**62}),
        ([0, 1], 100, {"wide_gaps": False}),
    ],
)
def test_a_sealed_artifact_with_impossible_blocks_is_refused(tmp_path: Path, gaps: list[int], length: int, changes: dict[str, int]) -> None:
    index, data = one_block(gaps, length, **changes)
    with pytest.raises(BadFile) as caught, SparseDelta(sealed(tmp_path / "a.safetensors", index, data)) as artifact:
        artifact.entries(artifact.index.tensors[0], 0, 20)
        artifact.entries(artifact.index.tensors[0], 0, length)
    assert str(tmp_path / "a.safetensors") in caught.value.message


@pytest.mark.parametrize("key", ["peru.task", "peru.result", "peru.entries", "peru.kept"])
@pytest.mark.parametrize("value", [None, "", "-1", "9" * 30, "x" * 64, "0" * 63, "\x1b[2J", "0" * 64 + "\n", "t\n"])
def test_a_sealed_artifact_with_odd_metadata_is_refused(tmp_path: Path, key: str, value: str | None) -> None:
    index, data = one_block([0, 1], 100)
    with SparseDelta(sealed(tmp_path / "good.safetensors", index, data)) as artifact:
        assert artifact.entries(artifact.index.tensors[0], 0, 100)[1].positions.tolist() == [0, 2]
    if key == "peru.task" and value in {"x" * 64, "9" * 30, "0" * 63}:
        return  # valid names
    with pytest.raises(BadFile) as caught:
        SparseDelta(sealed(tmp_path / "bad.safetensors", index, data, **{key: value}))
    assert key in caught.value.message and "bad.safetensors" in caught.value.message
    assert "\x1b" not in caught.value.message


def test_signed_numbers_are_written_as_the_format_says() -> None:
    """0, -1, 1, -2, ... as varints 0, 1, 2, 3, ...: exponents and scales of packs and mixed artifacts use this."""
    for value, written in ((0, b"\0"), (-1, b"\1"), (1, b"\2"), (-2, b"\3"), (-64, b"\x7f"), (64, b"\x80\1"), (-1074, b"\xe3\x10")):
        sink = bytestream.Sink()
        sink.signed(value)
        assert bytes(sink.data) == written
        assert bytestream.Cursor(written).signed(abs(value)) == value
    with pytest.raises(BadFile):
        bytestream.Cursor(b"\3").signed(1)
