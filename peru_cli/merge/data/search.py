"""`--search`: merge in memory and test on examples of every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.errors import BadFile, Mismatch
from peru_cli.inference.inputs import class_logits
from peru_cli.inference.models import IMAGE, TEXT
from peru_cli.inference.task_models import Running
from peru_cli.merge.data.task_models import TaskParts, load_task
from peru_cli.merge.passes.run import merge
from peru_cli.merge.plan import MergePlan
from peru_cli.methods.parameters import Value
from peru_cli.methods.rules import Rule
from peru_cli.vectors.family import StreamSettings


class MemoryWriter(CheckpointWriter):
    """A checkpoint in memory."""

    def __init__(self, plan: MergePlan) -> None:
        self.order = plan.outputs
        self.tables = {info.name: bytearray(info.nbytes) for info in self.order}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        self.tables[name][offset : offset + len(data)] = data

    def commit(self) -> None:
        pass

    def __enter__(self) -> MemoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def tensor(self, name: str) -> torch.Tensor:
        """A floating tensor in float32."""
        info = next(info for info in self.order if info.name == name)
        if not info.entries:
            return torch.empty(info.shape)
        return torch.frombuffer(self.tables[name], dtype=getattr(torch, info.dtype.torch_name or "")).view(info.shape).float()


@dataclass
class Point:
    """The result of one value: accuracies by task, and the mean over tasks of accuracy / the fine-tune's accuracy."""

    value: Value
    accuracies: dict[str, float]
    normalised: float


class Trial:
    """All tasks' classifiers in memory, which share the merged weights."""

    def __init__(self, plan: MergePlan, running: Running) -> None:
        """Measures the fine-tunes. BadFile if a task's examples have no labels, Mismatch if a model is not a classifier."""
        self._plan, self._running = plan, running
        self._parts: list[TaskParts] = []
        self._labels: list[np.ndarray[Any, np.dtype[Any]]] = []
        for vector in plan.vectors:
            examples = running.examples[vector.name]
            if examples.labels is None:
                raise BadFile(f"{examples.source} has no labels", "--search measures accuracy: use a file with a column 'label'")
            parts = load_task(plan, vector, examples, running.device)
            if parts.loaded.kind not in (TEXT, IMAGE):
                raise Mismatch(f"{vector.fine.label} is a {parts.loaded.kind}: --search measures the accuracy of classifiers")
            labels = examples.class_numbers(parts.loaded.model.config)
            assert labels is not None
            self._parts.append(parts)
            self._labels.append(labels)
        self.fine = self._accuracies()
        if blank := [task for task, accuracy in self.fine.items() if not accuracy]:
            raise Mismatch(f"the fine-tune {blank[0]} gets none of its examples right", "are these the labels it was trained on?")

    @property
    def examples(self) -> int:
        """Number of examples of all tasks together."""
        return sum(map(len, self._labels))

    def _accuracies(self) -> dict[str, float]:
        found = {}
        for vector, parts, labels in zip(self._plan.vectors, self._parts, self._labels, strict=True):
            logits = class_logits(parts.loaded.model, parts.loaded.inputs, self._running.batch_size)
            found[vector.name] = float((logits.argmax(-1) == labels).mean())
        return found

    def try_merge(self, value: Value, rule: Rule, how: StreamSettings) -> Point:
        """Merge with a rule, put the result under every task's head, and measure."""
        writer = MemoryWriter(self._plan)
        merge(self._plan, rule, writer, how)
        weights = {
            slot.base.name: writer.tensor(slot.info.name).to(self._running.device) for slot in (*self._plan.slots, *self._plan.averaged)
        }
        for parts in self._parts:  # all models share the merged weights
            parts.put(weights)
        accuracies = self._accuracies()
        return Point(value, accuracies, sum(accuracies[task] / self.fine[task] for task in accuracies) / len(accuracies))


def best(points: Sequence[Point]) -> Point:
    """The point with the highest normalised accuracy; ties: the first."""
    return max(points, key=lambda point: point.normalised)
