"""Low-rank approximations against dense float64 decompositions; byte budgets against all possible choices."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch

from peru_cli.methods.compact.budget import ranks_for_bytes
from peru_cli.methods.compact.lowrank import (
    DenseSvd,
    Matrix,
    ThinSvd,
    find_range,
    fit,
    gram,
    move_scale,
    solve,
    squared_distance,
    thin_inner,
    thin_values,
)


def dense_best(product: torch.Tensor, rank: int) -> torch.Tensor:
    """Eckart and Young, in float64."""
    u, s, vt = torch.linalg.svd(product.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def thin(rows: int, columns: int, r: int, condition: float = 1.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random thin factors whose columns differ in size by up to `condition`, in the opposite order in the other factor."""
    noise = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, math.log10(condition), r, dtype=torch.float64)
    left = torch.randn(rows, r, generator=noise, dtype=torch.float64) * sizes
    return left, torch.randn(r, columns, generator=noise, dtype=torch.float64) / sizes[:, None].sqrt()


@pytest.mark.parametrize(("rows", "columns", "r"), [(90, 130, 16), (130, 90, 16), (8, 60, 12), (60, 8, 12), (8, 9, 12)])
@pytest.mark.parametrize("condition", [1.0, 1e7])
def test_thin_factors_give_the_best_approximation_of_their_product(rows: int, columns: int, r: int, condition: float) -> None:
    left, right = thin(rows, columns, r, condition)
    product = left @ right
    found = ThinSvd(left.float(), right.float()) if condition == 1.0 else ThinSvd(left, right)
    exact = torch.linalg.svdvals(product)
    torch.testing.assert_close(found.values, exact[: len(found.values)], rtol=1e-6, atol=1e-6 * float(exact[0]))
    torch.testing.assert_close(thin_values(left, right), exact[: len(found.values)], rtol=1e-9, atol=1e-12 * float(exact[0]))
    for rank in (1, 3, 7):
        b, a = found.factors(rank)
        assert b.shape == (rows, rank) and a.shape == (rank, columns)
        best = dense_best(product, rank)
        assert float((b @ a - best).norm() / best.norm()) < 1e-5
        # the dropped energy is the squared error, and both factors carry the square root of the values
        assert float((product - b @ a).square().sum()) == pytest.approx(float(exact[rank:].square().sum()), rel=1e-4)
        torch.testing.assert_close(b.norm(dim=0).square(), found.values[:rank])
        torch.testing.assert_close(a.norm(dim=1).square(), found.values[:rank])
        other = DenseSvd(product).factors(rank)
        assert float((other[0] @ other[1] - best).norm() / best.norm()) < 1e-12


def test_products_are_compared_without_computing_them() -> None:
    a, b = thin(40, 50, 6), thin(40, 50, 4, seed=1)
    assert thin_inner(a, b) == pytest.approx(float(((a[0] @ a[1]) * (b[0] @ b[1])).sum()))
    whole = thin_inner(a, a)
    assert squared_distance(a, b, whole) == pytest.approx(float((a[0] @ a[1] - b[0] @ b[1]).square().sum()))
    assert squared_distance(a, a, whole) < 1e-12 * whole


@pytest.mark.parametrize("scale", [2.0, 0.5, 1 / 3, -3.0, 2.0**-4, 1e4])
def test_a_scale_moves_into_the_factors_without_rounding_more_than_once(scale: float) -> None:
    left, right = thin(30, 20, 5)
    left, right = (left * 1e-5).half(), (right * 300).half()  # a trained lora_B is small
    b, a = move_scale(left.double(), right.double(), scale)
    torch.testing.assert_close(b @ a, scale * left.double() @ right.double(), rtol=1e-15, atol=0)
    assert 0.5 <= float(b.abs().max() / a.abs().max()) <= 4
    stored = b.half().double() @ a.half().double()
    if math.log2(abs(scale)).is_integer():
        # a power of two costs nothing, although half of the left factor's entries were subnormal
        assert torch.equal(stored, scale * left.double() @ right.double())
    assert float((stored - b @ a).norm() / (b @ a).norm()) < 2**-10


