"""Makes the golden artifacts beside this file: `python tests/golden/make.py`.

Inputs come from integer arithmetic, expected results from the plain NumPy below, which shares no code with peru. Only the
artifacts come from `peru prune`. Run it again only if format 1 is given up: the files define it, and
tests/artifacts/test_format.py compares them literally."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Tensors = dict[str, tuple[str, Array]]  # name -> safetensors dtype, its entries as stored in the file (BF16: uint16)

HERE = Path(__file__).resolve().parent
BITS = {"F64": 64, "I64": 64, "F32": 32, "F16": 16, "BF16": 16, "BOOL": 8, "U8": 8}


@dataclass
class Case:
    """One golden artifact: its inputs, its options, and the result of unpacking."""

    base: Tensors
    fine: Tensors
    options: list[str]
    expected: Tensors
    base_files: dict[str, str] = field(default_factory=dict)
    fine_files: dict[str, str] = field(default_factory=dict)


def noise(shape: tuple[int, ...], seed: int) -> Array:
    """Splitmix64: uint64 of a shape."""
    with np.errstate(over="ignore"):
        x = (np.arange(prod(shape), dtype=np.uint64) + np.uint64(seed << 32) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))).reshape(shape)


def weights(shape: tuple[int, ...], seed: int, bits: int = 12) -> Array:
    """float32 multiples of 2^-bits in (-1/8, 1/8)."""
    whole = (noise(shape, seed) % np.uint64(1 << (bits - 2))).astype(np.int64) - (1 << (bits - 3))
    return whole.astype(np.float32) / np.float32(1 << bits)


def steps(shape: tuple[int, ...], seed: int) -> Array:
    """float32 multiples of 2^-10 from -4 to 4, half of them 0: many equal magnitudes."""
    x = noise(shape, seed)
    return np.where(x >> np.uint64(63), (x % np.uint64(9)).astype(np.int64) - 4, 0).astype(np.float32) / np.float32(1024)


def to_bf16(values: Array) -> Array:
    """float32 without NaN to BF16 patterns, to nearest even."""
    u = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16).reshape(values.shape)


def from_bf16(patterns: Array) -> Array:
    """BF16 patterns as float32."""
    return (patterns.astype(np.uint32) << 16).view(np.float32).reshape(patterns.shape)


def kept(pairs: dict[str, tuple[Array, Array]], changed: dict[str, Array], density: Fraction, scope: str) -> dict[str, Array]:
    """Which entries are kept, by sorting all of them; `pairs` are float32, base first."""
    masks = {name: np.zeros(mask.size, bool) for name, mask in changed.items()}
    names = sorted(pairs)
    for group in [names] if scope == "global" else [[name] for name in names]:
        ranked = []
        for name in group:
            with np.errstate(invalid="ignore", over="ignore"):
                keys = np.abs(pairs[name][1] - pairs[name][0]).reshape(-1)
            keys[~np.isfinite(keys)] = np.inf
            ranked += [(-float(keys[i]), name, int(i)) for i in np.flatnonzero(changed[name])]
        n = int(density * sum(pairs[name][0].size for name in group))
        for _, name, i in sorted(ranked)[:n]:
            masks[name][i] = True
    return {name: mask.reshape(changed[name].shape) for name, mask in masks.items()}


def tiny() -> Case:
    """One tensor, two entries kept."""
    base = np.array([0x3F80, 0xBF80, 0x0000, 0x4000, 0x3F00, 0x3E80, 0xC000, 0x4040], np.uint16).reshape(2, 4)
    fine = base.copy()
    fine[0, 1], fine[1, 2], fine[1, 3] = 0xBF82, 0xC001, 0x4041  # by 2^-6, 2^-6, 2^-6: the last of the equals is dropped
    expected = fine.copy()
    expected[1, 3] = base[1, 3]
    tensors = [{"w": ("BF16", array)} for array in (base, fine, expected)]
    return Case(tensors[0], tensors[1], ["--keep", "25%"], tensors[2])


def heads() -> Case:
    """BF16 behind a prefix, one tensor's base in F32, a head that the base lacks, a base tensor without counterpart."""
    shapes = {"embed.weight": (50, 12), "layer.0.bias": (24,), "layer.0.weight": (16, 24), "layer.10.weight": (16, 24)}
    base: Tensors = {"pooler.weight": ("BF16", to_bf16(weights((6, 6), 1)))}
    fine: Tensors = {
        "bert.classifier": ("BF16", to_bf16(weights((5,), 2))),
        "classifier.weight": ("BF16", to_bf16(weights((3, 24), 3))),
    }
    pairs, changed = {}, {}
    for seed, (name, shape) in enumerate(shapes.items(), 10):
        wide = weights(shape, seed, bits=14)  # more bits than BF16 has: rounded to nearest even, ties included
        base[name] = ("F32", wide) if name == "layer.0.weight" else ("BF16", to_bf16(wide))
        cast = to_bf16(wide)
        moved = to_bf16(from_bf16(cast) + steps(shape, seed + 100))
        fine["bert." + name] = ("BF16", moved)
        pairs["bert." + name] = from_bf16(cast), from_bf16(moved)
        changed["bert." + name] = cast != moved
    masks = kept(pairs, changed, Fraction(1, 10), "global")
    expected = dict(fine)
    for name, mask in masks.items():
        expected[name] = ("BF16", np.where(mask, fine[name][1], to_bf16(pairs[name][0])))
    return Case(base, fine, ["--keep", "10%"], expected)


