"""Panels of matrices: differences from the base, which of them are kept, elections among them, and the result on the base.

Arrays are 1-D runs of entries, (n,): bits of a dtype, or floats of the computing kind, `f4` or `f8`. Every product and sum is
rounded, in the order of the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import Kernel, kernels
from peru_cli.kernels.merging.verbs import Flags, Floats, pointers
from peru_cli.kernels.scalars import DTYPES, FLOATS, Float, widen

Ints = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1024  # entries whose sums over tasks are held at once


def _less_base(value: Any, base: Any, i: int) -> Any:
    return value - widen(base[i])


def _as_it_is(value: Any, base: Any, i: int) -> Any:
    return value


against: Any = _as_it_is  # replaced in each variant
_AGAINST = {
    f"{dtype}{' less base' * base}": {**bound, "against": _less_base if base else _as_it_is}
    for (dtype, bound), base in product(DTYPES.items(), (False, True))
}


@kernels("*b *b i8 *f", _AGAINST)
def _values(bits: Any, base: Any, n: int, out: Any) -> int:
    wrong = np.int32(0)
    for i in range(n):
        value = against(widen(bits[i]), base, i)
        out[i] = value
        wrong |= np.int32(value - value != Float(0))
    return np.int64(wrong)  # type: ignore[return-value]


@kernels("*b i8 *f", DTYPES)
def _add_base(base: Any, n: int, vector: Any) -> None:
    for i in range(n):
        vector[i] = vector[i] + widen(base[i])


@kernels("**f i8 i8 *f *f", FLOATS)
def _spread(values: Any, tasks: int, n: int, mean: Any, out: Any) -> None:
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        for i in range(size):
            mean[i] = values[0][start + i]
        for task in range(1, tasks):
            value = values[task]
            for i in range(size):
                mean[i] = mean[i] + value[start + i]
        for i in range(size):
            mean[i] = mean[i] / Float(tasks)
        for task in range(tasks):
            value = values[task]
            for i in range(size):
                rest = value[start + i] - mean[i]
                out[start + i] = rest * rest if task == 0 else out[start + i] + rest * rest
        for i in range(size):
            out[start + i] = out[start + i] / Float(tasks)


@kernels("**f *u1 *f i8 i8 f f *f *f *f", FLOATS)
def _erase(values: Any, flags: Any, weights: Any, tasks: int, n: int, least: Any, scale: Any, signs: Any, divisor: Any, out: Any) -> None:
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        for i in range(size):
            signs[i] = values[0][start + i] * Float(flags[start + i])
        for task in range(1, tasks):
            value = values[task]
            for i in range(size):
                signs[i] = signs[i] + value[start + i] * Float(flags[start + i])
        for i in range(size):
            signs[i] = Float(1) if signs[i] >= Float(0) else Float(-1)
            divisor[i] = Float(0)
            out[start + i] = Float(0)
        for task in range(tasks):
            value, weight = values[task], weights[task]
            for i in range(size):
                kept = value[start + i] * Float(flags[start + i])
                agrees = weight if kept * signs[i] > Float(0) else Float(0)
                out[start + i] = out[start + i] + kept * agrees
                divisor[i] = divisor[i] + agrees
        for i in range(size):
            divide = divisor[i] if divisor[i] > least else least
            out[start + i] = out[start + i] / divide * scale


@kernels("*k i8 i8 i8 *i8", FLOATS)
def _count_bins(keys: Any, n: int, shift: int, first: int, bins: Any) -> None:
    for i in range(n):
        bins[(np.int64(keys[i]) >> shift) + first] += 1


@kernels("*k i8 k k *k", FLOATS)
def _between(keys: Any, n: int, low: Any, high: Any, out: Any) -> int:
    found: Any = 0
    for i in range(n):
        out[found] = keys[i]
        found += np.int64((keys[i] >= low) & (keys[i] <= high))
    return found  # type: ignore[no-any-return]


@kernels("*f *f i8 i8 *f8", FLOATS)
def _add_products(a: Any, b: Any, rows: int, columns: int, sums: Any) -> None:
    for row in range(rows):
        for i in range(columns):
            sums[i] = sums[i] + np.float64(a[row * columns + i]) * np.float64(b[row * columns + i])


def vectors(dtype: str) -> list[Kernel]:
    """The loops of task vectors as float32 and of adding their base again, for `compile_beside`."""
    return [_values[f"{dtype} f4 less base"], _add_base[f"{dtype} f4"]]


def values_of(bits: Ints, base: Ints | None, dtype: str, out: Floats) -> bool:
    """Bits of a dtype as floats, less the base's, bits of that dtype, if it is given; whether all are finite."""
    what = f"{dtype} {out.dtype.str[1:]}{' less base' * (base is not None)}"
    return not _values[what](bits, bits if base is None else base, len(bits), out)


def add_base(vector: Floats, base: Ints, dtype: str) -> Floats:
    """vector + base, the base as bits of a dtype, in the vector's memory."""
    _add_base[f"{dtype} {vector.dtype.str[1:]}"](base, len(vector), vector)
    return vector


def spread(values: Sequence[Floats]) -> Floats:
    """The variance of each entry over the tasks: mean (x - mean x)^2; (n,) each."""
    out = np.empty_like(values[0])
    _spread[out.dtype.str[1:]](pointers(values), len(values), len(out), np.empty(_BLOCK, out.dtype), out)
    return out


def erased(values: Sequence[Floats], flags: Flags, weights: Sequence[float], least: float, scale: float) -> Floats:
    """SCE's merge (methods/entries/sce.py): weighted means over the tasks whose entry has the sign of the sum, times `scale`; (n,).

    Args:
        flags: the entries that count, the others are 0.
        least: a smaller divisor counts as this."""
    out = np.empty_like(values[0])
    blocks = (np.empty(_BLOCK, out.dtype) for _ in range(2))
    given = np.array(weights, out.dtype)
    _erase[out.dtype.str[1:]](pointers(values), flags, given, len(values), len(out), least, scale, *blocks, out)
    return out


def count_bins(keys: Ints, shift: int, first: int, bins: Ints) -> None:
    """Count keys of int32 or int64, (n,), in bins of 2^shift keys each, of which the one of key 0 is number `first`; int64 bins."""
    _count_bins[f"f{keys.itemsize}"](keys, len(keys), shift, first, bins)


def add_products(a: Floats, b: Floats, sums: Floats) -> None:
    """Add a * b of each row to `sums`, row after row; (rows, columns) each, float64 (columns,)."""
    _add_products[a.dtype.str[1:]](a, b, *a.shape, sums)


def between(keys: Ints, low: int, high: int) -> Ints:
    """The keys from `low` to `high`, both included, in order; int32 or int64, (n,) -> (k,)."""
    out = np.empty(len(keys) + 1, keys.dtype)
    found = _between[f"f{keys.itemsize}"](keys, len(keys), low, high, out)
    return out[:found].copy()
