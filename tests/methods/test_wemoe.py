"""WEMoE on arrays: routers start near lambda as the authors' do, and what tasks add is that of merged weights, input by input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peru_cli.methods.compact.wemoe import Change, Changes, Known, Router, normals, shares_of


def test_numbers_are_normal_and_depend_on_the_seed_and_the_purpose_only() -> None:
    drawn = normals(3, "a", 20001)
    ordered = np.sort(drawn.numpy())
    wanted = torch.special.ndtri((torch.arange(20001, dtype=torch.float64) + 0.5) / 20001).numpy()
    assert abs(float(drawn.mean())) < 0.02 and abs(float(drawn.std()) - 1) < 0.02
    assert np.abs(ordered - wanted)[200:-200].max() < 0.06
    assert normals(3, "a", 7).tolist() == drawn[:7].tolist() != normals(4, "a", 7).tolist() != normals(3, "b", 7).tolist()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_router_starts_at_lambda_as_in_the_authors_program(depth: int) -> None:
    router = Router.fresh(64, 3, depth, 0.3, 0, "mlp")
    *before, (_, bias) = router.layers
    assert bias.eq(0.3).all() and all(b.eq(0).all() for _, b in before)
    for weight, _ in router.layers:
        assert float(weight.std()) == pytest.approx(0.01, rel=0.15) and abs(float(weight.mean())) < 0.003
    hidden = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(router(hidden), torch.full((50, 3), 0.3), atol=0.35 if depth == 1 else 0.05, rtol=0)
    again = Router.read(torch.cat([tensor.flatten() for tensor in router.tensors]), 64, 3, depth)
    torch.testing.assert_close(again(hidden), router(hidden), atol=0, rtol=0)


def test_what_tasks_add_is_that_of_merged_weights_of_each_input() -> None:
    noise = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise).double()

    factors = Change(left=draw(7, 2), right=draw(2, 5), bias=draw(7))
    changes = [factors, Change(), Change(whole=draw(7, 5)), Change(left=draw(7, 3), right=draw(3, 5))]
    inputs, gates = draw(4, 6, 5), draw(4, 4)
    made = Changes(changes, 5, 7)
    made.to(inputs)
    for row, found in enumerate(made.add(inputs, gates)):
        weight, bias = torch.zeros(7, 5).double(), torch.zeros(7).double()
        for gate, change in zip(gates[row], changes, strict=True):
            if change.left is not None and change.right is not None:
                weight += gate * (change.left @ change.right)
            weight += gate * change.whole if change.whole is not None else 0
            bias += gate * change.bias if change.bias is not None else 0
        torch.testing.assert_close(found, inputs[row] @ weight.T + bias, atol=1e-12, rtol=1e-12)


def test_shares_are_those_of_positive_gates() -> None:
    found = shares_of(torch.tensor([[0.6, 0.2, -3.0], [-1.0, -2.0, 0.0], [0.0, 0.0, 5.0]]), None)
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.25, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 1.0]]))


def test_known_gates_give_the_posterior_of_normal_distributions() -> None:
    noise = torch.Generator().manual_seed(2)
    gates = [torch.randn(n, 3, generator=noise).double() + torch.tensor(at) for n, at in ((20, [0, 0, 1]), (30, [2, 0, 0]), (9, [0, 1, 0]))]
    known = Known.of(gates)
    asked = torch.randn(5, 3, generator=noise).double()
    means = np.stack([found.numpy().mean(0) for found in gates])
    within = np.concatenate([found.numpy() - mean for found, mean in zip(gates, means, strict=True)])
    density = np.exp(-0.5 * ((asked.numpy()[:, None] - means) ** 2 / (within**2).mean(0)).sum(2))
    np.testing.assert_allclose(shares_of(asked, known).numpy(), density / density.sum(1, keepdims=True), rtol=1e-9)
