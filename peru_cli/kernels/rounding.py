"""The last step of a merge in one loop: weighted sums of bits, or merged vectors, onto the base and rounded.

Arrays are 1-D runs of entries, (n,): bits of one dtype, and float32. Every product and sum is rounded, in the order of the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import kernels
from peru_cli.kernels.merging.verbs import Flags, Floats, pointers
from peru_cli.kernels.scalars import DTYPES, ROUNDED, Float, narrow, widen

Ints = np.ndarray[Any, np.dtype[Any]]
_BLOCK = 1024  # entries whose sums over tasks are held at once
_ALL = np.ones(1, np.bool_)  # a placeholder if there are no flags
_NO_BASE = {2: np.zeros(1, np.int16), 4: np.zeros(1, np.int32)}


def _as_it_is(value: Any, unused: Any, i: int) -> Any:
    return value


def _less_base(value: Any, base: Any, i: int) -> Any:
    return value - widen(base[i])


def _plus_base(value: Any, base: Any, i: int) -> Any:
    return value + widen(base[i])


def _where_flagged(value: Any, flags: Any, i: int) -> Any:
    return value * Float(flags[i])


def _pattern(number: Any) -> Any:
    return np.float32(number).view(np.uint32)


against: Any = _as_it_is  # these are replaced in each variant of a loop
onto: Any = _as_it_is
flagged: Any = _as_it_is
INFINITE: Any = np.uint16(0x7F80)

ROUNDS: dict[str, dict[str, Any]] = {
    "BF16": {**DTYPES["BF16 f4"], **ROUNDED["BF16"], "INFINITE": np.uint16(0x7F80)},
    "F16": {**DTYPES["F16 f4"], **ROUNDED["F16"], "INFINITE": np.uint16(0x7C00)},
    "F32": {**DTYPES["F32 f4"], "narrow": _pattern, "INFINITE": np.uint32(0x7F80_0000)},
}
_BASE = {"against": _less_base, "onto": _plus_base}
_PARTS = {
    f"{dtype}{' on base' * base}{' flagged' * flags}": {
        **bound, **(_BASE if base else {}), "flagged": _where_flagged if flags else _as_it_is,
    }
    for (dtype, bound), base, flags in product(ROUNDS.items(), *[(False, True)] * 2)
}  # fmt: skip


@kernels("**b *b **u1 *f i8 i8 f f *f *b", _PARTS)
def _rounded_sum(
    bits: Any, base: Any, flags: Any, factors: Any, tasks: int, n: int, factor: Any, scale: Any, total: Any, out: Any
) -> int:  # fmt: skip
    wrong = np.int32(0)
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        for task in range(tasks):
            mine, kept, first, second = bits[task], flags[task], factors[2 * task], factors[2 * task + 1]
            if task == 0:
                for i in range(size):
                    total[i] = flagged(against(widen(mine[start + i]), base, start + i), kept, start + i) * first * second
            else:
                for i in range(size):
                    total[i] = total[i] + flagged(against(widen(mine[start + i]), base, start + i), kept, start + i) * first * second
        for i in range(size):
            rounded = narrow(onto(total[i] * factor * scale, base, start + i))
            out[start + i] = rounded
            wrong |= np.int32((rounded & INFINITE) == INFINITE)
    return np.int64(wrong)  # type: ignore[return-value]


@kernels("*f *b f i8 *b", {dtype: {**bound, "onto": _plus_base} for dtype, bound in ROUNDS.items()})
def _rounded_onto(vector: Any, base: Any, scale: Any, n: int, out: Any) -> int:
    wrong = np.int32(0)
    for i in range(n):
        rounded = narrow(onto(vector[i] * scale, base, i))
        out[i] = rounded
        wrong |= np.int32((rounded & INFINITE) == INFINITE)
    return np.int64(wrong)  # type: ignore[return-value]


def rounded_sum(
    bits: Sequence[Ints],
    dtype: str,
    base: Ints | None,
    flags: Sequence[Flags | None],
    factors: Sequence[tuple[float, float]],
    factor: float,
    scale: float,
) -> tuple[Ints, bool]:
    """sum of (bits - base) * flags * both factors, times `factor` and `scale`, + base, rounded; and whether all of it is finite.

    Args:
        bits: entries of each task, of one dtype: BF16, F16 or F32.
        base: the base's, of the same dtype; None for nothing.
        flags: entries to keep, the others become 0; None for all."""
    n = len(bits[0])
    out = np.empty(n, bits[0].dtype)
    some = any(each is not None for each in flags)
    held = [np.ones(n, np.bool_) if each is None else each for each in flags] if some else [_ALL]
    what = f"{dtype}{' on base' * (base is not None)}{' flagged' * some}"
    given = pointers(bits), _NO_BASE[out.itemsize] if base is None else base, pointers(held if some else held * len(bits))
    room = np.empty(_BLOCK, np.float32)
    wrong = _rounded_sum[what](*given, np.array(factors, np.float32).reshape(-1), len(bits), n, factor, scale, room, out)
    return out, not wrong


def rounded_onto(vector: Floats, dtype: str, base: Ints, scale: float) -> tuple[Ints, bool]:
    """base + scale * vector, rounded, and whether all of it is finite; float32 and bits of BF16, F16 or F32."""
    out = np.empty(len(vector), base.dtype)
    return out, not _rounded_onto[dtype](vector, base, scale, len(vector), out)
