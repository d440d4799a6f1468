"""SMILE on arrays: factors are NumPy's truncated SVD, one layer equals a float64 reference, orthogonal tasks are told apart."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from peru_cli.methods.compact import smile
from peru_cli.methods.compact.lowrank import Matrix
from peru_cli.methods.compact.smile import Expert, correction, expert_factors, probabilities, stack_gates


class Held(Matrix):
    """A matrix in memory, read in panels of three."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, (self.rows, self.columns) = values, values.shape

    def row_panels(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield from ((at, self.values[at : at + 3]) for at in range(0, self.rows, 3))

    def column_panels(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield from ((at, self.values[:, at : at + 3]) for at in range(0, self.columns, 3))


def low_rank(rows: int, columns: int, rank: int, seed: int) -> torch.Tensor:
    noise = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=noise).double(), torch.randn(rank, columns, generator=noise).double()
    return left @ (right * torch.arange(rank, 0, -1)[:, None])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (8, 8)])
def test_factors_are_the_truncated_svd_with_unit_rows_on_the_inputs(shape: tuple[int, int], transposed: bool) -> None:
    whole = low_rank(*shape, 6, 0)
    found = expert_factors(Held(whole.T if transposed else whole), 4, transposed, lambda t: t, "w")
    u, s, vt = np.linalg.svd(whole.numpy())
    np.testing.assert_allclose(found.left @ found.right, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-9)
    np.testing.assert_allclose(found.right @ found.right.T, np.eye(4), atol=1e-9)
    np.testing.assert_allclose(
        np.abs(found.right.numpy() @ vt[:4].T), np.eye(4), atol=1e-6
    )  # the rows are V's, in order: a prefix is the gate
    assert found.squared == pytest.approx((s**2).sum()) and found.squared_error == pytest.approx((s[4:] ** 2).sum())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_task_vector_of_low_rank_has_no_more_directions_than_it_needs(transposed: bool) -> None:
    whole = low_rank(9, 14, 3, 1)
    found = expert_factors(Held(whole.T if transposed else whole), 8, transposed, lambda t: t, "w")
    assert found.right.shape == (3, 14) and found.squared_error == pytest.approx(0, abs=1e-9)
    none = expert_factors(Held(torch.zeros(9, 14)), 8, transposed, lambda t: t, "w")
    assert none.squared == 0 and (none.right.shape == (0, 14 if not transposed else 9))


def test_large_matrices_are_factored_by_the_range_finder_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = low_rank(40, 30, 5, 2)
    wanted = expert_factors(Held(whole), 4, False, lambda t: t, "w")
    monkeypatch.setattr(smile, "GRAM_SIDE", 8)
    for transposed in (False, True):
        found = expert_factors(Held(whole.T if transposed else whole), 4, transposed, lambda t: t, "w")
        np.testing.assert_allclose(found.left @ found.right, wanted.left @ wanted.right, atol=1e-4)


def reference(x: np.ndarray, experts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], gate: int, top: int) -> np.ndarray:
    """The paper's equations, input by input."""
    rows = []
    for one in x:
        r = np.array([np.sqrt(((right[:gate] @ one) ** 2).sum()) for _, right, _ in experts])
        p = np.exp(r - r.max()) / np.exp(r - r.max()).sum()
        chosen = np.argsort(-p)[:top]
        rows.append(sum(p[i] / p[chosen].sum() * (experts[i][0] @ (experts[i][1] @ one) + experts[i][2]) for i in chosen))
    return np.array(rows)


@pytest.mark.parametrize("top", [1, 2, 3])
def test_one_layer_equals_a_float64_reference(top: int) -> None:
    noise = np.random.default_rng(0)
    experts = []
    for _ in range(3):
        u, s, vt = np.linalg.svd(noise.normal(size=(7, 11)))
        experts.append((u[:, :5] * s[:5], vt[:5], noise.normal(size=7)))
    x = noise.normal(size=(40, 11))
    held = [Expert(*(torch.from_numpy(part.copy()) for part in parts)) for parts in experts]
    shares = probabilities(torch.from_numpy(x), stack_gates(held, 2))
    assert set(shares.argmax(1).tolist()) == {0, 1, 2}
    found = correction(torch.from_numpy(x), held, shares, top, 7)
    np.testing.assert_allclose(found, reference(x, experts, 2, top), atol=1e-12)


def test_tasks_with_orthogonal_subspaces_are_told_apart() -> None:
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)).double())[0]
    experts = [Expert(torch.zeros(5, 3).double(), basis[3 * task : 3 * task + 3], None) for task in range(4)]
    inputs = torch.cat([torch.randn(20, 3, generator=torch.Generator().manual_seed(t)).double() @ experts[t].right for t in range(4)])
    found = probabilities(inputs, stack_gates(experts, 3))
    assert torch.equal(found.argmax(1), torch.arange(4).repeat_interleave(20))
    assert not correction(inputs, experts, found, 1, 5).any()


def test_one_task_is_always_chosen_and_an_expert_without_directions_never_against_others() -> None:
    one, none = Expert(torch.zeros(5, 1), torch.eye(4)[:1], None), Expert(torch.zeros(5, 0), torch.zeros(0, 4), None)
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert probabilities(inputs, stack_gates([one], 2)).eq(1).all()
    assert probabilities(inputs, stack_gates([one, none], 2)).argmax(1).eq(0).all()
