"""Sums of products of integer factors, and base + difference: the operations that unpack every entry of a mixed artifact.

Factors are floats that hold integers so small that no product and no sum rounds (methods/mixed/scales.py). So float32, if it is
wide enough, gives the same numbers as float64, and the order of additions does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import kernels
from peru_cli.kernels.scalars import DTYPES, FLOATS, ROUNDED, Float, narrow, widen

Floats = np.ndarray[Any, np.dtype[Any]]
Integers = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1024  # columns processed together: their right factors stay in the second-level cache from row to row, their sums in the first


# Most entries of coarse factors are 0. So a row first selects the directions that it has, and processes four at a time.
@kernels("*f *f i8 i8 i8 *i8 f8 *i8 *f *f *f8", FLOATS)
def _product(
    left: Any, right: Any, rows: int, rank: int, columns: int, at: Any, unit: float, which: Any, weights: Any, sums: Any, out: Any
) -> None:  # fmt: skip
    for begin in range(0, columns, _BLOCK):
        size = min(_BLOCK, columns - begin)
        for row in range(rows):
            count: Any = 0
            for i in range(rank):
                weight = left[row * rank + i]
                which[count] = i * columns + begin
                weights[count] = weight
                count += np.int64(weight != Float(0))
            for j in range(size):
                sums[j] = Float(0)
            fours = count - count % 4
            for i in range(0, fours, 4):
                a, b, c, d = which[i], which[i + 1], which[i + 2], which[i + 3]
                e, f, g, h = weights[i], weights[i + 1], weights[i + 2], weights[i + 3]
                for j in range(size):
                    sums[j] = sums[j] + ((e * right[a + j] + f * right[b + j]) + (g * right[c + j] + h * right[d + j]))
            for i in range(fours, count):
                a, e = which[i], weights[i]
                for j in range(size):
                    sums[j] = sums[j] + e * right[a + j]
            first = at[row] + begin
            for j in range(size):
                out[first + j] = np.float64(sums[j]) * unit


_ROUNDED = {name: {**DTYPES[f"{name} f8"], **bound} for name, bound in ROUNDED.items()}


@kernels("*b *f8 i8 *b", _ROUNDED)
def _add(bits: Any, differences: Any, n: int, out: Any) -> None:
    for i in range(n):
        wide = widen(bits[i])
        rounded = narrow(np.float32(wide + differences[i]))
        out[i] = bits[i] if differences[i] == 0.0 or wide - wide != 0.0 else rounded


def product_into(left: Floats, right: Floats, unit: float, at: Integers, out: Floats) -> None:
    """unit * left @ right, each row into `out` from entry `at` on.

    Args:
        left, right: (rows, k) and (k, columns), both float32 or both float64, holding integers whose sums do not round.
        unit: a power of two.
        at: int64 (rows,).
        out: float64."""
    rows, rank = left.shape
    room = np.empty(rank, np.int64), np.empty(rank, left.dtype), np.empty(_BLOCK, left.dtype)
    _product[left.dtype.str[1:]](left, right, rows, rank, right.shape[1], at, unit, *room, out)


def added(bits: Any, differences: Floats, dtype: str) -> Any:
    """base + differences in float64, rounded to BF16 or F16 by way of float32, as bits; int16 (n,), float64 (n,).

    Entries whose difference is 0 or whose base is not finite stay unchanged."""
    out = np.empty(len(bits), np.int16)
    _add[dtype](np.ascontiguousarray(bits), np.ascontiguousarray(differences), len(bits), out)
    return out
