"""A task's weights from a pack's sums: base + signs and factor * sums, in one pass over the entries."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import kernels
from peru_cli.kernels.scalars import DTYPES, ROUNDED, Float, narrow, widen

Integers = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[Any]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
_ALL = np.ones(1, np.bool_)  # a placeholder if there are no flags


def _single(number: Any) -> Any:
    return np.float32(number).view(np.uint32)


def _double(number: Any) -> Any:
    return np.float64(number).view(np.uint64)


def _all(number: Any, flags: Any, i: int) -> Any:
    return number


def _flagged(number: Any, flags: Any, i: int) -> Any:
    return number * flags[i]


masked: Any = _all  # these three are replaced in each variant of a loop
Bits: Any = np.uint16
INFINITY: Any = np.uint16(0x7F80)  # magnitudes from here on are not finite

_TARGETS: dict[str, dict[str, Any]] = {
    "BF16 f4": {**ROUNDED["BF16"], "Bits": np.uint16, "INFINITY": np.uint16(0x7F80)},
    "F16 f4": {**ROUNDED["F16"], "Bits": np.uint16, "INFINITY": np.uint16(0x7C00)},
    "F32 f4": {"narrow": _single, "Bits": np.uint32, "INFINITY": np.uint32(0x7F80_0000)},
    "F64 f8": {"narrow": _double, "Bits": np.uint64, "INFINITY": np.uint64(0x7FF0_0000_0000_0000)},
}
_VARIANTS = {
    f"{dtype[:-3]} {sums}{' masked' * mask}": {**DTYPES[dtype], **bound, "s": sums, "masked": _flagged if mask else _all}
    for (dtype, bound), sums, mask in product(_TARGETS.items(), ("i1", "i2", "i4"), (False, True))
}


@kernels("*b *s *u1 *f i8 i8 i8 *b", _VARIANTS)
def _retrieve(base: Any, sums: Any, flags: Any, row: Any, width: int, at: int, n: int, out: Any) -> int:
    wrong: Any = 0
    done: Any = 0
    while done < n:
        size = min(width - at, n - done)
        bad = np.int32(0)
        for i in range(size):
            vector = Float(masked(sums[done + i], flags, done + i)) * row[at + i]
            bits = narrow(widen(base[done + i]) + vector)
            out[done + i] = bits
            bad = np.int32(bad + np.int32((bits & Bits(INFINITY | Bits(INFINITY - Bits(1)))) >= INFINITY))
        wrong += bad
        done += size
        at = 0
    return wrong  # type: ignore[no-any-return]


def retrieved(base: Integers, sums: Integers, flags: Flags | None, row: Floats, at: int, dtype: str, out: Integers) -> bool:
    """base + row * sums, rounded once, into `out`; (n,). False if an entry is not finite.

    Args:
        base, out: bits of BF16, F16, F32 or F64.
        sums: int8, int16 or int32; those without a flag count as 0.
        row: factors of the columns, float32 (float64 for F64); `at` is the first entry's, and after the last comes the first."""
    variant = f"{dtype} {sums.dtype.str[1:]}{' masked' * (flags is not None)}"
    sums = np.ascontiguousarray(sums)
    return _retrieve[variant](base, sums, _ALL if flags is None else flags, row, len(row), at, len(out), out) == 0
