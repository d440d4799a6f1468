"""The diagonal of a classifier's Fisher information, with its exact expectation over labels, without a gradient for each label.

    F = sum_y p_y (J^T (e_y - p))^2 = sum_k c_k (J^T u_k)^2,      J = d logits / d theta, of one example

for any c and u with sum_k c_k u_k u_k^T = diag(p) - p p^T, which has one rank less than labels. J^T u for all k at once is one batched
pass back to the outputs of the layers; weights' gradients are never formed where that costs more. With what comes back to a linear
layer, s (k, positions, out), and its inputs a (positions, in):

    F[o, i] = sum_k c_k (sum_t s[k, t, o] a[t, i])^2 = sum_tu (sum_k c_k s[k, t, o] s[k, u, o]) (a[t, i] a[u, i])

The right side is one product of matrices for all labels. The left one is cheaper where positions are many and labels few."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from peru_cli.errors import UsageError

HELD = 1 << 25  # numbers that come back at a time
FORMED = 20  # adding the square of an entry costs as much as so many multiplications


def directions(chances: Tensor) -> tuple[Tensor, Tensor]:
    """c (labels - 1,) and u (labels - 1, labels) with sum_k c_k u_k u_k^T = diag(p) - p p^T: each label against the later ones.

    Args:
        chances: p, (labels,), float64; they add up to 1."""
    tail = chances.flip(0).cumsum(0).flip(0).clamp_min(1e-300)
    labels, later = len(chances), tail[1:]
    above = torch.ones(labels, labels, dtype=chances.dtype, device=chances.device).triu(1)
    u = torch.eye(labels, dtype=chances.dtype, device=chances.device) - above * chances / torch.cat([later, later.new_ones(1)])[:, None]
    return chances[:-1] * later / tail[:-1], u[:-1]


class ExactFisher:
    """Adds up the diagonal over examples. `totals` has a tensor like each of the model's parameters.

    Layers whose gradients follow from what goes in and what comes back are found by their type, and each is compared with autograd on
    the first example. All other parameters (shared ones, those used in another way) get a gradient for each k."""

    def __init__(self, model: nn.Module, task: str) -> None:
        from transformers.pytorch_utils import Conv1D

        self.model, self.task = model, task
        self.parameters = list(model.parameters())
        self.totals = {p: torch.zeros_like(p, requires_grad=False) for p in self.parameters}
        owners: dict[nn.Parameter, int] = {}
        for module in model.modules():
            for p in module.parameters(recurse=False):
                owners[p] = owners.get(p, 0) + 1
        kinds: dict[type[nn.Module], type[Layer]] = {
            nn.Linear: Matrix, Conv1D: Transposed, nn.LayerNorm: Norm, nn.Embedding: Table,
        }  # fmt: skip
        self._layers = [
            kinds[type(module)](module)
            for module in model.modules()
            if type(module) in kinds
            and len(getattr(module, "normalized_shape", (1,))) == 1
            and all(owners[p] == 1 for p in module.parameters(recurse=False))
        ]
        self._others = self.parameters
        self._is_checked = False

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Add one example's diagonal. UsageError for a language model."""
        if not self._is_checked:
            self._layers = self._explained(batch)
            explained = {p for layer in self._layers for p in layer.parameters}
            self._others = [p for p in self.parameters if p not in explained]
            self._is_checked = True
        logits = self._run(batch, self._others)
        c, u = directions(logits.detach().double().softmax(-1)[0])
        ends = [end for layer in self._layers for _, end in layer.calls]
        held = max(1, HELD // sum(tensor.numel() for tensor in (*ends, *self._others)))
        scaled = (u * c.sqrt()[:, None]).to(logits.dtype)
        for start in range(0, len(c), held):
            found = _back(logits, [*ends, *self._others], scaled[start : start + held])
            for layer in self._layers:
                layer.add(self.totals, [found.pop(0) for _ in layer.calls])
            for p, gradients in zip(self._others, found, strict=True):
                self.totals[p].add_(gradients.square_().sum(0))
        self.model.requires_grad_(False)

    def _run(self, batch: Mapping[str, Tensor], wanted: Sequence[nn.Parameter]) -> Tensor:
        """Logits with what leads back to layers' outputs and the wanted parameters."""
        hooks = [layer.module.register_forward_hook(layer.note, with_kwargs=True) for layer in self._layers]
        for layer in self._layers:
            layer.calls.clear()
        for p in self.parameters:
            p.requires_grad_(False)
        for p in wanted:
            p.requires_grad_(True)
        try:
            logits: Tensor = self.model(**batch).logits
        finally:
            for hook in hooks:
                hook.remove()
        if logits.dim() != 2:
            raise UsageError(f"{self.task} is a language model: too many labels to sum over", "add --expectation sampled")
        return logits

    def _explained(self, batch: Mapping[str, Tensor]) -> list[Layer]:
        """The layers whose gradients are those of autograd, for one direction."""
        logits = self._run(batch, self.parameters)
        ends = [end for layer in self._layers for _, end in layer.calls]
        some = torch.linspace(-1, 1, logits.shape[1], device=logits.device, dtype=logits.dtype)[None] + 0.1
        found = _back(logits, [*ends, *self.parameters], some)
        wanted = dict(zip(self.parameters, found[len(ends) :], strict=True))
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        kept = []
        for layer in self._layers:
            signals = [found.pop(0) for _ in layer.calls]
            ours = layer.gradients(*layer.rows(signals)) if signals else [torch.zeros_like(wanted[p]) for p in layer.parameters]
            pairs = zip(ours, (wanted[p] for p in layer.parameters), strict=True)
            if all(float((a - b).abs().max()) <= 1e-4 * float(b.abs().max()) + 1e-6 * largest for a, b in pairs):
                kept.append(layer)
        return kept


def _back(logits: Tensor, ends: Sequence[Tensor], vectors: Tensor) -> list[Tensor]:
    """J^T v of each row of `vectors`, (rows, *shape) for each of `ends`; zeros where logits do not depend on them."""
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(logits, ends, vectors[:, None], retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError:  # an operation that cannot be batched: the same, one after the other
        each = [torch.autograd.grad(logits, ends, v[None], retain_graph=True, materialize_grads=True) for v in vectors]
        found = [torch.stack(one) for one in zip(*each, strict=True)]
    return [end.new_zeros(len(vectors), *end.shape) if g is None else g for g, end in zip(found, ends, strict=True)]


class Layer(ABC):
    """A layer, and what went through it for one example."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.parameters = list(module.parameters(recurse=False))
        self.calls: list[tuple[Tensor, Tensor]] = []  # its inputs and outputs

    def note(self, module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], out: Tensor) -> Tensor:
        """A forward hook: gradients of the output will be asked for. What changes it in place gets a copy."""
        end = out if out.requires_grad else out.requires_grad_(True)
        inputs: Tensor = given[0] if given else next(iter(named.values()))
        self.calls.append((inputs.detach(), end))
        return end.clone()

    def rows(self, signals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Inputs (positions, in) of all calls, and what came back (k, positions, out)."""
        came = torch.cat([s.reshape(len(s), -1, s.shape[-1]) for s in signals], 1)
        return torch.cat([a.reshape(-1, a.shape[-1]) for a, _ in self.calls]), came

    def add(self, totals: Mapping[nn.Parameter, Tensor], signals: Sequence[Tensor]) -> None:
        """Add the sum over k of the squared gradients."""
        if signals:
            for p, gradients in zip(self.parameters, self.gradients(*self.rows(signals)), strict=True):
                totals[p].add_(gradients.square().sum(0))

    @abstractmethod
    def gradients(self, inputs: Tensor, came: Tensor) -> list[Tensor]:
        """(k, *shape) of each parameter."""


class Matrix(Layer):
    """y = W a + b, W (out, in)."""

    def gradients(self, inputs: Tensor, came: Tensor) -> list[Tensor]:
        return [self._stored(came.transpose(1, 2) @ inputs), *([came.sum(1)] if len(self.parameters) == 2 else [])]

    def _stored(self, matrices: Tensor) -> Tensor:
        """(..., out, in) as the layer has it."""
        return matrices

    def add(self, totals: Mapping[nn.Parameter, Tensor], signals: Sequence[Tensor]) -> None:
        if not signals:
            return
        inputs, came = self.rows(signals)
        total, many = self._stored(totals[self.parameters[0]]), len(inputs)
        if many * (many + 1) < len(came) * (2 * many + FORMED):
            lags = range(many)  # pairs of positions that are so far apart, in either order
            of_inputs = torch.cat([inputs[: many - lag] * inputs[lag:] * (2.0 if lag else 1.0) for lag in lags])
            of_outputs = torch.cat([(came[:, : many - lag] * came[:, lag:]).sum(0) for lag in lags])
            total.addmm_(of_outputs.T, of_inputs)
        else:
            gradient = inputs.new_empty(total.shape)
            for one in came:
                torch.mm(one.T, inputs, out=gradient)
                total.addcmul_(gradient, gradient)
        if len(self.parameters) == 2:
            totals[self.parameters[1]].add_(came.sum(1).square_().sum(0))


class Transposed(Matrix):
    """GPT-2's, W (in, out)."""

    def _stored(self, matrices: Tensor) -> Tensor:
        return matrices.mT


class Norm(Layer):
    """y = w x / |x| + b, over the last dimension."""

    def gradients(self, inputs: Tensor, came: Tensor) -> list[Tensor]:
        module = self.module
        ways = {module.weight: lambda: (came * functional.layer_norm(inputs, inputs.shape[-1:], eps=module.eps)).sum(1)}
        return [ways.get(p, lambda: came.sum(1))() for p in self.parameters]


class Table(Layer):
    """Rows of an embedding."""

    def rows(self, signals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return torch.cat([a.reshape(-1) for a, _ in self.calls]), torch.cat([s.reshape(len(s), -1, s.shape[-1]) for s in signals], 1)

    def _used(self, inputs: Tensor, came: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that were used, and their gradients (k, rows, width). Padding has none."""
        used, place = torch.unique(inputs, return_inverse=True)
        found = came.new_zeros(len(came), len(used), came.shape[-1]).index_add_(1, place, came)
        real = used != (-1 if self.module.padding_idx is None else self.module.padding_idx)
        return used[real], found[:, real]

    def gradients(self, inputs: Tensor, came: Tensor) -> list[Tensor]:
        used, found = self._used(inputs, came)
        return [came.new_zeros(len(came), *self.module.weight.shape).index_copy_(1, used, found)]

    def add(self, totals: Mapping[nn.Parameter, Tensor], signals: Sequence[Tensor]) -> None:
        if signals:
            used, found = self._used(*self.rows(signals))
            totals[self.parameters[0]].index_add_(0, used, found.square_().sum(0))
