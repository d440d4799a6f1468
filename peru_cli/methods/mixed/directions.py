"""Singular directions at the least error for their bits: which to keep, at what precision, and both factors refined in turn.

With u and v of unit length, u sqrt(s) and v sqrt(s) are quantised with one step each, so that an error of one step costs
the same in either factor and in every direction: s step^2 = const is reverse water-filling (Cover and Thomas,
Elements of Information Theory, 10.3.3) for products. The multiplier is squared error per bit, the same everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peru_cli.methods.mixed.rates import SLOPE, bits, missed, quantise
from peru_cli.methods.mixed.scales import MAX_SCALE, is_exact, scale_number, scale_of
from peru_cli.methods.mixed.weights import regain

LARGEST = 2047  # largest magnitude of an integer in a factor
ROUNDS = 2  # rounds of refinement: a third gains less than 0.1% of the error
_OFFSETS = np.arange(-4, 9)  # scales tried around the one that is best at high rates
_TABLE_BITS = 10.0  # approximate cost of a direction's contexts and scale
Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Spectrum:
    """Leading singular values and vectors of a matrix: float64 (k,), (rows, k), (columns, k); squared norms of the whole matrix and of
    each of its rows, (rows,)."""

    left: Floats
    values: Floats
    right: Floats
    squared: float
    squares: Floats


@dataclass(frozen=True)
class LowRank:
    """left (rows, k) int16, right (k, columns) int16, scale indices (k,), and the squared error of each row of the matrix, (rows,)."""

    left: Integers
    right: Integers
    scales: Integers
    squared_errors: Floats


def choose_scales(values: Floats, rows: int, columns: int, multiplier: float) -> tuple[Integers, Floats]:
    """For each singular value, the scale with the least error plus multiplier times bits, and that sum; (k,), (k,).

    A direction is worth keeping if the sum is below its squared singular value."""
    high_rate = multiplier / SLOPE / values
    numbers = np.clip(scale_number(high_rate)[None] + _OFFSETS[:, None], -MAX_SCALE, MAX_SCALE)
    steps_squared = scale_of(numbers)
    left, right = (np.sqrt(values / (n * steps_squared)) for n in (rows, columns))
    left_missed, right_missed = rows * steps_squared * missed(left), columns * steps_squared * missed(right)
    # The other factor is solved for, given the rounded one: only the rounding error outside the direction counts.
    error = values * (left_missed + right_missed / (1 + right_missed / values))
    total = error + multiplier * (rows * bits(left) + columns * bits(right) + _TABLE_BITS)
    best = np.argmin(total, axis=0)
    each = np.arange(len(values))
    return numbers[best, each], total[best, each]


def quantised(spectrum: Spectrum, multiplier: float, longer: bool = False) -> LowRank | None:
    """The directions that are worth their bits, as integers. None if there are none. The sums of their products are exact.

    `longer` compensates for the directions that are left out (weights.py, `regain`)."""
    positive = spectrum.values > 0
    values = spectrum.values[positive]
    rows, columns = len(spectrum.left), len(spectrum.right)
    numbers, totals = choose_scales(values, rows, columns, multiplier) if len(values) else (np.zeros(0, np.int64), values)
    keep = np.flatnonzero(totals < np.square(values))
    if not len(keep):
        return None
    numbers = np.maximum(numbers[keep], _finest(spectrum, np.flatnonzero(positive)[keep]))
    while True:
        found = _refined(spectrum, np.flatnonzero(positive)[keep], numbers, longer)
        largest = np.abs(found.left).max(0), np.abs(found.right).max(1)
        if is_exact(*largest, found.scales):
            return found
        numbers = np.maximum(numbers, numbers.max() - 4 * _spread(numbers))  # a scale too fine for exact sums beside the coarsest


def _finest(spectrum: Spectrum, keep: Integers) -> Integers:
    """The finest scales at which both factors' entries fit their integers, with room for refinement; (k,)."""
    largest = np.maximum(np.abs(spectrum.left[:, keep]).max(0), np.abs(spectrum.right[:, keep]).max(0))
    finest: Integers = np.ceil(4 * np.log2(np.square(1.5 * largest / LARGEST) * spectrum.values[keep])).astype(np.int64)
    return finest


def _spread(numbers: Integers) -> int:
    """The range of scales minus one octave."""
    return max(int(numbers.max() - numbers.min()) // 4 - 1, 0)


def _refined(spectrum: Spectrum, keep: Integers, numbers: Integers, longer: bool) -> LowRank:
    """Round one factor, solve for the other, and alternate. Lengthen the last one if `longer`."""
    values, steps = spectrum.values, np.sqrt(scale_of(numbers))
    rows, columns = len(spectrum.left), len(spectrum.right)
    root = np.sqrt(values[keep])
    ratios = root / np.sqrt(columns) / steps, root / np.sqrt(rows) / steps
    scaled_left, scaled_right = spectrum.left * values, spectrum.right * values
    right: Integers = quantise(spectrum.right[:, keep] * root, steps, ratios[0], LARGEST)
    left: Integers = np.zeros((rows, len(keep)), np.int16)
    for last in range(1 - ROUNDS, 1):
        left = quantise(_solve(scaled_left, spectrum.right, _scaled(right, steps)), steps, ratios[1], LARGEST)
        solved = _solve(scaled_right, spectrum.left, _scaled(left, steps))
        if longer and not last:
            solved *= regain(spectrum.squared, _squared(_scaled(left, steps), solved))
        right = quantise(solved, steps, ratios[0], LARGEST)
    factor = np.ascontiguousarray(right.T)
    return LowRank(left, factor, numbers, missed_by(spectrum, left, factor, numbers))


def missed_by(spectrum: Spectrum, left: Integers, right: Integers, scales: Integers) -> Floats:
    """What factors miss of each row of a matrix, squared, (rows,); integers (rows, k), (k, columns), scale numbers (k,)."""
    steps = np.sqrt(scale_of(scales))
    a, b = _scaled(left, steps), _scaled(right.T, steps)
    wanted = spectrum.left @ (spectrum.values[:, None] * _inner(spectrum.right, b))
    missed: Floats = spectrum.squares - 2 * (wanted * a).sum(1) + ((a @ _inner(b, b)) * a).sum(1)
    return np.maximum(missed, 0.0)


def _scaled(factor: Integers, steps: Floats) -> Floats:
    """A factor's integers as floats; (n, k), (k,) -> (n, k)."""
    scaled: Floats = factor * steps
    return scaled


def _inner(a: Floats, b: Floats) -> Floats:
    """a^T b; (n, k), (n, m) -> (k, m). Uses torch, whose threads are off in passes: the same bits for any number of threads."""
    result: Floats = (torch.from_numpy(a).T @ torch.from_numpy(b)).numpy()
    return result


def _squared(a: Floats, b: Floats) -> float:
    """The squared norm of a b^T; (n, k), (m, k)."""
    return float((_inner(a, a) * _inner(b, b)).sum())


def _solve(scaled: Floats, other: Floats, fixed: Floats) -> Floats:
    """The least-squares factor of (scaled @ other^T) beside `fixed`; (n, K), (m, K), (m, k) -> (n, k)."""
    inner = _inner(fixed, fixed)
    inner[np.diag_indices_from(inner)] += 1e-12 * max(float(np.trace(inner)), 1e-300)  # for a factor that was rounded to zero
    weights = torch.linalg.solve(torch.from_numpy(inner), torch.from_numpy(_inner(fixed, other)))
    result: Floats = (torch.from_numpy(scaled) @ weights.T).numpy()
    return result
