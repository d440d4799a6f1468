"""How good merged weights are: on examples of every task, under the task's own head, in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from peru_cli.errors import BadFile, Mismatch, UsageError
from peru_cli.inference.data import Array, Examples
from peru_cli.inference.inputs import Inputs, class_logits, counted_tokens
from peru_cli.inference.metrics import kl_bernoulli, kl_divergence
from peru_cli.inference.models import CLASSES, IMAGE, LABELS, TEXT, problem_of
from peru_cli.inference.prepare import Loaded
from peru_cli.inference.task_models import Running
from peru_cli.inference.tokens import TokenSums, token_logits
from peru_cli.kernels.random import words
from peru_cli.merge.data.task_models import TaskParts, load_task
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.search.asked import ACCURACY, KL, NORMALISED, PERPLEXITY
from peru_cli.methods.philox import stream_key
from peru_cli.vectors.family import TaskVector

_MOST_LOGITS = 1 << 29  # of fine-tunes, kept in memory for --objective kl: 2 GiB

Report = Callable[[float], bool]  # takes the score after each task but the last; true: give the trial up


class GivenUp(Exception):
    """A trial is poor after some of the tasks."""


@dataclass
class Score:
    """The score of a trial, and each task's figure: accuracy, perplexity or KL divergence."""

    total: float
    figures: dict[str, float]


@dataclass
class Part:
    """Some of a task's examples, and what the fine-tune makes of them: its logits (for KL), and its own figure."""

    inputs: Inputs
    labels: Array | None
    logits: list[torch.Tensor] | None = None
    fine: float = 0.0


def split(count: int, share: Fraction, seed: int, task: str) -> tuple[Array, Array]:
    """Indices of the examples that are searched on, and of those held out: floor(share * count); docs/random.md has the order."""
    order = np.argsort(words(stream_key(seed, task, "held out"), 0, count), kind="stable")
    held = int(share * count)
    return np.sort(order[held:]), np.sort(order[:held])


