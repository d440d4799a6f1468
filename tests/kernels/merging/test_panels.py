"""Loops on panels, against NumPy in float64 and against sorting."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.kernels.merging.panels import add_products, between, spread, values_of
from peru_cli.methods.order import Counts, kept, largest, number_of, ordered


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_variances_are_numpys(kind: type) -> None:
    values = [np.random.default_rng(i).standard_normal(5000).astype(kind) for i in range(3)]
    assert np.array_equal(spread(values), np.var(values, axis=0))


def test_values_are_differences_and_say_whether_they_are_finite() -> None:
    fine, base = np.array([0x3F80, 0x4000, 0x7F80], np.uint16), np.array([0x4000, 0x3F80, 0x7F80], np.uint16)
    out = np.empty(3, np.float32)
    assert values_of(fine[:2], base[:2], "BF16", out[:2]) and out[:2].tolist() == [-1.0, 1.0]
    assert not values_of(fine, base, "BF16", out) and not values_of(fine, None, "BF16", out)


def test_products_add_up_row_after_row() -> None:
    a, b = (np.random.default_rng(i).standard_normal((50, 30)) for i in range(2))
    sums = np.zeros(30)
    add_products(a[:20], b[:20], sums)
    add_products(a[20:], b[20:], sums)
    assert np.array_equal(sums, np.add.reduce(a * b, axis=0))


class Cut:
    """A run of numbers in panels."""

    def __init__(self, numbers: np.ndarray, size: int) -> None:
        self._parts = [numbers[at : at + size] for at in range(0, len(numbers), size)]

    def each(self, what, then=None):
        return [what(part) for part in self._parts]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_k_largest_of_panels_are_those_of_a_sort(kind: type) -> None:
    noise = np.random.default_rng(1)
    numbers = np.concatenate([noise.standard_normal(3000), noise.integers(-2, 3, 3000) * 1.0, [-0.0, 0.0]]).astype(kind)
    noise.shuffle(numbers)
    panels, counts = Cut(numbers, 700), Counts(f"i{numbers.itemsize}")
    panels.each(lambda part: counts.add(ordered(part)))
    for taken, k in zip(largest(panels, counts, ordered, ks := [1, 2, 500, 3300, 6002]), ks, strict=True):
        assert number_of(taken.key, numbers.dtype.str[1:]) == np.sort(numbers)[-k]
        flags = np.concatenate([kept(keys, taken, panel) for panel, keys in enumerate(panels.each(ordered))])
        assert np.array_equal(np.flatnonzero(flags), np.sort(np.argsort(-numbers, kind="stable")[:k]))


def test_keys_between_bounds_keep_their_order() -> None:
    keys = np.random.default_rng(0).integers(-9, 9, 1000).astype(np.int32)
    assert np.array_equal(between(keys, -2, 3), keys[(keys >= -2) & (keys <= 3)])