def grown() -> Case:
    """F32 with rounded values, NaN and infinities apart, a grown vocabulary, side files, integers copied and stored whole."""
    shapes = {"embed.weight": (40, 8), "linear.bias": (16,), "linear.weight": (24, 16)}
    base: Tensors = {"position_ids": ("I64", np.arange(20, dtype=np.int64)), "steps": ("I64", np.array(7, np.int64))}
    fine: Tensors = {"position_ids": base["position_ids"], "steps": ("I64", np.array(8, np.int64))}
    for seed, (name, shape) in enumerate(shapes.items(), 20):
        array = weights(shape, seed, bits=20)
        base[name] = ("F32", array)
        fine[name] = ("F32", (array + steps(shape, seed + 100) * np.float32(1 + 2**-9)).astype(np.float32))
    flat_base, flat = base["linear.weight"][1].reshape(-1), fine["linear.weight"][1].reshape(-1)
    flat.view(np.uint32)[[3, 5]] = 0x7FC01234, 0xFF800000  # a NaN with payload, -infinity
    flat_base.view(np.uint32)[9] = 0x7F800000
    flat_base.view(np.uint32)[11] = flat.view(np.uint32)[11] = 0x7FC00000  # unchanged: does not compete
    flat_base.view(np.uint32)[13], flat.view(np.uint32)[13] = 0xFF7FFFFF, 0x7F7FFFFF  # the difference overflows
    flat_base.view(np.uint32)[15], flat.view(np.uint32)[15] = 0, 0x7F7FFFFF  # the difference rounds to infinity
    pairs = {name: (base[name][1], fine[name][1]) for name in shapes}
    changed = {name: a.view(np.uint32) != b.view(np.uint32) for name, (a, b) in pairs.items()}
    expected = dict(fine)
    for name, mask in kept(pairs, changed, Fraction(1, 8), "tensor").items():
        a, b = pairs[name]
        with np.errstate(invalid="ignore", over="ignore"):
            difference = b - a
            finite = np.isfinite(difference)
            rounded = from_bf16(to_bf16(np.where(finite, difference, 0)))
            stored = np.where(finite & np.isfinite(a + rounded), (a + rounded).view(np.uint32), b.view(np.uint32))
        expected[name] = ("F32", np.where(mask, stored, a.view(np.uint32)).view(np.float32))
    new_rows = weights((3, 8), 30)
    fine["embed.weight"], expected["embed.weight"] = (
        ("F32", np.concatenate((table["embed.weight"][1], new_rows))) for table in (fine, expected)
    )
    same = '{"max_length": 20}\n'
    return Case(
        base,
        fine,
        ["--keep", "12.5%", "--scope", "tensor", "--base-id", "example/base@0123abc"],
        expected,
        {"config.json": '{"vocab_size": 40}\n', "generation_config.json": same},
        {"config.json": '{"vocab_size": 43}\n', "generation_config.json": same},
    )


