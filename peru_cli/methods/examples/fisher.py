"""Fisher merging: average the models, weighting each entry by how much the task's output depends on it.

    F_t = E_x sum_y p(y | x) (d/d theta log p(y | x))^2;    theta* = sum_t w_t F_t theta_t / sum_t w_t F_t

Source: Matena & Raffel, Merging Models with Fisher-Weighted Averaging (2022), https://arxiv.org/abs/2111.09832, equations 3
and 4, appendix D (normalisation). Each gradient is of one example: squaring a batch's gradient gives something else.
`--expectation exact` sums over all labels (diagonal.py). `sampled` draws one label for each example from the model itself (for language
models one token for each position). F is at least `--floor`, so entries that no task needs are averaged. Labels are never read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peru_cli.errors import UsageError
from peru_cli.kernels.random import words
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.philox import stream_key
from peru_cli.methods.rules import Rule, RuleInput, add_up, scaled
from peru_cli.methods.statistics import Collector, Found, TaskModel, whole
from peru_cli.streaming.arrays import Array

if TYPE_CHECKING:
    import torch

ROLE, NORM = "fisher", "fisher-norm"


class Fisher(Rule):
    """See the module. Tensors without statistics (buffers) are averaged by the weights alone."""

    on_vectors = False

    def _importance(self, tile: RuleInput, task: int) -> Array:
        """w_t F_t of a tile; (n,)."""
        xp, out = tile.xp, tile.room("importance", tile.n)
        found, weight = self.statistics[task], self.parameters.weights[task]
        if found.shape(ROLE, tile.name) is None:
            return xp.fill(out, weight)
        xp.copy(xp.upload(found.entries(ROLE, tile.name, tile.start, tile.n)), out)
        xp.clip(out, self.parameters.number("floor"), None, out=out)
        if self.parameters.values["normalize"]:
            norm = whole(found, NORM, tile.name)
            weight /= max(float(norm), 1e-30) if norm is not None else 1.0
        return scaled(out, weight, tile)

    def merge(self, tile: RuleInput) -> Array:
        xp = tile.xp
        divisor = xp.fill(tile.room("divisor", tile.n), 0.0)

        def parts() -> Any:
            for task in range(tile.tasks):
                importance = self._importance(tile, task)
                xp.add(divisor, importance, out=divisor)
                yield xp.multiply(tile.inputs(task), importance, out=tile.room(f"part{task % 2}", tile.n))

        total = add_up(tile, parts())
        return xp.divide(total, divisor, out=total)


def label_draws(seed: int, start: int, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Uniform numbers in [0, 1) that choose the labels; float64 (n,)."""
    return words(stream_key(seed, "fisher", "labels"), start, n) / 2.0**32


def squared_gradients(logits: torch.Tensor, parameters: Sequence[torch.Tensor], draws: Any) -> list[torch.Tensor | None]:
    """(d log p(y) / d theta)^2 of one example for drawn labels y, summed over positions before the square; shaped like the parameters.

    Args:
        logits: (1, labels), or (1, positions, vocabulary), still attached to the parameters.
        draws: uniform numbers that choose a label for each row, (rows,)."""
    import torch

    rows = logits.reshape(-1, logits.shape[-1]).log_softmax(-1)  # (rows, labels)
    chances = rows.detach().double().exp()
    below = chances.cumsum(-1) <= torch.as_tensor(draws, device=rows.device).unsqueeze(1) * chances.sum(-1, keepdim=True)
    labels = below.sum(-1).clamp(max=rows.shape[1] - 1)
    chosen = rows.gather(1, labels.unsqueeze(1)).sum()
    return [g if g is None else g.square_() for g in torch.autograd.grad(chosen, parameters, allow_unused=True)]


class FisherCollector(Collector):
    """The diagonal of the Fisher information matrix of every parameter, float32."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._exact = parameters.text("expectation") == "exact"

    def check(self, task_model: TaskModel) -> None:
        if self._exact and not hasattr(task_model.model.config, "num_labels"):
            raise UsageError(f"{task_model.task}: not a classifier", "add --expectation sampled")

    def collect(self, models: Sequence[TaskModel]) -> list[Found]:
        return [self._diagonal(task_model) for task_model in models]

    def _diagonal(self, task_model: TaskModel) -> Found:
        import torch

        totals = self._exactly(task_model) if self._exact else self._sampled(task_model)
        sums = {id(p): total.div_(len(task_model.examples)) for p, total in totals.items()}
        norm = torch.stack([total.double().square().sum() for total in sums.values()]).sum().sqrt()
        result: Found = {}
        for name, parameter in task_model.model.named_parameters(remove_duplicate=False):
            if name in task_model.names:
                result[f"{ROLE}/{task_model.names[name]}"] = sums[id(parameter)]
                result[f"{NORM}/{task_model.names[name]}"] = norm.clone()
        return result

    def _exactly(self, task_model: TaskModel) -> Mapping[torch.nn.Parameter, torch.Tensor]:
        from peru_cli.methods.examples.diagonal import ExactFisher

        found = ExactFisher(task_model.model, task_model.task)
        for _, batch in task_model.examples.batches(1, task_model.device):
            found.add(batch)
            task_model.advance(1)
        return found.totals

    def _sampled(self, task_model: TaskModel) -> Mapping[torch.nn.Parameter, torch.Tensor]:
        import torch

        parameters = [p.requires_grad_(True) for p in task_model.model.parameters()]
        totals = [torch.zeros_like(p) for p in parameters]
        seed, drawn = int(self.parameters.number("seed")), 0
        for _, batch in task_model.examples.batches(1, task_model.device):
            logits = task_model.model(**batch).logits
            rows = logits[..., 0].numel()
            draws = label_draws(seed, drawn, rows)
            drawn += rows
            for total, found in zip(totals, squared_gradients(logits, parameters, draws), strict=True):
                if found is not None:
                    total.add_(found)
            task_model.advance(1)
        for p in parameters:
            p.requires_grad_(False)
        return dict(zip(parameters, totals, strict=True))
