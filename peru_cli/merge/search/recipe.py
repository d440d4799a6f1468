"""`--search` over numbers of a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peru_cli.console import console
from peru_cli.errors import UsageError
from peru_cli.inference.remote_code import trusting
from peru_cli.inference.task_models import read_data
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.recipe.plan import Stage
from peru_cli.merge.search.asked import Examples, Searching
from peru_cli.merge.search.leaves import Leaves
from peru_cli.merge.search.run import Found, Subject, search
from peru_cli.merge.search.space import Point
from peru_cli.methods.rules import Rule
from peru_cli.shown import listed
from peru_cli.vectors.family import StreamSettings


def search_recipe(
    asked: Searching,
    leaves: Leaves,
    examples: Examples,
    stage: Stage,
    device: str,
    plan_at: Callable[[Point], Stage],
    write: Callable[[Point, Path], None],
    identity: str,
    how: StreamSettings,
    near: Path,
) -> Found:
    """Search; see `run.search`. `stage` is the result's document at the start, `plan_at` plans it at a point, `write` writes its model.

    Raises UsageError for examples of no model, and for layers put together from several models, which no task's model can run."""
    names = tuple(name for name, _ in stage.layout.tasks)
    data = None
    most = int(examples.most) if examples.most is not None else None
    if asked.metric_command is None:
        if stage.layout.stacked:
            raise UsageError("--search runs the models of the recipe, but this one stacks layers", "measure it with --metric-command CMD")
        running = read_data(examples.files, names, device, examples.batch_size, "--search", most, every=False)
        if lacking := [name for name in names if name not in running.examples]:
            console.warn(f"no --data for {listed(lacking)}: the search does not measure {'it' if len(lacking) == 1 else 'them'}")
        first = f", the first {most} examples of each" if most is not None else ""
        data = running, ", ".join(f"{text.partition('=')[0]}={Path(text).name}" for text in examples.files) + first

    def build(point: Point) -> tuple[MergePlan, Rule]:
        planned = plan_at(point)
        return planned.plan, planned.rule

    models = [str(name) for name in stage.recipe.models()]
    with trusting(models, examples.trust):
        subject = Subject(leaves.dimensions, build, write, identity)
        return search(asked, subject, stage.plan, data, examples.seed, how, console.note, near)
