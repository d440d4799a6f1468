"""docs/format.md: golden files that are compared literally, and a reader written from that page alone."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from golden.make import CASES, Tensors, noise, write_model, write_safetensors
from pcodec import wrapped

GOLDEN = Path(__file__).resolve().parent / "golden"
DOCUMENT = (GOLDEN.parents[1] / "docs" / "format.md").read_text("utf-8")
Array = np.ndarray[Any, np.dtype[Any]]


# -- the reader: docs/format.md and nothing else ------------------------------------------------------


def document_rows(heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, less its head; code marks and escapes are taken off."""
    lines = DOCUMENT.split(f"\n{heading}\n", 1)[1].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def code(cell: str) -> str:
    assert cell.startswith("`") and cell.endswith("`"), cell
    return cell[1:-1]


DTYPES = {int(row[0]): row[1] for row in document_rows("### Dtype codes")}
BITS = {row[1]: int(row[2]) for row in document_rows("### Dtype codes")}
MANTISSA = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}
FLOAT = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
WHOLE, DELTA, COPY = 0, 1, 2
MARKER = 0x7FC0


def short(data: bytes) -> bytes:
    return blake3(data).digest()[:16]


def read_safetensors(data: bytes) -> tuple[dict[str, str], dict[str, tuple[str, tuple[int, ...], bytes]], bytes]:
    """Metadata; dtype, shape and bytes of each tensor; the header's bytes."""
    (n,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + n])
    metadata = table.pop("__metadata__", {})
    begin = 8 + n
    tensors = {}
    for name, entry in table.items():
        a, b = entry["data_offsets"]
        tensors[name] = entry["dtype"], tuple(entry["shape"]), data[begin + a : begin + b]
    return metadata, tensors, data[:begin]


def tensor_digest(dtype: str, shape: tuple[int, ...], data: bytes) -> bytes:
    digest = blake3(b"peru tensor 1\0" + dtype.encode() + b"\0" + ",".join(map(str, shape)).encode() + b"\0")
    leaf = (1 << 14) * BITS[dtype] // 8
    for at in range(0, len(data), leaf):
        digest.update(blake3(data[at : at + leaf]).digest())
    return digest.digest()


