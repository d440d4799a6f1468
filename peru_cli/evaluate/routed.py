"""`peru eval` of routed experts: one model on the data of every task, without being told which task it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from peru_cli.artifacts.packs.routed import Routed, open_routed
from peru_cli.checkpoints.places import Place
from peru_cli.errors import Mismatch, UsageError
from peru_cli.evaluate.run import Score, threads_for
from peru_cli.finetunes.fine_tune import check_base
from peru_cli.finetunes.pack_task import base_of_pack
from peru_cli.inference import metrics
from peru_cli.inference.data import Array, Examples, class_doubts
from peru_cli.inference.eval_model import Base
from peru_cli.inference.inputs import BATCH_SIZES
from peru_cli.inference.models import CLASSES, IMAGE, TEXT, problem_of
from peru_cli.inference.prepare import Loaded, Prepared, Settings, prepare
from peru_cli.inference.routed import subject_of
from peru_cli.live.applied import as_saved, verify_base
from peru_cli.live.routed import AppliedRouted, install
from peru_cli.shown import listed

METRICS = ("accuracy", "routed", "given")


@dataclass
class RoutedScore(Score):
    """A data set's score. Metrics: `accuracy` with the head that the router chose, `routed`: inputs whose task it found, and `given`:
    accuracy with the task's own head. `shares`: of the inputs, by the task that answered."""

    shares: dict[str, float] = field(default_factory=dict)


def evaluate_routed(
    label: str, place: Place, base: str, examples: Mapping[str, Examples], settings: Settings, batch_size: int | None,
    advance: Callable[[int], None], step: Callable[[str], None],
) -> list[RoutedScore]:  # fmt: skip
    """Run routed experts on the data of their tasks.

    Raises UsageError for data of no task, BadFile for damage, Mismatch for another base or models that are no classifiers, before
    the first forward pass for everything that headers and side files show."""
    with Base(base) as opened, open_routed(place) as routed:
        if strangers := [task for task in examples if task not in routed.tasks]:
            hint = f"write --data TASK=FILE; the tasks are {listed(routed.tasks)}"
            raise UsageError(f"--data {strangers[0]}: {label} has no such task" if strangers[0] else "--data names no task", hint)
        origins = {origin.info.name: origin for origin in base_of_pack(routed)}
        check_base(origins.values(), routed, opened.checkpoint)
        of_base = {name: file.read_bytes() for name, file in opened.checkpoint.side_files.items()}
        prepared = {}
        for task, found in examples.items():
            ready = prepare(subject_of(routed, routed.tasks[task], opened, label), found, [of_base], settings.context)
            if ready.kind not in (TEXT, IMAGE) or problem_of(ready.config) != CLASSES:
                raise Mismatch(f"{label}: the task {task} is no classifier of one class", "`peru eval` measures the routing of classifiers")
            prepared[task] = ready
        verify_base(opened.memory, origins, {name: name for name in origins}, routed)
        scores = []
        for task, ready in prepared.items():
            step(task)
            with threads_for(ready.subject.parameters, settings.threads):
                scores.append(_score(routed, task, ready, examples[task], settings, batch_size, advance))
        return scores


def _score(
    routed: Routed, task: str, ready: Prepared, examples: Examples, settings: Settings, batch_size: int | None,
    advance: Callable[[int], None],
) -> RoutedScore:  # fmt: skip
    subject = ready.subject
    score = RoutedScore(
        task, subject.label, None, ready.kind, len(examples), "examples", subject.nbytes, subject.place, subject.shared_bytes,
        subject.shared, None, classes=ready.config.num_labels,
    )  # fmt: skip
    loaded, size = ready.build(settings), batch_size or BATCH_SIZES[ready.kind]
    with install(loaded.model, as_saved(loaded.model), routed) as applied:
        predicted, chosen = _run(loaded, applied, size, advance)
        mine = list(routed.tasks).index(task)
        found = chosen == mine
        labels, heads = examples.class_numbers(ready.config), any(record.tensors for record in routed.index.tasks)
        if labels is not None:
            right = (predicted == labels) & (found | (not heads))  # another task's head gives another task's classes
            score.metrics["accuracy"] = metrics.wilson(int(right.sum()), len(right))
            if heads and not found.all():
                applied.head = task
                predicted = _run(loaded, applied, size, lambda examples: None)[0]
            if heads:
                score.metrics["given"] = metrics.wilson(int((predicted == labels).sum()), len(labels))
            score.warnings += class_doubts(examples, ready.config)
        score.metrics["routed"] = metrics.wilson(int(found.sum()), len(found))
    score.shares = {name: float((chosen == number).mean()) for number, name in enumerate(routed.tasks)}
    return score


def _run(loaded: Loaded, applied: AppliedRouted, size: int, advance: Callable[[int], None]) -> tuple[Array, Array]:
    """The class of each input, and the number of the task that answered; int64 (n,). Mismatch for outputs that are NaN."""
    predicted, chosen = np.empty(len(loaded.inputs), np.int64), np.empty(len(loaded.inputs), np.int64)
    device = next(loaded.model.parameters()).device
    with torch.inference_mode():
        for numbers, batch in loaded.inputs.batches(size, device):
            logits = loaded.model(**batch).logits.float()
            if logits.isnan().any() or applied.routing is None:
                raise Mismatch(f"{loaded.label}: some outputs are NaN", "try --dtype fp32; if that does not help, the weights are broken")
            predicted[numbers] = logits.argmax(-1).cpu().numpy()
            chosen[numbers] = applied.routing.chosen.cpu().numpy()
            advance(len(numbers))
    return predicted, chosen
