"""Merges with data: collect the statistics of every task, and search for the best value of an option."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peru_cli.console import Progress as Bar
from peru_cli.inference.task_models import Running
from peru_cli.merge.data.search import Point, Trial, best
from peru_cli.merge.data.statistics import Progress, Statistics, open_folder
from peru_cli.merge.plan import MergePlan
from peru_cli.methods.parameters import Parameters, Value
from peru_cli.methods.rules import Rule
from peru_cli.methods.table import Method
from peru_cli.vectors.family import StreamSettings


@dataclass
class Looked:
    """The rule with its statistics, its parameters, the statistics' keys, and the curve of a search with the fine-tunes' accuracies."""

    rule: Rule
    parameters: Parameters
    keys: tuple[str, ...]
    searched: str
    points: list[Point]
    fine: dict[str, float]


def look(
    plan: MergePlan,
    method: Method,
    parameters: Parameters,
    running: Running,
    folder: Path,
    searched: tuple[str, Sequence[Value]] | None,
    how: StreamSettings,
    say: Callable[[str], None],
    bar: Bar,
) -> Looked:
    """Collect statistics into the folder, and try every value of a searched option.

    Raises BadFile or Mismatch for examples and models that do not fit together."""
    statistics = None
    if method.statistics is not None:
        statistics = Statistics(plan, method, running, open_folder(folder), Progress(say, bar.expect, bar.advance))

    def build(values: Parameters) -> Rule:
        rule = method.build(values)
        if statistics is not None:
            rule.statistics = statistics.take(values)
        return rule

    points: list[Point] = []
    fine: dict[str, float] = {}
    name = ""
    if searched is not None:
        name, candidates = searched
        say("measuring the fine-tunes")
        trial = Trial(plan, running)
        fine = trial.fine
        for value in candidates:
            points.append(trial.try_merge(value, build(_with(parameters, name, value)), how))
            say(f"--{name} {float(value):g}: normalised accuracy {100 * points[-1].normalised:.2f}%")
        parameters = _with(parameters, name, best(points).value)
    keys = tuple(statistics.keys(parameters)) if statistics is not None else ()
    return Looked(build(parameters), parameters, keys, name, points, fine)


def _with(parameters: Parameters, name: str, value: Value) -> Parameters:
    return replace(parameters, values=dict(parameters.values) | {name: value})
