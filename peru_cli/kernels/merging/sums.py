"""Sums over many entries, by halving: the same on every processor, unlike NumPy's.

Arrays are 1-D runs of entries, (n,): bits of a dtype, or floats of the computing kind, `f4` or `f8`. Sums are float64. The first three
halvings are computed together, in their order."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import kernels
from peru_cli.kernels.merging.verbs import Flags, Floats, pointers
from peru_cli.kernels.scalars import DTYPES, FLOATS, Float, widen

_BLOCK = 64  # entries of each eighth that are widened at once
_ALL = np.ones(1, np.bool_)  # a placeholder if there are no flags
_NO_BASE = {size: np.zeros(1, f"i{size}") for size in (1, 2, 4, 8)}


def _absolute(value: Any, flags: Any, i: int) -> Any:
    return abs(value)


def _absolute_flagged(value: Any, flags: Any, i: int) -> Any:
    return abs(value) * Float(flags[i])


def _square_flagged(value: Any, flags: Any, i: int) -> Any:
    kept = value * Float(flags[i])
    return kept * kept


def _less_base(value: Any, base: Any, i: int) -> Any:
    return value - widen(base[i])


def _as_it_is(value: Any, base: Any, i: int) -> Any:
    return value


summed: Any = _absolute  # these are replaced in each variant of a loop
against: Any = _as_it_is
_SUMMED = {
    f"{kind} {name}": {**bound, "summed": function}
    for kind, bound in FLOATS.items()
    for name, function in (("absolute", _absolute), ("absolute flagged", _absolute_flagged), ("square flagged", _square_flagged))
}
_AGAINST = {
    f"{dtype}{' less base' * base}": {**bound, "against": _less_base if base else _as_it_is}
    for (dtype, bound), base in product(DTYPES.items(), (False, True))
}


def _at(values: Any, flags: Any, i: int) -> Any:
    return np.float64(summed(values[i], flags, i))


def _halve(sums: Any, size: Any) -> None:
    while size > 1:
        half = size // 2
        for i in range(half):
            sums[i] = sums[i] + sums[half + i]
        if size % 2:
            sums[0] = sums[0] + sums[size - 1]
        size = half


@kernels("*f *u1 i8 *f8", _SUMMED)
def _halved_sum(values: Any, flags: Any, n: int, sums: Any) -> None:
    size: Any = n // 2
    if n % 8:
        for i in range(size):
            sums[i] = _at(values, flags, i) + _at(values, flags, size + i)
        if n % 2:
            sums[0] = sums[0] + _at(values, flags, n - 1)
    else:
        size = n // 8
        for i in range(size):
            w = _at(values, flags, i) + _at(values, flags, i + 4 * size)
            x = _at(values, flags, i + size) + _at(values, flags, i + 5 * size)
            y = _at(values, flags, i + 2 * size) + _at(values, flags, i + 6 * size)
            z = _at(values, flags, i + 3 * size) + _at(values, flags, i + 7 * size)
            sums[i] = (w + y) + (x + z)
    _halve(sums, size)


def _times(wide: Any, a: Any, b: Any, part: int) -> Any:
    return wide[a + part * _BLOCK] * wide[b + part * _BLOCK]


# Distances between the eighths are constant, so that the compiler can tell what overlaps.
@kernels("**b *b i8 i8 i8 *f8 *f8 *f8", _AGAINST)
def _inner_products(bits: Any, base: Any, tasks: int, n: int, chunk: int, wide: Any, room: Any, sums: Any) -> None:
    eighth = chunk // 8
    for start in range(0, n, chunk):
        for begin in range(0, eighth, _BLOCK):
            for part in range(8):
                first = start + part * eighth + begin
                there = max(min(_BLOCK, n - first), 0)
                for task in range(tasks):
                    mine, to = bits[task], (task * 8 + part) * _BLOCK
                    for i in range(there):
                        wide[to + i] = np.float64(against(widen(mine[first + i]), base, first + i))
                    for i in range(there, _BLOCK):
                        wide[to + i] = 0.0
            pair: Any = 0
            for one in range(tasks):
                for two in range(one, tasks):
                    a, b, to = one * 8 * _BLOCK, two * 8 * _BLOCK, pair * eighth + begin
                    for i in range(_BLOCK):
                        w = _times(wide, a + i, b + i, 0) + _times(wide, a + i, b + i, 4)
                        x = _times(wide, a + i, b + i, 1) + _times(wide, a + i, b + i, 5)
                        y = _times(wide, a + i, b + i, 2) + _times(wide, a + i, b + i, 6)
                        z = _times(wide, a + i, b + i, 3) + _times(wide, a + i, b + i, 7)
                        room[to + i] = (w + y) + (x + z)
                    pair += 1
        for each in range(pair):
            half, first = eighth // 2, each * eighth
            while half:
                for i in range(half):
                    room[first + i] = room[first + i] + room[first + half + i]
                half //= 2
            sums[start // chunk + each * (-(-n // chunk))] = room[first]


def halved_sum(values: Floats, what: str, flags: Flags | None = None) -> float:
    """The sum over all entries; (n,).

    Args:
        what: of each entry the "absolute" value or the "square", rounded like the entries.
        flags: the entries that count; None for all. Squares want them."""
    if len(values) < 2:
        parts = np.abs(values) if what == "absolute" else values * values
        return float((parts if flags is None else parts * flags).sum())
    sums = np.empty(len(values) // 2)
    variant = f"{values.dtype.str[1:]} {what}{' flagged' * (flags is not None)}"
    _halved_sum[variant](np.ascontiguousarray(values), _ALL if flags is None else flags, len(values), sums)
    return float(sums[0])


def inner_products(bits: Sequence[Any], base: Any, dtype: str, chunk: int) -> list[list[list[float]]]:
    """Sums of products over chunks of entries, a power of two of at least 512, each by halving.

    A table (tasks, tasks) of lists, from one array of each task, (n,).

    Args:
        bits: entries of a dtype of which the loop computes in a kind: "BF16 f4".
        base: the base's, which are subtracted first; None for nothing."""
    tasks, n = range(len(bits)), len(bits[0])
    pairs = [(one, two) for one in tasks for two in tasks[one:]]
    sums = np.empty((len(pairs), -(-n // chunk)))
    wide = np.empty((len(tasks) * 8 + 1) * _BLOCK + len(pairs) * chunk // 8)
    room = wide[len(tasks) * 8 * _BLOCK + _BLOCK // 2 :]  # processors take addresses 4,096 bytes apart for the same: half a block from them
    what = f"{dtype}{' less base' * (base is not None)}"
    given = pointers(bits), _NO_BASE[bits[0].dtype.itemsize] if base is None else base
    _inner_products[what](*given, len(bits), n, chunk, wide, room, sums)
    found: dict[tuple[int, int], list[float]] = dict(zip(pairs, sums.tolist(), strict=True))
    return [[found[min(one, two), max(one, two)] for two in tasks] for one in tasks]