def lossless() -> Case:
    """F16 bit for bit: zeros of both signs, NaN payloads, infinities; an untouched tensor, a scalar, an empty one, bytes."""
    shape = (30, 20)
    values = weights(shape, 40).astype(np.float16).view(np.uint16)
    moved = (values + (noise(shape, 41) % np.uint64(5) == 0) * np.uint16(1)).astype(np.uint16)
    odd = [(0x0000, 0x8000), (0x8000, 0x0000), (0x7E00, 0x7C01), (0x3C00, 0xFE55), (0x7C00, 0xFC00), (0xFBFF, 0x7BFF)]
    for i, (old, new) in enumerate(odd):
        values[2, i], moved[2, i] = old, new
    frozen = weights((10,), 42).astype(np.float16)
    base: Tensors = {
        "weight": ("F16", values),
        "frozen": ("F16", frozen),
        "scalar": ("F16", np.array(0x3C00, np.uint16)),
        "empty": ("F16", np.zeros((0, 3), np.uint16)),
        "mask": ("BOOL", np.array([0, 1, 1, 0], np.uint8)),
        "table": ("U8", np.arange(9, dtype=np.uint8)),
    }
    fine = {**base, "weight": ("F16", moved), "scalar": ("F16", np.array(0xBC00, np.uint16)), "mask": ("BOOL", np.ones(4, np.uint8))}
    return Case({"model." + name: tensor for name, tensor in base.items()}, fine, ["--lossless"], fine)


def octaves() -> Case:
    """BF16 and F16 differences of which sign and octave are kept, some stored apart."""
    base: Tensors = {}
    fine: Tensors = {}
    shape = (20, 24)
    small = (noise(shape, 52) % np.uint64(2001)).astype(np.int64) - 1000
    moved = small.astype(np.float32) * np.abs(small).astype(np.float32) / np.float32(1 << 26)  # every octave up to 2^-6
    for seed, dtype in ((50, "BF16"), (51, "F16")):
        wide = weights(shape, seed)
        if dtype == "BF16":
            a, b = to_bf16(wide), to_bf16(from_bf16(to_bf16(wide)) + moved)
            a[0, :3], b[0, :3] = (0x7F7F, 0x3F80, 0x7F80), (0xFF7F, 0x7FC1, 0x3F80)  # overflow; a NaN; from infinity
        else:
            a, b = wide.astype(np.float16).view(np.uint16), (wide.astype(np.float16) + moved).astype(np.float16).view(np.uint16)
            a[0, :2], b[0, :2] = (0xFBFF, 0x0000), (0x7BFF, 0x7BFF)  # the sum overflows; it does not
        base[dtype], fine[dtype] = (dtype, a), (dtype, b)
    floats = {"BF16": from_bf16, "F16": lambda bits: bits.view(np.float16).astype(np.float32)}
    pairs = {name: (floats[name](base[name][1]), floats[name](fine[name][1])) for name in base}
    changed = {name: base[name][1] != fine[name][1] for name in base}
    masks = kept(pairs, changed, Fraction(1, 4), "global")
    with np.errstate(invalid="ignore", over="ignore"):
        keys = np.concatenate([np.abs(b - a)[masks[name]] for name, (a, b) in pairs.items()])
    least = Fraction(float(keys[np.isfinite(keys)].min()))
    expected: Tensors = {}
    for name, (a, b) in pairs.items():
        back = base[name][1].copy()
        for i in zip(*np.nonzero(masks[name]), strict=True):
            back[i] = fine[name][1][i]
            with np.errstate(invalid="ignore", over="ignore"):
                difference = float(b[i] - a[i])
            if np.isfinite(difference):
                size, octave = abs(Fraction(difference)) / least, 0
                while 2 ** (octave + 1) <= size:
                    octave += 1
                level = from_bf16(to_bf16(np.array(float(least * Fraction(11, 8) * 2**octave), np.float32)))
                with np.errstate(over="ignore"):
                    total = a[i] + np.copysign(level, np.float32(difference))
                    coded = to_bf16(total) if name == "BF16" else total.astype(np.float16).view(np.uint16)
                back[i] = coded if np.isfinite(floats[name](np.array(coded, np.uint16))) else back[i]
        expected[name] = (name, back)
    return Case(base, fine, ["--keep", "25%", "--values", "log2"], expected)


