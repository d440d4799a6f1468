"""Merges of tiles: add the kept entries of task vectors, trim them, elect signs, add the result to the base.

Arrays are 1-D runs of entries, (n,): floats of the computing kind, `f4` or `f8`, and bools for kept entries. Every product and
sum is rounded, in the order of the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import Kernel, kernel, kernels
from peru_cli.kernels.scalars import DTYPES, FLOATS, MAGNITUDE, ROUNDED, Float, Key, narrow, widen

Floats = np.ndarray[Any, np.dtype[Any]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
_BLOCK = 1024  # entries whose sums over tasks are held at once
_LEAST = 1e-8  # a sum of weights below this counts as 0
_ALL = np.ones(1, np.bool_)  # a placeholder if there are no flags


def _less_base(value: Any, base: Any, i: int) -> Any:
    return value - base[i]


def _as_it_is(value: Any, unused: Any, i: int) -> Any:
    return value


def _where_flagged(value: Any, flags: Any, i: int) -> Any:
    return value * Float(flags[i])


def _added(value: Any, total: Any, i: int) -> Any:
    return total[i] + value


against: Any = _as_it_is  # these three are replaced in each variant of a loop
flagged: Any = _as_it_is
onto: Any = _as_it_is

_PARTS = {
    f"{dtype}{' less base' * base}{' flagged' * flags}{' added' * more}": {
        **bound,
        "against": _less_base if base else _as_it_is,
        "flagged": _where_flagged if flags else _as_it_is,
        "onto": _added if more else _as_it_is,
    }
    for (dtype, bound), base, flags, more in product(DTYPES.items(), *[(False, True)] * 3)
}


@kernels("*b *f *u1 i8 f f *f", _PARTS)
def _accumulate(bits: Any, base: Any, flags: Any, n: int, first: Any, second: Any, total: Any) -> None:
    for i in range(n):
        total[i] = onto(flagged(against(widen(bits[i]), base, i), flags, i) * first * second, total, i)


@kernels("*k i8 k *u1 *u1", FLOATS)
def _trim(patterns: Any, n: int, threshold: Any, above: Any, at_least: Any) -> int:
    equals: Any = 0
    for start in range(0, n, _BLOCK):
        same = np.int32(0)
        for i in range(start, min(start + _BLOCK, n)):
            key = Key(patterns[i] & MAGNITUDE)
            above[i] = np.uint8(key > threshold)
            at_least[i] = np.uint8(key >= threshold)
            same = np.int32(same + np.int32(key == threshold))
        equals += same
    return equals  # type: ignore[no-any-return]


def _weighted(value: Any, flag: Any, first: Any, second: Any) -> Any:
    return value * Float(flag) * first * second


def _vote(values: Any, flags: Any, before: Any, task: int, start: int, size: int, total: Any) -> None:
    """total = or += a task's votes for a block."""
    value, flag, first, second = values[task], flags[task], before[2 * task], before[2 * task + 1]
    if task == 0:
        for i in range(size):
            total[i] = _weighted(value[start + i], flag[start + i], first, second)
    else:
        for i in range(size):
            total[i] = total[i] + _weighted(value[start + i], flag[start + i], first, second)


# Parts of an election on a block, which elections.py has, too. Arrays hold an entry for each of the block.


def decide(signs: Any, divisor: Any, total: Any, size: int, strict: int) -> None:
    """Sums of votes become the elected signs; divisors and totals begin."""
    for i in range(size):
        positive = signs[i] > Float(0) if strict else signs[i] >= Float(0)
        signs[i] = Float(1) if positive else Float(-1)
        divisor[i] = Float(0)
        total[i] = Float(-0.0)  # adding any first summand to -0.0 leaves it unchanged


def join(vote: Any, i: int, weight: Any, share: Any, signs: Any, divisor: Any, total: Any) -> None:
    """Add a task's vote if it agrees with the elected sign."""
    part = vote * signs[i]
    part = Float(0) if part <= Float(0) else part  # |entry| if it agrees
    divisor[i] = divisor[i] + (share if part > Float(0) else Float(0))
    total[i] = total[i] + part * weight


def balance(votes: Any, size: int) -> Any:
    """How many sums are positive, minus how many are negative."""
    more = np.int32(0)
    for i in range(size):
        more = np.int32(more + np.int32(votes[i] > Float(0)) - np.int32(votes[i] < Float(0)))
    return more


