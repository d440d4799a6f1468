"""`--search` over options of the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from peru_cli.console import Progress as Bar
from peru_cli.console import console
from peru_cli.inference.task_models import Running
from peru_cli.merge import output as out
from peru_cli.merge.given import Given
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.search.asked import Searching
from peru_cli.merge.search.run import Found, Subject, search
from peru_cli.merge.search.space import Dimension, Point
from peru_cli.merge.search.typed import at, first_point
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule
from peru_cli.vectors.family import StreamSettings


def search_options(
    asked: Searching,
    dimensions: Sequence[Dimension],
    seed: int,
    plan: MergePlan,
    typed: tuple[Given, Parameters],
    build: Callable[[Given, Parameters], Rule],
    record: Callable[[Given, Parameters], out.Recipe],
    data: tuple[Running, str] | None,
    how: StreamSettings,
    near: Path,
    bar: Bar,
) -> Found:
    """Search; see `run.search`. `build` and `record` make a rule and the record of a merge from what is typed and its parameters."""

    def write(point: Point, folder: Path) -> None:
        now = at(dimensions, point, *typed)
        where = out.Where(folder, False, False, bar.step, console.note)
        out.write_directory(plan, build(*now), record(*now), where, how)

    identity = out.resume_key(plan, record(*at(dimensions, first_point(dimensions), *typed)))
    subject = Subject(dimensions, lambda point: (plan, build(*at(dimensions, point, *typed))), write, identity)
    return search(asked, subject, plan, data, seed, how, console.note, near)
