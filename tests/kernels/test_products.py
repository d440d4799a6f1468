"""Loops of unpacking against exact integers and against NumPy's own float64."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.kernels.products import added, product_into
from peru_cli.methods.mixed.scales import product, run_of_product, scale_of
from peru_cli.streaming.arrays import CPU


@pytest.mark.parametrize("kind, most", [(np.float32, 50), (np.float64, 2**20)])
def test_a_product_of_integers_is_that_of_python(kind: type, most: int) -> None:
    noise = np.random.default_rng(0)
    left, right = noise.integers(-most, most + 1, (5, 7)), noise.integers(-most, most + 1, (7, 1030))
    left[:, 3], left[4] = 0, 0
    out = np.full((6, 1030), 9.0)
    product_into(left.astype(kind), right.astype(kind), 0.25, np.array([1, 0, 5, 2, 4]) * 1030, out.reshape(-1))
    exact = left.astype(object) @ right.astype(object)
    assert (out[[1, 0, 5, 2, 4]] * 4 == exact.astype(np.float64)).all() and (out[3] == 9).all()


@pytest.mark.parametrize("most, octaves", [(3, 1), (40, 4), (2047, 9), (5, 35)])
def test_a_run_of_a_product_has_the_bits_of_a_float64_product(most: int, octaves: int) -> None:
    """Both where float32 is wide enough and where it is not."""
    noise = np.random.default_rng(1)
    left, right = (noise.integers(-most, most + 1, shape).astype(np.int16) for shape in ((20, 9), (9, 33)))
    scales = noise.integers(-300, -300 + 4 * octaves, 9)
    rows = np.sort(noise.choice(50, 20, replace=False))
    whole = np.zeros((50, 33))
    whole[rows] = (left * scale_of(scales)) @ right.astype(np.float64)
    for start, stop in ((0, 50 * 33), (5, 33 * 7 + 1), (33 * 48, 33 * 50)):
        assert (run_of_product(left, right, scales, rows, start, stop) == whole.reshape(-1)[start:stop]).all()
    assert (run_of_product(left, right, scales, None, 7, 600) == whole[rows].reshape(-1)[7:600]).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_base_plus_differences_of_any_size_is_rounded_as_numpy_rounds_it(dtype: str) -> None:
    noise, bits = np.random.default_rng(2), np.arange(-(1 << 15), 1 << 15).astype(np.int16)
    with np.errstate(invalid="ignore"):  # NaNs are among them
        wide = CPU.widen(bits, BY_NAME[dtype], np.empty(len(bits), np.float32)).astype(np.float64)
    for size in (1e-9, 1e-3, 1.0, 1e38, 1e300):
        differences = noise.normal(0, size, len(bits))
        differences[::5], differences[1::5] = 0.0, -0.0
        with np.errstate(over="ignore"):
            single = (wide + differences).astype(np.float32)
        stays = (differences == 0) | ~np.isfinite(wide)
        assert (added(bits, differences, dtype) == np.where(stays, bits, CPU.narrow(single, BY_NAME[dtype]))).all()


def test_factors_may_lie_in_memory_in_any_order() -> None:
    noise = np.random.default_rng(3)
    left, right = (np.asfortranarray(noise.integers(-3, 4, shape).astype(np.int16)) for shape in ((20, 5), (5, 9)))
    scales = np.arange(5)
    assert (product(left, right, scales) == (left * scale_of(scales)) @ right.astype(np.float64)).all()
