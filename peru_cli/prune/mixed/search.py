"""Find the multiplier that meets a goal: the most bytes below a limit, or the largest error below one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_WIDEST = 3.0  # largest step of the logarithm while only one side is known
_INNER = 0.08  # least distance of a guess from either end of the known interval, as a share of it


@dataclass(frozen=True)
class Found:
    """A logarithm of the multiplier, and the value measured there."""

    at: float
    value: float


def approach(measure: Callable[[float], float], target: float, start: float, slope: float, tolerance: float, most: int) -> Found | None:
    """The point with the largest value not above the target, for a nearly monotone function. None if there is none.

    Stops within `tolerance` below the target, as a share of it, or after `most` measurements.

    Args:
        measure: values are positive, or 0.
        slope: approximate d log(value) / dx; its sign is that of the function."""
    x, below, above = start, None, None
    stride = 0.5  # doubles until both sides are known: the function may be much flatter than `slope`
    for _ in range(most):
        found = Found(x, measure(x))
        if found.value <= target:
            below = found if below is None or found.value >= below.value else below
            if found.value >= target * (1 - tolerance):
                return found
        elif above is None or found.value <= above.value:
            above = found
        stride = 2 * stride if below is None or above is None else stride
        x = _next(below, above, target, slope, stride)
        if below is not None and above is not None and abs(below.at - above.at) < 1e-9:
            break
    return below


def _next(below: Found | None, above: Found | None, target: float, slope: float, stride: float) -> float:
    aim = math.log(target)
    if below is None or above is None:
        known = below or above
        assert known is not None
        step = (aim - math.log(max(known.value, target * 1e-6))) / slope
        side = math.copysign(1, step) if step else math.copysign(1, slope) * (1 if below else -1)
        return known.at + side * min(stride * max(1.15 * abs(step), 0.01), _WIDEST)
    low, high = math.log(max(below.value, target * 1e-6)), math.log(above.value)
    share = (aim - 0.002 - low) / (high - low) if high > low else 0.5
    return below.at + (above.at - below.at) * min(max(share, _INNER), 1 - _INNER)