@kernels("**f **u1 *f *f *f i8 i8 i8 i8 *f *f *f *f", FLOATS)
def _disjoint(
    values: Any, flags: Any, before: Any, after: Any, shares: Any, tasks: int, n: int, mean: int, strict: int,
    signs: Any, divisor: Any, total: Any, out: Any,
) -> None:  # fmt: skip
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        for task in range(tasks):
            _vote(values, flags, before, task, start, size, signs)
        decide(signs, divisor, total, size, strict)
        for task in range(tasks):
            value, flag, first, second = values[task], flags[task], before[2 * task], before[2 * task + 1]
            weight, share = after[task], shares[task]
            for i in range(size):
                join(_weighted(value[start + i], flag[start + i], first, second), i, weight, share, signs, divisor, total)
        if mean:
            for i in range(size):
                divide = Float(1) if abs(divisor[i]) < Float(_LEAST) else divisor[i]
                out[start + i] = total[i] / divide * signs[i]
        else:
            for i in range(size):
                out[start + i] = total[i] * signs[i]


@kernels("**f **u1 *f i8 i8 *f", FLOATS)
def _elected(values: Any, flags: Any, before: Any, tasks: int, n: int, total: Any) -> int:
    elected: Any = 0
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        for task in range(tasks):
            _vote(values, flags, before, task, start, size, total)
        elected += balance(total, size)
    return elected  # type: ignore[no-any-return]


@kernels("*f i8 f f", FLOATS)
def _step(vector: Any, n: int, step: Any, least: Any) -> None:
    for i in range(n):
        value = vector[i]
        size = abs(value)
        share = step / (size if size > least else least)
        share = share if share > Float(0) else Float(0)
        vector[i] = value * (share if share < Float(1) else Float(1))


@kernels("*f *f i8 f", FLOATS)
def _onto(vector: Any, base: Any, n: int, scale: Any) -> None:
    for i in range(n):
        vector[i] = vector[i] * scale + base[i]


@kernels("*f4 i8 *u2", ROUNDED)
def _narrow(numbers: Any, n: int, out: Any) -> None:
    for i in range(n):
        out[i] = narrow(numbers[i])


@kernels("*b i8 *f", {dtype: DTYPES[f"{dtype} f4"] for dtype in ROUNDED})
def _widen(bits: Any, n: int, out: Any) -> None:
    for i in range(n):
        out[i] = widen(bits[i])


@kernel("*u8 i8 i8 *f8 *f8")
def _by_rank(keys: Any, rows: int, columns: int, table: Any, out: Any) -> None:
    for row in range(rows):
        start = row * columns
        for rank in range(columns):
            out[start + np.int64(keys[start + rank] & np.uint64(0xFFFFFFFF))] = table[rank]


Signed: Any = np.int16  # replaced in each variant
_WIDTHS = {f"i{size}": {"s": f"i{size}", "Signed": np.dtype(f"i{size}").type} for size in (1, 2, 4, 8)}


@kernels("*s i8 s", _WIDTHS)
def _largest_magnitude(bits: Any, n: int, mask: Any) -> int:
    largest = Signed(0)
    for i in range(n):
        pattern = Signed(bits[i] & mask)
        largest = pattern if pattern > largest else largest
    return largest  # type: ignore[no-any-return]


def accumulate(
    total: Floats, bits: Floats, dtype: str, base: Floats | None, flags: Flags | None, factors: tuple[float, float], first: bool
) -> None:
    """total (+)= (bits - base) * flags * factors, step by step; `first` overwrites the total.

    Args:
        bits: entries of a dtype, as integers or floats.
        base: floats to subtract; None for nothing.
        flags: entries to keep, the others become 0; None for all."""
    what = f"{dtype} {total.dtype.str[1:]}{' less base' * (base is not None)}{' flagged' * (flags is not None)}{' added' * (not first)}"
    others = total if base is None else base, _ALL if flags is None else flags
    _accumulate[what](bits, *others, len(total), *factors, total)


def trim(values: Floats, threshold: int) -> tuple[Flags, Flags, int]:
    """Entries whose magnitude pattern is above a threshold, those at or above it, and the number of equals; bools (n,)."""
    above, at_least = np.empty(len(values), np.bool_), np.empty(len(values), np.bool_)
    return above, at_least, _trim[values.dtype.str[1:]](values, len(values), threshold, above, at_least)


def pointers(arrays: Sequence[Any]) -> Any:
    """The addresses of arrays of one length, for a loop that takes `**`."""
    assert all(array.flags.c_contiguous and len(array) == len(arrays[0]) for array in arrays)
    return np.array([array.__array_interface__["data"][0] for array in arrays], np.uint64)


