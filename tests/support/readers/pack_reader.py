"""A reader of packs written from docs/packs.md, docs/format.md and docs/random.md alone. It shares no code with peru."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from blake3 import blake3
from pcodec import wrapped

from tests.support.readers.format_reader import (
    BITS,
    DTYPES,
    FLOAT,
    MARKER,
    Array,
    Cursor,
    checkpoint_digest,
    kept_entries,
    put_in,
    read_safetensors,
    short,
    tensor_digest,
)

COPY, SUM, TARGET, WHOLE = 0, 1, 2, 3
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def word(key: tuple[str, ...], number: int) -> int:
    """docs/random.md in plain integers."""
    from tests.methods.test_superpose import plain_word

    return plain_word(int(key[0]), list(key[1:]), number)


class PackReader:
    """Everything that a pack holds."""

    kind = "superposed"

    def __init__(self, data: bytes) -> None:
        self.metadata, roles, header = read_safetensors(data)
        self.roles = {name: raw for name, (_, _, raw) in roles.items()}
        index = self.roles["index"]
        digest = self.metadata["peru.digest"].encode()
        blank = header.replace(b'"peru.digest":"' + digest, b'"peru.digest":"' + b"0" * 64)
        assert blake3(b"peru header 1\0" + blank + index).hexdigest().encode() == digest
        assert self.metadata["peru.kind"] == self.kind and len(header) % 8 == 0
        self.cursor = self.open_index(index)
        version = self.cursor.byte()
        assert version in (1, 2)
        self.groups = [(self.text(), self.cursor.varint()) for _ in range(self.cursor.varint())]
        self.tensors = self.read_tensors()
        self.blocks_at = len(self.roles.get("blocks", b""))  # position of the reader
        self.sums = self.read_sums()
        self.contents = [(self.cursor.varint(), self.cursor.take(16)) for _ in range(self.cursor.varint())]
        self.tasks = [self.read_task(number) for number in range(self.cursor.varint())]
        self.residuals = {task["name"]: self.read_residual() for task in self.tasks} if version == 2 else {}
        assert self.cursor.at == len(self.cursor.data) and self.blocks_at == len(self.roles.get("blocks", b""))

    def open_index(self, index: bytes) -> Cursor:
        return Cursor(index)

    def text(self) -> str:
        return self.cursor.take(self.cursor.varint()).decode()

    def name(self, before: bytes) -> bytes:
        shared = self.cursor.varint()
        return before[:shared] + self.cursor.take(self.cursor.varint())

    def shape(self) -> tuple[int, ...]:
        return tuple(self.cursor.varint() for _ in range(self.cursor.varint()))

    def read_tensors(self) -> list[dict[str, Any]]:
        tensors, name = [], b""
        for _ in range(self.cursor.varint()):
            before, name = name, self.name(name)
            assert name > before
            t: dict[str, Any] = {
                "name": name.decode(),
                "mode": self.cursor.byte(),
                "dtype": DTYPES[self.cursor.byte()],
                "shape": self.shape(),
            }
            t["base_dtype"], t["digest"] = DTYPES[self.cursor.byte()], self.cursor.take(16)
            if t["mode"] != COPY:
                coded = self.cursor.varint()
                t["exponent"] = -(coded + 1) // 2 if coded % 2 else coded // 2
            if t["mode"] in (TARGET, WHOLE):
                t["group"], t["place"] = self.cursor.varint(), self.cursor.varint()
            tensors.append(t)
        return tensors

    def read_sums(self) -> dict[str, Array]:
        """Sums by tensor, flat; int32."""
        codec, size, count = self.cursor.byte(), self.cursor.varint(), self.cursor.varint()
        assert codec == 1
        left = sum(math.prod(t["shape"]) for t in self.tensors if t["mode"] != COPY)
        assert left == int(self.metadata["peru.entries"])
        parts, at, blocks = [np.empty(0, np.int32)], 0, self.roles.get("blocks", b"")
        for _ in range(count):
            nbytes, digest = self.cursor.varint(), self.cursor.take(16)
            data, at = blocks[at : at + nbytes], at + nbytes
            assert short(data) == digest
            parts.append(decode(data, np.empty(min(size, left), np.int32)))
            left -= len(parts[-1])
        assert not left
        self.blocks_at = at
        flat, found, tensors = np.concatenate(parts), {}, {}
        for t in self.tensors:
            if t["mode"] != COPY:
                n = math.prod(t["shape"])
                found[t["name"]], flat = flat[:n], flat[n:]
                tensors[t["name"]] = ("I32", t["shape"], found[t["name"]].astype("<i4").tobytes())
        assert checkpoint_digest(tensors) == self.metadata["peru.sums"]
        return found

    def read_task(self, number: int) -> dict[str, Any]:
        cursor = self.cursor
        task: dict[str, Any] = {"name": self.text(), "prefix": self.text(), "shift": cursor.varint(), "digest": cursor.take(32)}
        task["together"], task["decimals"] = cursor.varint(), [float(self.text()) for _ in range(4)]
        task["cosines"] = np.frombuffer(cursor.take(4 * number), "<i2").reshape(number, 2)
        task["own"], name = [], b""
        for _ in range(cursor.varint()):
            name = self.name(name)
            task["own"].append((name.decode(), DTYPES[cursor.byte()], self.shape(), cursor.take(16)))
        task["files"] = {}
        for _ in range(cursor.varint()):
            file, from_base = self.text(), cursor.byte()
            task["files"][file] = None if from_base and (cursor.varint(), cursor.take(16)) else self.content(cursor.varint())
        return task

    def read_residual(self) -> dict[str, tuple[Array, Array, Array, bool]]:
        """For each tensor with corrections: positions, values, values stored apart, whether they are rounded."""
        cursor = self.cursor
        density, _ = self.text(), float(self.text())
        floating = [t for t in self.tensors if t["dtype"] in ("F16", "BF16", "F32", "F64")]
        kept = [cursor.varint() for _ in floating]
        total = sum(math.prod(t["shape"]) for t in floating)
        assert sum(kept) <= int(Fraction(density) * total)
        streams = []
        for _ in range(cursor.varint()):
            s = {"dtype": DTYPES[cursor.byte()], "rounded": cursor.byte(), "positions": cursor.byte(), "values": cursor.byte()}
            s["block"], s["kept"] = cursor.varint(), cursor.varint()
            assert s["kept"] == sum(k for k, t in zip(kept, floating, strict=True) if t["dtype"] == s["dtype"]) > 0
            streams.append(s)
        blocks, left, origins = [], [s["kept"] for s in streams], [0] * len(streams)
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
        size = sum(b["positions"] + b["values"] + b["apart"] * BITS[streams[b["stream"]]["dtype"]] // 8 for b in blocks)
        found = kept_entries(self.roles["blocks"][self.blocks_at : self.blocks_at + size], streams, blocks)
        self.blocks_at += size
        result, at = {}, dict.fromkeys(DTYPES.values(), 0)
        for count, t in zip(kept, floating, strict=True):
            begin = at[t["dtype"]]
            at[t["dtype"]] += math.prod(t["shape"])
            if count:
                number = next(i for i, s in enumerate(streams) if s["dtype"] == t["dtype"])
                positions, values, apart = found[number]
                i, j = np.searchsorted(positions, (begin, at[t["dtype"]]))
                assert j - i == count
                a, b = (int(np.count_nonzero(values[:k] == MARKER)) for k in (i, j))
                result[t["name"]] = positions[i:j] - begin, values[i:j], apart[a:b], bool(streams[number]["rounded"])
        return result

    def correct(self, task: str, tensor: dict[str, Any], raw: bytes) -> bytes:
        """The retrieved tensor with the residual's entries."""
        entries = self.residuals.get(task, {}).get(tensor["name"])
        if entries is None:
            return raw
        bits = np.frombuffer(bytearray(raw), f"<i{BITS[tensor['dtype']] // 8}")
        *three, rounded = entries
        put_in(bits, *three, tensor["dtype"], rounded)
        return bits.tobytes()

    def content(self, number: int) -> bytes:
        at = sum(size for size, _ in self.contents[:number])
        size, digest = self.contents[number]
        data = self.roles["files"][at : at + size]
        assert short(data) == digest
        return data

    def place(self, task: dict[str, Any], tensor: dict[str, Any]) -> dict[str, Any]:
        """The tensor whose sums hold a task's vector."""
        if tensor["mode"] == SUM:
            return tensor
        prefix, depth = self.groups[tensor["group"]]
        how, block = self.metadata["peru.decorrelate"], tensor["place"]
        order = list(range(depth))
        if how == "shift":
            order = [(b + task["shift"]) % depth for b in order]
        for k, i in enumerate(range(depth - 1, 0, -1) if how == "shuffle" else ()):
            j = word((self.metadata["peru.seed"], task["name"], "order", prefix, str(depth)), k) * (i + 1) >> 32
            order[i], order[j] = order[j], order[i]
        return next(t for t in self.tensors if t["mode"] == tensor["mode"] and (t["group"], t["place"]) == (tensor["group"], order[block]))

    def factor(self, task: dict[str, Any]) -> float:
        """What a task's sums are multiplied by."""
        own = self.metadata["peru.scales"].split(",")[self.tasks.index(task)] if "peru.scales" in self.metadata else 1
        return float(self.metadata["peru.scale"]) * float(own)

    def retrieve(self, name: str, base: Tensors) -> Tensors:
        """A task's checkpoint; F32 and BF16, cast as far as the golden pack needs it."""
        task = next(t for t in self.tasks if t["name"] == name)
        result: Tensors = {}
        for tensor in self.tensors:
            dtype, shape, raw = base[tensor["name"]]
            assert (dtype, shape) == (tensor["base_dtype"], tensor["shape"]) and tensor_digest(dtype, shape, raw)[:16] == tensor["digest"]
            fine = task["prefix"][1:] + tensor["name"] if task["prefix"][:1] == "+" else tensor["name"].removeprefix(task["prefix"][1:])
            if tensor["mode"] == COPY:
                result[fine] = (dtype, shape, self.correct(name, tensor, raw))
                continue
            place = self.place(task, tensor)
            vector = self.sums[place["name"]].astype(np.float32) * np.float32(self.factor(task) * 2.0 ** place["exponent"])
            if tensor["mode"] != SUM and self.metadata["peru.signs"] == "yes":
                width = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
                key = (self.metadata["peru.seed"], name, "signs", place["name"])
                for j in range(width):
                    if word(key, j // 32) >> j % 32 & 1:
                        vector[j::width] *= np.float32(-1)
            added = widen(raw, dtype, tensor["dtype"]) if tensor["mode"] != WHOLE else np.float32(0)
            back = narrow(added + vector, tensor["dtype"])
            result[fine] = (tensor["dtype"], shape, self.correct(name, tensor, back))
        at = sum(math.prod(s) * {"F32": 4, "BF16": 2}[d] for t in self.tasks[: self.tasks.index(task)] for _, d, s, _ in t["own"])
        for own, dtype, shape, digest in task["own"]:
            size = math.prod(shape) * {"F32": 4, "BF16": 2}[dtype]
            raw, at = self.roles["whole"][at : at + size], at + size
            assert tensor_digest(dtype, shape, raw)[:16] == digest
            result[own] = (dtype, shape, raw)
        return result


class MaskReader(PackReader):
    """Everything that an artifact of kind `masks` holds: docs/masks.md."""

    kind = "masks"

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        assert all(tensor["mode"] in (COPY, SUM) for tensor in self.tensors) and not self.groups
        tables = {}
        for task in self.tasks:
            threshold, kept, digest = self.rest.take(self.rest.varint()).decode(), self.rest.varint(), self.rest.take(32)
            blocks = [(self.rest.varint(), self.rest.varint(), self.rest.take(16)) for _ in self.table]
            tables[task["name"]] = float(threshold), kept, digest, blocks
        assert self.rest.at == len(self.rest.data)
        self.thresholds = {name: table[0] for name, table in tables.items()}
        self.masks = self.decode_blocks(tables)

    def open_index(self, index: bytes) -> Cursor:
        outer = Cursor(index)
        assert outer.byte() == 1
        inner = outer.take(outer.varint())
        self.rest = Cursor(index[outer.at :])
        return Cursor(inner)

    def read_sums(self) -> dict[str, Array]:
        codec, self.size, count = self.cursor.byte(), self.cursor.varint(), self.cursor.varint()
        assert codec == 1
        self.table = [(self.cursor.varint(), self.cursor.take(16)) for _ in range(count)]
        return {}

    def decode_blocks(self, tables: dict[str, Any]) -> dict[str, dict[str, Array]]:
        """Fills the sums. Returns the masks by task and tensor, flat, 0 and 1."""
        blocks, at, left = self.roles.get("blocks", b""), 0, int(self.metadata["peru.entries"])
        flat = {"": [np.empty(0, np.int32)]} | {name: [np.empty(0, np.uint8)] for name in tables}
        for number, (nbytes, digest) in enumerate(self.table):
            n = min(self.size, left)
            assert short(blocks[at : at + nbytes]) == digest
            flat[""].append(decode(blocks[at : at + nbytes], np.empty(n, np.int32)))
            at, left = at + nbytes, left - n
            for name, (_, _, _, masks) in tables.items():
                ones, nbytes, digest = masks[number]
                data, at = blocks[at : at + nbytes], at + nbytes
                assert short(data) == digest and bool(data) == bool(ones)
                mask, position = np.zeros(n, np.uint8), 0
                for gap in decode(data, np.empty(ones, np.uint32)).tolist() if ones else []:
                    mask[position + gap] = 1
                    position += gap + 1
                flat[name].append(mask)
        assert not left and at == len(blocks)
        found = {}
        for name, parts in flat.items():
            whole, found[name] = np.concatenate(parts), {}
            for t in self.tensors:
                if t["mode"] != COPY:
                    n = math.prod(t["shape"])
                    found[name][t["name"]], whole = whole[:n], whole[n:]
            dtype = "BOOL" if name else "I32"
            shapes = {t["name"]: t["shape"] for t in self.tensors}
            digest = checkpoint_digest({n: (dtype, shapes[n], part.tobytes()) for n, part in found[name].items()})
            assert digest == (tables[name][2].hex() if name else self.metadata["peru.sums"])
            assert not name or sum(int(part.sum()) for part in found[name].values()) == tables[name][1]
        self.sums = found.pop("")
        return found

    def retrieve(self, name: str, base: Tensors) -> Tensors:
        sums, masks = self.sums, self.masks[name]
        self.sums = {tensor: values * masks[tensor].astype(np.int32) for tensor, values in sums.items()}
        result = super().retrieve(name, base)
        self.sums = sums
        return result


def decode(data: bytes, out: Array) -> Array:
    """A pcodec stream with this many numbers of a type."""
    file, used = wrapped.FileDecompressor.new(data)
    chunk, more = file.chunk_decompressor(data[used:], {"int32": "i32", "uint32": "u32"}[str(out.dtype)])
    chunk.read_page_into(data[used + more :], len(out), out)
    return out


def widen(raw: bytes, dtype: str, wanted: str) -> Array:
    """A base's entries cast to a dtype, as float32."""
    values = np.frombuffer(raw, "<u2").astype(np.uint32) << 16 if dtype == "BF16" else np.frombuffer(raw, "<u4")
    floats = values.astype(np.uint32).view(np.float32)
    if wanted == "BF16":
        return (np.frombuffer(narrow(floats, "BF16"), "<u2").astype(np.uint32) << 16).view(np.float32)
    return floats


def narrow(floats: Array, dtype: str) -> bytes:
    """Finite float32 rounded to a dtype, to nearest even."""
    if dtype == "F32":
        return floats.astype(FLOAT["F32"]).tobytes()
    u = floats.view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("<u2").tobytes()
