"""The exact diagonal of the Fisher information, against autograd a label at a time and closed forms, in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from peru_cli.methods.examples import diagonal


class Logits(torch.nn.Module):
    """Rows that go through layers of every kind, and through parameters in ways that no layer's hook sees."""

    def __init__(self, width: int, labels: int, last: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        nn = torch.nn
        self.table, self.norm, self.bare = nn.Embedding(9, width, padding_idx=0), nn.LayerNorm(width), nn.LayerNorm(width, bias=False)
        self.twice, self.turned, self.unused, self.beside = (
            nn.Linear(width, width),
            Conv1D(width, width),
            nn.Linear(2, 2),
            nn.Linear(width, width),
        )
        self.one, self.other, self.shift = nn.Linear(width, width), nn.Linear(width, width), nn.Parameter(torch.ones(width))
        self.other.weight, self.last, self.head = self.one.weight, last, nn.Linear(width, labels)

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        x = self.norm(self.table(ids)) + self.shift
        x = torch.nn.functional.relu(self.twice(x), inplace=True) + self.twice(x).tanh()
        x = self.bare(x + self.turned(x)) + torch.nn.functional.linear(x, self.beside.weight) + self.beside(x)
        return SimpleNamespace(logits=self.head(self.last(self.one(x) + self.other(x).tanh()).mean(1)))


class NotBatched(torch.autograd.Function):
    """The identity, whose backward asks for a number: nothing that can be batched."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_non_differentiable()
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        assert not ctx.saved_tensors
        return gradient if float(gradient.sum()) < 1e300 else -gradient


@pytest.mark.parametrize(("positions", "labels", "last"), [(3, 12, torch.sin), (9, 2, NotBatched.apply), (9, 2, torch.sin)])
def test_exact_fisher_is_a_gradient_for_each_label(positions: int, labels: int, last: Callable[..., torch.Tensor]) -> None:
    """In float64: with labels many or few, layers used twice, shared or bypassed, and what cannot be batched."""
    torch.manual_seed(0)
    model = Logits(10, labels, last).double()
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = [torch.zeros_like(p) for p in parameters]
    rows = torch.randint(0, 9, (3, 1, positions))
    for ids in rows:
        chances = model(ids).logits[0].log_softmax(-1)
        for y in range(labels):
            gradients = torch.autograd.grad(chances[y], parameters, retain_graph=True, materialize_grads=True)
            for total, gradient in zip(wanted, gradients, strict=True):
                total += chances[y].exp().detach() * gradient.square()
    found = diagonal.ExactFisher(model.requires_grad_(False), "a")
    for ids in rows:
        found.add({"ids": ids})
    for name, p, total in zip(names, parameters, wanted, strict=True):
        torch.testing.assert_close(found.totals[p], total, rtol=1e-9, atol=1e-18, msg=name)
    by_labels = {name for name, p in zip(names, parameters, strict=True) if any(p is other for other in found._others)}
    assert by_labels == {"shift", "beside.weight", "beside.bias", "one.weight", "one.bias", "other.bias"}


def test_exact_fisher_of_softmax_regression_is_its_closed_form() -> None:
    """E_x p_c (1 - p_c) x_d^2 for the weight (c, d), without x for the bias."""
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 5).double().requires_grad_(False)
    wrapped = torch.nn.Module()
    wrapped.model, wrapped.forward = model, lambda x: SimpleNamespace(logits=model(x))
    found = diagonal.ExactFisher(wrapped, "a")
    weight, bias = torch.zeros(5, 7, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for x in torch.randn(4, 1, 7, dtype=torch.float64):
        p = model(x).softmax(-1)[0]
        weight, bias = weight + (p * (1 - p))[:, None] * x.square(), bias + p * (1 - p)
        found.add({"x": x})
    torch.testing.assert_close(found.totals[model.weight], weight, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found.totals[model.bias], bias, rtol=1e-12, atol=1e-15)


def test_labels_against_later_ones_are_their_covariance() -> None:
    p = torch.tensor([0.5, 1e-12, 0.3, 0.0, 0.2 - 1e-12], dtype=torch.float64)
    c, u = diagonal.directions(p)
    assert len(c) == 4
    torch.testing.assert_close(torch.einsum("k,ki,kj->ij", c, u, u), p.diag() - p[:, None] * p, rtol=1e-12, atol=1e-16)
