"""Entries at the least error for their bits without a basis: one step for all of them, small ones rounded to 0.

At a coarse step nearly all entries are zero, which leaves a sparse matrix with quantised values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.methods.mixed.rates import SLOPE, entropy, quantise
from peru_cli.methods.mixed.scales import scale_number, scale_of

LARGEST = 32767
_OFFSETS = range(-8, 25, 4)  # steps tried around the one that is best at high rates; 4 is a factor of two
_OWN_BITS = 24.0  # approximate cost of a tensor's context and scale
Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Dense:
    """Integers (n,), their scale index, and their squared error."""

    integers: Integers
    scale: int
    squared_error: float


def quantised(values: Floats, multiplier: float, sample: int = 1 << 16) -> Dense | None:
    """The entries at the step with the least error plus multiplier times bits. None if dropping them is better. float64 (n,)."""
    if not len(values) or not values.any():
        return None
    some = values if len(values) <= sample else values[:: -(-len(values) // sample)]
    share = len(values) / len(some)
    best, least = None, float(np.square(some).sum()) * share
    finest = math.ceil(4 * math.log2(float(np.abs(values).max()) / LARGEST))
    centre = max(int(scale_number(np.array([math.sqrt(multiplier / SLOPE)]))[0]), finest - _OFFSETS.start)
    for g in range(centre + _OFFSETS.start, centre + _OFFSETS.stop, _OFFSETS.step):
        found = with_scale(some, g)
        cost = share * (found.squared_error + multiplier * entropy(found.integers)) + multiplier * _OWN_BITS
        if cost < least:
            best, least = g, cost
    return None if best is None else with_scale(values, best)


def with_scale(values: Floats, g: int) -> Dense:
    """The entries quantised with a given scale index; float64 (n,)."""
    step = scale_of(np.array([g]))
    deviation = np.sqrt(np.square(values).mean(keepdims=True)) if len(values) else np.ones(1)
    integers = quantise(values[:, None], step, np.maximum(deviation / step, 1e-9), LARGEST)[:, 0]
    return Dense(integers, g, float(np.square(values - integers * step).sum()))
