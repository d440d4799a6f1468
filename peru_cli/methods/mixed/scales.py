"""Quantisation steps as integers times powers of two, so that sums of products are exact in float64.

A scale has an index g, four to the octave: `MANTISSAS[g mod 4] * 2^(g div 4 - 4)`, which is 2^(g / 4) to within 1.7%."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.kernels.products import product_into

MANTISSAS = (16, 19, 23, 27)
MAX_SCALE = 2000  # largest magnitude of g: 2^500 either way, well within float64
EXACT_BITS = 53  # mantissa bits of a float64
_SINGLE_BITS = 24  # those of a float32
Integers = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


def scale_of(g: Integers) -> Floats:
    """The exact scales of indices g; integers (k,) -> float64 (k,)."""
    g = np.asarray(g, np.int64)
    scales: Floats = np.ldexp(np.asarray(MANTISSAS, np.float64)[g % 4], (g // 4 - 4).astype(np.int32))
    return scales


def scale_number(scale: Floats) -> Integers:
    """The index of the nearest scale, by ratio; positive float64 (k,) -> int64 (k,)."""
    numbers: Integers = np.clip(np.rint(4 * np.log2(scale)), -MAX_SCALE, MAX_SCALE).astype(np.int64)
    return numbers


def _total(largest_left: Integers, largest_right: Integers, g: Integers) -> tuple[int, int]:
    """The most that a sum over directions can become, in units of 2^e, and e, the least exponent of the scales; e spans at most 53."""
    exponents = [int(number) // 4 for number in g]
    least = min(exponents)
    if max(exponents) - least > EXACT_BITS:
        return 1 << 2 * EXACT_BITS, least
    terms = zip(largest_left, largest_right, g, exponents, strict=True)
    return sum(int(a) * int(b) * MANTISSAS[int(number) % 4] << (exponent - least) for a, b, number, exponent in terms), least


def is_exact(largest_left: Integers, largest_right: Integers, g: Integers) -> bool:
    """Whether float64 is exact for every sum over directions of integers up to these magnitudes times their scales.

    All terms are whole multiples of 2^e, with e the least exponent of the scales. If their magnitudes together stay below
    2^53 times that, no partial sum rounds, in whatever order a processor adds. Three arrays of integers (k,)."""
    return not len(g) or _total(largest_left, largest_right, g)[0] < 1 << EXACT_BITS


def product(left: Integers, right: Integers, g: Integers) -> Floats:
    """sum_i left[:, i] scale(g_i) right[i]; int16 (rows, k), (k, columns), (k,) -> float64 (rows, columns).

    If `is_exact` holds, the result is exact and does not depend on the order of summation."""
    panel = np.zeros((len(left), right.shape[1]))
    _product_into(left, right, g, np.arange(len(left)), panel)
    return panel


def run_of_product(left: Integers, right: Integers, g: Integers, rows: Integers | None, start: int, stop: int) -> Floats:
    """Entries `start` to `stop` of the product, row by row, float64 (stop - start,).

    `rows`, ascending, are the rows of the left factor; the others are zero. None for all rows."""
    columns = right.shape[1]
    first, last = start // columns, -(-stop // columns)
    if rows is None:
        panel = np.empty((last - first, columns))
        _product_into(left[first:last], right, g, np.arange(last - first), panel)
    else:
        panel = np.zeros((last - first, columns))
        a, b = np.searchsorted(rows, (first, last))
        _product_into(left[a:b], right, g, rows[a:b] - first, panel)
    at = start - first * columns
    return panel.reshape(-1)[at : at + stop - start]


def _product_into(left: Integers, right: Integers, g: Integers, rows: Integers, panel: Floats) -> None:
    """The product into some rows of a panel: in float32 where that is exact, too."""
    if not left.size:
        return
    total, least = _total(np.abs(left, dtype=np.int32).max(0), np.abs(right, dtype=np.int32).max(1), g)
    kind = np.float32 if total < 1 << _SINGLE_BITS else np.float64
    units = np.ldexp(np.asarray(MANTISSAS, np.float64)[g % 4], (g // 4 - least).astype(np.int32))
    at = np.ascontiguousarray(rows * panel.shape[1], np.int64)
    product_into((left * units).astype(kind, "C"), right.astype(kind, "C"), 2.0 ** (least - 4), at, panel.reshape(-1))