class InMemory(Matrix):
    """A matrix that counts how often it is read."""

    def __init__(self, entries: torch.Tensor, step: int = 37) -> None:
        self.entries, self.step, self.passes = entries, step, 0
        self.rows, self.columns = entries.shape

    def row_panels(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.passes += 1
        for start in range(0, self.rows, self.step):
            yield start, self.entries[start : start + self.step]

    def column_panels(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.passes += 1
        for start in range(0, self.columns, self.step):
            yield start, self.entries[:, start : start + self.step]


@cache
def spectra() -> dict[str, torch.Tensor]:
    """Matrices with spectra from flat to steep; float32."""
    noise = torch.Generator().manual_seed(3)
    u = torch.linalg.qr(torch.randn(300, 300, generator=noise))[0]
    v = torch.linalg.qr(torch.randn(420, 300, generator=noise))[0]
    index = torch.arange(1, 301)
    shapes = {"slow": index**-0.5, "1/i": 1 / index, "steep": torch.exp(-index / 10), "step": torch.where(index > 40, 0.1, 1.0)}
    found = {name: (u * s) @ v.T for name, s in shapes.items()}
    return found | {"noise": torch.randn(300, 420, generator=noise), "tall noise": torch.randn(420, 300, generator=noise)}


@pytest.mark.parametrize("name", sorted(spectra()))
def test_the_range_finder_is_within_a_percent_of_the_optimum(name: str) -> None:
    entries = spectra()[name]
    matrix = InMemory(entries)
    exact = torch.linalg.svdvals(entries.double())
    for rank in (1, 8, 32):
        matrix.passes = 0
        fitted = fit(matrix, find_range(matrix, rank, "seed"), rank, lambda t: t)
        error = float((entries.double() - fitted.left @ fitted.right).norm())
        optimum = float(exact[rank:].square().sum().sqrt())
        assert optimum * (1 - 1e-6) <= error <= 1.01 * optimum
        assert math.sqrt(fitted.squared_error) == pytest.approx(error, rel=1e-4)  # measured, not assumed
        assert fitted.squared == pytest.approx(float(entries.double().square().sum()), rel=1e-9)
        assert matrix.passes <= 13


@pytest.mark.parametrize("name", sorted(spectra()))
def test_the_gram_matrix_gives_the_optimum(name: str) -> None:
    entries = spectra()[name]
    matrix = InMemory(entries)
    found = gram(matrix)
    exact = torch.linalg.svdvals(entries.double())
    torch.testing.assert_close(found.values, exact, rtol=1e-6, atol=1e-7 * float(exact[0]))
    for rank in (1, 8, 32):
        fitted = fit(matrix, found, rank, lambda t: t)
        best = dense_best(entries, rank)
        # "step" has equal singular values at rank 1 to 32: many approximations are best there
        if name != "step":
            assert float((fitted.left @ fitted.right - best).norm() / best.norm()) < 1e-5
        assert math.sqrt(fitted.squared_error) == pytest.approx(float(exact[rank:].square().sum().sqrt()), rel=1e-6)


def test_the_error_is_measured_on_the_stored_factors() -> None:
    entries = spectra()["steep"]
    matrix = InMemory(entries)
    fitted = fit(matrix, gram(matrix), 60, lambda t: t.bfloat16().double())
    stored = fitted.left.bfloat16().double() @ fitted.right.bfloat16().double()
    assert torch.equal(stored, fitted.left @ fitted.right)
    error = float((entries.double() - stored).square().sum())
    assert fitted.squared_error == pytest.approx(error, rel=1e-6)
    assert error > 1.5 * float(torch.linalg.svdvals(entries.double())[60:].square().sum())  # the rest is rounding


def test_panels_change_nothing_but_rounding_and_zero_is_zero() -> None:
    entries = spectra()["1/i"]
    one, many = (find_range(InMemory(entries, step), 8, "seed").values for step in (1000, 1))
    torch.testing.assert_close(one, many, rtol=1e-5, atol=0)
    assert len(find_range(InMemory(torch.zeros(50, 60)), 4, "seed").values) == 0
    assert gram(InMemory(torch.zeros(5, 6))).squared == 0


def test_a_solver_that_fails_on_a_gpu_runs_on_the_cpu() -> None:
    """The device "meta" stands for a GPU: it is not a CPU, and its solvers can be made to fail."""
    seen = []

    def solver(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(matrix.device.type)
        if matrix.device.type != "cpu":
            raise torch.linalg.LinAlgError("no convergence")
        return (matrix + 1,)

    class OnGpu(torch.Tensor):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("meta")

        def cpu(self) -> torch.Tensor:  # type: ignore[override]
            return self.as_subclass(torch.Tensor)

    (result,) = solve(solver, torch.zeros(2, 2).as_subclass(OnGpu))
    assert seen == ["meta", "cpu"] and result.device.type == "meta"
    with pytest.raises(torch.linalg.LinAlgError):
        solve(lambda matrix: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")), torch.zeros(2, 2))


@pytest.mark.parametrize("seed", range(4))
def test_budgets_are_spent_as_well_as_by_brute_force(seed: int) -> None:
    noise = np.random.default_rng(seed)
    for trial in range(150):
        energies = [np.sort(noise.random(noise.integers(1, 6)) ** 3)[::-1] for _ in range(noise.integers(1, 5))]
        if trial % 3 == 0:
            energies = [np.round(values * 4) / 4 for values in energies]  # equal gains, and zeros
        costs = [int(cost) for cost in noise.choice([3, 5, 7, 12], len(energies))]
        budget = sum(costs) + int(noise.integers(0, 60))
        ranks = ranks_for_bytes(energies, costs, budget)
        assert min(ranks) >= 1 and sum(n * cost for n, cost in zip(ranks, costs, strict=True)) <= budget
        choices = itertools.product(*(range(1, len(values) + 1) for values in energies))
        fitting = (c for c in choices if sum(n * cost for n, cost in zip(c, costs, strict=True)) <= budget)
        best = max(sum(values[:n].sum() for values, n in zip(energies, choice, strict=True)) for choice in fitting)
        assert sum(values[:n].sum() for values, n in zip(energies, ranks, strict=True)) == pytest.approx(best, abs=1e-12)


def test_a_budget_below_rank_1_is_refused() -> None:
    with pytest.raises(ValueError, match="one rank"):
        ranks_for_bytes([np.ones(3), np.ones(2)], [10, 10], 19)