def signs() -> Case:
    """A third of the increases and of the decreases of each tensor, as signs with one scale a tensor; some stored apart."""
    base: Tensors = {}
    fine: Tensors = {}
    expected: Tensors = {}
    kinds = (("F32", (9, 7)), ("BF16", (6, 5)), ("F64", (4, 5)), ("F32", (2,)))
    for seed, (dtype, shape) in enumerate(kinds, 60):
        start, moved, name = weights(shape, seed), steps(shape, seed + 10), f"{dtype}.{seed}"
        if dtype == "BF16":
            a, b = to_bf16(start), to_bf16(from_bf16(to_bf16(start)) + moved)
            a[0, :3], b[0, :3] = (0x7F7F, 0x3F80, 0x7F7F), (0xFF7F, 0x7FC1, 0x7F7E)  # overflow; a NaN; the sum fits
        else:
            a, b = (array.astype(np.float32 if dtype == "F32" else np.float64) for array in (start, start + moved))
            a[..., 0], b[..., 0] = -0.0, 0.0  # no change of the value
        base[name], fine[name] = (dtype, a), (dtype, b)
        before, after = (from_bf16(a), from_bf16(b)) if dtype == "BF16" else (a, b)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = after - before
        keys = np.where(np.isfinite(difference), np.abs(difference), np.inf)
        mask = np.zeros(shape, bool)
        grows = (difference > 0) | np.isnan(difference)  # the only NaN is a positive one
        for side in (grows, difference < 0):
            count = int(side.sum()) // 3
            mask |= side & (keys >= (np.sort(keys[side])[-count] if count else 0))
        counted = mask & np.isfinite(difference)
        scale = np.float64(difference[counted].astype(np.float64) ** 2).sum() / max(int(counted.sum()), 1)
        step = np.sqrt(scale).astype(difference.dtype)
        with np.errstate(over="ignore"):
            total = np.where(grows, before + step, before - step)
        bits = to_bf16(total) if dtype == "BF16" else total
        fits = np.isfinite(difference) & np.isfinite(from_bf16(bits) if dtype == "BF16" else bits)
        expected[name] = dtype, np.where(mask, np.where(fits, bits, b), a)
    return Case(base, fine, ["--keep", "33.4%", "--scope", "sign", "--values", "sign"], expected)


CASES = {"tiny": tiny, "heads": heads, "grown": grown, "lossless": lossless, "octaves": octaves, "signs": signs}


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """In the order that peru writes: wide dtypes first, then by name."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in sorted(tensors.items(), key=lambda item: (-BITS[item[1][0]], item[0])):
        raw = array.astype(array.dtype.newbyteorder("<")).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_model(folder: Path, tensors: Tensors, files: dict[str, str]) -> None:
    """A checkpoint folder."""
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", tensors)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())


def main() -> None:
    """Replace golden files: the named ones, or all."""
    for name in sys.argv[1:] or CASES:
        make = CASES[name]
        case, folder = make(), HERE / name
        if folder.exists():
            shutil.rmtree(folder)
        write_model(folder / "base", case.base, case.base_files)
        write_safetensors(folder / "expected.safetensors", case.expected)
        with tempfile.TemporaryDirectory() as scratch:
            write_model(Path(scratch, "fine"), case.fine, case.fine_files)
            model = f"golden={scratch}/fine"
            command = [sys.executable, "-m", "peru_cli", "prune", model, "-b", folder / "base", "-o", folder / "artifact.safetensors"]
            subprocess.run([*command, *case.options], check=True)


if __name__ == "__main__":
    main()
