"""A reader of artifacts written from docs/format.md alone. It shares no code with peru."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from pcodec import wrapped

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
DOCUMENT = (GOLDEN.parents[1] / "docs" / "format.md").read_text("utf-8")
Array = np.ndarray[Any, np.dtype[Any]]


def document_rows(heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its header row, code marks and escapes."""
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
EXACT, ROUNDED, SIGN = 0, 1, 2
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
        assert s["rounded"] in (EXACT, ROUNDED, SIGN)
        form = "<d" if s["dtype"] == "F64" else "<f"
        for t in tensors if s["rounded"] == SIGN else ():
            if t["kept"] and t["dtype"] == s["dtype"]:
                (t["scale"],) = struct.unpack(form, cursor.take(struct.calcsize(form)))
                assert 0 <= t["scale"] < np.inf
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
    """Patterns as floats; BF16 as float32."""
    if dtype == "BF16":
        return (bits.astype(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return bits.view(FLOAT[dtype])


def cast(bits: Array, source: str, target: str) -> Array:
    """Signed patterns of one dtype cast to another."""
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
        assert stream["rounded"] != SIGN or set(values.tolist()) <= {0, -1, MARKER}
        apart = np.frombuffer(raw[cut:], f"<i{width // 8}")
        for part, array in zip(found[b["stream"]], (positions, values, apart), strict=True):
            part.append(array)
    assert at == len(data)
    return [tuple(np.concatenate(part) for part in stream) for stream in found]


def put_in(bits: Array, positions: Array, values: Array, apart: Array, dtype: str, rounded: int, scale: float = 0.0) -> None:
    """Replace the base's entries at positions with the fine-tune's."""
    b = bits[positions]
    exact = values
    with np.errstate(all="ignore"):
        if rounded:
            wide = "F64" if dtype == "F64" else "F32"
            r = floats(order(values), "BF16") if rounded == ROUNDED else np.where(values == -1, -1.0, 1.0) * scale
            total = floats(b, dtype).astype(FLOAT[wide]) + r.astype(FLOAT[wide])
            bits[positions] = cast(total.view(f"<i{total.itemsize}"), wide, dtype)
            marked = values == MARKER
            positions, b, exact = positions[marked], b[marked], apart
        bits[positions] = order((order(b) + exact).astype(bits.dtype))


def read_artifact(artifact: bytes, base: dict[str, tuple[str, tuple[int, ...], bytes]], base_files: dict[str, bytes]) -> tuple:
    """The fine-tune's tensors and side files. Asserts every rule and digest of the document on the way."""
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
                kind = streams[numbers[dtype]]["rounded"]
                put_in(bits, positions[i:j] - begin, values[i:j], apart[a:b], dtype, kind, t.get("scale", 0.0))
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
