"""AdaMerging: task arithmetic with learned scales, which minimise the entropy of the merged model's predictions on every task's inputs.

    theta* = theta_0 + sum_t lambda_t,l tau_t,l;    lambda minimises the sum over tasks of the mean entropy of p(y | x; theta*)

Source: Yang et al., AdaMerging (2024), https://arxiv.org/abs/2310.02575, equations 4 to 6. There is one lambda for each task
(`--scope global`, task-wise) or for each task and tensor (`--scope tensor`, layer-wise). All start from `--scale` and are
learned by Adam on batches of unlabelled inputs. The derivative by lambda_t,l is the inner product of the loss's gradient
at tensor l with tau_t,l, so autograd sees only the merged model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peru_cli.errors import UsageError
from peru_cli.kernels.random import words
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.philox import stream_key
from peru_cli.methods.rules import Result, Rule, RuleInput, onto_base, weighted_sum
from peru_cli.methods.statistics import Collector, Found, TaskModel, whole

if TYPE_CHECKING:
    import torch

ROLE = "lambda"


class AdaMerging(Rule):
    """See the module. Tensors without a learned scale (buffers) use `--scale`."""

    suffers_from_norms = False

    def _scale(self, task: int, name: str) -> float:
        found = whole(self.statistics[task], ROLE, name)
        return self.parameters.number("scale") if found is None else float(found)

    def merge(self, tile: RuleInput) -> Result:
        scales = [self._scale(task, tile.name) for task in range(tile.tasks)]
        return onto_base(weighted_sum(scales), 1.0)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the softmax, in nats; (batch, labels) -> scalar."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def shuffled(seed: int, task: str, n: int, batch: int) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """Endless batches of example indices; every epoch is shuffled anew."""
    epoch = 0
    while True:
        order = np.argsort(words(stream_key(seed, task, f"epoch {epoch}"), 0, n), kind="stable")
        for start in range(0, n, batch):
            yield order[start : start + batch]
        epoch += 1


class Merged:
    """The merged model in place of all tasks' models, as a function of the lambdas (tasks, groups)."""

    def __init__(self, models: Sequence[TaskModel], by_tensor: bool) -> None:
        import torch

        self._models = [task_model.model for task_model in models]
        origin: dict[str, torch.Tensor] = {}
        self.groups: list[str] = []  # merged parameters, by their names in the first model
        named = [dict(task_model.model.named_parameters()) for task_model in models]
        for name in named[0]:
            base = models[0].base(name)
            if base is not None:
                origin[name] = base.to(named[0][name])
                self.groups.append(name)
        self._base = list(origin.values())
        # Task vectors replace the fine-tunes' own weights: one set of merged weights serves all models.
        self._vectors = [[table[name].data - base for name, base in origin.items()] for table in named]
        self._weights = [torch.empty_like(base) for base in self._base]
        for table in named:
            for name, weight in zip(origin, self._weights, strict=True):
                table[name].data = weight
                table[name].requires_grad_(True)
        self._parameters = [[table[name] for name in origin] for table in named]
        self.columns = range(len(self.groups)) if by_tensor else [0] * len(self.groups)

    def put(self, lambdas: torch.Tensor) -> None:
        """Set the merged weights; lambdas (tasks, groups)."""
        rows = lambdas.tolist()
        for i, (weight, base) in enumerate(zip(self._weights, self._base, strict=True)):
            weight.copy_(base)
            for vectors, row in zip(self._vectors, rows, strict=True):
                weight.add_(vectors[i], alpha=row[self.columns[i]])

    def gradient(self, batches: Sequence[Any]) -> tuple[float, torch.Tensor]:
        """At the current weights: the entropy summed over one batch of each task, and its derivative, (tasks, groups)."""
        import torch

        total, sums = 0.0, [torch.zeros_like(weight) for weight in self._weights]
        for model, parameters, batch in zip(self._models, self._parameters, batches, strict=True):
            loss = entropy(model(**batch).logits)
            for part, gradient in zip(sums, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    part.add_(gradient)
            total += float(loss.detach())
        result = torch.zeros(len(self._models), max(self.columns, default=0) + 1, dtype=torch.float64)
        for i, part in enumerate(sums):
            for task, vectors in enumerate(self._vectors):
                result[task, self.columns[i]] += torch.dot(part.view(-1), vectors[i].view(-1)).double().cpu()
        return total, result


class LambdaCollector(Collector):
    """Learns the lambdas: a float64 scalar for each task and tensor."""

    together = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._steps = int(parameters.number("steps"))

    def check(self, task_model: TaskModel) -> None:
        if len(task_model.examples) == 0:
            raise UsageError(f"{task_model.task}: no examples to learn from")

    def work(self, task_model: TaskModel) -> int:
        return self._steps * min(task_model.batch_size, len(task_model.examples))

    def collect(self, models: Sequence[TaskModel]) -> list[Found]:
        import torch

        number = self.parameters.number
        merged = Merged(models, self.parameters.text("scope") == "tensor")
        width = max(merged.columns, default=0) + 1
        lambdas = torch.full((len(models), width), number("scale"), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([lambdas], lr=number("learning-rate"))
        streams = [shuffled(int(number("seed")), s.task, len(s.examples), s.batch_size) for s in models]
        for _ in range(self._steps):
            merged.put(lambdas.detach())
            batches = []
            for task_model, stream in zip(models, streams, strict=True):
                numbers = next(stream)
                batches.append({name: tensor.to(task_model.device) for name, tensor in task_model.examples.make(numbers).items()})
                task_model.advance(len(numbers))
            _, lambdas.grad = merged.gradient(batches)
            optimizer.step()
        learned = lambdas.detach()
        return [
            {f"{ROLE}/{s.names[name]}": learned[t, column].clone() for name, column in zip(merged.groups, merged.columns, strict=True)}
            for t, s in enumerate(models)
        ]
