"""A reader of kind `mixed` written from docs/mixed.md and docs/format.md; it shares no code with peru. Sums are Python integers."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from tests.support.readers import format_reader as common

M = (16, 19, 23, 27)
Array = np.ndarray[Any, Any]


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, n: int) -> bytes:
        self.at += n
        assert self.at <= len(self.data)
        return self.data[self.at - n : self.at]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = shift = 0
        while (byte := self.byte()) >= 0x80:
            value, shift = value | (byte & 0x7F) << shift, shift + 7
        return value | byte << shift

    def signed(self) -> int:
        v = self.varint()
        return -(v + 1) // 2 if v % 2 else v // 2


def _tensor(index: _Bytes, before: bytes, dtypes: dict[int, str]) -> dict[str, Any]:
    shared = index.varint()
    name = before[:shared] + index.take(index.varint())
    t: dict[str, Any] = {"name": name, "mode": index.byte(), "dtype": dtypes[index.byte()], "parts": 0, "base rows": 0}
    t["shape"] = tuple(index.varint() for _ in range(index.varint()))
    if t["mode"] != 0:
        t["base dtype"], t["base digest"] = dtypes[index.byte()], index.take(16)
    if t["mode"] == 1:
        t["base rows"], t["parts"] = index.varint(), index.byte()
        if t["parts"] & 1:
            t["columns"], t["rank"], t["kept rows"] = (index.varint() for _ in range(3))
        if t["parts"] & 2:
            t["context"], t["scale"] = index.byte(), index.signed()
    if t["mode"] == 0 or t["base rows"]:
        t["whole digest"] = index.take(16)
    return t


def _scale(g: int) -> Fraction:
    return M[g % 4] * Fraction(2) ** (g // 4 - 4)


def read_mixed(artifact: bytes, base: dict[str, tuple[str, tuple[int, ...], bytes]]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The fine-tune's tensors: dtype, shape, bytes by name. Asserts all digests."""
    metadata, roles, _ = common.read_safetensors(artifact)
    assert metadata["peru.format"] == "1" and metadata["peru.kind"] == "mixed"
    dtypes = {int(row[0]): row[1] for row in common.document_rows("### Dtype codes")}
    index = _Bytes(roles["index"][2])
    assert index.byte() == 1
    tensors: list[dict[str, Any]] = []
    for _ in range(index.varint()):
        tensors.append(_tensor(index, tensors[-1]["name"] if tensors else b"", dtypes))
    streams = [
        {"number": index.byte(), "codec": index.byte(), "block": index.varint(), "left": index.varint()} for _ in range(index.varint())
    ]
    blocks, at = roles["blocks"][2] if "blocks" in roles else b"", 0
    values: dict[int, list[int]] = {stream["number"]: [] for stream in streams}
    for _ in range(index.varint()):
        stream, size, digest = streams[index.byte()], index.varint(), index.take(16)
        data, at = blocks[at : at + size], at + size
        assert common.short(data) == digest
        count = min(stream["block"], stream["left"])
        stream["left"] -= count
        kind = {32: "u32", 37: "i32", 38: "i64"}.get(stream["number"], "i16")
        values[stream["number"]] += [int(v) for v in common.decode(data, stream["codec"], kind, count)]
    assert at == len(blocks) and not any(stream["left"] for stream in streams)

    def take(number: int, n: int) -> list[int]:
        taken, values[number] = values[number][:n], values[number][n:]
        assert len(taken) == n
        return taken

    whole, found = _Bytes(roles["whole"][2] if "whole" in roles else b""), {}
    prefix = metadata["peru.prefix"]
    for t in tensors:
        name, width = t["name"].decode(), {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}[t["dtype"]]
        entries = int(np.prod(t["shape"], dtype=np.int64))
        if t["mode"] == 0:
            data = whole.take(entries * width)
            assert common.tensor_digest(t["dtype"], t["shape"], data)[:16] == t["whole digest"]
        else:
            base_name = name[len(prefix) - 1 :] if prefix.startswith("+") else prefix[1:] + name
            had, shape, raw = base[base_name]
            assert common.tensor_digest(had, shape, raw)[:16] == t["base digest"] and had == t["base dtype"]
            data = raw if t["mode"] == 2 else _delta(t, take, np.frombuffer(raw, f"i{len(raw) // int(np.prod(shape))}"), had)
            if t["base rows"]:
                rest = whole.take(entries * width - len(data))
                grown = (t["shape"][0] - t["base rows"], *t["shape"][1:])
                assert common.tensor_digest(t["dtype"], grown, rest)[:16] == t["whole digest"]
                data += rest
        found[name] = (t["dtype"], t["shape"], data)
    assert not any(values.values())
    assert common.checkpoint_digest(found) == metadata["peru.result"]
    return found


def _delta(t: dict[str, Any], take: Any, base: Array, had: str) -> bytes:
    n, dtype = len(base), t["dtype"]
    b = common.cast(base, had, dtype) if had != dtype else base
    low, dense = [Fraction(0)] * n, [Fraction(0)] * n
    if t["parts"] & 1:
        columns, rows = t["columns"], n // t["columns"]
        kept = list(range(rows))
        if t["kept rows"]:
            kept, last = [], -1
            for gap in take(32, t["kept rows"]):
                last += 1 + gap
                kept.append(last)
            assert last < rows
        lefts, rights, steps = take(33, t["rank"]), take(34, t["rank"]), take(35, t["rank"])
        g = 0
        for i in range(t["rank"]):
            g += steps[i]
            left, right = take(lefts[i], len(kept)), take(rights[i], columns)
            for row, a in zip(kept, left, strict=True):
                for column, c in enumerate(right):
                    low[row * columns + column] += a * c * _scale(g)
    if t["parts"] & 2:
        dense = [q * _scale(t["scale"]) for q in take(t["context"], n)]
    assert all(Fraction(float(x)) == x for x in (*low, *dense)), "a sum is not exact"
    d = np.array([float(x) for x in low]) + np.array([float(x) for x in dense])
    wide = np.asarray(common.floats(b, dtype), np.float64)
    with np.errstate(all="ignore"):
        total = wide + d
        rounded = common.cast(total.view(np.int64), "F64", dtype) if dtype != "F64" else total.view(np.int64)
    r = np.where((d == 0) | ~np.isfinite(wide), b, rounded).astype(b.dtype)
    if t["parts"] & 4:
        v = np.array(take({2: 36, 4: 37, 8: 38}[b.dtype.itemsize], n)).astype(b.dtype)
        r = common.order(common.order(r) + v)
    return r.astype(b.dtype).tobytes()
