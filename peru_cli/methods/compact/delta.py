"""Bit-exact differences between a fine-tune and its base, entry by entry.

Floating entries are handled as integers of their width ("bits"): the sign-magnitude pattern, read as a signed integer.
`order` maps it to an integer that ascends with the float's total order, in which one step is one unit in the last place
(ULP). Differences of such integers, modulo 2^width, are exact for every pattern, including NaN payloads and -0.0, where
`base + bf16(fine - base)` would not round back."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.streaming.arrays import BITS, CPU, Array, Arrays

_MANTISSA = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}
NOT_ROUNDED = 0x7FC0  # the bf16 pattern (a NaN) that marks an entry whose exact difference is stored apart
Bits = np.ndarray[Any, np.dtype[Any]]  # int16, int32 or int64
INFINITE_KEY = {False: 0x7F80_0000, True: 0x7FF0_0000_0000_0000}  # by whether keys are wide
_BF16 = BY_NAME["BF16"]


def infinity(dtype: Dtype) -> int:
    """The bit pattern of +infinity. Larger patterns (without the sign) are NaNs."""
    mantissa = _MANTISSA[dtype.name]
    return ((1 << (dtype.bits - 1 - mantissa)) - 1) << mantissa


def cast_bits(xp: Arrays, bits: Array, source: Dtype, target: Dtype) -> Array:
    """Convert floats between dtypes, identically on every device; (n,) -> (n,).

    Rounds to nearest even (float64 to 16 bits by way of float32). NaNs keep their sign and as much of their payload as fits,
    and become quiet. Conversion instructions differ in this, so it is done on integers."""
    if source is target:
        return bits
    kind = "f8" if "F64" in (source.name, target.name) else "f4"
    result = xp.narrow(xp.widen(bits, source, xp.empty(len(bits), kind)), target)
    if xp.largest_magnitude(bits) > infinity(source):
        at = xp.where(xp.greater(bits & ((1 << (source.bits - 1)) - 1), infinity(source)))
        xp.put(result, at, _cast_nan(xp.download(xp.take(bits, at)).astype(np.int64), source, target))
    return result


def _cast_nan(bits: Bits, source: Dtype, target: Dtype) -> Bits:
    have, want = _MANTISSA[source.name], _MANTISSA[target.name]
    payload = bits & ((1 << have) - 1)
    payload = payload >> (have - want) if have > want else payload << (want - have)
    pattern = payload | infinity(target) | (1 << (want - 1))
    signed: Bits = np.where(bits < 0, pattern | (-1 << (target.bits - 1)), pattern).astype(BITS[target.bits])
    return signed


def order(bits: Bits) -> Bits:
    """Sign-magnitude patterns to integers in total order, and back: it is its own inverse; (n,) -> (n,)."""
    width = bits.dtype.itemsize * 8
    ordered: Bits = bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))
    return ordered


def add_ulps(base: Bits, ulps: Bits) -> Bits:
    """The bits that are so many ULPs above `base`, modulo 2^width; bits (n,) and (n,) -> (n,)."""
    return order(order(base) + ulps)


def rises(base: Bits, fine: Bits) -> Bits:
    """Where an entry has grown, in the floats' total order; (n,) and (n,) -> bool (n,)."""
    grown: Bits = order(fine) > order(base)
    return grown


def round_difference(base: Bits, fine: Bits, dtype: Dtype, least: float | None = None) -> tuple[Bits, Bits]:
    """fine - base rounded to bf16.

    Args:
        base, fine: bits of one dtype; (n,).
        least: the smallest magnitude of the differences. If given, only sign and octave above it are kept (see `_octaves`).

    Returns:
        codes: `order` of the bf16 pattern, int16. NOT_ROUNDED if base + bf16 would not be finite or the difference is not
            (NaN, infinity, overflow); (n,).
        apart: positions of those entries, ascending int64. Their exact ULP differences are stored apart."""
    with np.errstate(over="ignore", invalid="ignore"):
        difference = _floats(fine, dtype) - _floats(base, dtype)
        patterns: Bits = CPU.narrow(difference if least is None else _octaves(difference, least), _BF16)
        finite = np.isfinite(difference) & ((_plus(base, patterns, dtype) & ((1 << (dtype.bits - 1)) - 1)) < infinity(dtype))
    apart = np.flatnonzero(~finite)
    patterns[apart] = NOT_ROUNDED
    return order(patterns), apart


