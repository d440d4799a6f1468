"""What stays by rank, against sorting."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.kernels.merging.ranking import stay_by_rank


@pytest.mark.parametrize("columns", [1, 2, 40, 200, 1500, 40_000])
@pytest.mark.parametrize("kind", ["few values", "all values"])
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_ranks_of_magnitudes_decide_what_stays(columns: int, kind: str, epsilon: float) -> None:
    noise = np.random.default_rng(columns)
    vector = noise.integers(-3, 4, (4, columns)) if kind == "few values" else noise.standard_normal((4, columns))
    vector = (vector * noise.choice([1e-40, 1e-3, 1.0, 1e37], (4, columns))).astype(np.float32)
    draws, limits = noise.integers(0, 2**32, 4 * columns, np.uint32), np.floor(np.linspace(0.5 - epsilon, 0.5 + epsilon, columns) * 2.0**32)
    draws[: min(3, columns)] = np.array([0, 2**31, 2**32 - 1])[: min(3, columns)]
    ranks = np.argsort(np.argsort(np.abs(vector), axis=1, kind="stable"), axis=1)
    assert np.array_equal(stay_by_rank(vector, draws, limits), draws.reshape(4, columns) < limits[ranks])
