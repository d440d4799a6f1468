"""`--data`: artifacts tuned on their tasks' examples, one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from peru_cli.artifacts.mixed.writer import Represented
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.inference.data import Examples
from peru_cli.inference.inputs import BATCH_SIZES
from peru_cli.inference.metrics import Estimate, bootstrap_mean
from peru_cli.inference.models import IMAGE, TEXT, VALUE, problem_of
from peru_cli.inference.task_models import Running, digest_inputs, load_fine_tune, read_floats
from peru_cli.prune.artifact import PruneTask
from peru_cli.prune.mixed.decompose import Item
from peru_cli.prune.mixed.represent import Frame, size_of
from peru_cli.prune.mixed.tune import Student, descend, measure, split
from peru_cli.prune.mixed.write import difference

START = 0.92  # of the bytes for changes that integers take before they move: moved ones take more
_FURTHEST = 1.25  # of their way that integers may go to use the bytes up
_BISECTIONS = 7


@dataclass(frozen=True)
class Gain:
    """What tuning brought a task: distances to the fine-tune's outputs on what was held out, before and after."""

    task: str
    digest: str  # of the examples
    examples: int
    held: int
    unit: str  # "examples", or "tokens"
    metric: str  # "KL", or "squared distance"
    before: Estimate
    after: Estimate
    kept: bool  # whether the integers stay moved

    def encode(self) -> str:
        """As the artifact records it: digest, examples, held-out ones (or their tokens), mean before and after."""
        return f"{self.digest} {self.examples} {self.held} {self.before.value!r} {self.after.value!r}"

    def figures(self) -> dict[str, object]:
        """For --json."""
        after = {"value": self.after.value, "low": self.after.low, "high": self.after.high}
        counts = {"examples": self.examples, "digest": self.digest, "held_out": self.held, "unit": self.unit}
        return counts | {"metric": self.metric, "before": self.before.value, "after": after}

    def __str__(self) -> str:
        after = f"{self.after.value:.4g} ({self.after.low:.4g} to {self.after.high:.4g})"
        held = f"{self.held:,} {self.unit} held out"
        said = f"{self.task}: {self.metric} to the fine-tune on {held}: {after}, {self.before.value:.4g} without data"
        return said if self.kept else f"{said}; so the artifact is as without data"


@contextmanager
def one_thread() -> Iterator[None]:
    """The same sums for any `--threads`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tune_task(
    base: Checkpoint, task: PruneTask, items: Sequence[Item], frame: Frame, free: Mapping[str, Represented],
    found: Mapping[str, Represented], running: Running, allowed: int,
) -> Gain:  # fmt: skip
    """Move a task's integers, and fix its items to them if they are better on held-out examples than what no data would give.

    Args:
        free: the parts without data, by the fine-tune's names; as large as is allowed.
        found: the parts whose integers move, smaller, as they get larger.
        allowed: bytes of the artifact.

    Raises:
        Mismatch, BadFile: model and examples do not fit.
    """
    examples: Examples = running.examples[task.vector.name]
    loaded, own = load_fine_tune(task.vector.fine, base, examples, running.device)
    by_name = {item.name: item for item in items}

    def student_of(parts: Mapping[str, Represented]) -> Student:
        def weights(name: str, changed: bool) -> torch.Tensor | None:
            item = by_name.get(name)
            return None if item is None else _weights(base, task.vector.fine, item, parts[name] if changed else Represented())

        return Student(loaded, own, parts, weights)

    size = running.batch_size or BATCH_SIZES[loaded.kind]
    chosen = split(loaded.inputs.lengths, size)
    with one_thread():
        student = student_of(free)
        before = measure(student, chosen.held, size)
        student.close()
        student = student_of(found)
        descend(student, chosen.batches)
        student.settle(_share(lambda parts: size_of(frame, items, parts), student, found, allowed))
        after = measure(student, chosen.held, size)
    moved = student.harvest(found)
    kept = float(after.mean()) < float(before.mean()) and size_of(frame, items, moved) <= allowed
    if kept:
        for name, parts in moved.items():
            by_name[name].fixed = parts
    classified = loaded.kind in (TEXT, IMAGE)
    metric = "squared distance" if classified and problem_of(loaded.model.config) == VALUE else "KL"
    return Gain(
        task.vector.name, digest_inputs(examples), len(examples), len(after), "examples" if classified else "tokens", metric,
        bootstrap_mean(before), bootstrap_mean(after), kept,
    )  # fmt: skip


def _share(sized: Callable[[dict[str, Represented]], int], student: Student, found: Mapping[str, Represented], allowed: int) -> float:
    """How far of their way integers may go within the bytes allowed; 0 if they do not fit where they started."""
    fits, exceeds = 0.0, _FURTHEST
    if sized(student.harvest(found, exceeds)) <= allowed:
        return exceeds
    for _ in range(_BISECTIONS):
        middle = (fits + exceeds) / 2
        if sized(student.harvest(found, middle)) <= allowed:
            fits = middle
        else:
            exceeds = middle
    return fits


def _weights(base: Checkpoint, fine: Checkpoint, item: Item, parts: Represented) -> torch.Tensor:
    """A tensor as the artifact gives it, in float32, before it is rounded to the fine-tune's dtype."""
    pair = item.pair
    result = read_floats(fine, item.name) if pair.grown else torch.empty(pair.fine.shape)
    values = read_floats(base, pair.base.name).view(-1)[: pair.entries]
    added = difference(parts, 0, pair.entries)
    if added is not None:
        values = (values.double() + torch.from_numpy(np.ascontiguousarray(added))).float()
    result.view(-1)[: pair.entries] = values
    return result
