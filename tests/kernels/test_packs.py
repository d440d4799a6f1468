"""A task from a pack's sums: the loop and the same in NumPy, pass by pass."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.kernels.packs import retrieved
from peru_cli.streaming.arrays import BITS, CPU

N = 5000


@pytest.mark.parametrize("sums_kind", ["i2", "i4"])
@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("masked", [False, True])
def test_base_and_signed_sums_are_added_as_numpy_adds_them(name: str, sums_kind: str, masked: bool) -> None:
    dtype, rng = BY_NAME[name], np.random.default_rng(0)
    kind = np.dtype("f8" if name == "F64" else "f4")
    base = np.array(CPU.narrow(rng.standard_normal(N).astype(kind), dtype))
    sums = rng.integers(-3000, 3000, N).astype(sums_kind)
    flags = rng.random(N) < 0.5 if masked else None
    row = (rng.choice([-1.0, 1.0], 1100) * 2.0**-13 * 0.3).astype(kind)
    at = 1090
    factors = row[(np.arange(N) + at) % len(row)]
    vector = (sums if flags is None else sums * flags).astype(kind) * factors
    wanted = CPU.narrow(CPU.widen(base, dtype, np.empty(N, kind)) + vector, dtype)
    out = np.empty(N, BITS[dtype.bits])
    assert retrieved(base, sums, flags, row, at, name, out)
    assert np.array_equal(out, np.asarray(wanted).view(out.dtype))


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
def test_entries_that_do_not_fit_are_reported(name: str) -> None:
    dtype, kind = BY_NAME[name], np.dtype("f8" if name == "F64" else "f4")
    base, out = np.zeros(10, BITS[dtype.bits]), np.empty(10, BITS[dtype.bits])
    sums = np.zeros(10, np.int16)
    assert retrieved(base, sums, None, np.ones(3, kind), 0, name, out)
    sums[9] = 1
    for factor in (np.inf, np.nan, np.finfo(kind).max):
        fits = name in ("F32", "F64") and np.isfinite(factor)
        assert retrieved(base, sums, None, np.full(3, factor, kind), 0, name, out) == fits


def test_sums_in_memory_are_the_same_numbers(tmp_path: object) -> None:
    base = np.arange(100, dtype=np.int32)
    small, wide = np.arange(-50, 50, dtype=np.int16), np.arange(-50, 50, dtype=np.int32)
    one, two = np.empty_like(base), np.empty_like(base)
    assert retrieved(base, small, None, np.full(7, 0.5, np.float32), 3, "F32", one)
    assert retrieved(base, wide, None, np.full(7, 0.5, np.float32), 3, "F32", two)
    assert np.array_equal(one, two)
