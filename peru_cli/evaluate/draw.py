"""`peru eval --plot` and `--report`."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peru_cli.errors import UsageError
from peru_cli.evaluate.show import cell, mean_of, notes, score_tables, weight_tables
from peru_cli.reports import plots
from peru_cli.reports.page import write_report
from peru_cli.shown import listed

if TYPE_CHECKING:
    from peru_cli.evaluate.interference_command import Drawing
    from peru_cli.evaluate.run import Score
    from peru_cli.evaluate.weights import WeightsReport


def _points(scores: Sequence[Score]) -> tuple[list[plots.Point], list[plots.Point]]:
    """Accuracies (or agreement, without labels) of the models and of those they are compared with."""
    ours, theirs = [], []
    for score in scores:
        got = score.metrics.get("accuracy", score.metrics.get("agreement"))
        if got is not None:
            ours.append(plots.Point(score.task, score.nbytes, got.value, got.low, got.high))
        other = score.metrics.get("against_accuracy")
        if other is not None and score.against_bytes is not None:
            theirs.append(plots.Point(score.task, score.against_bytes, other.value, other.low, other.high))
    return ours, theirs


def _errors(weights: dict[str, WeightsReport]) -> dict[str, dict[str, float]]:
    """Error by task and tensor."""
    return {task: {tensor.name: tensor.error for tensor in report.tensors} for task, report in weights.items()}


def draw(
    plot: Path | None, report: Path | None, scores: Sequence[Score], weights: dict[str, WeightsReport], gates: list[str], missed: list[str]
) -> Iterator[tuple[Path, str]]:
    """Draw the requested files. Yields each file and what was done to it."""
    if plot is not None:
        _plot(plot, scores, weights)
        yield plot, "drew"
    if report is not None:
        _page(report, scores, weights, gates, missed)
        yield report, "wrote"


def _plot(path: Path, scores: Sequence[Score], weights: dict[str, WeightsReport]) -> None:
    """One plot of all measurements."""
    (ours, theirs), errors = _points(scores), _errors(weights)
    if ours and errors:
        plots.plot_evaluation(path, ours, theirs, errors)
    elif ours:
        plots.plot_accuracies(path, ours, theirs)
    elif errors:
        plots.plot_errors(path, errors)
    else:
        raise UsageError(
            "--plot: there is nothing to draw", "it draws accuracy against bytes, and with --base and --against the error of the weights"
        )


def _svg(plot: Callable[[io.BytesIO], None]) -> str:
    """A plot as an SVG element for a page."""
    room = io.BytesIO()
    plot(room)
    text = room.getvalue().decode("utf-8")
    return text[text.index("<svg") :]


def draw_one(plot: Path | None, report: Path | None, drawing: Drawing, models: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """The same for one measurement that has its own plot."""
    if plot is not None:
        drawing.plot(plot)
        yield plot, "drew"
    if report is not None:
        drawn = [(drawing.caption, _svg(drawing.plot))]
        title = f"peru eval, {drawing.title}: {listed(models)}"
        write_report(report, title, _command(), drawing.tables, [], drawn, [], [], [])
        yield report, "wrote"


def _command() -> str:
    """The command line."""
    return "peru " + shlex.join(sys.argv[1:]) if sys.argv[1:2] == ["eval"] else "peru eval"


def _page(path: Path, scores: Sequence[Score], weights: dict[str, WeightsReport], gates: list[str], missed: list[str]) -> None:
    """The report."""
    (ours, theirs), errors = _points(scores), _errors(weights)
    drawn = []
    if ours:
        caption = "Accuracy against bytes on the disk, with 95% intervals."
        drawn.append((caption, _svg(lambda room: plots.plot_accuracies(room, ours, theirs))))
    if errors:
        caption = "Where the weights differ: error of each tensor's change, the largest if there are many."
        drawn.append((caption, _svg(lambda room: plots.plot_errors(room, errors))))
    tables = [("Tasks", *table[1:]) for table in score_tables(scores)]
    folded = []
    if weights:
        tables.append(("Weights", *weight_tables(weights, False)[0][1:]))
        folded = [(f"Weights by tensor{f': {table[0]}' if table[0] else ''}", *table[1:]) for table in weight_tables(weights, True)]
    said = notes(scores, bool(weights))
    if (mean := mean_of(scores)) is not None:
        said.insert(0, f"mean normalised accuracy {cell('normalised', mean)} %")
    names = listed(dict.fromkeys([*(score.model for score in scores), *([] if scores else weights)]))
    write_report(path, f"peru eval: {names}", _command(), tables, folded, drawn, gates, missed, said)
