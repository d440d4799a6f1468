"""Differences between a fine-tune and its base, entry by entry, to the bit.

Floating entries are handled as integers of their width ("bits"): the sign-magnitude pattern, read as a
signed integer. `order` maps it to an integer that ascends with the float's total order, in which a step
of one is one unit in the last place (ULP); differences of such integers, modulo 2^width, are exact for
every pattern, NaN payloads and -0.0 included, where `base + bf16(fine - base)` would not round back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.streaming.device import BITS, largest

_MANTISSA = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}
NOT_ROUNDED = 0x7FC0  # the bf16 pattern (a NaN) that marks an entry whose exact difference is stored apart
Bits = np.ndarray[Any, np.dtype[Any]]  # int16, int32 or int64
INFINITE_KEY = {torch.int32: 0x7F80_0000, torch.int64: 0x7FF0_0000_0000_0000}


def float_type(dtype: Dtype) -> torch.dtype:
    """The torch dtype of a compressible dtype."""
    return {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}[dtype.name]


def as_float(bits: torch.Tensor, dtype: Dtype) -> torch.Tensor:
    """The same memory as floats; same shape."""
    return bits.view(float_type(dtype))


def cast_bits(bits: torch.Tensor, source: Dtype, target: Dtype) -> torch.Tensor:
    """Convert floats between dtypes, the same on every device; (n,) -> (n,).

    Round to nearest even (float64 to 16 bits by way of float32). NaNs keep sign and as much of their
    payload as fits, made quiet: conversion instructions differ there, so it is done on integers.
    """
    if source is target:
        return bits
    floats = as_float(bits, source)
    if source.name == "F64" and target.bits == 16:
        floats = floats.to(torch.float32)
    result = floats.to(float_type(target)).view(BITS[target.bits])
    magnitude_mask = (1 << (source.bits - 1)) - 1
    magnitudes = bits & magnitude_mask
    infinity = _infinity(source)
    if bits.numel() and largest(magnitudes) > infinity:
        at = torch.nonzero(magnitudes > infinity).view(-1)
        result[at] = _cast_nan(bits[at].to(torch.int64), source, target)
    return result


def _infinity(dtype: Dtype) -> int:
    mantissa = _MANTISSA[dtype.name]
    return ((1 << (dtype.bits - 1 - mantissa)) - 1) << mantissa


def _cast_nan(bits: torch.Tensor, source: Dtype, target: Dtype) -> torch.Tensor:
    have, want = _MANTISSA[source.name], _MANTISSA[target.name]
    payload = bits & ((1 << have) - 1)
    payload = payload >> (have - want) if have > want else payload << (want - have)
    pattern = payload | _infinity(target) | (1 << (want - 1))
    return torch.where(bits < 0, pattern - (1 << (target.bits - 1)), pattern).to(BITS[target.bits])


def order(bits: Bits) -> Bits:
    """Sign-magnitude patterns to integers in total order, and back: it is its own inverse; (n,) -> (n,)."""
    width = bits.dtype.itemsize * 8
    ordered: Bits = bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))
    return ordered


def ulp_difference(base: Bits, fine: Bits) -> Bits:
    """How many ULPs `fine` is above `base`, modulo 2^width; bits (n,) and (n,) -> (n,)."""
    return order(fine) - order(base)


def add_ulps(base: Bits, ulps: Bits) -> Bits:
    """Inverse of `ulp_difference`: the fine-tune's bits; (n,) and (n,) -> (n,)."""
    return order(order(base) + ulps)


class KeyWorkspace:
    """Reused room for the keys of a tile; one a thread."""

    def __init__(self, entries: int, device: torch.device, wide: bool) -> None:
        kind = torch.float64 if wide else torch.float32
        self.a = torch.empty(entries, dtype=kind, device=device)
        self.b = torch.empty(entries, dtype=kind, device=device)
        self.key_type = torch.int64 if wide else torch.int32


def magnitude_keys(base: torch.Tensor, fine: torch.Tensor, dtype: Dtype, low: int, room: KeyWorkspace) -> torch.Tensor:
    """The key of every entry: |fine - base| in float32 (float64 in a wide workspace) as its bit pattern.

    Args:
        base, fine: bits of the same dtype; (n,).
        low: the smallest key that the caller will look at. Above 0, the keys of unchanged entries may be
            0; else they are -1, and changed entries whose difference is zero (+0.0 and -0.0) have 0.

    Returns:
        Integers that order as the magnitudes do; keys that are not finite all tie as the largest,
        `INFINITE_KEY`. A view of the workspace, valid until its next use; (n,).
    """
    n = base.numel()
    minuend, subtrahend = room.a[:n], room.b[:n]
    minuend.copy_(as_float(fine, dtype))
    subtrahend.copy_(as_float(base, dtype))
    torch.sub(minuend, subtrahend, out=minuend)
    torch.abs(minuend, out=minuend)
    keys = minuend.view(room.key_type)
    infinite = INFINITE_KEY[room.key_type]
    if low <= 0 or (n and largest(keys) >= infinite):
        keys.clamp_(max=infinite)
        keys.masked_fill_(base == fine, -1)
    return keys


def _floats(bits: Bits, dtype: Dtype) -> torch.Tensor:
    return as_float(torch.from_numpy(bits), dtype)


def round_difference(base: Bits, fine: Bits, dtype: Dtype) -> tuple[Bits, Bits]:
    """fine - base rounded to bf16, for float32 and float64.

    Returns:
        codes: `order` of the bf16 pattern, int16; NOT_ROUNDED where base + bf16 would not be finite or
            the difference is not (NaN, infinity, overflow); (n,).
        apart: positions of those entries, ascending int64; their exact ULP differences are stored apart.
    """
    rounded = (_floats(fine, dtype) - _floats(base, dtype)).to(torch.float32).to(torch.bfloat16)
    back = _floats(base, dtype) + rounded.to(float_type(dtype))
    apart = np.flatnonzero(~torch.isfinite(back).numpy())
    patterns = rounded.view(torch.int16).numpy()
    patterns[apart] = NOT_ROUNDED
    return order(patterns), apart


def add_rounded(base: Bits, codes: Bits, dtype: Dtype) -> tuple[Bits, Bits]:
    """base + the rounded difference, in the fine-tune's dtype.

    Returns the bits, (n,), and the positions at which the exact difference must be used instead.
    """
    patterns = order(codes)
    apart = np.flatnonzero(patterns == NOT_ROUNDED)
    result = _floats(base, dtype) + torch.from_numpy(patterns).view(torch.bfloat16).to(float_type(dtype))
    return result.view(BITS[dtype.bits]).numpy(), apart
