"""The strict safetensors header: what it refuses, by name. It reads what the reference writes, and the reverse."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo, build_header, check_tensor_name, header_length, parse_header
from peru_cli.checkpoints.local.checkpoint import SafetensorsCheckpoint
from peru_cli.checkpoints.local.files import RandomAccessFile, read_header
from peru_cli.errors import BadFile
from tests.conftest import raw

U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def header_text(entries: dict[str, Any] | str) -> bytes:
    """JSON; in text, @ stands for a valid entry."""
    text = entries.replace("@", json.dumps(U8)) if isinstance(entries, str) else json.dumps(entries)
    return text.encode("utf-8", "surrogateescape")


def file_of(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {**U8, **changes}}


REFUSED: dict[str, tuple[dict[str, Any] | str, str]] = {
    "duplicate tensor": ('{"a":@,"a":@}', "'a' appears twice"),
    "duplicate metadata": ('{"__metadata__":{"k":"1","k":"2"},"a":@}', "'k' appears twice"),
    "duplicate metadata table": ('{"__metadata__":{},"__metadata__":{},"a":@}', "appears twice"),
    "duplicate field": ('{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', "'dtype' appears twice"),
    "leading space": (" " + json.dumps({"a": U8}), "does not begin with '{'"),
    "byte order mark": ("\ufeff" + json.dumps({"a": U8}), "does not begin with '{'"),
    "empty name": ({"": U8}, "empty name"),
    "parent folder": ({"../a": U8}, "'../a'"),
    "parent folder inside": ({"a/../../b": U8}, "path out of its folder"),
    "parent folder, backslash": ({"..\\a": U8}, "path out of its folder"),
    "absolute path": ({"/etc/passwd": U8}, "'/etc/passwd'"),
    "line feed": ({"a\nb": U8}, "control character"),
    "escape": ({"\x1b[2J": U8}, "control character"),
    "C1 control": ({"a\x9b2J": U8}, "control character"),
    "nul": ({"a\0": U8}, "control character"),
    "lone surrogate": ('{"\\ud800":@}', "not valid Unicode"),
    "lone surrogate in metadata": ('{"__metadata__":{"k":"\\ud800"},"a":@}', "__metadata__"),
    "lone surrogate in a metadata key": ('{"__metadata__":{"\\udfff":"v"},"a":@}', "__metadata__"),
    "metadata of numbers": ({"__metadata__": {"k": 1}, "a": U8}, "not a table of strings"),
    "metadata list": ({"__metadata__": ["k"], "a": U8}, "not a table of strings"),
    "shape of 2^64-1": (entry(shape=[2**64 - 1]), "impossible shape"),
    "shapes whose product wraps": (entry(shape=[2**32, 2**32, 4]), "impossible shape"),
    "zero hides an absurd shape": (entry(shape=[0, 2**63], data_offsets=[0, 0]), "impossible shape"),
    "negative dimension": (entry(shape=[-4]), "shape of tensor 'a' is not a list of whole numbers"),
    "bool dimension": (entry(shape=[True, 4]), "shape of tensor 'a' is not a list of whole numbers"),
    "float dimension": (entry(shape=[4.0]), "shape of tensor 'a' is not a list of whole numbers"),
    "text dimension": (entry(shape=["4"]), "shape of tensor 'a' is not a list of whole numbers"),
    "shape is a number": (entry(shape=4), "shape of tensor 'a' is not a list of whole numbers"),
    "too many dimensions": (entry(shape=[1] * 65), "65 dimensions"),
    "negative offset": (entry(data_offsets=[-4, 0]), "data_offsets of tensor 'a' is not a list of whole numbers"),
    "bool offset": (entry(data_offsets=[False, 4]), "data_offsets of tensor 'a' is not a list of whole numbers"),
    "float offset": (entry(data_offsets=[0, 4.0]), "data_offsets of tensor 'a' is not a list of whole numbers"),
    "one offset": (entry(data_offsets=[4]), "1 offsets"),
    "offsets reversed": (entry(data_offsets=[4, 0]), "says -4 bytes"),
    "offsets of another size": (entry(data_offsets=[0, 3]), "says 3 bytes"),
    "unknown dtype": (entry(dtype="F7"), "unknown dtype 'F7'"),
    "dtype in lower case": (entry(dtype="u8"), "unknown dtype 'u8'"),
    "dtype is a number": (entry(dtype=5), "unknown dtype 5"),
    "half a byte": (entry(dtype="F4", shape=[7]), "does not fill whole bytes"),
    "missing field": ({"a": {"dtype": "U8", "shape": [4]}}, "entry of tensor 'a'"),
    "extra field": (entry(strides=[1]), "entry of tensor 'a'"),
    "entry is a list": ({"a": [0, 4]}, "entry of tensor 'a'"),
    "gap before the first": (entry(data_offsets=[1, 5]), "'a' begins at byte 1"),
    "gap": ({"a": {**U8, "shape": [1], "data_offsets": [0, 1]}, "b": {**U8, "shape": [2], "data_offsets": [2, 4]}}, "'b' begins at byte 2"),
    "overlap": ({"a": U8, "b": {**U8, "shape": [2], "data_offsets": [2, 4]}}, "'b' begins at byte 2"),
    "same bytes twice": ({"a": U8, "b": U8}, "'b' begins at byte 0"),
    "empty tensor inside another": ({"a": U8, "b": {**U8, "shape": [0], "data_offsets": [2, 2]}}, "'b' begins at byte 2"),
    "tensors end early": (entry(shape=[3], data_offsets=[0, 3]), "truncated or overlong"),
    "tensors end late": (entry(shape=[5], data_offsets=[0, 5]), "truncated or overlong"),
    "no tensors but data": ({}, "truncated or overlong"),
    "NaN": ('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', "NaN"),
    "Infinity": ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,Infinity]}}', "Infinity"),
    "a number of 5,000 digits": ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,' + "9" * 5000 + "]}}", "not valid JSON"),
    "deep nesting": ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON"),
    "something after the table": (json.dumps({"a": U8}) + "x", "not valid JSON"),
    "not closed": ('{"a":', "not valid JSON"),
    "not JSON": ("{a}", "not valid JSON"),
    "not UTF-8": ("{\udc80", "not valid JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_headers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    entries, message = REFUSED[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(file_of(header_text(entries), b"\1\2\3\4"))
    with pytest.raises(BadFile) as caught:
        SafetensorsCheckpoint("bad", "file", [path], {})
    assert message in caught.value.message and str(path) in caught.value.message


def test_the_cases_above_are_refused_for_the_stated_reason(tmp_path: Path) -> None:
    """The same file without its flaw is read."""
    path = tmp_path / "good.safetensors"
    path.write_bytes(file_of(header_text({"__metadata__": {"k": "1"}, "a": U8}) + b"   ", b"\1\2\3\4"))
    with SafetensorsCheckpoint("good", "file", [path], {}) as opened:
        assert opened.read("a") == b"\1\2\3\4" and opened.metadata == {"k": "1"}


@pytest.mark.parametrize("claim", [2**64 - 1, 2**63, 100_000_001, 99_999_999, 5])
def test_header_length_is_checked_before_memory_is_allocated(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", claim) + b"{}")
    with pytest.raises(BadFile, match=f"{claim} bytes"):
        SafetensorsCheckpoint("bad", "file", [path], {})


def test_every_truncation_and_every_overlength_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"a": torch.arange(5), "b": torch.ones(3, dtype=torch.bfloat16), "e": torch.zeros(0)}, path, metadata={"format": "pt"})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(BadFile) as caught:
            SafetensorsCheckpoint("cut", "file", [path], {})
        assert str(path) in caught.value.message
    for more in (1, 7, 4096):
        path.write_bytes(whole + b"\0" * more)
        with pytest.raises(BadFile, match="truncated or overlong"):
            SafetensorsCheckpoint("long", "file", [path], {})


def every_kind() -> dict[str, torch.Tensor]:
    """A tensor of each dtype that torch and safetensors share, of several sizes, with every byte value."""
    everything = torch.arange(256, dtype=torch.int16).to(torch.uint8).repeat(2)
    tensors = {}
    for dtype in BY_NAME.values():
        if dtype.torch_name is None or (kind := getattr(torch, dtype.torch_name, None)) is None:
            continue
        flat = everything % 2 == 1 if kind is torch.bool else everything.view(kind)
        tensors[f"{dtype.name}.all"] = flat.clone()
        tensors[f"{dtype.name}.matrix"] = flat[: flat.numel() // 4 * 4].clone().view(4, -1)
        tensors[f"{dtype.name}.scalar"] = flat[3].clone()
        tensors[f"{dtype.name}.empty"] = flat[:0].clone().view(3, 0, 2)
    return tensors


def test_output_of_the_reference_is_read_byte_for_byte(tmp_path: Path) -> None:
    tensors, path = {}, tmp_path / "all.safetensors"
    for name, tensor in every_kind().items():
        try:
            save_file({name: tensor}, path)
        except Exception:  # this version of the reference writer does not know the dtype
            continue
        tensors[name] = tensor
    everyday = {"BOOL", "U8", "I8", "U16", "U32", "U64", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64", "I64"}
    assert {n.split(".")[0] for n in tensors} >= everyday
    save_file(tensors, path, metadata={"format": "pt", "note": 'ü "\n\\ 模型'})
    with SafetensorsCheckpoint("all", "file", [path], {}) as opened:
        assert sorted(opened.tensors) == sorted(tensors)
        assert opened.metadata == {"format": "pt", "note": 'ü "\n\\ 模型'}
        for name, tensor in tensors.items():
            info = opened.tensors[name]
            assert getattr(torch, info.dtype.torch_name or "") == tensor.dtype and info.shape == tuple(tensor.shape)
            assert opened.read(name) == raw(tensor), name
        part = bytearray(7)
        opened.read_into("I64.all", 13, memoryview(part))
        assert bytes(part) == raw(tensors["I64.all"])[13:20]


def test_the_reference_reads_our_headers(tmp_path: Path) -> None:
    tensors, placed, at = every_kind(), [], 0
    known = {d.torch_name: d for d in BY_NAME.values()}
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
        placed.append(TensorInfo(name, known[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), at))
        at += placed[-1].nbytes
    unknown = "_E8M0", "FNUZ"  # dtypes that not every version of the reference knows
    placed = [info for info in placed if not any(text in info.name for text in unknown)]
    offset, contiguous = 0, []
    for info in placed:
        contiguous.append(TensorInfo(info.name, info.dtype, info.shape, offset))
        offset += info.nbytes
    path = tmp_path / "built.safetensors"
    header = build_header(contiguous, {"format": "pt", "a": "ü"}, reserve=5000)
    assert len(header) % 8 == 0 and len(header) >= 5000
    path.write_bytes(header + b"".join(raw(tensors[info.name]) for info in contiguous))
    with safe_open(path, "pt") as reference:
        assert reference.metadata() == {"format": "pt", "a": "ü"}
        assert sorted(reference.keys()) == sorted(info.name for info in contiguous)
    for name, tensor in load_file(path).items():
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        assert raw(tensor) == raw(tensors[name]), name


def test_two_shards_with_one_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"same": torch.ones(2), name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(BadFile, match=r"two\.safetensors: tensor 'same' is in another shard"):
        SafetensorsCheckpoint("both", "files", [tmp_path / "one.safetensors", tmp_path / "two.safetensors"], {})


def test_a_tensor_cannot_take_the_metadata_name() -> None:
    with pytest.raises(BadFile, match="__metadata__"):
        check_tensor_name("__metadata__")


UNICODE = st.characters(exclude_categories=["Cs"])
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).map(
    lambda text: text.replace("..", "x").lstrip("/\\") or "y"
)
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def placed_tensors(draw: st.DrawFn) -> list[TensorInfo]:
    at, result = 0, []
    for name in draw(st.lists(NAMES, unique=True, max_size=8)):
        info = TensorInfo(name, draw(st.sampled_from(sorted(BY_NAME.values(), key=lambda d: d.code))), draw(SHAPES), at)
        if info.entries * info.dtype.bits % 8 == 0:
            result.append(info)
            at += info.nbytes
    return result


@settings(max_examples=150, deadline=None)
@given(placed_tensors(), st.dictionaries(st.text(UNICODE, max_size=9), NAMES, max_size=4), st.integers(0, 3000))
def test_build_and_parse_are_inverse(tensors: list[TensorInfo], metadata: dict[str, str], reserve: int) -> None:
    built = build_header(tensors[::-1], metadata, reserve)
    total = len(built) + sum(info.nbytes for info in tensors)
    assert header_length(built, total) == len(built) - 8 and len(built) >= reserve
    parsed = parse_header(built[8:], total)
    assert dict(parsed.tensors) == {info.name: info for info in tensors}
    assert (dict(parsed.metadata), parsed.data_offset, parsed.file_bytes) == (metadata, len(built), total)
    assert build_header(parsed.tensors.values(), parsed.metadata, reserve) == built
    # Another writer's form of the same header: spaces, escapes, fields and tensors in another order.
    raw_entries = {name: dict(reversed(entry.items())) for name, entry in reversed(json.loads(built[8:]).items())}
    other = json.dumps(raw_entries, indent=1).encode()
    read = parse_header(other, 8 + len(other) + total - len(built), parsed.tensors)
    assert (dict(read.tensors), dict(read.metadata)) == (dict(parsed.tensors), metadata)
    assert all(info is parsed.tensors[name] for name, info in read.tensors.items())


def test_tensors_that_another_file_has_too_are_the_same_objects() -> None:
    infos = [
        TensorInfo("a.b", BY_NAME["F32"], (2, 3), 0),
        TensorInfo("a.c", BY_NAME["F32"], (2,), 24),
        TensorInfo("d", BY_NAME["U8"], (4,), 32),
    ]
    built = build_header(infos, {})
    first = parse_header(built[8:], len(built) + 36)
    sealed = build_header(infos, {"k": "v"})
    assert parse_header(sealed[8:], len(sealed) + 36, first.tensors).tensors is first.tensors
    moved = [infos[0], TensorInfo("d", BY_NAME["U8"], (4,), 24), TensorInfo("a.c", BY_NAME["F16"], (2,), 28)]
    built = build_header(moved, {})
    second = parse_header(built[8:], len(built) + 32, first.tensors)
    assert list(second.tensors.values()) == moved
    assert second.tensors["a.b"] is first.tensors["a.b"] and second.tensors["a.c"].name is first.tensors["a.c"].name


@pytest.mark.parametrize("long", [1, 65_400, 131_000, 300_000])
@pytest.mark.parametrize(("number", "at"), [(2000, 0), (2000, 900), (2000, 1999), (1, 0)])
def test_headers_of_many_pieces_and_names_longer_than_a_piece_are_read(long: int, number: int, at: int) -> None:
    """Entries are read 65,536 characters at a time. `json` says what is right."""
    infos, total = [], 0
    for i in range(number):
        infos.append(TensorInfo(f"layers.{i}.{'n' * long if i == at else 'weight'}", BY_NAME["U8"], (i % 3,), total))
        total += i % 3
    built = build_header(infos, {})
    wanted = json.loads(built[8:])
    read = parse_header(built[8:], len(built) + total).tensors
    found = {name: (t.dtype.name, [*t.shape], [t.begin, t.begin + t.nbytes]) for name, t in read.items()}
    assert found == {name: tuple(entry.values()) for name, entry in wanted.items()}
    bad = built[8:].replace(b"U8", b"U" * 2 * long, 1)
    with pytest.raises(BadFile, match="unknown dtype"):
        parse_header(bad, 8 + len(bad) + total)


def read_or_refuse(data: bytes, path: Path) -> None:
    """A BadFile, or a header that accounts for every byte of the file; nothing else."""
    path.write_bytes(data)
    file = RandomAccessFile(path)
    try:
        header = read_header(file)
    except BadFile as error:
        assert str(path) in error.message
        return
    finally:
        file.close()
    assert header.data_offset + sum(info.nbytes for info in header.tensors.values()) == len(data) == header.file_bytes
    build_header(header.tensors.values(), header.metadata)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_random_bytes_are_refused_and_nothing_worse(tmp_path_factory: pytest.TempPathFactory, data: bytes, framed: bool) -> None:
    read_or_refuse(struct.pack("<Q", len(data)) + data if framed else data, tmp_path_factory.getbasetemp() / "random.safetensors")


TOKENS = ['"', "{", "}", "[", "]", ",", ":", "0", "-1", "1e9", "null", "true", "NaN", "\\u0000", "\\ud800"]
TOKENS += ['"a":', "\udc80", "9" * 30, '"U8"', '"BF16"', "\n", "é"]


@settings(max_examples=400, deadline=None)
@given(placed_tensors(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), st.sampled_from(TOKENS)), min_size=1, max_size=4))
def test_mutated_headers_are_refused_or_sound(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[TensorInfo], mutations: list[tuple[int, int, str]]
) -> None:
    text = build_header(tensors, {"format": "pt"})[8:]
    for where, removed, token in mutations:
        at = where % (len(text) + 1)
        text = text[:at] + token.encode("utf-8", "surrogateescape") + text[at + removed :]
    data = b"\0" * sum(info.nbytes for info in tensors)
    read_or_refuse(file_of(text, data), tmp_path_factory.getbasetemp() / "mutated.safetensors")