def checkpoint_digest(tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> str:
    digest = blake3(b"peru checkpoint 1\0")
    for name, tensor in sorted(tensors.items()):
        digest.update(struct.pack("<I", len(name.encode())) + name.encode() + tensor_digest(*tensor))
    return digest.hexdigest()


class Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        assert self.at + n <= len(self.data)
        self.at += n
        return self.data[self.at - n : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                assert value <= 1 << 62 and shift <= 56 and (byte or not shift)
                return value
            shift += 7


def read_index(data: bytes) -> tuple[list[dict], list[dict], list[dict], list[dict]]:
    cursor = Cursor(data)
    assert cursor.byte() == 1
    tensors, name = [], b""
    for _ in range(cursor.varint()):
        before, shared = name, cursor.varint()
        name = name[:shared] + cursor.take(cursor.varint())
        assert name > before
        t: dict[str, Any] = {"name": name.decode(), "mode": cursor.byte(), "dtype": DTYPES[cursor.byte()], "rows": 0, "kept": 0}
        t["shape"] = t["base_shape"] = tuple(cursor.varint() for _ in range(cursor.varint()))
        if t["mode"] != WHOLE:
            t["base_dtype"], t["base_digest"] = DTYPES[cursor.byte()], cursor.take(16)
        if t["mode"] == DELTA:
            t["rows"], t["kept"] = cursor.varint(), cursor.varint()
            if t["rows"]:
                t["base_shape"] = (t["rows"], *t["shape"][1:])
        if t["mode"] == WHOLE or t["rows"]:
            t["whole_digest"] = cursor.take(16)
        tensors.append(t)
    streams = []
    for _ in range(cursor.varint()):
        s = {"dtype": DTYPES[cursor.byte()], "rounded": cursor.byte(), "positions": cursor.byte(), "values": cursor.byte()}
        s["block"], s["kept"] = cursor.varint(), cursor.varint()
        assert s["kept"] == sum(t["kept"] for t in tensors if t["dtype"] == s["dtype"]) > 0
        streams.append(s)
    blocks, origins, left = [], [0] * len(streams), [s["kept"] for s in streams]
    for _ in range(cursor.varint()):
        number = cursor.byte()
        origins[number] += cursor.varint()
        b = {"stream": number, "origin": origins[number], "count": min(left[number], streams[number]["block"])}
        left[number] -= b["count"]
        b["wide"], b["positions"], b["values"] = cursor.byte(), cursor.varint(), cursor.varint()
        b["apart"] = cursor.varint() if streams[number]["rounded"] else 0
        b["digest"] = cursor.take(16)
        blocks.append(b)
    assert not any(left)
    files = []
    for _ in range(cursor.varint()):
        files.append({"name": cursor.take(cursor.varint()).decode(), "from_base": cursor.byte(), "size": cursor.varint()})
        files[-1]["digest"] = cursor.take(16)
    assert cursor.at == len(data)
    return tensors, streams, blocks, files


def decode(data: bytes, codec: int, kind: str, count: int) -> Array:
    letter, bits = kind[0], int(kind[1:])
    out = np.empty(count, dtype=f"{letter}{bits // 8}")
    if codec == 0:
        assert len(data) == out.nbytes
        return np.frombuffer(data, dtype=out.dtype.newbyteorder("<"))
    assert codec == 1
    file, a = wrapped.FileDecompressor.new(data)
    chunk, b = file.chunk_decompressor(data[a:], kind)
    progress, c = chunk.read_page_into(data[a + b :], count, out)
    assert progress.n_processed == count and a + b + c == len(data)
    return out


def order(x: Array) -> Array:
    width = x.dtype.itemsize * 8
    return np.where(x >= 0, x, x ^ x.dtype.type((1 << (width - 1)) - 1))


def floats(bits: Array, dtype: str) -> Array:
    """Patterns as the floats that they are; BF16 as float32, which holds it."""
    if dtype == "BF16":
        return (bits.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return bits.view(FLOAT[dtype])


def cast(bits: Array, source: str, target: str) -> Array:
    """Signed patterns of one dtype to those of another."""
    if source == target:
        return bits
    signed = np.dtype(f"<i{BITS[target] // 8}")
    values = floats(bits, source)
    with np.errstate(all="ignore"):
        if BITS[target] == 16:
            values = values.astype(np.float32)
        if target == "BF16":
            u = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
            result = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16).view(signed)
        else:
            result = values.astype(FLOAT[target]).view(signed)
    for i in np.flatnonzero(np.isnan(values)):
        have, want = MANTISSA[source], MANTISSA[target]
        pattern = int(bits[i]) & ((1 << BITS[source]) - 1)
        payload = pattern & ((1 << have) - 1)
        payload = payload >> (have - want) if have > want else payload << (want - have)
        exponent = (1 << (BITS[target] - 1 - want)) - 1
        sign = pattern >> (BITS[source] - 1)
        pattern = sign << (BITS[target] - 1) | exponent << want | payload | 1 << (want - 1)
        result[i] = np.array(pattern, f"<u{BITS[target] // 8}").view(signed)
    return result


def kept_entries(data: bytes, streams: list[dict], blocks: list[dict]) -> list[tuple[Array, Array, Array]]:
    """Positions, values and values apart of each stream."""
    at, found = 0, [([], [], []) for _ in streams]
    ends = [0] * len(streams)
    for b in blocks:
        stream = streams[b["stream"]]
        width = BITS[stream["dtype"]]
        size = b["positions"] + b["values"] + b["apart"] * width // 8
        raw, at = data[at : at + size], at + size
        assert short(raw) == b["digest"] and b["origin"] == ends[b["stream"]]
        gaps = decode(raw[: b["positions"]], stream["positions"], "u64" if b["wide"] else "u32", b["count"]).astype(np.int64)
        cut = b["positions"] + b["values"]
        values = decode(raw[b["positions"] : cut], stream["values"], "i16" if stream["rounded"] else f"i{width}", b["count"])
        positions = b["origin"] + np.cumsum(gaps) + np.arange(b["count"])
        ends[b["stream"]] = int(positions[-1]) + 1
        assert not stream["rounded"] or np.count_nonzero(values == MARKER) == b["apart"]
        apart = np.frombuffer(raw[cut:], f"<i{width // 8}")
        for part, array in zip(found[b["stream"]], (positions, values, apart), strict=True):
            part.append(array)
    assert at == len(data)
    return [tuple(np.concatenate(part) for part in stream) for stream in found]


def put_in(bits: Array, positions: Array, values: Array, apart: Array, dtype: str, rounded: bool) -> None:
    """Replace the base's entries at positions by the fine-tune's."""
    b = bits[positions]
    exact = values
    with np.errstate(all="ignore"):
        if rounded:
            r = floats(order(values), "BF16").astype(FLOAT[dtype])
            bits[positions] = (floats(b, dtype) + r).view(bits.dtype)
            marked = values == MARKER
            positions, b, exact = positions[marked], b[marked], apart
        bits[positions] = order((order(b) + exact).astype(bits.dtype))


def read_artifact(artifact: bytes, base: dict[str, tuple[str, tuple[int, ...], bytes]], base_files: dict[str, bytes]) -> tuple:
    """The fine-tune's tensors and side files; asserts every rule and digest of the document on the way."""
    metadata, roles, header = read_safetensors(artifact)
    assert len(header) % 8 == 0 and list(roles) == [r for r in ("blocks", "whole", "files", "index") if r in roles]
    for key, required, pattern, _ in document_rows("### Metadata"):
        assert code(key) in metadata or required == "no"
        assert code(key) not in metadata or re.fullmatch(code(pattern), metadata[code(key)])
    at = header.index(b'"peru.digest":"') + len(b'"peru.digest":"')
    blank = header[:at] + b"0" * 64 + header[at + 64 :]
    index = roles["index"][2]
    assert blake3(b"peru header 1\0" + blank + index).hexdigest() == metadata["peru.digest"] == header[at : at + 64].decode()
    whole_at = files_at = 0
    whole, stored = (roles[role][2] if role in roles else b"" for role in ("whole", "files"))
    tensors, streams, blocks, files = read_index(index)
    entries = kept_entries(roles["blocks"][2] if "blocks" in roles else b"", streams, blocks)
    numbers = {s["dtype"]: i for i, s in enumerate(streams)}
    begins = dict.fromkeys(DTYPES.values(), 0)
    result = {}
    for t in tensors:
        name, dtype, data = t["name"], t["dtype"], b""
        if t["mode"] != WHOLE:
            prefix = metadata["peru.prefix"]
            base_name = name.removeprefix(prefix[1:]) if prefix[:1] == "+" else prefix[1:] + name
            assert prefix[:1] != "+" or name.startswith(prefix[1:])
            base_dtype, base_shape, data = base[base_name]
            assert (base_dtype, base_shape) == (t["base_dtype"], t["base_shape"])
            assert tensor_digest(base_dtype, base_shape, data)[:16] == t["base_digest"]
        if t["mode"] == DELTA:
            bits = cast(np.frombuffer(bytearray(data), f"<i{BITS[base_dtype] // 8}"), base_dtype, dtype)
            begin, begins[dtype] = begins[dtype], begins[dtype] + len(bits)
            if t["kept"]:
                positions, values, apart = entries[numbers[dtype]]
                i, j = np.searchsorted(positions, (begin, begin + len(bits)))
                assert j - i == t["kept"]
                a, b = (int(np.count_nonzero(values[:k] == MARKER)) for k in (i, j))
                put_in(bits, positions[i:j] - begin, values[i:j], apart[a:b], dtype, bool(streams[numbers[dtype]]["rounded"]))
            data = bits.tobytes()
        if t["mode"] == WHOLE or t["rows"]:
            shape = (t["shape"][0] - t["rows"], *t["shape"][1:]) if t["rows"] else t["shape"]
            size = int(np.prod(shape, dtype=object)) * BITS[dtype] // 8
            own, whole_at = whole[whole_at : whole_at + size], whole_at + size
            assert tensor_digest(dtype, shape, own)[:16] == t["whole_digest"]
            data += own
        result[name] = dtype, t["shape"], data
    side = {}
    for file in files:
        content = base_files[file["name"]] if file["from_base"] else stored[files_at : files_at + file["size"]]
        files_at += 0 if file["from_base"] else file["size"]
        assert len(content) == file["size"] and short(content) == file["digest"]
        side[file["name"]] = content
    assert (whole_at, files_at) == (len(whole), len(stored))
    assert int(metadata["peru.kept"]) == sum(t["kept"] for t in tensors)
    assert int(metadata["peru.entries"]) == sum(int(np.prod(t["base_shape"], dtype=object)) for t in tensors if t["mode"] == DELTA)
    assert checkpoint_digest(result) == metadata["peru.result"]
    return result, side


# -- golden files -------------------------------------------------------------------------------------


def model(folder: Path) -> tuple[dict, dict[str, bytes]]:
    """Tensors and side files of a checkpoint folder."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "model.safetensors"}
    return read_safetensors((folder / "model.safetensors").read_bytes())[1], files


@pytest.mark.parametrize("name", CASES)
def test_the_writer_gives_the_golden_bytes(tmp_path: Path, peru, name: str) -> None:
    case = CASES[name]()
    write_model(tmp_path / "fine", case.fine, case.fine_files)
    write_model(tmp_path / "base", case.base, case.base_files)
    assert model(tmp_path / "base") == model(GOLDEN / name / "base")
    peru("prune", f"golden={tmp_path}/fine", "-b", tmp_path / "base", "-o", tmp_path / "a.safetensors", "--no-sync", *case.options)
    assert (tmp_path / "a.safetensors").read_bytes() == (GOLDEN / name / "artifact.safetensors").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_a_reader_made_from_the_document_gives_the_expected_result(name: str) -> None:
    case = CASES[name]()
    tensors, files = read_artifact((GOLDEN / name / "artifact.safetensors").read_bytes(), *model(GOLDEN / name / "base"))
    assert tensors == read_safetensors((GOLDEN / name / "expected.safetensors").read_bytes())[1]
    assert files == {file: text.encode() for file, text in case.fine_files.items()}


@pytest.mark.parametrize("name", CASES)
def test_unpack_gives_the_expected_result(tmp_path: Path, peru, name: str) -> None:
    case, folder = CASES[name](), GOLDEN / name
    peru("unpack", folder / "artifact.safetensors", "-b", folder / "base", "-o", tmp_path / "r.safetensors", "--no-sync")
    assert (tmp_path / "r.safetensors").read_bytes() == (folder / "expected.safetensors").read_bytes()
    write_safetensors(tmp_path / "expected.safetensors", case.expected)
    assert (tmp_path / "expected.safetensors").read_bytes() == (folder / "expected.safetensors").read_bytes()
    peru("unpack", folder / "artifact.safetensors", "-b", folder / "base", "-o", tmp_path / "r", "--no-sync")
    assert model(tmp_path / "r")[1] == {file: text.encode() for file, text in case.fine_files.items()}


def test_golden_files_hold_what_they_are_there_for() -> None:
    """Each corner of the format is in one of them."""
    seen = set()
    for name in CASES:
        artifact = (GOLDEN / name / "artifact.safetensors").read_bytes()
        assert len(artifact) < 10_000
        metadata, roles, _ = read_safetensors(artifact)
        tensors, streams, blocks, files = read_index(roles["index"][2])
        seen |= {f"prefix {metadata['peru.prefix'][:1]}", *(key for key in metadata), *roles}
        seen |= {f"mode {t['mode']}" for t in tensors} | {"grown" for t in tensors if t["rows"]}
        seen |= {f"{s['dtype']} {s['rounded']}" for s in streams} | {"apart" for b in blocks if b["apart"]}
        seen |= {f"{t['base_dtype']} to {t['dtype']}" for t in tensors if t["mode"] == DELTA}
        seen |= {f"from base {f['from_base']}" for f in files}
    corners = {"prefix ", "prefix +", "prefix -", "mode 0", "mode 1", "mode 2", "grown", "apart", "from base 0", "from base 1"}
    corners |= {"BF16 0", "F16 0", "F32 1", "F32 to BF16", *(code(row[0]) for row in document_rows("### Metadata"))}
    assert corners | {"blocks", "whole", "files", "index"} <= seen


# -- the same reader on artifacts that are too large for golden files ----------------------------------


def random_patterns(dtype: str, n: int, seed: int) -> Array:
    """Every kind of number: all exponents, NaN payloads, subnormals, zeros of both signs."""
    unsigned = f"<u{BITS[dtype] // 8}"
    bits = noise((n,), seed).astype(unsigned)
    exponent, mantissa = BITS[dtype] - 1 - MANTISSA[dtype], MANTISSA[dtype]
    special = [0, 1, (1 << mantissa) - 1, ((1 << exponent) - 1) << mantissa, (((1 << exponent) - 1) << mantissa) + 1]
    bits[: 2 * len(special)] = [x | s << (BITS[dtype] - 1) for x in special for s in (0, 1)]
    return bits


@pytest.mark.parametrize("options", [["--lossless"], ["--keep", "40%"], ["--keep", "3%", "--scope", "tensor", "--values", "exact"]])
def test_the_reader_follows_unpack_through_all_dtypes_and_many_blocks(tmp_path: Path, peru, options: list[str]) -> None:
    base: Tensors = {}
    fine: Tensors = {}
    seed = 100
    for source in MANTISSA:
        for target in MANTISSA:
            base[f"{source}.{target}"] = source, random_patterns(source, 2003, seed := seed + 1)
            fine[f"{source}.{target}"] = target, random_patterns(target, 2003, seed := seed + 1)
    for name, dtype in (("a", "BF16"), ("b", "F32"), ("c", "BF16"), ("d", "F32")):
        bits = random_patterns(dtype, 260_007, seed := seed + 1)
        base[name] = dtype, bits
        fine[name] = dtype, bits + (noise(bits.shape, seed := seed + 1) % np.uint64(3)).astype(bits.dtype)
    write_model(tmp_path / "base", base, {})
    write_model(tmp_path / "fine", fine, {})
    at = ["-b", tmp_path / "base", "--no-sync"]
    peru("prune", tmp_path / "fine", *at, "-o", tmp_path / "a.safetensors", *options)
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r.safetensors")
    artifact = (tmp_path / "a.safetensors").read_bytes()
    tensors, _ = read_artifact(artifact, *model(tmp_path / "base"))
    assert tensors == read_safetensors((tmp_path / "r.safetensors").read_bytes())[1]
    if options == ["--lossless"]:
        assert tensors == model(tmp_path / "fine")[0]
        assert len(read_index(read_safetensors(artifact)[1]["index"][2])[2]) > 6


def test_changed_counts_tensors_in_which_nothing_is_kept(tmp_path: Path, peru) -> None:
    """Tensors larger than the sample that thresholds are predicted from; 0 of 1.2 million each are kept."""
    base: Tensors = {name: ("BF16", np.full(1_200_000, 0x3F80, np.uint16)) for name in ("a", "b")}
    fine: Tensors = {name: ("BF16", array + (np.arange(array.size) % 3 == 0).astype(np.uint16)) for name, (_, array) in base.items()}
    write_model(tmp_path / "base", base, {})
    write_model(tmp_path / "fine", fine, {})
    target = tmp_path / "a.safetensors"
    peru("prune", tmp_path / "fine", "-b", tmp_path / "base", "-o", target, "--keep", "0.0000005", "--scope", "tensor", "--no-sync")
    metadata, roles, _ = read_safetensors(target.read_bytes())
    assert (metadata["peru.changed"], metadata["peru.kept"], list(roles)) == ("800000", "0", ["index"])
    assert read_artifact(target.read_bytes(), *model(tmp_path / "base"))[0] == model(tmp_path / "base")[0]


# -- what a reader checks, on files whose seal is right ------------------------------------------------


def sealed(artifact: bytes, old: bytes, new: bytes) -> bytes:
    """The artifact with a change of equal length in its header, sealed again."""
    _, roles, header = read_safetensors(artifact)
    assert header.count(old) == 1 and len(old) == len(new)
    changed = header.replace(old, new)
    at = changed.index(b'"peru.digest":"') + len(b'"peru.digest":"')
    seal = blake3(b"peru header 1\0" + changed[:at] + b"0" * 64 + changed[at + 64 :] + roles["index"][2]).hexdigest()
    return changed[:at] + seal.encode() + changed[at + 64 :] + artifact[len(header) :]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"peru.kept":"139"', b'"peru.kept":"138"', "its index has 139"),
        (b'"peru.entries":"1392"', b'"peru.entries":"0139"', "'0139'"),
        (b'"peru.task":"golden"', b'"peru.task":"../old"', "'../old'"),
        (b'"peru.result":', b'"peru.resort":', "lacks 'peru.result'"),
        (b'"peru.prefix":"+bert."', b'"peru.prefix":"*bert."', "'*bert.'"),
        (b'"peru.density":"1/10"', b'"peru.density":"0.10"', "'0.10'"),
        (b'"peru.kind":"sparse-delta"', b'"peru.kind":"sparse-gamma"', "sparse-gamma"),
        (b'"peru.format":"1"', b'"peru.format":"2"', "format '2'"),
    ],
)
def test_metadata_is_checked(tmp_path: Path, peru, old: bytes, new: bytes, message: str) -> None:
    artifact = (GOLDEN / "heads" / "artifact.safetensors").read_bytes()
    for content, expected in ((artifact.replace(old, new), None), (sealed(artifact, old, new), message)):
        (tmp_path / "a.safetensors").write_bytes(content)
        peru("unpack", tmp_path / "a.safetensors", "-b", GOLDEN / "heads" / "base", "-o", tmp_path / "r.safetensors", code=1)
        assert expected is None or expected in peru.stderr
    assert sealed(artifact, old, old) == artifact


def test_padding_is_sealed(tmp_path: Path, peru) -> None:
    artifact = bytearray((GOLDEN / "heads" / "artifact.safetensors").read_bytes())
    end = len(read_safetensors(artifact)[2])
    assert artifact[end - 1 : end] == b" "
    artifact[end - 1 : end] = b"\t"  # white space still, to a JSON parser
    (tmp_path / "a.safetensors").write_bytes(artifact)
    peru("unpack", tmp_path / "a.safetensors", "-b", GOLDEN / "heads" / "base", "-o", tmp_path / "r.safetensors", code=1)
    assert "altered" in peru.stderr


def test_index_limits() -> None:
    """Numbers that go on and on, names that front coding blows up, blocks larger than their entries."""
    from peru_cli.artifacts.index import decode_index
    from peru_cli.errors import BadFile

    with pytest.raises(BadFile, match="number above"):
        decode_index(b"\x01" + b"\x80" * 1000 + b"\x01")
    varint = lambda n: bytes([n & 127 | 128, n >> 7 & 127 | 128, n >> 14])  # noqa: E731
    scalar = b"\0\x05\0" + bytes(16)  # WHOLE, U8, no dimensions, digest
    long = b"a" * 1_000_000
    names = b"\0" + varint(len(long)) + long + scalar
    names += b"".join(varint(len(long) + i) + b"\x01a" + scalar for i in range(120))
    with pytest.raises(BadFile, match="names"):
        decode_index(b"\x01" + bytes([121]) + names)
    index = bytearray(read_safetensors((GOLDEN / "tiny" / "artifact.safetensors").read_bytes())[1]["index"][2])
    sizes = index.index(b"\x0c\x09")
    index[sizes : sizes + 1] = varint(2 * 8 + 2**16 + 1)
    with pytest.raises(BadFile, match="number above"):
        decode_index(bytes(index))


# -- the document and the code say the same ------------------------------------------------------------


def test_dtype_codes_are_those_of_the_code() -> None:
    from peru_cli.checkpoints.dtypes import BY_CODE

    rows = [(int(number), name, int(bits), mark == "yes") for number, name, bits, mark in document_rows("### Dtype codes")]
    assert rows == [(d.code, d.name, d.bits, d.compressible) for d in sorted(BY_CODE.values(), key=lambda d: d.code)]


def test_metadata_keys_and_patterns_are_those_of_the_code() -> None:
    from peru_cli.artifacts.sparse_delta import METADATA, OPTIONAL

    rows = {code(key): (code(pattern), required) for key, required, pattern, _ in document_rows("### Metadata")}
    assert rows.pop("peru.digest") == ("[0-9a-f]{64}", "yes")
    assert rows == {key: (pattern, "no" if key in OPTIONAL else "yes") for key, pattern in METADATA.items()}


def test_limits_are_those_of_the_code() -> None:
    from peru_cli.artifacts import codecs, container, index
    from peru_cli.checkpoints import header, sidefiles

    assert container.MAX_INDEX_BYTES == 2**30 and tuple(code(row[0]) for row in document_rows("## Container")) == container.ROLES
    assert (index.MAX_NAMES_BYTES, index.MAX_BLOCK_ENTRIES, index.BLOCK_ENTRIES) == (10**8, 2**22, 2**17)
    assert (header.MAX_ENTRIES, header.MAX_DIMENSIONS, sidefiles.MAX_SIDE_FILE_BYTES) == (2**62, 64, 64_000_000)
    assert (index.WHOLE, index.DELTA, index.COPY, index.EXACT, index.ROUNDED, index.NOT_ROUNDED) == (0, 1, 2, 0, 1, 32704)
    assert (index.STORED, index.FROM_BASE, codecs.RAW, codecs.PCO) == (0, 1, 0, 1)


def test_side_file_names_are_those_of_the_code() -> None:
    from peru_cli.checkpoints.sidefiles import is_side_file_name

    section = DOCUMENT.split("\n## Side files\n", 1)[1].split("\n## ", 1)[0]
    names = re.findall(r"`([^`]+)`", section.split("with NAME in", 1)[1])
    plain = [f"{n}.json" for n in names if "." not in n]
    others = [n.replace("*", "any") for n in names if "." in n]
    assert len(plain) == 17 and len(others) == 7
    assert all(map(is_side_file_name, plain + others))
    refused = [
        "modeling.py",
        "../config.json",
        "sub/config.json",
        ".model",
        "model.safetensors",
        "é.model",
        "x.json",
        "a" * 125 + ".spm",
        "",
    ]
    assert not any(map(is_side_file_name, refused))


def test_the_worked_example_is_the_golden_file() -> None:
    lines = DOCUMENT.split("\n## A worked example\n", 1)[1].split("```")[1].splitlines()
    shown = bytes.fromhex(" ".join(re.match(r"(?:[0-9a-f]{2} )*[0-9a-f]{2}(?=   )", line).group() for line in lines if line))
    artifact = (GOLDEN / "tiny" / "artifact.safetensors").read_bytes()
    assert artifact[960:] == shown and len(read_safetensors(artifact)[2]) == 960
