"""What a merge prints: the methods there are, what will be merged, and the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Optional

import typer

from peru_cli.console import console, count, plural, si_bytes
from peru_cli.methods.lora.table import SPACES
from peru_cli.methods.table import METHODS, Method
from peru_cli.methods.then.table import PASSES

if TYPE_CHECKING:
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.merge.output import Recipe
    from peru_cli.merge.plan import MergePlan


def list_methods_and_exit(value: bool) -> None:
    """`--list-methods`."""
    if not value:
        return
    rows = [[f"{m.name} *" if m.take else m.name, m.title, " ".join(f"--{o}" for o in m.options), m.paper] for m in METHODS.values()]
    console.table(["method", "what it does", "options", "paper"], rows)
    for name, after in PASSES.items():
        console.note(f"--then {name}: {after.title} ({after.paper})")
    for name, space in SPACES.items():
        console.note(f"--lora {name}: {space.title} ({space.paper})")
    for method in METHODS.values():
        if method.take:
            console.note(f"* take {method.name} {method.take} (docs/merging.md has the figures)")
    console.result(
        [{"method": m.name, "title": m.title, "options": list(m.options), "paper": m.paper, "take": m.take} for m in METHODS.values()]
    )
    raise typer.Exit()


def say(plan: MergePlan, recipe: Recipe, method: Method, base: Optional[Checkpoint], tasks: list[tuple[str, Checkpoint]]) -> None:
    """What was found in the inputs, and what will be done with it."""
    for model in ([base] if base is not None else []) + [model for _, model in tasks]:
        for warning in model.warnings:
            console.warn(warning)
    if base is not None:
        console.note(f"base {base.label}: {base.kind}, {plural(len(base.tensors), 'tensor')}, {si_bytes(base.nbytes)}")
    for vector, (name, model) in zip(plan.vectors, tasks, strict=True):
        console.note(f"{name}: {model.label}, {model.kind}, {plural(len(model.tensors), 'tensor')} ({vector.pairing.prefix})")
        if heads := plan.heads[name]:
            listed = ", ".join(info.name for info in heads[:4]) + (", ..." if len(heads) > 4 else "")
            console.note(f"  kept for the task, {si_bytes(sum(info.nbytes for info in heads))}: {listed}")
    if len(tasks) == 1:
        console.note("only one model: there is nothing to merge it with")
    same = {info.name for info in plan.copied}
    console.note(f"merging {plural(len(plan.slots), 'tensor')}, {count(plan.entries)} entries" + (f"; copying {len(same)}" if same else ""))
    console.note(f"{recipe.method} ({method.paper}): " + ", ".join(f"{name} {value}" for name, value in recipe.words().items()))


def summary(plan: MergePlan, recipe: Recipe, target: Path) -> dict[str, object]:
    """The report of a merge, for `--json`."""
    return {
        "output": str(target),
        "method": recipe.method,
        "tasks": list(recipe.tasks),
        "options": recipe.words(),
        "merged": len(plan.slots),
        "entries": plan.entries,
        "copied": [info.name for info in plan.copied],
        "heads": {task: [info.name for info in heads] for task, heads in plan.heads.items()},
        "bytes": sum(info.nbytes for info in plan.written),
    }
