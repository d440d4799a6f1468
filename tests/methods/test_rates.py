"""Rate and distortion of quantised Gaussians: the table against a quantiser of three lines on the quantiles of a Gaussian."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from peru_cli.methods.mixed.rates import SLOPE, bits, entropy, missed, quantise, zone

N = 1 << 17
QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / N) for i in range(N)])  # a Gaussian of variance 1 without chance
TRIED = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3)  # dead zones, in steps


def measured(ratio: float, dead: float) -> tuple[float, float]:
    """Bits and squared error an entry, in steps, with a dead zone that is this much wider on each side."""
    entries = QUANTILES * ratio
    integers = np.sign(entries) * np.floor(np.abs(entries) + 0.5 - dead)
    shares = np.unique(integers, return_counts=True)[1] / N
    return float(-(shares * np.log2(shares)).sum()), float(np.square(entries - integers).mean())


def test_the_slope_is_that_of_a_uniform_quantiser() -> None:
    """D = c 2^(-2 R), and D = 1/12 of a squared step: -dD/dR by a difference."""
    change = 1e-6
    assert pytest.approx((2 ** (2 * change) - 2 ** (-2 * change)) / (2 * change) / 12, rel=1e-9) == SLOPE


@pytest.mark.parametrize("log", [-3.0, -2.5, -1.875, -1.0, -0.375, 0.0, 0.625, 1.5, 2.25, 3.0, 4.0, 5.0])
def test_bits_error_and_zone_are_the_best_that_a_dead_zone_reaches(log: float) -> None:
    ratio = np.array([2.0**log])
    costs = {dead: measured(2.0**log, dead) for dead in TRIED}
    chosen = float(zone(ratio)[0])
    assert min(abs(chosen - dead) for dead in TRIED) < 1e-12
    least = min(distortion + SLOPE * rate for rate, distortion in costs.values())
    rate, distortion = measured(2.0**log, chosen)
    assert distortion + SLOPE * rate == pytest.approx(least, rel=1e-5)
    assert float(bits(ratio)[0]) == pytest.approx(rate, rel=2e-3, abs=2e-4)
    assert float(missed(ratio)[0]) == pytest.approx(distortion, rel=2e-3)
    integers = quantise(QUANTILES[:, None], 1 / ratio, ratio, 2047)
    assert entropy(integers) / N == pytest.approx(rate, rel=1e-9, abs=1e-12)
    assert np.square(QUANTILES[:, None] * ratio - integers).mean() == pytest.approx(distortion, rel=1e-9)


def test_every_dead_zone_is_the_best_somewhere() -> None:
    chosen = {round(float(each), 9) for each in zone(2.0 ** np.arange(-3, 5.01, 1 / 8))}
    assert chosen == set(TRIED)


def test_beyond_the_table_a_bit_is_a_factor_of_two_and_little_is_worth_nothing() -> None:
    entropy_of_a_gaussian = 0.5 * math.log2(2 * math.pi * math.e)
    assert bits(np.array([2.0**6, 2.0**9])) == pytest.approx([6 + entropy_of_a_gaussian, 9 + entropy_of_a_gaussian], abs=2e-3)
    assert missed(np.array([2.0**6, 2.0**9])) == pytest.approx([1 / 12, 1 / 12], rel=5e-3)
    few = np.array([2.0**-4, 2.0**-9])
    assert bits(few).tolist() == [0.0, 0.0] and missed(few).tolist() == np.square(few).tolist()


def test_integers_are_clipped_and_keep_their_sign() -> None:
    found = quantise(np.array([[1e9, 0.5], [-1e9, -0.5], [0.0, -3.0]]), np.array([1.0, 1.0]), np.array([32.0, 32.0]), 7)
    assert found.dtype == np.int16 and np.abs(found).max() == 7 and found[:, 0].tolist() == [7, -7, 0] and found[2, 1] == -3


def test_entropy_counts_the_bits_of_all_entries() -> None:
    assert entropy(np.array([0, 0, 1, 1])) == 4.0 and entropy(np.array([], np.int16)) == 0.0 and entropy(np.array([3, 3])) == 0.0
    assert entropy(np.array([[0, 0], [0, 1]])) == pytest.approx(4 * (-0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)), rel=1e-12)
