"""Plots. matplotlib is imported only here, and only when a plot is asked for."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peru_cli.errors import UsageError
from peru_cli.shown import cut, printable

SUFFIXES = (".png", ".svg", ".pdf")


def _name(text: str) -> str:
    """A name as a label: no formulas, and no characters that a viewer would interpret."""
    return printable(cut(text, 80)).replace("$", r"\$")


def check_plot(path: Path) -> None:
    """Reject a plot that cannot be drawn, before any work is done."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--plot {path} should end in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.parent}: no such folder")
    need_matplotlib("--plot")


def need_matplotlib(option: str) -> None:
    """UsageError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{option} needs matplotlib", "pip install 'peru-cli[plot]'") from error


@contextmanager
def _figure(path: Path | io.BytesIO, width: float, height: float, columns: int) -> Iterator[Any]:
    """Yield axes to draw on, then write the file; as SVG if it is written to memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "svg.hashsalt": "peru"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
        yield axes[0]
        in_memory: dict[str, Any] = {"format": "svg", "metadata": {"Date": None}} if isinstance(path, io.BytesIO) else {}
        figure.savefig(path, dpi=150, **in_memory)
        pyplot.close(figure)


def _bars(axis: Any, names: Sequence[str], values: Sequence[float], label: str, most: int = 40) -> None:
    """Horizontal bars: the `most` largest, in their given order."""
    if len(names) > most:
        least = sorted(values, reverse=True)[most - 1]
        chosen = [i for i, value in enumerate(values) if value >= least][:most]
        label += f" (largest {most} of {len(names)})"
    else:
        chosen = list(range(len(names)))
    axis.barh(range(len(chosen)), [values[i] for i in chosen], color="#3b6ea5", height=0.75)
    axis.set_yticks(range(len(chosen)), [_name(names[i]) for i in chosen], fontsize=6)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_xlabel(label)


def plot_comparison(
    path: Path,
    names: Sequence[str],
    relative: Sequence[float],
    choices: Mapping[str, Sequence[tuple[str, int, float]]],
    fine_bytes: int,
) -> None:
    """Change by tensor on the left; relative error over size on the right, a line for each series of choices (name, bytes, error)."""
    with _figure(path, 11, max(4.0, 0.13 * min(len(names), 40) + 1.2), 2) as (left, right):
        _bars(left, names, relative, "norm of the change / norm of the base")
        right.set_xscale("log")
        for (label, points), color, mark, side in zip(choices.items(), ("#b5533c", "#3b6ea5"), "so", (7, -7), strict=False):
            if points:
                right.plot([p[1] / 1e6 for p in points], [100 * p[2] for p in points], marker=mark, color=color, label=label)
            for name, nbytes, error in points:
                align = "left" if side > 0 else "right"
                right.annotate(
                    name, (nbytes / 1e6, 100 * error), (side, side / 2), textcoords="offset points", ha=align, fontsize=7, color=color
                )
        right.axvline(fine_bytes / 1e6, color="#888888", linestyle=":", label="the fine-tune")
        right.set_xlabel("predicted artifact, MB")
        right.set_ylabel("relative error: of the task vector's norm lost, %")
        right.set_ylim(bottom=0)
        right.margins(x=0.2)
        right.grid(alpha=0.25)
        right.legend(frameon=False, fontsize=8)


