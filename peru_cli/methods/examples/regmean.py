"""RegMean: for every linear layer, the weight whose outputs are closest to all models' outputs on their own inputs.

    minimise sum_t w_t |X_t W^T - X_t W_t^T|^2:    W*^T = (sum_t w_t G_t)^-1 sum_t w_t G_t W_t^T,    G_t = X_t^T X_t / N_t

Source: Jin et al., Dataless Knowledge Fusion by Merging Weights of Language Models (2023), https://arxiv.org/abs/2212.09849,
equation 2 and section 3.2: off-diagonal entries of G_t are multiplied by alpha (0.9 to 0.95 for CLIP, 0.1 to 0.6 for
language models). All other tensors are averaged. Padding does not count as input. Labels are never read.

A small multiple of the identity is added to every G_t (`--ridge`, as a share of the mean diagonal of all), so that directions
without inputs are averaged instead of left to chance. W* = sum_t W_t M_t with M_t = w_t G_t (sum G)^-1, solved in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peru_cli.methods.matrices import Matrices, MatrixRule
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Result, RuleInput, times, weighted_sum
from peru_cli.methods.statistics import Collector, Found, TaskModel, whole
from peru_cli.methods.weighted.linear import share_of_sum

ROWS, COLUMNS = "gram", "gram-in-out"  # by whether weights are stored (out, in) or (in, out)


def mixing_matrices(grams: Sequence[torch.Tensor], weights: Sequence[float], alpha: float, ridge: float) -> list[torch.Tensor]:
    """M_t, such that W* = sum_t W_t M_t; float64 (in, in) each. They add up to the identity.

    Args:
        grams: G_t of each task, (in, in).
        weights: w_t.
        alpha: factor of the off-diagonal entries.
        ridge: multiple of the identity that is added, as a share of the mean diagonal entry of all G_t."""
    scaled_grams = []
    for gram, weight in zip(grams, weights, strict=True):
        g = gram.double() * (alpha * weight)
        g.diagonal().copy_(gram.double().diagonal() * weight)
        scaled_grams.append(g)
    little = ridge * float(sum(g.diagonal().mean() for g in scaled_grams)) / len(grams)
    for g in scaled_grams:
        g.diagonal().add_(little or 1e-30)  # layers whose inputs are all 0 are averaged
    factors, pivots, _ = torch.linalg.lu_factor_ex(torch.stack(scaled_grams).sum(0))
    return [torch.linalg.lu_solve(factors, pivots, g).T.contiguous() for g in scaled_grams]


class RegMean(MatrixRule):
    """See the module."""

    on_vectors = False

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._average = share_of_sum(parameters.weights)

    def _role(self, name: str) -> str | None:
        """The role under which a tensor's inputs were collected. None if they were not."""
        for role in (ROWS, COLUMNS):
            if self.statistics and all(found.shape(role, name) is not None for found in self.statistics):
                return role
        return None

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return self._role(name) is not None

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        inputs = max(rows, columns)  # at most: a Gram matrix and a solution for each task
        return 8 * (2 * tasks + 2) * inputs**2 + 3 * 8 * rows * columns

    def merge_matrix(self, matrices: Matrices) -> torch.Tensor:
        role = self._role(matrices.name)
        assert role is not None
        grams = [torch.from_numpy(found) for s in self.statistics if (found := whole(s, role, matrices.name)) is not None]
        number = self.parameters.number
        total: Any = 0
        for task, matrix in enumerate(mixing_matrices(grams, self.parameters.weights, number("alpha"), number("ridge"))):
            weights = matrices.tensor(task)
            mixing = matrix.to(weights.device)
            total = total + (weights @ mixing if role == ROWS else mixing.T @ weights)
        return total  # type: ignore[no-any-return]

    def merge(self, tile: RuleInput) -> Result:
        return times(weighted_sum(self.parameters.weights), self._average)


class RegMeanCollector(Collector):
    """G_t of every linear layer, float64 (in, in). Layers with the same input share the work."""

    def collect(self, models: Sequence[TaskModel]) -> list[Found]:
        return [self._grams(task_model) for task_model in models]

    def _grams(self, task_model: TaskModel) -> Found:
        from transformers.pytorch_utils import Conv1D

        totals: Found = {}
        counts: dict[str, int] = {}
        mask: list[torch.Tensor | None] = [None]
        last: list[Any] = [None, None, 0]  # an input, its Gram matrix and its number of rows: query, key and value get the same input

        def hook(key: str) -> Any:
            def before(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
                if last[0] is not arguments[0]:
                    rows = real_rows(arguments[0], mask[0])
                    last[:] = [arguments[0], rows.T @ rows, len(rows)]
                counts[key] = counts.get(key, 0) + last[2]
                if key in totals:
                    totals[key].add_(last[1])
                else:
                    totals[key] = last[1].clone()

            return before

        hooks = []
        for name, module in task_model.model.named_modules():
            if isinstance(module, (torch.nn.Linear, Conv1D)) and f"{name}.weight" in task_model.names:
                role = ROWS if isinstance(module, torch.nn.Linear) else COLUMNS
                hooks.append(module.register_forward_pre_hook(hook(f"{role}/{task_model.names[f'{name}.weight']}")))
        try:
            with torch.no_grad():
                for numbers, batch in task_model.examples.batches(task_model.batch_size, task_model.device):
                    mask[0] = batch.get("attention_mask")
                    task_model.model(**batch)
                    task_model.advance(len(numbers))
        finally:
            for handle in hooks:
                handle.remove()
        return {key: total.div_(max(counts[key], 1)) for key, total in totals.items()}


def real_rows(inputs: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A layer's inputs without padding, one for each row; (batch, ..., in) -> float64 (rows, in).

    Args:
        mask: (batch, positions), 0 for padding; used for inputs that have these positions."""
    if mask is not None and inputs.dim() == 3 and inputs.shape[:2] == mask.shape:
        return inputs[mask.bool()].double()
    return inputs.reshape(-1, inputs.shape[-1]).double()
