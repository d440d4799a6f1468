"""Loops on bits of differences, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.kernels.deltas import Room, add_ulps


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


@pytest.mark.parametrize("dtype", ["F32", "U8"])
@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_changed_entries_are_found_wherever_they_are(dtype: str, share: float) -> None:
    """At both ends of words of 64 entries and of blocks, and in rests that are shorter."""
    rng, kind = np.random.default_rng(1), "f4" if dtype == "F32" else "i1"
    room = Room(3000, "f4")
    for n in (0, 1, 63, 64, 65, 1024, 3000):
        base = rng.integers(1, 100, n).astype(kind).view(f"i{np.dtype(kind).itemsize}")
        where = np.union1d(np.flatnonzero(rng.random(n) < share), [0, 63, 64, n - 1] if share else []).astype(int)
        where = where[(where >= 0) & (where < n)]
        fine = base.copy()
        fine[where] += 1
        for found in (room.changed(base, fine, dtype), room.select(base, fine, dtype, 0)):
            assert found[0].tolist() == where.tolist()
            assert found[-1].tolist() == fine[where].tolist() and set(found[-2].tolist()) <= {1}
