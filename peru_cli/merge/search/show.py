"""The result of a search: a table, a report for `--json`, a plot."""

from __future__ import annotations

from fractions import Fraction

from peru_cli.console import console
from peru_cli.merge.output import show
from peru_cli.merge.search.asked import ACCURACY, KL, LARGER_IS_BETTER, METRIC, NORMALISED
from peru_cli.merge.search.run import Found, shown
from peru_cli.merge.search.space import Dimension, decimal

_MOST = 12  # trials listed


def show_search(found: Found) -> None:
    """Print a table, and draw the plot if one is wanted."""
    _print(found)
    if found.asked.plot is not None:
        _plot(found)


def _print(found: Found) -> None:
    """Print the points with each task's figure, the best one marked; of many trials the best."""
    measure, tasks = found.asked.measure, list(found.fine)
    percent = measure in (NORMALISED, ACCURACY)
    rows = []
    if tasks and measure != KL:
        one = "100.00" if measure == NORMALISED else ""
        rows.append(["fine-tunes", *[""] * (len(found.dimensions) - 1), *(_figure(found.fine[t], percent) for t in tasks), one, ""])
    chosen = list(found.tried)
    if found.asked.trials is not None:
        finished = [tried for tried in chosen if tried.score is not None]
        chosen = sorted(finished, key=lambda t: t.score or 0.0, reverse=measure in LARGER_IS_BETTER)[:_MOST]
    for tried in chosen:
        score = "" if tried.score is None else shown(measure, tried.score).removesuffix("%")
        cells = [_value(d, number) for d, number in zip(found.dimensions, tried.point, strict=True)]
        figures = [_figure(tried.figures[task], percent) if task in tried.figures else "" for task in tasks]
        rows.append([*cells, *figures, score, "best" if tried is found.best else ""])
    names = [found.dimensions[0].name, *(f">{d.name}" for d in found.dimensions[1:])]
    console.table([*names, *(f">{task}" for task in tasks), f">{measure}", ""], rows)
    if found.asked.trials is not None:
        given_up = sum(tried.score is None for tried in found.tried)
        console.line(f"{len(found.tried)} trials, of which {given_up} were given up early; the best {len(chosen)} are listed")
    if found.held is not None:
        total = shown(measure, found.held.total)
        console.line(f"on {found.held_examples:,} examples held out, which the search did not see: {measure} {total}")


def _figure(value: float, percent: bool) -> str:
    return f"{100 * value:.2f}" if percent else f"{value:.6g}"


def _value(dimension: Dimension, number: Fraction) -> str:
    return show(number) if dimension.kind is Fraction else decimal(number)


def as_json(found: Found) -> dict[str, object]:
    """The report for `--json`."""
    held = {"score": found.held.total, "figures": found.held.figures, "examples": found.held_examples} if found.held is not None else None
    if found.asked.trials is not None:
        trials = [
            {
                "number": tried.number, "score": tried.score, "figures": dict(tried.figures),
                "values": {d.name: _value(d, number) for d, number in zip(found.dimensions, tried.point, strict=True)},
            }
            for tried in found.tried
        ]  # fmt: skip
        return {
            "objective": found.asked.measure, "seed": found.seed, "best": found.best.number, "fine_tunes": dict(found.fine),
            "examples": found.examples, "held_out": held, "trials": trials,
        }  # fmt: skip
    (dimension,) = found.dimensions
    points: list[dict[str, object]] = []
    for tried in found.tried:
        point: dict[str, object] = {"value": _value(dimension, tried.point[0])}
        if found.asked.measure in (NORMALISED, ACCURACY):
            point["accuracy"] = dict(tried.figures)
        elif found.asked.measure != METRIC:
            point["figures"] = dict(tried.figures)
        points.append(point | {found.asked.measure: tried.score})
    report: dict[str, object] = {"option": dimension.name, "fine_tunes": dict(found.fine), "points": points}
    return report | ({"held_out": held} if held is not None else {})


def _plot(found: Found) -> None:
    """Draw the scores over the trials, and over each searched value."""
    from peru_cli.reports.plots import plot_search

    assert found.asked.plot is not None
    label = f"{found.asked.measure}, %" if found.asked.measure in (NORMALISED, ACCURACY) else found.asked.measure
    factor = 100 if found.asked.measure in (NORMALISED, ACCURACY) else 1
    scores = [None if tried.score is None else factor * tried.score for tried in found.tried]
    values = {d.name: [float(tried.point[i]) for tried in found.tried] for i, d in enumerate(found.dimensions)}
    plot_search(found.asked.plot, scores, values, found.tried.index(found.best), label)