def plot_frontier(path: Path, points: Sequence[tuple[str, int, float]], title: str) -> None:
    """Accuracy over bytes. Each point: name, bytes, and normalised accuracy (1 is the fine-tune's)."""
    with _figure(path, 7.5, 4.5, 1) as (axis,):
        axis.set_xscale("log")
        axis.scatter([nbytes for _, nbytes, _ in points], [100 * accuracy for _, _, accuracy in points], color="#0072b2", zorder=3)
        middle = sorted(nbytes for _, nbytes, _ in points)[len(points) // 2]
        for name, nbytes, accuracy in points:
            side = "right" if nbytes > middle else "left"
            axis.annotate(
                name, (nbytes, 100 * accuracy), (-7 if side == "right" else 7, 0), textcoords="offset points", ha=side, va="center"
            )
        axis.margins(x=0.25, y=0.12)
        axis.grid(alpha=0.25)
        axis.set_xlabel("bytes for all tasks, on top of the base")
        axis.set_ylabel("accuracy, % of the fine-tunes'")
        axis.set_title(title)


def plot_densities(path: Path, names: Sequence[str], densities: Sequence[float]) -> None:
    """Density of each tensor of an artifact."""
    plot_by_tensor(path, names, [100 * density for density in densities], "entries kept, %")


def plot_by_tensor(path: Path, names: Sequence[str], values: Sequence[float], label: str) -> None:
    """One value for each tensor."""
    with _figure(path, 7, max(4.0, 0.13 * min(len(names), 40) + 1.2), 1) as (axis,):
        _bars(axis, names, values, label)


def plot_spectra(
    path: Path, names: Sequence[str], spectra: Sequence[Sequence[float]], ranks: Sequence[int], megabytes: Sequence[float],
    errors: Sequence[float],
) -> None:  # fmt: skip
    """Singular values by index on the left, a line for each module; size and relative error by rank on the right."""
    with _figure(path, 11, 4.5, 2) as (left, right):
        for values in spectra:
            left.plot(range(1, len(values) + 1), values, color="#3b6ea5", alpha=max(0.08, min(0.8, 8 / len(names))), linewidth=1)
        left.set_yscale("log")
        left.set_xlabel("index")
        left.set_ylabel(f"singular value, {len(names)} modules")
        right.plot(ranks, megabytes, marker="o", color="#3b6ea5")
        right.set_xscale("log", base=2)
        right.set_xticks(ranks, [str(rank) for rank in ranks])
        right.set_xlabel("rank kept")
        right.set_ylabel("factors, MB", color="#3b6ea5")
        right.set_ylim(bottom=0)
        second = right.twinx()
        second.spines["right"].set_visible(True)
        second.plot(ranks, [100 * error for error in errors], marker="s", color="#b5533c")
        second.set_ylabel("relative error, %", color="#b5533c")
        second.set_ylim(bottom=0)


@dataclass(frozen=True)
class Point:
    """One model of a task: its bytes, its accuracy (0 to 1) and the bounds of the confidence interval."""

    task: str
    nbytes: int
    accuracy: float
    low: float
    high: float


def plot_accuracies(path: Path | io.BytesIO, ours: Sequence[Point], theirs: Sequence[Point]) -> None:
    """Accuracy against bytes, one colour for each task. Ours are filled, those compared with are hollow, and a line joins them."""
    with _figure(path, 7.5, 4.2, 1) as (axis,):
        _accuracies(axis, ours, theirs)


Errors = Mapping[str, Mapping[str, float]]  # of the weights, by task and tensor


def plot_errors(path: Path | io.BytesIO, errors: Errors) -> None:
    """Error of the weights by tensor, one panel for each task."""
    with _figure(path, 7.5 if len(errors) == 1 else 5.5 * len(errors), _panels_height(errors), len(errors)) as axes:
        _error_panels(axes, errors)


def plot_evaluation(path: Path, ours: Sequence[Point], theirs: Sequence[Point], errors: Errors) -> None:
    """Both plots side by side."""
    with _figure(path, 6.5 + 5.5 * len(errors), max(4.2, _panels_height(errors)), 1 + len(errors)) as (left, *axes):
        _accuracies(left, ours, theirs)
        _error_panels(axes, errors)


def _error_panels(axes: Sequence[Any], errors: Errors) -> None:
    """Draw all panels on one scale, so that tasks can be compared."""
    largest = max((error for found in errors.values() for error in found.values()), default=0.0)
    for axis, (task, found) in zip(axes, errors.items(), strict=True):
        _bars(axis, list(found), list(found.values()), _ERROR)
        axis.set_xlim(0, 1.05 * largest or 1)
        if len(errors) > 1:
            axis.set_title(_name(task), fontsize=9)


def _panels_height(errors: Errors) -> float:
    return max(_bars_height(len(found)) for found in errors.values())


_ERROR = "error / norm of the fine-tune's change"


def _bars_height(count: int) -> float:
    return max(2.4, 0.13 * min(count, 40) + 1.2)


def _accuracies(axis: Any, ours: Sequence[Point], theirs: Sequence[Point]) -> None:
    colours = ["#3b6ea5", "#b5533c", "#4f8a5b", "#8a6bb1", "#c19a2e", "#4aa3a2", "#a34a77", "#6b7280"]
    opposite = {point.task: point for point in theirs}
    for number, point in enumerate(ours):
        colour = colours[number % len(colours)]
        bars = [[100 * (point.accuracy - point.low)], [100 * (point.high - point.accuracy)]]
        axis.errorbar([point.nbytes], [100 * point.accuracy], yerr=bars, fmt="o", color=colour, capsize=3, label=_name(point.task))
        if (other := opposite.get(point.task)) is not None:
            axis.plot([other.nbytes], [100 * other.accuracy], marker="o", markerfacecolor="white", color=colour, linestyle="")
            axis.plot([point.nbytes, other.nbytes], [100 * point.accuracy, 100 * other.accuracy], color=colour, alpha=0.35, linewidth=1)
    axis.set_xscale("log")
    axis.set_xlabel("bytes" + (" (hollow: what it is compared with)" if theirs else ""))
    axis.set_ylabel("accuracy, %")
    axis.legend(frameon=False)


def plot_tau_jp(path: Path | io.BytesIO, names: Sequence[str], matrix: Mapping[str, Mapping[str, float]]) -> None:
    """tau-Jp as a heat map: a row for each task vector, a column for each task's inputs."""
    with _figure(path, 2.2 + 0.9 * max(len(names), 2), 1.2 + 0.7 * max(len(names), 2), 1) as (axis,):
        table = [[matrix[i][j] for j in names] for i in names]
        largest = max(map(max, table))
        axis.imshow(table, vmin=0, vmax=largest or 1, cmap="Blues", aspect="auto")
        axis.set_xticks(range(len(names)), list(map(_name, names)), rotation=45, ha="right", fontsize=7)
        axis.set_yticks(range(len(names)), list(map(_name, names)), fontsize=7)
        axis.set_xlabel("inputs of")
        axis.set_ylabel("vector of")
        axis.set_title("tau-Jp", fontsize=9)
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                colour = "white" if value > 0.6 * largest else "black"
                axis.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=7, color=colour)