class Judge:
    """All tasks' models in memory. They share the merged weights and keep their own heads."""

    def __init__(self, plan: MergePlan, running: Running, objective: str, share: Fraction = Fraction(0), seed: int = 0) -> None:
        """Measures the fine-tunes.

        Raises BadFile or Mismatch for examples and models that do not suit the objective, UsageError if too few examples are left."""
        self._running, self._objective = running, objective
        self._models: dict[str, TaskParts] = {}
        self._parts: dict[str, Part] = {}
        self._held: dict[str, Part] = {}
        shared: dict[str, torch.Tensor] = {}
        for vector in plan.vectors:
            if vector.name not in running.examples:
                continue
            model = self._load(plan, vector, running.examples[vector.name])
            labels = self._labels(vector, model.loaded, running.examples[vector.name])
            searched, held = split(len(model.loaded.inputs), share, seed, vector.name)
            if share and not len(held):
                raise UsageError(
                    f"{running.examples[vector.name].source} has too few examples to hold some out: {len(model.loaded.inputs)}",
                    "write --hold-out 0, or use more examples",
                )
            self._models[vector.name] = model
            self._parts[vector.name] = self._part(vector.name, searched, labels)
            if len(held):
                self._held[vector.name] = self._part(vector.name, held, labels, "held-out ")
            if shared:  # measured: the fine-tune's own weights can go
                model.put(shared)
            else:
                tensors = dict(model.loaded.model.named_parameters()) | dict(model.loaded.model.named_buffers())
                shared = {merged: tensors[name].data for name, merged in model.merged.items() if name in tensors}

    def _load(self, plan: MergePlan, vector: TaskVector, examples: Examples) -> TaskParts:
        if self._objective in (NORMALISED, ACCURACY) and examples.labels is None:
            raise BadFile(
                f"{examples.source} has no labels",
                "--search measures accuracy: use a file with a column 'label', or --objective kl or perplexity",
            )
        parts = load_task(plan, vector, examples, self._running.device)
        kind, classifies = parts.loaded.kind, parts.loaded.kind in (TEXT, IMAGE)
        if self._objective in (NORMALISED, ACCURACY) and not classifies:
            raise Mismatch(
                f"{vector.fine.label} is a {kind}: --search measures the accuracy of classifiers", "add --objective perplexity, or kl"
            )
        if self._objective == PERPLEXITY and classifies:
            raise Mismatch(f"{vector.fine.label} is a model for {kind}: only language models have a perplexity", "leave --objective out")
        if classifies and (problem := problem_of(parts.loaded.model.config)) != CLASSES and (self._objective, problem) != (KL, LABELS):
            raise Mismatch(f"{vector.fine.label} predicts {problem}, not one of several classes", "--metric-command can measure it")
        return parts

    def _labels(self, vector: TaskVector, loaded: Loaded, examples: Examples) -> Array | None:
        return examples.class_numbers(loaded.model.config) if self._objective in (NORMALISED, ACCURACY) else None

    @property
    def device(self) -> torch.device:
        """Where the models run."""
        return self._running.device

    @property
    def fine(self) -> dict[str, float]:
        """The fine-tunes' own figures on the examples that are searched on."""
        return {task: part.fine for task, part in self._parts.items()}

    @property
    def examples(self) -> int:
        """Number of examples that are searched on, of all tasks."""
        return sum(len(part.inputs) for part in self._parts.values())

    @property
    def held(self) -> int:
        """Number of examples that are held out, of all tasks."""
        return sum(len(part.inputs) for part in self._held.values())

    def _part(self, task: str, numbers: Array, labels: Array | None, which: str = "") -> Part:
        loaded = self._models[task].loaded
        whole = loaded.inputs
        inputs = Inputs(whole.lengths[numbers], lambda chosen: whole.make(numbers[chosen]), whole.padded)
        part = Part(inputs, labels[numbers] if labels is not None else None)
        if self._objective == KL:
            part.logits = self._logits(loaded, inputs)
            part.fine = 0.0
        else:
            part.fine = self._figure(loaded, part)
        if self._objective == NORMALISED and not part.fine:
            raise Mismatch(
                f"the fine-tune {task} gets none of its {which}examples right",
                "use more examples, or --hold-out 0" if which else "are these the labels it was trained on?",
            )
        return part

    def _logits(self, loaded: Loaded, inputs: Inputs) -> list[torch.Tensor]:
        """The model's logits, one tensor of all examples, or one for each batch of a language model."""
        if loaded.kind in (TEXT, IMAGE):
            return [torch.from_numpy(class_logits(loaded.model, inputs, self._running.batch_size))]
        found, entries = [], 0
        with torch.inference_mode():
            for _, batch in inputs.batches(self._running.batch_size, self._running.device):
                entries += int((counted_tokens(batch, loaded.kind) >= 0).sum()) * loaded.model.get_output_embeddings().weight.shape[0]
                if entries > _MOST_LOGITS:
                    raise UsageError("--objective kl keeps the fine-tunes' logits in memory, and these examples have too many tokens",
                                     "use fewer with --max-samples, or --objective perplexity")  # fmt: skip
                found.append(token_logits(loaded, batch)[0].float().cpu())
        return found

    def _figure(self, loaded: Loaded, part: Part) -> float:
        """Accuracy, mean KL divergence from the fine-tune (nats), or perplexity, as the objective says."""
        if loaded.kind in (TEXT, IMAGE):
            logits = class_logits(loaded.model, part.inputs, self._running.batch_size)
            if part.logits is not None:
                apart = kl_bernoulli if problem_of(loaded.model.config) == LABELS else kl_divergence
                return float(apart(part.logits[0].numpy(), logits).mean())
            return float((logits.argmax(-1) == part.labels).mean())
        sums = TokenSums()
        with torch.inference_mode():
            for number, (_, batch) in enumerate(part.inputs.batches(self._running.batch_size, self._running.device)):
                mine, came = token_logits(loaded, batch)
                theirs = part.logits[number].to(mine.device) if part.logits is not None else None
                sums.add(came, mine, theirs)
        mean = float(sums.all("ours" if part.logits is None else "kl").mean())
        return mean if part.logits is not None else math.exp(min(mean, 700.0))

    def measure(self, weights: Mapping[str, torch.Tensor], report: Report = lambda score: False) -> Score:
        """Put merged weights under every task's head, and measure. Raises GivenUp where `report` says so."""
        for model in self._models.values():
            model.put(weights)
        figures: dict[str, float] = {}
        for task, part in self._parts.items():
            figures[task] = self._figure(self._models[task].loaded, part)
            if len(figures) < len(self._parts) and report(self._total(figures, self._parts)):
                raise GivenUp
        return Score(self._total(figures, self._parts), figures)

    def measure_held(self, weights: Mapping[str, torch.Tensor]) -> Score | None:
        """The same on the examples that were held out. None if there are none."""
        if not self._held:
            return None
        for model in self._models.values():
            model.put(weights)
        figures = {task: self._figure(self._models[task].loaded, part) for task, part in self._held.items()}
        return Score(self._total(figures, self._held), figures)

    def _total(self, figures: Mapping[str, float], parts: Mapping[str, Part]) -> float:
        """The objective over the tasks measured so far."""
        if self._objective == NORMALISED:
            return sum(figures[task] / parts[task].fine for task in figures) / len(figures)
        if self._objective == PERPLEXITY:
            return math.exp(sum(map(math.log, figures.values())) / len(figures))
        return sum(figures.values()) / len(figures)
