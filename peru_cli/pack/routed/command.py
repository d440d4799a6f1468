"""`peru shuffle-pack --method smile`: its options, and what it reports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from peru_cli import options
from peru_cli.console import console, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.shown import listed

if TYPE_CHECKING:
    from peru_cli.checkpoints.dtypes import Dtype
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.pack.routed.run import RoutedOptions, RoutedPlan, RoutedResult

SMILE = "smile"


def read_options(
    method: str, ranks: Mapping[str, Optional[int]], given: Mapping[str, object], change: Optional[Path],
    patterns: tuple[Optional[re.Pattern[str]], Optional[re.Pattern[str]]], per_task: Optional[str], dtype: Optional[Dtype],
) -> Optional[RoutedOptions]:  # fmt: skip
    """The options of `smile`. None for any other method.

    Args:
        ranks: --rank, --gate-rank and --top-k, by name. None means that the option was not given.
        given: options that `smile` does not have, by name, in the same way.
        change: the pack of --add-to or --remove-from.
        patterns: --target and --exclude.

    Raises UsageError for options that the method does not have."""
    if method != SMILE:
        if wrong := [name for name, value in ranks.items() if value is not None]:
            raise UsageError(f"{', '.join(wrong)}: no meaning with --method {method}", "it belongs to --method smile")
        return None
    from peru_cli.pack.routed.run import RoutedOptions

    if change is not None:
        raise UsageError(f"--add-to and --remove-from change packs, not routed experts ({change})", "make a new artifact of all fine-tunes")
    if wrong := [name for name, value in given.items() if value not in (None, [])]:
        raise UsageError(f"{', '.join(wrong)}: no meaning with --method smile, which superposes nothing", "leave it out")
    default = RoutedOptions()
    rank = ranks["--rank"] or default.rank
    gate = ranks["--gate-rank"] or min(default.gate, rank)
    return RoutedOptions(rank, gate, ranks["--top-k"] or default.top, *patterns, per_task, dtype)


def write(
    chosen: RoutedOptions, base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], opened: Sequence[Checkpoint], out: Path,
    base_id: Optional[str], run: options.Running,
) -> Optional[RoutedResult]:  # fmt: skip
    """Plan the artifact, say what is planned, and write it. None after --dry-run."""
    from peru_cli.checkpoints.base_name import name_base
    from peru_cli.checkpoints.local.atomic import check_room
    from peru_cli.checkpoints.names.renamed import record_rules
    from peru_cli.finetunes.verify import verify_expanded
    from peru_cli.pack.routed.run import make_routed, plan_routed
    from peru_cli.vectors.settings import streaming

    plan = plan_routed(base, tasks, chosen)
    check_room(out, sum(info.nbytes for heads in plan.heads.values() for info in heads) + len(tasks) * plan.expert_bytes())
    for warning in [w for model in (base, *(m for _, m in tasks)) for w in model.warnings] + plan.warnings:
        console.warn(warning)
    say(plan)
    if run.dry_run:
        console.result(_planned(plan, out))
        return None
    if (named := name_base(base, base_id)) is not None:
        plan.metadata |= named.metadata()
    plan.metadata |= record_rules((model for _, model in tasks), plan.metadata)
    total = len(tasks) * plan.entries
    with console.progress(total, "pack") as progress, streaming(run.device, run.threads, run.tile_entries, progress.advance) as how:
        verify_expanded(opened, how, progress.step)
        return make_routed(plan, out, how, run.sync, progress.step)


def say(plan: RoutedPlan) -> None:
    """Note what is routed, what belongs to one task, and what stays as in the base."""
    console.note(f"base {plan.base.label}: {plan.base.kind}, {plural(len(plan.base.tensors), 'tensor')}, {si_bytes(plan.base.nbytes)}")
    for vector in plan.vectors:
        console.note(f"{vector.name}: {vector.fine.label}, {vector.fine.kind} ({vector.pairing.prefix})")
        if heads := plan.heads[vector.name]:
            named = listed([info.name for info in heads][:4])
            console.note(f"  kept for the task, {si_bytes(sum(info.nbytes for info in heads))}: {named}")
    chosen = plan.options
    console.note(f"{plural(len(plan.layers), 'linear layer')}: rank {chosen.rank}, router of {chosen.gate} directions, top {chosen.top}")
    if plan.rest:
        console.note(f"{plural(len(plan.rest), 'other tensor')} stay as in the base: {listed(plan.rest)}")


def _planned(plan: RoutedPlan, out: Path) -> dict[str, Any]:
    return {
        "output": str(out),
        "method": SMILE,
        "tasks": [vector.name for vector in plan.vectors],
        "layers": [layer.weight.name for layer in plan.layers],
        "as_in_base": plan.rest,
        "expert_bytes": plan.expert_bytes(),
        "heads": {task: [info.name for info in heads] for task, heads in plan.heads.items()},
    }


def report(result: RoutedResult, published: dict[str, Any]) -> None:
    """Print tasks with what their experts hold, and bytes."""
    columns = ["task", ">norm", ">error", ">cosine", ">experts", ">own tensors"]
    rows = [
        [t.name, f"{t.norm:.4g}", f"{t.error:.3f}", f"{t.cosine:.3f}", si_bytes(t.expert_bytes), si_bytes(t.whole_bytes)]
        for t in result.tasks
    ]
    console.table(columns, rows)
    console.line(
        f"{result.path}: {plural(len(result.tasks), 'task')}, {plural(result.layers, 'routed layer')}, {si_bytes(result.file_bytes)}"
    )
    console.result(
        {
            "path": str(result.path),
            "method": SMILE,
            "file_bytes": result.file_bytes,
            "layers": result.layers,
            "packed": [
                {
                    "task": t.name,
                    "norm": t.norm,
                    "error": t.error,
                    "cosine": t.cosine,
                    "expert_bytes": t.expert_bytes,
                    "whole_bytes": t.whole_bytes,
                }
                for t in result.tasks
            ],
        }
        | published
    )
