"""`peru shuffle-pack --method smile|wemoe`: options, and what is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from peru_cli import options
from peru_cli.console import console, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.methods.compact.routed import ROUTED, of_method
from peru_cli.shown import listed

if TYPE_CHECKING:
    import re

    from peru_cli.checkpoints.dtypes import Dtype
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.pack.routed.plan import Method, RoutedPlan, RoutedResult


def read_options(
    method: str, own: Mapping[str, object], foreign: Mapping[str, object], change: Optional[Path],
    patterns: tuple[Optional[re.Pattern[str]], Optional[re.Pattern[str]]], per_task: Optional[str], dtype: Optional[Dtype],
) -> Optional[Method[Any]]:  # fmt: skip
    """A method that routes, with its options. None for any other method.

    Args:
        own: options that only methods that route have, by name. None or an empty list means that the option was not given.
        foreign: options that other methods have, in the same way; some methods that route have them, too.
        change: the pack of --add-to or --remove-from.
        patterns: --target and --exclude.

    Raises UsageError for options that the method does not have."""
    typed = {name: value for name, value in {**foreign, **own}.items() if value not in (None, [])}
    if method not in ROUTED:
        if wrong := [name for name in typed if name in own]:
            belong = " or ".join(name for name, one in ROUTED.items() if wrong[0] in one.options)
            raise UsageError(f"{', '.join(wrong)}: no meaning with --method {method}", f"it belongs to --method {belong}")
        return None
    from peru_cli.pack.routed.plan import Given

    if change is not None:
        raise UsageError(f"--add-to and --remove-from change packs, not routed experts ({change})", "make a new artifact of all fine-tunes")
    if wrong := [name for name in typed if name not in ROUTED[method].options]:
        raise UsageError(f"{', '.join(wrong)}: no meaning with --method {method}, which superposes nothing", "leave it out")
    found: Method[Any] = of_method(method, "pack").Chosen(Given(typed, *patterns, per_task, dtype))
    return found


def write(
    method: Method[Any], base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], opened: Sequence[Checkpoint], out: Path,
    base_id: Optional[str], run: options.Running,
) -> Optional[RoutedResult]:  # fmt: skip
    """Plan the artifact, say what is planned, and write it. None after --dry-run."""
    from peru_cli.checkpoints.base_name import name_base
    from peru_cli.checkpoints.local.atomic import check_room
    from peru_cli.checkpoints.names.renamed import record_rules
    from peru_cli.finetunes.verify import verify_expanded
    from peru_cli.vectors.settings import streaming

    plan = method.plan(base, tasks)
    check_room(out, plan.own_bytes + method.most_bytes(plan))
    for warning in [w for model in (base, *(m for _, m in tasks)) for w in model.warnings] + plan.warnings:
        console.warn(warning)
    say(method, plan)
    if run.dry_run:
        told = {"output": str(out), "method": name_of(method), "tasks": [vector.name for vector in plan.vectors]}
        heads = {task: [info.name for info in heads] for task, heads in plan.heads.items()}
        console.result(told | method.planned(plan) | {"heads": heads})
        return None
    if (named := name_base(base, base_id)) is not None:
        plan.metadata |= named.metadata()
    plan.metadata |= record_rules((model for _, model in tasks), plan.metadata)
    total = len(tasks) * plan.entries
    with console.progress(total, "pack") as progress, streaming(run.device, run.threads, run.tile_entries, progress.advance) as how:
        verify_expanded(opened, how, progress.step)
        return method.make(plan, out, how, run.sync, progress.step)


def name_of(method: Method[Any]) -> str:
    """A method's name in the table."""
    return type(method).__module__.rpartition(".")[2]


def say(method: Method[Any], plan: RoutedPlan) -> None:
    """Note what is routed, what belongs to one task, and what becomes of the rest."""
    console.note(f"base {plan.base.label}: {plan.base.kind}, {plural(len(plan.base.tensors), 'tensor')}, {si_bytes(plan.base.nbytes)}")
    for vector in plan.vectors:
        console.note(f"{vector.name}: {vector.fine.label}, {vector.fine.kind} ({vector.pairing.prefix})")
        if heads := plan.heads[vector.name]:
            named = listed([info.name for info in heads][:4])
            console.note(f"  kept for the task, {si_bytes(sum(info.nbytes for info in heads))}: {named}")
    for line in method.say(plan):
        console.note(line)


def report(method: Method[Any], result: RoutedResult, published: dict[str, Any]) -> None:
    """Print tasks with what is stored of them, and bytes."""
    columns = ["task", ">norm", ">error", ">cosine", f">{method.blocks}", ">own tensors"]
    rows = [
        [t.name, f"{t.norm:.4g}", f"{t.error:.3f}", f"{t.cosine:.3f}", si_bytes(t.nbytes), si_bytes(t.whole_bytes)] for t in result.tasks
    ]
    console.table(columns, rows)
    if "rest_bytes" in result.more:
        console.line(f"all other tensors: {si_bytes(result.more['rest_bytes'])}; routers: {si_bytes(result.more['router_bytes'])}")
    if "routed_to" in result.more:
        sent, entropy = result.more["routed_to"], result.more["entropy"]
        rows = [[task, *(f"{100 * share:.1f}" for share in shares.values())] for task, shares in sent.items()]
        console.table(["routed to, % of --data", *(f">{task}" for task in sent)], rows)
        console.line(
            f"entropy of predictions: {entropy['first']:.3f} nats in the first tenth of the steps, {entropy['last']:.3f} in the last"
        )
    console.line(
        f"{result.path}: {plural(len(result.tasks), 'task')}, {plural(result.layers, 'routed layer')}, {si_bytes(result.file_bytes)}"
    )
    packed = [
        {"task": t.name, "norm": t.norm, "error": t.error, "cosine": t.cosine, "expert_bytes": t.nbytes, "whole_bytes": t.whole_bytes}
        for t in result.tasks
    ]
    told = {"path": str(result.path), "method": name_of(method), "file_bytes": result.file_bytes, "layers": result.layers, "packed": packed}
    console.result(told | result.more | published)