def _of_tasks(values: Sequence[Floats], flags: Sequence[Flags | None], before: Sequence[tuple[float, float]]) -> tuple[Any, ...]:
    """Arguments that loops over tasks share, and the arrays that they point to."""
    ones = np.ones(len(values[0]), np.bool_) if any(each is None for each in flags) else _ALL
    held = [ones if each is None else each for each in flags]
    kind = values[0].dtype
    return kind.str[1:], (pointers(values), pointers(held), np.array(before, kind).reshape(-1)), held


def disjoins() -> list[Kernel]:
    """The loops of `disjoint` on float32, for `compile_beside`."""
    return [_disjoint["f4"]]


def disjoint(
    values: Sequence[Floats],
    flags: Sequence[Flags | None],
    before: Sequence[tuple[float, float]],
    after: Sequence[float],
    shares: Sequence[float] | None,
    strict: bool,
    out: Floats,
) -> Floats:
    """TIES' election and disjoint merge (methods/entries/ties.py), into `out`; (n,).

    Args:
        values, flags, before: a task's vote is value * flag * both factors; one of each for every task.
        after: factor of the votes that agree with the elected sign.
        shares: divide by their sum over the tasks that agree (by 1 if that is 0); None does not divide.
        strict: a sum of 0 elects -, otherwise +."""
    kind, arguments, _held = _of_tasks(values, flags, before)
    mean, tasks, n = shares is not None, len(values), len(out)
    given = np.array(after, out.dtype), np.array(shares if shares is not None else after, out.dtype)
    blocks = (np.empty(_BLOCK, out.dtype) for _ in range(3))
    _disjoint[kind](*arguments, *given, tasks, n, mean, strict, *blocks, out)
    return out


def elected(values: Sequence[Floats], flags: Sequence[Flags | None], before: Sequence[tuple[float, float]]) -> int:
    """The number of entries that elect + minus the number that elect -, with votes as in `disjoint`."""
    kind, arguments, _held = _of_tasks(values, flags, before)
    return _elected[kind](*arguments, len(values), len(values[0]), np.empty(_BLOCK, values[0].dtype))


def by_rank(magnitudes: Floats, table: Floats) -> Floats:
    """table[rank] of each entry, its rank among its row's magnitudes, equals in order; (rows, columns), (columns,) -> float64."""
    rows, columns = magnitudes.shape
    if magnitudes.dtype == np.float32:
        keys = magnitudes.view(np.uint32).astype(np.uint64)  # without a sign, patterns of floats rise as the floats do
        keys <<= np.uint64(32)
        keys |= np.arange(columns, dtype=np.uint64)  # makes keys unique: any sort gives the same order, and sorting is fast
        keys.sort(axis=1)
    else:
        keys = np.argsort(magnitudes, axis=1, kind="stable").astype(np.uint64)
    out = np.empty((rows, columns))
    _by_rank(keys.reshape(-1), rows, columns, table, out.reshape(-1))
    return out


def stepped(vector: Floats, step: float, least: float) -> Floats:
    """vector * clip(step / max(|vector|, least), 0, 1), in its memory; (n,)."""
    _step[vector.dtype.str[1:]](vector, len(vector), step, least)
    return vector


def onto_base(vector: Floats, base: Floats, scale: float) -> Floats:
    """base + scale * vector, in the vector's memory; (n,)."""
    _onto[vector.dtype.str[1:]](vector, base, len(vector), scale)
    return vector


def narrowed(numbers: Floats, dtype: str) -> Any:
    """float32 rounded to BF16 or F16, nearest even, as bits; int16 (n,). NaNs stay NaN, with any payload."""
    out = np.empty(len(numbers), np.int16)
    _narrow[dtype](np.ascontiguousarray(numbers), len(numbers), out)
    return out


def widened(bits: Any, dtype: str, out: Floats) -> Floats:
    """BF16 or F16 bits as float32, exactly; (n,)."""
    _widen[dtype](np.ascontiguousarray(bits), len(bits), out)
    return out


def largest_magnitude(bits: Any) -> int:
    """The largest pattern of bits (signed integers) without the sign; -1 if there are no entries; (n,)."""
    variant = bits.dtype.str[1:]
    return _largest_magnitude[variant](np.ascontiguousarray(bits), len(bits), np.iinfo(bits.dtype).max) if len(bits) else -1
