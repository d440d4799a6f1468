"""TIES' election from the bits of a base and of fine-tunes: which entries are kept, who wins, the result on the base, rounded.

Arrays are 1-D runs of entries, (n,): bits of one dtype, and float32. Every product and sum is rounded, in the order of the formulas
(verbs.py has them for floats)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import Kernel, kernels
from peru_cli.kernels.merging.verbs import Flags, balance, decide, join, pointers
from peru_cli.kernels.rounding import INFINITE, ROUNDS, Ints
from peru_cli.kernels.scalars import MAGNITUDE, Float, narrow, widen

_BLOCK = 1024  # entries whose votes are held at once
MOST = 2**31 - 1  # the largest pattern of a magnitude
_LEAST = 1e-8  # a sum of weights below this counts as 0
_ALL = np.ones(1, np.bool_)  # a placeholder if there are no flags
Range = tuple[int, int, Flags | None]  # patterns of magnitudes from and to which entries are kept, and which among them (None: all)


def _key(value: Any) -> Any:
    return np.int32(np.float32(value).view(np.int32) & MAGNITUDE)


def _votes(bits: Any, base: Any, flags: Any, ranges: Any, before: Any, task: int, start: int, size: int, votes: Any, signs: Any) -> None:
    """A task's votes for a block, and their sum over the tasks so far."""
    mine, kept = bits[task], flags[task]
    flagged, low, high = ranges[3 * task], ranges[3 * task + 1], ranges[3 * task + 2]
    first, second, at = before[2 * task], before[2 * task + 1], task * _BLOCK
    if flagged:
        for i in range(size):
            value = Float(widen(mine[start + i]) - widen(base[start + i]))
            key = _key(value)
            votes[at + i] = value * Float((key >= low) & (key <= high)) * Float(kept[start + i]) * first * second
    else:
        for i in range(size):
            value = Float(widen(mine[start + i]) - widen(base[start + i]))
            key = _key(value)
            votes[at + i] = value * Float((key >= low) & (key <= high)) * first * second
    if task == 0:
        for i in range(size):
            signs[i] = votes[i]
    else:
        for i in range(size):
            signs[i] = signs[i] + votes[at + i]


@kernels("**b *b **u1 *i4 *f *f *f i8 i8 i8 i8 f *f *f *f *f *b", ROUNDS)
def _merge(
    bits: Any, base: Any, flags: Any, ranges: Any, before: Any, after: Any, shares: Any, tasks: int, n: int, mean: int, strict: int,
    scale: Any, votes: Any, signs: Any, divisor: Any, total: Any, out: Any,
) -> int:  # fmt: skip
    wrong = np.int32(0)
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        for task in range(tasks):
            _votes(bits, base, flags, ranges, before, task, start, size, votes, signs)
        decide(signs, divisor, total, size, strict)
        for task in range(tasks):
            at, weight, share = task * _BLOCK, after[task], shares[task]
            for i in range(size):
                join(votes[at + i], i, weight, share, signs, divisor, total)
        if mean:
            for i in range(size):
                divide = Float(1) if abs(divisor[i]) < Float(_LEAST) else divisor[i]
                total[i] = total[i] / divide
        for i in range(size):
            rounded = narrow(Float(total[i] * signs[i] * scale + widen(base[start + i])))
            out[start + i] = rounded
            wrong |= np.int32((rounded & INFINITE) == INFINITE)
    return np.int64(wrong)  # type: ignore[return-value]


@kernels("**b *b **u1 *i4 *f i8 i8 *f *f", ROUNDS)
def _elected(bits: Any, base: Any, flags: Any, ranges: Any, before: Any, tasks: int, n: int, votes: Any, signs: Any) -> int:
    elected: Any = 0
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        for task in range(tasks):
            _votes(bits, base, flags, ranges, before, task, start, size, votes, signs)
        elected += balance(signs, size)
    return elected  # type: ignore[no-any-return]


@kernels("*b *b i8 k k *u1", ROUNDS)
def _within(bits: Any, base: Any, n: int, low: Any, high: Any, out: Any) -> int:
    found: Any = 0
    for start in range(0, n, _BLOCK):
        inside = np.int32(0)
        for i in range(start, min(start + _BLOCK, n)):
            key = _key(Float(widen(bits[i]) - widen(base[i])))
            flag = (key >= low) & (key <= high)
            out[i] = np.uint8(flag)
            inside = np.int32(inside + np.int32(flag))
        found += inside
    return found  # type: ignore[no-any-return]


def _of_tasks(
    bits: Sequence[Ints], base: Ints, kept: Sequence[Range], before: Sequence[tuple[float, float]]
) -> tuple[tuple[Any, ...], Any]:
    """Arguments that both loops share, and the arrays that they point to."""
    n = len(base)
    held = [_ALL if flags is None else flags for _, _, flags in kept]
    assert all(flags is None or len(flags) == n for _, _, flags in kept)
    addresses = np.array([each.__array_interface__["data"][0] for each in held], np.uint64)
    ranges = np.array([(flags is not None, low, high) for low, high, flags in kept], np.int32).reshape(-1)
    return (pointers(bits), base, addresses, ranges, np.array(before, np.float32).reshape(-1)), held


def elects(dtype: str, signs: bool = False) -> list[Kernel]:
    """The loops of `merged`, for `compile_beside`; with `signs` also that of `elected`."""
    return [_merge[dtype], *([_elected[dtype]] if signs else [])]


def trims(dtype: str) -> list[Kernel]:
    """The loops of `within`, for `compile_beside`."""
    return [_within[dtype]]


def merged(
    bits: Sequence[Ints],
    dtype: str,
    base: Ints,
    kept: Sequence[Range],
    before: Sequence[tuple[float, float]],
    after: Sequence[float],
    shares: Sequence[float] | None,
    strict: bool,
    scale: float,
) -> tuple[Ints, bool]:
    """base + scale * TIES' merge, rounded, and whether all of it is finite.

    Args:
        bits, base: entries of each task and of the base, of one dtype: BF16, F16 or F32.
        kept, before: a task's vote is (bits - base) * both factors where it is kept, otherwise 0.
        after: factor of the votes that agree with the elected sign.
        shares: divide by their sum over the tasks that agree (by 1 if that is 0); None does not divide.
        strict: a sum of 0 elects -, otherwise +."""
    arguments, _held = _of_tasks(bits, base, kept, before)
    tasks, out = len(bits), np.empty(len(base), base.dtype)
    given = np.array(after, np.float32), np.array(shares if shares is not None else after, np.float32)
    rooms = (np.empty(size * _BLOCK, np.float32) for size in (tasks, 1, 1, 1))
    return out, not _merge[dtype](*arguments, *given, tasks, len(base), shares is not None, strict, scale, *rooms, out)


def elected(bits: Sequence[Ints], dtype: str, base: Ints, kept: Sequence[Range], before: Sequence[tuple[float, float]]) -> int:
    """The number of entries that elect + minus the number that elect -, with votes as in `merged`."""
    arguments, _held = _of_tasks(bits, base, kept, before)
    return _elected[dtype](*arguments, len(bits), len(base), np.empty(len(bits) * _BLOCK, np.float32), np.empty(_BLOCK, np.float32))


def within(bits: Ints, dtype: str, base: Ints, low: int, high: int) -> tuple[Flags, int]:
    """Entries of which the magnitude of (bits - base) has a pattern from `low` to `high`, bools (n,), and their number."""
    out = np.empty(len(base), np.bool_)
    return out, _within[dtype](bits, base, len(base), low, high, out)
