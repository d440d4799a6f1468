"""How task vectors disturb each other: tau-Jp, disentanglement error and negation, on models assembled in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, Mismatch
from peru_cli.inference.data import Examples
from peru_cli.inference.eval_model import in_memory
from peru_cli.inference.inputs import class_logits
from peru_cli.inference.models import IMAGE, TEXT
from peru_cli.inference.prepare import Settings, load
from peru_cli.inference.task_models import Running, read_floats, trace_names
from peru_cli.inference.taujp import change_norms
from peru_cli.live.memory import read_tensors
from peru_cli.merge.data.task_models import TaskParts, load_task
from peru_cli.merge.plan import MergePlan, Options, plan_merge

Advance = Callable[[int], None]


@dataclass
class Interference:
    """tau-Jp by (task of the vector, task of the inputs); disentanglement error by task, as shares; the scale of the vectors."""

    tasks: tuple[str, ...]
    tau_jp: dict[tuple[str, str], float]
    error: dict[str, float]
    scale: float


class Vectors:
    """A base and task vectors in float32, and every task's model to load their sums into."""

    def __init__(self, base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], running: Running) -> None:
        """Raises Mismatch, from headers alone, if the models do not fit together or are not classifiers."""
        self.plan: MergePlan = plan_merge(base, tasks, True, Options())
        self.running = running
        self.base = {slot.base.name: read_floats(base, slot.base.name).to(running.device) for slot in self.plan.slots}
        self.tau: dict[str, dict[str, torch.Tensor]] = {}
        for number, vector in enumerate(self.plan.vectors):
            read = {slot.base.name: read_floats(vector.fine, slot.inputs[number].name) for slot in self.plan.slots}
            self.tau[vector.name] = {name: tensor.to(running.device) - self.base[name] for name, tensor in read.items()}

    def weights(self, scales: Mapping[str, float]) -> dict[str, torch.Tensor]:
        """base + sum of scale * tau."""
        found = {name: tensor.clone() for name, tensor in self.base.items()}
        for task, scale in scales.items():
            for name, tensor in found.items():
                tensor.add_(self.tau[task][name], alpha=scale)
        return found

    def load(self, task: str, attention: str | None = None) -> TaskParts:
        """A task's model, a classifier."""
        vector = next(vector for vector in self.plan.vectors if vector.name == task)
        parts = load_task(self.plan, vector, self.running.examples[task], self.running.device, attention)
        _require_classifier(parts, vector.fine.label)
        return parts

    def predictions(self, parts: TaskParts, scales: Mapping[str, float], advance: Advance) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Classes that base + sum of scale * tau predicts under a task's head; (examples,)."""
        parts.put(self.weights(scales))
        chosen: np.ndarray[Any, np.dtype[np.int64]] = class_logits(
            parts.loaded.model, parts.loaded.inputs, self.running.batch_size, advance
        ).argmax(-1)
        return chosen


def _require_classifier(parts: TaskParts, label: str) -> None:
    if parts.loaded.kind not in (TEXT, IMAGE):
        raise Mismatch(f"{label} is a {parts.loaded.kind}: a classifier is needed here")


def measure_interference(vectors: Vectors, scale: float, advance: Advance) -> Interference:
    """tau-Jp of every pair of tasks, and the share of each task's inputs whose prediction the other tasks' vectors change.

    Labels are not read. The error compares theta_0 + scale tau_t with theta_0 + scale sum tau (Ortiz-Jimenez et al. 2023,
    https://arxiv.org/abs/2305.12827, equation 9, at one point)."""
    tasks = tuple(vectors.tau)
    found = Interference(tasks, {}, {}, scale)
    for task in tasks:
        parts = vectors.load(task, "eager")
        model = parts.loaded.model
        parts.put(vectors.base)
        origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
        sums = dict.fromkeys(tasks, 0.0)
        with torch.no_grad():
            for numbers, batch in parts.loaded.inputs.batches(vectors.running.batch_size, vectors.running.device):
                for other in tasks:
                    tau = {name: vectors.tau[other][ours] for name, ours in parts.merged.items() if name in origin}
                    sums[other] += float(change_norms(model, origin, tau, batch).double().sum())
                advance(len(numbers))
        for other, total in sums.items():
            found.tau_jp[other, task] = total / len(parts.loaded.inputs)
        alone = vectors.predictions(parts, {task: scale}, advance)
        together = vectors.predictions(parts, dict.fromkeys(tasks, scale), advance)
        found.error[task] = float((alone != together).mean())
    return found


@dataclass
class Negated:
    """Accuracies on both tasks at one scale: theta_0 - scale * tau."""

    scale: float
    target: float
    control: float


KEPT = 0.95  # share of the base's accuracy on the control task that must remain


def measure_negation(
    vectors: Vectors, target: str, control: TaskParts, control_examples: Examples, scales: Sequence[float], advance: Advance
) -> tuple[list[Negated], Negated]:
    """Accuracies of the base minus a task vector by scale (0 first), and the point that forgets most.

    That is the lowest accuracy on the target among points that keep 95% of the base's accuracy on the control task (Ilharco et
    al. 2023, https://arxiv.org/abs/2212.04089, section 3); ties: the smallest scale.

    Raises BadFile if examples have no labels."""
    mine = vectors.load(target)
    parts = {"target": mine, "control": control}
    labels = {}
    for name, examples in (("target", vectors.running.examples[target]), ("control", control_examples)):
        found = examples.class_numbers(parts[name].loaded.model.config)
        if found is None:
            raise BadFile(f"{examples.source} has no labels", "negation measures accuracy: name a file with a column 'label'")
        labels[name] = found
    points = []
    for scale in sorted({0.0, *scales}):
        right = {name: float((vectors.predictions(parts[name], {target: -scale}, advance) == labels[name]).mean()) for name in parts}
        points.append(Negated(scale, right["target"], right["control"]))
    allowed = [point for point in points if point.control >= KEPT * points[0].control]
    return points, min(allowed, key=lambda point: point.target)


def load_base(vectors: Vectors, examples: Examples) -> TaskParts:
    """The base under its own head. Mismatch if it has none."""
    base = vectors.plan.base
    assert base is not None
    state = read_tensors(base)
    subject = in_memory(base.label, state, {name: path.read_bytes() for name, path in base.side_files.items()}, base.nbytes)
    try:
        loaded = load(subject, examples, [], Settings(device=vectors.running.device))
    except Mismatch as error:
        raise Mismatch(f"the control task needs a head: {error.message}", "add --against control=MODEL") from error
    own = trace_names(state, loaded)
    parts = TaskParts(loaded, own, {name: ours for name, ours in own.items() if ours in vectors.base})
    _require_classifier(parts, base.label)
    return parts
