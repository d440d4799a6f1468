"""`peru shuffle-pack`."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.methods.compact.masks.table import MASKS
from peru_cli.methods.compact.routed import ROUTED
from peru_cli.pack.masks import command as packmasks
from peru_cli.pack.routed import command as packrouted
from peru_cli.pack.show import say_size
from peru_cli.publish.command import destination, publish

if TYPE_CHECKING:
    from peru_cli.pack.plan import PackPlan
    from peru_cli.pack.seal import PackResult


@options.shared(
    lacks=["device"],
    panels={
        "Inputs": "base add_to remove_from rename per_task",
        "Method": "method seed decorrelate signs skip scale precision target exclude whole_weights residual max_error threshold keep "
        "rank gate_rank top_k data max_samples steps learning_rate batch_size router_layers bits",
        "Output": "output merge_base dtype base_id",
    },
)
def shuffle_pack(
    models: Annotated[
        list[str], typer.Argument(metavar="[TASK=]MODEL...", help="Models, PEFT LoRA adapters or peru artifacts.", show_default=False)
    ],
    base: options.Base,
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="The pack, a .safetensors file.")],
    method: Annotated[
        str, typer.Option("--method", "-m", metavar="METHOD", help=f"superpose, {', '.join((*MASKS, *ROUTED))}.")
    ] = "superpose",
    threshold: Annotated[
        Optional[list[str]],
        typer.Option("--threshold", metavar="[TASK=]L", help="tall-masks: threshold of a task. Default: the best of .2, .3, .4, .5, .6."),
    ] = None,
    keep: Annotated[
        Optional[str],
        typer.Option("--keep", "-k", metavar="SHARE", help="magnitude-masks: share of a task's entries to keep. Default: 10%."),
    ] = None,
    rank: Annotated[Optional[int], typer.Option("--rank", min=1, metavar="R", help="smile: rank of the experts. Default: 16.")] = None,
    gate_rank: Annotated[
        Optional[int], typer.Option("--gate-rank", min=1, metavar="R", help="smile: directions by which the router chooses. Default: 4.")
    ] = None,
    top_k: Annotated[
        Optional[int], typer.Option("--top-k", min=1, metavar="N", help="smile: how many tasks' experts answer together. Default: 1.")
    ] = None,
    data: Annotated[
        Optional[list[str]],
        typer.Option("--data", "-d", metavar="TASK=FILE", help="wemoe: inputs of each task to train routers on. Labels are not used."),
    ] = None,
    max_samples: Annotated[
        Optional[int], typer.Option("--max-samples", min=1, metavar="N", help="wemoe: use the first N inputs of each task.")
    ] = None,
    steps: Annotated[
        Optional[int],
        typer.Option("--steps", min=0, metavar="N", help="wemoe: training steps, each with a batch of every task. Default: 200."),
    ] = None,
    learning_rate: Annotated[
        Optional[float], typer.Option("--learning-rate", metavar="R", help="wemoe: step size of Adam. Default: 0.001.")
    ] = None,
    batch_size: Annotated[
        Optional[int], typer.Option("--batch-size", min=1, metavar="N", help="wemoe: inputs of each task a step. Default: 16.")
    ] = None,
    router_layers: Annotated[
        Optional[int], typer.Option("--router-layers", min=1, max=2, metavar="1|2", help="wemoe: layers of a router. Default: 2.")
    ] = None,
    bits: Annotated[
        Optional[float], typer.Option("--bits", metavar="B", help="wemoe: bits a parameter for what differs from the base. Default: 0.3.")
    ] = None,
    seed: Annotated[
        Optional[int], typer.Option("--seed", min=0, metavar="N", help="Seed of the permutations and signs, or of routers. Default: 0.")
    ] = None,
    decorrelate: Annotated[
        Optional[str],
        typer.Option(
            "--decorrelate", metavar="shuffle|shift|none", help="How to permute repeated blocks. Default: shuffle.", show_default=False
        ),
    ] = None,
    signs: Annotated[
        Optional[bool], typer.Option("--signs/--no-signs", help="Random signs for columns (STA). Default: yes.", show_default=False)
    ] = None,
    skip: Annotated[
        Optional[int], typer.Option("--skip", min=1, metavar="K", help="Superpose only every K-th block, sum the others. Default: 1.")
    ] = None,
    scale: Annotated[
        Optional[str],
        typer.Option(
            "--scale",
            "-s",
            metavar="S|auto",
            help="Factor of each retrieved task vector; auto: least squares. Default: 1. wemoe: of the sum; 0.3.",
        ),
    ] = None,
    precision: Annotated[
        Optional[int],
        typer.Option(
            "--precision",
            min=0,
            max=20,
            metavar="BITS",
            help="Bits of precision below the RMS. Default: the fewest that make no difference.",
        ),
    ] = None,
    target: Annotated[
        Optional[str],
        typer.Option("--target", metavar="REGEX", help="Superpose, or route, tensors whose names match. Default: layers that repeat."),
    ] = None,
    exclude: Annotated[
        Optional[str], typer.Option("--exclude", metavar="REGEX", help="Do not superpose, or route, tensors whose names match.")
    ] = None,
    max_error: Annotated[
        Optional[float],
        typer.Option("--max-error", min=0, metavar="E", help="Leave out tasks with a predicted relative error above E."),
    ] = None,
    whole_weights: Annotated[
        bool, typer.Option("--whole-weights", help="Superpose weights instead of differences (PSP). A baseline, and a poor one.")
    ] = False,
    merge_base: Annotated[
        Optional[str],
        typer.Option("--merge-base", metavar="DIR", help="Write a new base with the sums added; the pack then belongs to it."),
    ] = None,
    residual: Annotated[
        Optional[str],
        typer.Option("--residual", metavar="DENSITY", help="Also store the largest errors: this share of each task's entries, e.g. 1%."),
    ] = None,
    add_to: Annotated[Optional[Path], typer.Option("--add-to", metavar="PACK", help="Add these tasks to PACK and write OUT.")] = None,
    remove_from: Annotated[
        Optional[Path],
        typer.Option("--remove-from", metavar="PACK", help="Remove these tasks from PACK and write OUT. Name the models that were packed."),
    ] = None,
    per_task: Annotated[
        Optional[str], typer.Option("--per-task", metavar="REGEX", help="Store tensors whose names match for each task (heads).")
    ] = None,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="bf16|fp16|fp32|fp64", help="Data type of retrieved tasks. Default: their own.")
    ] = None,
    rename: options.Rename = None,
    base_id: Annotated[
        Optional[str], typer.Option("--base-id", metavar="ID", help="Public name of the base to record, e.g. org/name@commit.")
    ] = None,
    *,
    publishing: options.Publishing,
    run: options.Running,
    cluster: options.Cluster,
) -> None:
    """Superpose many fine-tunes in the space of one; `peru unpack --task` gets each of them back, approximately.

    peru shuffle-pack a=MODEL b=MODEL c=MODEL --base BASE -o pack.safetensors --seed 7

    peru shuffle-pack d=MODEL --add-to pack.safetensors --base BASE -o pack2.safetensors

    peru shuffle-pack b=MODEL --remove-from pack2.safetensors --base BASE -o pack3.safetensors

    peru shuffle-pack a=MODEL b=MODEL --base BASE -o pack.safetensors --merge-base merged/

    peru shuffle-pack a=MODEL b=MODEL --base BASE -o masks.safetensors --method tall-masks --threshold a=0.3

    peru shuffle-pack a=MODEL b=MODEL --base BASE -o smile.safetensors --method smile --rank 16 --gate-rank 4

    peru shuffle-pack a=MODEL b=MODEL c=MODEL --base BASE -o pack.safetensors --executor ray

    peru shuffle-pack a=MODEL b=MODEL --base BASE -o wemoe.safetensors --method wemoe --data a=a.jsonl --data b=b.jsonl

    The default is STA + Shuffle. TA + Shuffle: --no-signs; STA: --decorrelate none; task arithmetic: both.
    """
    given = {
        "--seed": seed, "--decorrelate": decorrelate, "--signs": signs, "--skip": skip, "--scale": scale, "--precision": precision,
        "--target": target, "--exclude": exclude, "--per-task": per_task, "--dtype": dtype, "--base-id": base_id,
        "--merge-base": merge_base, "--residual": residual, "--whole-weights": whole_weights or None,
    }  # fmt: skip
    change = add_to or remove_from
    of_packs = ("seed", "decorrelate", "signs", "skip", "target", "exclude", "merge-base", "residual", "whole-weights")
    apart = {f"--{name}": given[f"--{name}"] for name in of_packs}
    matching = _pattern(target, "--target"), _pattern(exclude, "--exclude")
    floats = options.parse_dtype(dtype) if dtype is not None else None
    foreign: dict[str, object] = {name: value for name, value in apart.items() if name not in ("--target", "--exclude")}
    foreign |= {"--scale": scale, "--precision": precision, "--max-error": max_error, "--threshold": threshold, "--keep": keep}
    of_routed = {
        "--rank": rank, "--gate-rank": gate_rank, "--top-k": top_k, "--data": data, "--max-samples": max_samples, "--steps": steps,
        "--learning-rate": learning_rate, "--batch-size": batch_size, "--router-layers": router_layers, "--bits": bits,
    }  # fmt: skip
    if (address := cluster.address("cpu")) is not None:
        from peru_cli.pack.nodes import check_spread

        check_spread(method, add_to=add_to, remove_from=remove_from, merge_base=merge_base, residual=residual)
    routed = packrouted.read_options(method, of_routed, foreign, change, matching, per_task, floats)
    masks = packmasks.read_options(method, threshold or [], keep, {**apart, "--max-error": max_error}, change) if routed is None else None
    if add_to is not None and remove_from is not None:
        raise UsageError("--add-to and --remove-from exclude each other", "run one after the other")
    if change is not None and (fixed := [name for name, value in given.items() if value is not None]):
        raise UsageError(f"{', '.join(fixed)}: fixed when {change} was made", "leave it out, or make a new pack")
    if remove_from is not None and max_error is not None:
        raise UsageError("--max-error has no meaning with --remove-from", "leave it out")
    factor = 1.0 if scale is None or routed is not None else _scale(scale)
    if factor is None and masks is not None:
        raise UsageError("--scale auto works with --method superpose only", "masks print the least-squares scale: pass it as --scale S")
    if seed is not None and seed >= 10**19:
        raise UsageError(f"--seed {seed} has more than 19 digits")
    options.check_base_id(base_id)
    density = options.parse_density(residual, "--residual") if residual is not None else None

    from peru_cli.artifacts.packs.pack import Pack
    from peru_cli.checkpoints.base_name import name_base
    from peru_cli.checkpoints.local.atomic import check_room, check_target
    from peru_cli.checkpoints.names.renamed import record_rules
    from peru_cli.checkpoints.resolve import Argument, default_task, split_arguments
    from peru_cli.finetunes.nodes import Sources, There
    from peru_cli.finetunes.verify import verify_expanded
    from peru_cli.methods.compact.superpose import DECORRELATE
    from peru_cli.pack import run as job
    from peru_cli.pack.base import MergeBase, check_plain
    from peru_cli.pack.masks.run import make_masks, plan_masks
    from peru_cli.pack.nodes import PackSources
    from peru_cli.pack.plan import PackOptions, plan_change, plan_pack
    from peru_cli.pack.residual import check_residual
    from peru_cli.streaming.cluster import cluster_at
    from peru_cli.vectors.settings import streaming

    if decorrelate is not None and decorrelate not in DECORRELATE:
        raise UsageError(f"--decorrelate {decorrelate!r} is not {', '.join(DECORRELATE[:-1])} or {DECORRELATE[-1]}")
    chosen = PackOptions(
        seed or 0, decorrelate or "shuffle", signs is not False, skip or 1, factor, precision,
        *matching, per_task, floats, whole_weights,
    )  # fmt: skip
    out = Path(output)
    if out.suffix != ".safetensors" or output.endswith("/"):
        raise UsageError(f"-o {output} should end in .safetensors")
    check_target(out, run.force or run.dry_run)
    new_base = MergeBase(Path(merge_base), base_id) if merge_base is not None else None
    if new_base is not None:
        check_target(new_base.target, run.force or run.dry_run)
        if new_base.target.is_file() or new_base.target.suffix == ".safetensors":
            raise UsageError(f"--merge-base {merge_base} should be a folder")
    place = destination(publishing, run.force, output)
    arguments = [(a.task or default_task(a.model), a.model) for a in split_arguments(models)]
    if change is not None:
        packmasks.refuse_masks(change)
    old = Pack(change) if change is not None else None
    typed = tuple(Argument(None, model) for _, model in arguments)
    given_models = Sources(base, typed, tuple(rename or ()), unpacked=True).open()
    opened_base, opened, said, names = given_models.base, given_models.given, given_models.said, tuple(name for name, _ in arguments)
    assert opened_base is not None
    tasks = list(zip(names, given_models.fines, strict=True))
    if routed is not None:
        for line in said:
            console.note(line)
        if (wrote := packrouted.write(routed, opened_base, tasks, opened, out, base_id, run)) is not None:
            packrouted.report(routed, wrote, publish(place, [out], "shuffle-pack"))
        return
    if masks is not None:
        plan = plan_masks(opened_base, tasks, chosen, masks)
    else:
        plan = plan_change(old, opened_base, tasks, remove_from is not None) if old is not None else plan_pack(opened_base, tasks, chosen)
    check_room(out, sum(info.nbytes for heads in plan.heads.values() for info in heads) + (old.container.file_bytes if old else 0))
    if density is not None:
        check_residual(plan, density)
    if new_base is not None:
        check_plain(plan)
        check_room(new_base.target, opened_base.nbytes)
    for warning in [w for model in (opened_base, *(m for _, m in tasks)) for w in model.warnings] + plan.warnings:
        console.warn(warning)
    for line in said:
        console.note(line)
    _say(plan)
    if run.dry_run and masks is not None:
        console.result(packmasks.planned(plan, masks, out))
        return
    if run.dry_run:
        _groups(plan)
        console.result(_planned(plan, out))
        return
    if old is None and new_base is None and (named := name_base(opened_base, base_id)) is not None:
        plan.metadata |= named.metadata()
    plan.metadata |= record_rules((model for _, model in tasks), plan.metadata)
    tiles = run.tile_entries or job.default_tile(len(plan.vectors))
    passes = masks.passes if masks is not None else 1 if plan.removing else 2
    passes += 2 * len(plan.vectors) if density is not None else 0
    with (
        console.progress(passes * plan.entries, "pack") as progress,
        cluster_at(address, lambda: PackSources(There.of(given_models), names, chosen, tiles)) as elsewhere,
        streaming("cpu", run.threads, tiles, progress.advance, elsewhere) as how,
    ):
        verify_expanded(opened, how, progress.step)
        if masks is not None:
            masked = make_masks(plan, masks, out, how, run.sync, precision, progress.step)
            packmasks.report(masked, publish(place, [out], "shuffle-pack"))
            return
        result = job.make_pack(plan, out, how, run.sync, precision, max_error, new_base, density, progress.step)
    _report(result, merge_base, publish(place, [out], "shuffle-pack"))


def _scale(text: str) -> Optional[float]:
    """The number. None for `auto`."""
    try:
        value = float(text) if text != "auto" else None
    except ValueError:
        value = 0.0
    if value is not None and not (math.isfinite(value) and value):
        raise UsageError(f"--scale {text} is neither auto nor a finite number other than 0")
    return value


def _pattern(text: Optional[str], option: str) -> Optional[re.Pattern[str]]:
    try:
        return re.compile(text) if text is not None else None
    except re.error as error:
        raise UsageError(f"{option} {text!r} is not a regular expression: {error}") from error


def _say(plan: PackPlan) -> None:
    from peru_cli.artifacts.packs.superposed import PackMode

    console.note(f"base {plan.base.label}: {plan.base.kind}, {plural(len(plan.base.tensors), 'tensor')}, {si_bytes(plan.base.nbytes)}")
    for vector in plan.vectors:
        console.note(f"{vector.name}: {vector.fine.label}, {vector.fine.kind} ({vector.pairing.prefix})")
        if heads := plan.heads[vector.name]:
            listed = ", ".join(info.name for info in heads[:4]) + (", ..." if len(heads) > 4 else "")
            console.note(f"  kept for the task, {si_bytes(sum(info.nbytes for info in heads))}: {listed}")
    if (method := plan.metadata.get("peru.method")) is not None:
        console.note(f"{count(plan.entries)} entries; {method}, scale {plan.metadata['peru.scale']}")
        return
    targets = [tensor for tensor in plan.sums if tensor.is_target]
    share = 100 * sum(t.info.entries for t in targets) / max(plan.entries, 1)
    meta = plan.metadata
    console.note(f"{count(plan.entries)} entries; {plural(len(targets), 'target')} with {share:.3g}% of them; the rest are plain sums")
    console.note(
        f"decorrelate {meta['peru.decorrelate']}, signs {meta['peru.signs']}, scale {meta['peru.scale']}, seed {meta['peru.seed']}"
    )
    if any(tensor.mode == PackMode.WEIGHTS for tensor in targets):
        console.warn("--whole-weights is a baseline, not for use: each task disturbs the others by its whole weights")
    if not targets and plan.decorrelates:
        console.warn("no layer repeats in these models, so nothing is superposed and this is task arithmetic (see --target)")


def _groups(plan: PackPlan) -> None:
    from peru_cli.pack.plan import describe_groups

    console.table(["targets", "shape", ">blocks", ">entries"], describe_groups(plan.tensors, plan.arrangement.groups))


def _planned(plan: PackPlan, out: Path) -> dict[str, Any]:
    return {
        "output": str(out),
        "tasks": [vector.name for vector in plan.vectors],
        "entries": plan.entries,
        "groups": [{"prefix": group.prefix, "members": list(group.members)} for group in plan.arrangement.groups],
        "heads": {task: [info.name for info in heads] for task, heads in plan.heads.items()},
        "shifts": plan.shifts,
    }


def _report(result: PackResult, merge_base: Optional[str], published: dict[str, Any]) -> None:
    for task, error in result.left_out.items():
        console.warn(f"{task} is left out: its relative error would be {error:.4g}")
    columns = ["task", ">norm", ">predicted error", ">error", ">cosine", ">rounding", ">own tensors"]
    rows = [
        [
            task.name,
            f"{task.norm:.4g}",
            f"{task.predicted.error:.3f}",
            f"{task.measured.error:.3f}",
            f"{task.measured.cosine:.3f}",
            f"{task.rounding:.2g}",
            si_bytes(task.whole_bytes),
        ]
        for task in result.tasks
    ]
    if any(task.residual_error is not None for task in result.tasks):
        columns += [">error with residual", ">residual"]
        for row, packed in zip(rows, result.tasks, strict=True):
            row += [f"{packed.residual_error:.3f}", si_bytes(packed.residual_bytes)]
    if rows:
        console.table(columns, rows)
    say_size(result)
    if merge_base is not None:
        console.line(f"{merge_base}: the new base, with the plain sums; unpack needs it as --base")
    if result.best_scale is not None:
        console.line(f"scale {result.scale:g}")
    console.result(
        {
            "path": str(result.path),
            "file_bytes": result.file_bytes,
            "sums_bytes": result.sums_bytes,
            "delta_bytes": result.delta_bytes,
            "entries": result.entries,
            "bits_per_parameter": result.bits_per_parameter,
            "precision": result.precision,
            "scale": result.scale,
            "best_scale": result.best_scale,
            "merge_base": merge_base,
            "tasks": result.all_tasks,
            "left_out": result.left_out,
            "packed": [
                {
                    "task": task.name,
                    "norm": task.norm,
                    "predicted_error": task.predicted.error,
                    "predicted_cosine": task.predicted.cosine,
                    "error": task.measured.error,
                    "cosine": task.measured.cosine,
                    "rounding": task.rounding,
                    "whole_bytes": task.whole_bytes,
                    "residual_error": task.residual_error,
                    "residual_bytes": task.residual_bytes,
                }
                for task in result.tasks
            ],
        }
        | published
    )


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("shuffle-pack", cls=options.Command)(shuffle_pack)
