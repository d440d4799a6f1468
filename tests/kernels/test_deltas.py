"""Loops on bits of differences, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.kernels.deltas import add_ulps


@pytest.mark.parametrize("width", [2, 4, 8])
def test_bits_move_by_ulps_in_the_order_of_floats(width: int) -> None:
    """`nextafter` says what one ULP is; a step back gives the same bits, also from NaN."""
    floats, rng = np.dtype(f"f{width}"), np.random.default_rng(width)
    given = np.append(rng.standard_normal(500), [0.0, np.inf, np.nan, -np.inf]).astype(floats)
    bits, positions = given.view(f"i{width}").copy(), np.arange(0, 504, 3)
    steps = np.resize(np.array([1, 0, -1], f"i{width}"), len(positions))
    moved = add_ulps(bits, positions, steps)
    assert moved.tolist() == positions[steps != 0].tolist()
    finite = positions[np.isfinite(given[positions])]
    toward = np.where(steps == 0, given[positions], np.copysign(np.inf, steps).astype(floats))[np.isfinite(given[positions])]
    assert np.array_equal(bits.view(floats)[finite], np.nextafter(given[finite], toward))
    assert add_ulps(bits, positions, -steps).tolist() == moved.tolist()
    assert bits.tobytes() == given.tobytes()
    assert not len(add_ulps(bits, positions[:0], steps[:0]))
