"""Sums by halving, against the same order in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.kernels.merging.sums import halved_sum, inner_products


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 8, 1000, 4097])
def test_halved_sums_add_halves_of_the_array(kind: type, n: int) -> None:
    values = np.random.default_rng(n).standard_normal(n).astype(kind)
    flags = np.arange(n) % 3 > 0
    size = np.abs(values)
    for what, stays, each in (("absolute", None, size), ("absolute", flags, size * flags), ("square", flags, values**2 * flags)):
        flat = each.astype(np.float64)
        while len(flat) > 1:
            half = len(flat) // 2
            last = flat[2 * half :]
            flat = flat[:half] + flat[half : 2 * half]
            if len(last):
                flat[0] += last[0]
        assert halved_sum(values, what, stays) == (flat[0] if n else 0.0)


@pytest.mark.parametrize("dtype", ["F32 f4", "F64 f8", "BF16 f4"])
@pytest.mark.parametrize("n", [1, 512, 1500])
@pytest.mark.parametrize("based", [False, True])
def test_inner_products_are_summed_by_chunks_and_halves(dtype: str, n: int, based: bool) -> None:
    noise = np.random.default_rng(n)
    values = [noise.standard_normal(n).astype("f8" if dtype == "F64 f8" else "f4") for _ in range(4)]
    if dtype == "BF16 f4":
        bits = [(value.view(np.int32) >> 16).astype(np.int16) for value in values]
        values = [(each.astype(np.int32) << 16).view(np.float32) for each in bits]
    else:
        bits = list(values)
    table = inner_products(bits[:3], bits[3] if based else None, dtype, 512)
    if based:
        values = [value - values[3] for value in values]
    for i, j in ((0, 0), (0, 1), (2, 1), (2, 2)):
        rows = np.zeros(-(-n // 512) * 512)
        rows[:n] = values[i].astype(np.float64) * values[j].astype(np.float64)
        rows = rows.reshape(-1, 512)
        while rows.shape[1] > 1:
            half = rows.shape[1] // 2
            rows = rows[:, :half] + rows[:, half:]
        assert table[i][j] == rows[:, 0].tolist()
