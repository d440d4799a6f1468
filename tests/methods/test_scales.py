"""Scales of mixed artifacts: four to the octave, exact sums in float64, runs of products."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from peru_cli.methods.mixed.scales import MAX_SCALE, is_exact, product, run_of_product, scale_number, scale_of


def test_scales_are_quarters_of_an_octave_to_within_a_sixtieth() -> None:
    g = np.arange(-41, 42)
    scales = scale_of(g)
    assert scale_of(np.array([0, 1, 2, 3, 4, -1, -4])).tolist() == [1, 19 / 16, 23 / 16, 27 / 16, 2, 27 / 32, 0.5]
    assert np.abs(scales / 2.0 ** (g / 4) - 1).max() < 0.017 and (np.diff(scales) > 0).all()
    assert scale_of(np.array([MAX_SCALE, -MAX_SCALE])).tolist() == [2.0**500, 2.0**-500]


def test_the_number_of_a_scale_is_that_of_the_nearest_one_by_ratio() -> None:
    g = np.arange(-MAX_SCALE, MAX_SCALE + 1, 7)
    assert scale_number(scale_of(g)).tolist() == g.tolist()
    for quarter in (-9, 0, 5):
        for off, wanted in ((0.49, quarter), (0.51, quarter + 1), (-0.49, quarter), (-0.51, quarter - 1)):
            assert scale_number(np.array([2.0 ** ((quarter + off) / 4)])).tolist() == [wanted]
    assert scale_number(np.array([1e300, 1e-300])).tolist() == [MAX_SCALE, -MAX_SCALE]


@pytest.mark.parametrize(
    ("left", "right", "g", "exact"),
    [
        ([], [], [], True),
        ([1 << 20], [1 << 29], [0], False),  # times the mantissa 16 that is 2^53 units
        ([1 << 20], [(1 << 29) - 1], [0], True),
        ([1 << 20], [1 << 28], [3], True),  # 27 of 32
        ([1 << 20, 1 << 20], [1 << 28, 1 << 28], [0, 0], False),  # the sum of two
        ([1 << 20, 1 << 20], [1 << 28, (1 << 28) - 1], [0, 0], True),
        ([1, 1], [1, 1], [0, 4 * 48], True),  # 16 + 16 * 2^48
        ([1, 1], [1, 1], [0, 4 * 49], False),
        ([1, 0], [1, 0], [0, 4 * 53], True),  # nothing of the large scale is used
        ([1, 0], [1, 0], [-4 * 27, 4 * 27], False),
        ([1, 0], [1, 0], [0, 4 * 54], False),  # too far apart to be looked at
    ],
)
def test_sums_are_exact_below_two_to_the_53_units(left: list[int], right: list[int], g: list[int], exact: bool) -> None:
    assert is_exact(np.array(left, np.int64), np.array(right, np.int64), np.array(g, np.int64)) is exact


def test_an_odd_sum_above_two_to_the_24_is_not_rounded_to_float32() -> None:
    made = product(np.array([[31]], np.int16), np.array([[28485]], np.int16), np.array([1]))
    assert made.tolist() == [[31 * 28485 * 19 / 16]] and 1 << 24 < 31 * 28485 * 19 < 1 << 25


@pytest.mark.parametrize("largest", [3, 2047])  # the sums of small integers are exact in float32, too
def test_products_and_their_runs_are_exact_sums(largest: int) -> None:
    noise = np.random.default_rng(largest)
    left = noise.integers(-largest, largest + 1, (7, 3), np.int16)
    right = noise.integers(-largest, largest + 1, (3, 5), np.int16)
    g = np.array([-9, -6, -7])
    scales = [Fraction(float(scale)) for scale in scale_of(g)]
    exact = [[float(sum(int(a) * int(b) * s for a, b, s in zip(row, column, scales, strict=True))) for column in right.T] for row in left]
    assert product(left, right, g).tolist() == exact
    flat = [value for row in exact for value in row]
    for start, stop in ((0, 35), (0, 1), (4, 6), (5, 10), (7, 31), (34, 35)):
        assert run_of_product(left, right, g, None, start, stop).tolist() == flat[start:stop]
    rows = np.array([1, 2, 5, 6, 8, 11, 12])  # of 14; the others are 0
    sparse = np.zeros((14, 5))
    sparse[rows] = exact
    for start, stop in ((0, 70), (0, 6), (11, 13), (29, 41), (60, 70), (69, 70)):
        assert run_of_product(left, right, g, rows, start, stop).tolist() == sparse.reshape(-1)[start:stop].tolist()
    assert not math.isnan(float(product(left[:, :0], right[:0], g[:0]).sum()))