def add_rounded(base: Bits, codes: Bits, dtype: Dtype) -> tuple[Bits, Bits]:
    """base + the rounded difference: in the fine-tune's dtype, or in float32 and rounded to its 16 bits.

    Returns the bits, (n,), and the positions that need the exact difference instead."""
    patterns = order(codes)
    with np.errstate(over="ignore", invalid="ignore"):
        return _plus(base, patterns, dtype), np.flatnonzero(patterns == NOT_ROUNDED)


def sign_differences(base: Bits, fine: Bits, dtype: Dtype, scale: float) -> tuple[Bits, Bits]:
    """The signs of fine - base, to be added at one scale.

    Args:
        base, fine: bits of one dtype that differ; (n,).
        scale: what is added or subtracted; finite.

    Returns:
        codes: 0 where the entry has grown, -1 where it has shrunk, int16. NOT_ROUNDED if base + scale would not be finite or the
            difference is not; (n,).
        apart: positions of those entries, ascending int64. Their exact ULP differences are stored apart."""
    codes: Bits = np.where(rises(base, fine), np.int16(0), np.int16(-1))
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(_floats(fine, dtype) - _floats(base, dtype))
    bits, _ = add_signs(base, codes, dtype, scale)
    finite &= (bits & ((1 << (dtype.bits - 1)) - 1)) < infinity(dtype)
    apart = np.flatnonzero(~finite)
    codes[apart] = NOT_ROUNDED
    return codes, apart


def add_signs(base: Bits, codes: Bits, dtype: Dtype, scale: float) -> tuple[Bits, Bits]:
    """base + scale, or base - scale where the code is -1: in the fine-tune's dtype, or in float32 and rounded to its 16 bits.

    Returns the bits, (n,), and the positions that need the exact difference instead."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = _floats(base, dtype)
        step = total.dtype.type(scale)
        bits: Bits = CPU.narrow(total + np.where(codes < 0, -step, step), dtype)
    return bits, np.flatnonzero(codes == NOT_ROUNDED)


def _floats(bits: Bits, dtype: Dtype) -> Bits:
    """float64 for F64, float32 for the others; (n,)."""
    floats: Bits = CPU.widen(bits, dtype, np.empty(len(bits), "f8" if dtype.name == "F64" else "f4"))
    return floats


def _octaves(differences: Bits, least: float) -> Bits:
    """1.375 x least x 2^k with the difference's sign, for magnitudes from least x 2^k up to twice that; float32 (n,).

    Magnitudes above a threshold are dense near it and fall off: their mean in an octave lies between 1.25 and 1.45 times its
    lower end. Results for values that are not finite are arbitrary. A `least` that no octave can start at counts as 1."""
    start = np.float32(least)
    if not 0 < start < np.inf:
        start = np.float32(1)
    single = differences.astype(np.float32, copy=False)
    _, exponent = np.frexp(np.abs(single) / start)
    found: Bits = np.sign(single) * np.ldexp(np.float32(1.375) * start, exponent - 1)
    return found


def _plus(base: Bits, patterns: Bits, dtype: Dtype) -> Bits:
    """base + bf16 patterns, as bits of the base's dtype; (n,)."""
    total = _floats(base, dtype)
    added: Bits = CPU.narrow(total + CPU.widen(patterns, _BF16, np.empty(len(patterns), total.dtype)), dtype)
    return added
