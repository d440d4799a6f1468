"""`peru eval --tau-jp` and `--negate`: how task vectors affect each other's tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Optional

from peru_cli.console import console
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    import io
    from pathlib import Path

    from peru_cli.evaluate.interference import Vectors
    from peru_cli.inference.data import Examples


@dataclass(frozen=True)
class Drawing:
    """Content of --plot and --report for a measurement: tables (title, columns, rows) and one plot, drawn into a file or memory."""

    title: str
    tables: list[tuple[str, list[str], list[list[str]]]]
    caption: str
    plot: Callable[[Path | io.BytesIO], None]


def tau_jp(
    models: Mapping[str, str],
    base: Optional[str],
    examples: Mapping[str, Examples],
    scale: float,
    device: str,
    threads: Optional[int],
    batch_size: Optional[int],
) -> Drawing:
    """Print tau-Jp(i -> j) of all tasks and the disentanglement error of each."""
    from peru_cli.evaluate.interference import measure_interference
    from peru_cli.evaluate.run import threads_for
    from peru_cli.reports.plots import plot_tau_jp

    for task in models:
        if task not in examples:
            raise UsageError(f"--tau-jp needs examples of every task, and {task} has none", f"add --data {task}=FILE")
    vectors = _vectors(models, base, examples, device, batch_size)
    total = 3 * sum(map(len, examples.values()))
    with threads_for(vectors.plan.entries, threads), console.progress(total, "tau-Jp", "examples") as progress:
        found = measure_interference(vectors, scale, progress.advance)
    names = found.tasks
    rows = [[i, *(f"{found.tau_jp[i, j]:.4g}" for j in names)] for i in names]
    effects = ("", ["tau-Jp, vector of", *(f">inputs of {j}" for j in names)], rows)
    errors = (f"scale {scale:g}", ["task", ">disentanglement error, %"], [[j, f"{100 * found.error[j]:.2f}"] for j in names])
    console.table(*effects[1:])
    console.line()
    console.table(*errors[1:], errors[0])
    matrix = {i: {j: found.tau_jp[i, j] for j in names} for i in names}
    console.result({"tau_jp": matrix, "disentanglement_error": found.error, "scale": scale})
    caption = "tau-Jp: how far each task vector moves the features of each task's inputs, to first order."
    return Drawing("tau-Jp", [effects, errors], caption, lambda path: plot_tau_jp(path, names, matrix))


def negate(
    models: Mapping[str, str], base: Optional[str], against: Mapping[str, str], examples: Mapping[str, Examples], scales: list[float],
    device: str, threads: Optional[int], batch_size: Optional[int],
) -> Drawing:  # fmt: skip
    """Print accuracies of the base minus a task vector, and the best scale of the negation protocol."""
    from peru_cli.evaluate.interference import KEPT, load_base, measure_negation
    from peru_cli.evaluate.run import threads_for
    from peru_cli.reports.plots import plot_negation

    if len(models) != 1:
        raise UsageError(f"--negate takes one model, not {len(models)}", "name the fine-tune whose task should be forgotten")
    if set(examples) != {"target", "control"}:
        raise UsageError("--negate needs data of a target task and a control task", "add --data target=FILE --data control=FILE")
    if set(against) - {"control"}:
        raise UsageError("--negate takes only --against control=MODEL", "the model whose head judges the control task")
    ((task, model),) = models.items()
    if task == "control":
        raise UsageError("with --negate, the name 'control' is reserved for the control task", "give the model another name")
    tasks = {task: model} | ({"control": against["control"]} if against else {})
    vectors = _vectors(tasks, base, {task: examples["target"], "control": examples["control"]}, device, batch_size)
    control = vectors.load("control") if against else load_base(vectors, examples["control"])
    total = (len(scales) + 1) * sum(map(len, examples.values()))
    with threads_for(vectors.plan.entries, threads), console.progress(total, "negate", "examples") as progress:
        points, best = measure_negation(vectors, task, control, examples["control"], scales, progress.advance)
    rows = [
        [f"{p.scale:g}", f"{100 * p.target:.2f}", f"{100 * p.control:.2f}", "best" if p is best else ""]
        for p in points
    ]  # fmt: skip
    title = f"base - scale x {task}; control keeps {100 * KEPT:g}% of the base's"
    table = (title, ["scale", ">target, %", ">control, %", ""], rows)
    console.table(*table[1:], title)
    listed = [{"scale": p.scale, "target": p.target, "control": p.control} for p in points]
    console.result({"points": listed, "best": listed[points.index(best)]})
    columns = [p.scale for p in points], [p.target for p in points], [p.control for p in points]
    caption = "Accuracy of the base minus the task vector; the dotted line is the scale that is taken."
    return Drawing("negation", [table], caption, lambda path: plot_negation(path, *columns, points.index(best)))


def _vectors(
    models: Mapping[str, str], base: Optional[str], examples: Mapping[str, Examples], device: str, batch_size: Optional[int]
) -> Vectors:
    from peru_cli.checkpoints.names.translated import bring_together
    from peru_cli.checkpoints.resolve import open_model
    from peru_cli.evaluate.interference import Vectors
    from peru_cli.finetunes.open import open_fine_tune
    from peru_cli.inference.models import pick_device
    from peru_cli.inference.task_models import Running

    if base is None:
        raise UsageError("task vectors need a base", "add --base BASE")
    opened = open_model(base)
    together, said = bring_together([open_fine_tune(model, opened, task) for task, model in models.items()], opened)
    for line in said:
        console.note(line)
    return Vectors(opened, list(zip(models, together, strict=True)), Running(dict(examples), pick_device(device), batch_size or 32))