def plot_negation(path: Path | io.BytesIO, scales: Sequence[float], target: Sequence[float], control: Sequence[float], best: int) -> None:
    """Accuracies (0 to 1) of the base minus a task vector, over the scale. `best` is the index of the chosen point."""
    with _figure(path, 7.5, 4.2, 1) as (axis,):
        axis.plot(scales, [100 * value for value in target], marker="o", color="#b5533c", label="target")
        axis.plot(scales, [100 * value for value in control], marker="o", color="#3b6ea5", label="control")
        axis.axvline(scales[best], color="#6b7280", linewidth=1, linestyle=":")
        axis.set_xlabel("scale")
        axis.set_ylabel("accuracy, %")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)


def plot_cosines(path: Path, names: Sequence[str], pairs: Sequence[tuple[str, str, int, int]]) -> None:
    """Cosines between task vectors of a pack, in 1/10,000: unmoved on the left, moved apart on the right."""
    with _figure(path, 1.6 + 0.9 * 2 * max(len(names), 3), 0.8 + 0.9 * max(len(names), 3), 2) as axes:
        for axis, column, title in zip(axes, (2, 3), ("as they are", "moved apart"), strict=True):
            table = [[float("nan")] * len(names) for _ in names]
            for i in range(len(names)):
                table[i][i] = 1.0
            for pair in pairs:
                i, j = names.index(pair[0]), names.index(pair[1])
                table[i][j] = table[j][i] = int(pair[column]) / 10_000
            axis.imshow(table, vmin=-1, vmax=1, cmap="RdBu")
            axis.set_xticks(range(len(names)), list(map(_name, names)), rotation=45, ha="right", fontsize=7)
            axis.set_yticks(range(len(names)), list(map(_name, names)), fontsize=7)
            axis.set_title(f"cosine of task vectors, {title}", fontsize=9)
            for i in range(len(names)):
                for j in range(len(names)):
                    if table[i][j] == table[i][j]:
                        axis.text(j, i, f"{table[i][j]:.3f}", ha="center", va="center", fontsize=6)


def plot_search(path: Path, scores: Sequence[float | None], values: Mapping[str, Sequence[float]], best: int, label: str) -> None:
    """Scores of trials in order, and over each searched value (the first five). Trials given up have None, and are crosses below."""
    chosen = dict(list(values.items())[:5])
    known = [score for score in scores if score is not None]
    below = min(known) - 0.05 * ((max(known) - min(known)) or 1)
    with _figure(path, 3.4 * (1 + len(chosen)), 3.6, 1 + len(chosen)) as axes:
        for axis, (name, places) in zip(axes, {"trial": range(1, len(scores) + 1), **chosen}.items(), strict=True):
            given_up = [place for place, score in zip(places, scores, strict=True) if score is None]
            finished = [(place, score) for place, score in zip(places, scores, strict=True) if score is not None]
            axis.scatter([place for place, _ in finished], [score for _, score in finished], color="#3b6ea5", s=14)
            axis.scatter(given_up, [below] * len(given_up), color="#888888", marker="x", s=14)
            axis.scatter([list(places)[best]], [scores[best]], color="#b5533c", zorder=3)
            axis.set_xlabel(_name(name))
            axis.grid(alpha=0.25)
        axes[0].set_ylabel(_name(label))
