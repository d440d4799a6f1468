"""Base plus difference: the sum that every machine computes, and the effect of rounding to the fine-tune's dtype."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.kernels.products import added
from peru_cli.methods.compact.delta import Bits, add_ulps
from peru_cli.streaming.arrays import CPU

Floats = np.ndarray[Any, np.dtype[np.float64]]
_MANTISSA = {"F16": 10, "BF16": 7}
_LEAST = {"F16": -14, "BF16": -126}  # exponent of the smallest normal number
_STEPS = 6  # terms of the sum over neighbours: further ones are negligible


def add_difference(base: Bits, dtype: Dtype, difference: Floats | None, ulps: Bits | None = None) -> Bits:
    """base + difference in float64, rounded to the dtype to nearest even (to 16 bits by way of float32), then moved by ULPs.

    An entry whose difference is zero, or whose base is not finite, stays unchanged. `base` is bits of the dtype, (n,)."""
    if difference is not None and dtype.bits == 16:
        base = added(base, difference, dtype.name)
    elif difference is not None:
        wide = CPU.widen(base, dtype, np.empty(len(base)))
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = CPU.narrow(wide + difference, dtype)
        base = np.where((difference == 0) | ~np.isfinite(wide), base, rounded)
    return base if ulps is None else add_ulps(base, ulps)


def ulp_counts(base: Bits, dtype: Dtype) -> dict[int, int]:
    """The number of entries with a ULP of 2^e, by e. Empty for dtypes so fine that it does not matter. bits (n,)."""
    if dtype.bits != 16:
        return {}
    mantissa = _MANTISSA[dtype.name]
    fields = (base.view(np.uint16) & 0x7FFF) >> mantissa
    counts = np.bincount(fields, minlength=1)
    bias = 1 - _LEAST[dtype.name]
    exponents = [max(field - bias, _LEAST[dtype.name]) - mantissa for field in range(len(counts))]
    found: dict[int, int] = {}
    for exponent, n in zip(exponents, counts, strict=True):
        if n:
            found[exponent] = found.get(exponent, 0) + int(n)
    return found


def rounded_error(squared_errors: Floats, columns: int, ulps: dict[int, int]) -> float:
    """The squared error after rounding, if errors are Gaussian, alike in all entries of a row, and independent of the entries' sizes.

    A fine-tune's entries lie on the dtype's grid. An error below half a step is rounded away, any other becomes
    whole steps: u^2 sum over k >= 0 of (2 k + 1) P(|error| > (k + 1/2) u).

    Args:
        squared_errors: before rounding, summed over each row, (rows,).
        columns: entries of a row.
        ulps: the number of entries of the tensor by the exponent of their ULP; empty if rounding does not matter."""
    variances, rows = _by_size(np.asarray(squared_errors, np.float64) / columns)
    n = sum(ulps.values())
    if not n or not len(rows):
        return float(squared_errors.sum())
    ulp = np.exp2(np.array(list(ulps), np.float64))
    share = np.array(list(ulps.values()), np.float64) / n
    return float(columns * (rows[:, None] * share * _rounded(variances[:, None], ulp)).sum())


def _by_size(variances: Floats) -> tuple[Floats, Floats]:
    """The means of positive numbers that are alike within a quarter of an octave, and how many there are of each."""
    positive = variances[variances > 0]
    bins, counts = np.unique(np.round(4 * np.log2(positive)).astype(np.int64), return_inverse=True)
    sums = np.bincount(counts, positive, len(bins))
    found: Floats = np.bincount(counts, minlength=len(bins)).astype(np.float64)
    return sums / np.maximum(found, 1), found


def _rounded(variance: Floats, ulp: Floats) -> Floats:
    """The mean squared error of an entry after rounding; broadcast against each other."""
    import torch  # imported here: unpacking needs no torch

    fine = variance + ulp * ulp / 12
    steps = np.arange(3 * _STEPS)
    with np.errstate(over="ignore"):
        at = (steps + 0.5) * (ulp / np.sqrt(2 * variance))[..., None]
    whole = ulp * ulp * ((2 * steps + 1) * torch.erfc(torch.from_numpy(at)).numpy()).sum(-1)
    result: Floats = np.where(ulp * _STEPS / 2 < np.sqrt(variance), fine, whole)
    return result
