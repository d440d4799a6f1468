"""Run a search: measure points, on examples or by a command, and choose the best one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from blake3 import blake3

from peru_cli.checkpoints.local.atomic import check_room
from peru_cli.errors import Mismatch
from peru_cli.inference.data import Examples
from peru_cli.inference.task_models import Running, digest_inputs
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.search.asked import LARGER_IS_BETTER, METRIC, OBJECTIVES, Searching
from peru_cli.merge.search.memory import merged_weights
from peru_cli.merge.search.metric import read_command, run_metric
from peru_cli.merge.search.objective import GivenUp, Judge, Score
from peru_cli.merge.search.space import Dimension, Point, decimal, spelt
from peru_cli.merge.search.study import Study, Tried
from peru_cli.methods.rules import Rule
from peru_cli.vectors.family import StreamSettings

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What is searched: the dimensions, the merge at a point, how its model is written into a folder, and what it depends on."""

    dimensions: Sequence[Dimension]
    build: Callable[[Point], tuple[MergePlan, Rule]]
    write: Callable[[Point, Path], None]
    identity: str


@dataclass(frozen=True)
class Found:
    """The result of a search. `fine` has the fine-tunes' own figures, `held` the best point's score on the examples held out."""

    asked: Searching
    dimensions: Sequence[Dimension]
    seed: int
    data: str  # the names of the files
    best: Tried
    tried: Sequence[Tried]
    fine: Mapping[str, float]
    examples: int
    held: Score | None
    held_examples: int

    @property
    def point(self) -> Point:
        """The best point."""
        return self.best.point

    def words(self) -> str:
        """What was searched on what, for the model card."""
        if self.asked.trials is None:
            (dimension,) = self.dimensions
            text = f"{dimension.name}, the best of {dimension.text}"
        else:
            given_up = sum(tried.score is None for tried in self.tried)
            ranges = ", ".join(f"{d.name} {d.text}" for d in self.dimensions)
            pruned = f", of which {given_up} were given up early" if given_up else ""
            text = f"the best of {len(self.tried)} trials (TPE, seed {self.seed}{pruned}) over {ranges}"
        if self.asked.metric_command is not None:
            return text
        text += f" on {self.data}"
        if self.held is not None:
            text += f"; {shown(self.asked.measure, self.best.score or 0.0)} on {self.examples:,} examples, and "
            text += f"{shown(self.asked.measure, self.held.total)} on {self.held_examples:,} held out, which the search did not see"
        return text

    def chosen_by(self) -> str:
        """What was largest or smallest, for the model card."""
        if self.asked.trials is None and self.asked.objective is None and self.asked.metric_command is None:
            return "accuracy"
        return "a metric of the user's own" if self.asked.metric_command is not None else OBJECTIVES[self.asked.measure]


def shown(measure: str, score: float) -> str:
    """A score as people read it."""
    return f"{100 * score:.2f}%" if measure in LARGER_IS_BETTER and measure != METRIC else f"{score:.6g}"


def search(
    asked: Searching, subject: Subject, plan: MergePlan, data: tuple[Running, str] | None, seed: int, how: StreamSettings, say: Say,
    near: Path,
) -> Found:  # fmt: skip
    """Measure the points, and choose the best; of equals the first.

    `plan` is one of the subject's, `data` has the examples and their names in the model card, `near` is on the disk of the output.

    Raises BadFile, Mismatch or UsageError for examples, models, studies and commands that do not fit."""
    judge = None
    running, names = data if data is not None else (None, "")
    if running is not None:
        say("measuring the fine-tunes")
        judge = Judge(plan, running, asked.measure, asked.held, seed)
    command = read_command(asked.metric_command) if asked.metric_command is not None else []

    def evaluate(point: Point, report: Callable[[float], bool]) -> tuple[float, Mapping[str, float]] | None:
        if judge is None:
            with TemporaryDirectory(prefix=".peru-trial-", dir=near) as folder:
                check_room(Path(folder) / "model", sum(info.nbytes for info in plan.written))
                subject.write(point, Path(folder) / "model")
                return run_metric(command, Path(folder) / "model"), {}
        merged, rule = subject.build(point)
        try:
            score = judge.measure(merged_weights(merged, rule, how, judge.device), report)
        except GivenUp:
            return None
        return score.total, score.figures

    def told(tried: Tried) -> None:
        what = "given up: poor so far" if tried.score is None else f"{_title(asked)} {shown(asked.measure, tried.score)}"
        where = f"trial {tried.number + 1} of {asked.trials}, " if asked.trials is not None else ""
        words = spelt(subject.dimensions, tried.point) if where else f"--{subject.dimensions[0].name} {decimal(tried.point[0])}"
        say(f"{where}{words}: {what}")

    larger = asked.measure in LARGER_IS_BETTER
    if asked.trials is None:
        (dimension,) = subject.dimensions
        tried = []
        for number, value in enumerate(dimension.points()):
            made = evaluate((value,), lambda score: False)
            assert made is not None
            tried.append(Tried(number, (value,), made[0] if math.isfinite(made[0]) else None, made[1]))
            told(tried[-1])
    else:
        about = {
            "the merge": subject.identity,
            "--search": ",".join(f"{d.name}={d.text}" for d in subject.dimensions),
            "the objective": asked.metric_command or asked.measure,
            "--seed": str(seed),
            "--hold-out": str(asked.held),
            "--data": " ".join(_digest(examples) for _, examples in sorted(running.examples.items())) if running is not None else "",
        }
        study = Study(subject.dimensions, larger, seed, Path(asked.study) if asked.study is not None else None, about)
        if study.tried:
            say(f"{asked.study}: continuing after {len(study.tried)} trials")
        study.run(asked.trials, evaluate, told)
        tried = study.tried
    finished = [one for one in tried if one.score is not None]
    if not finished:
        raise Mismatch("no trial has a score", "its outputs are NaN or infinite everywhere: narrow --search")
    best = (max if larger else min)(finished, key=lambda one: one.score or 0.0)
    held = None
    if judge is not None and judge.held:
        merged, rule = subject.build(best.point)
        held = judge.measure_held(merged_weights(merged, rule, how, judge.device))
    return Found(
        asked, subject.dimensions, seed, names, best, tried, judge.fine if judge is not None else {},
        judge.examples if judge is not None else 0, held, judge.held if judge is not None else 0,
    )  # fmt: skip


def _digest(examples: Examples) -> str:
    labels = json.dumps(examples.labels, default=str)
    return blake3(f"{digest_inputs(examples)} {labels}".encode()).hexdigest()[:32]


def _title(asked: Searching) -> str:
    return "normalised accuracy" if asked.measure == "normalised" else "metric" if asked.measure == METRIC else asked.measure
