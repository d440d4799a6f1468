"""`peru prune`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peru_cli import options
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.prune.gates import parse_gates
from peru_cli.prune.mixed.goal import parse_goal
from peru_cli.publish.command import destination, publish
from peru_cli.shown import listed

if TYPE_CHECKING:
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.inference.task_models import Running
    from peru_cli.prune.gates import Gate
    from peru_cli.prune.mixed.goal import Goal
    from peru_cli.prune.run import PruneOptions, PruneResult, PruneTask
    from peru_cli.publish.run import Destination


@options.shared(
    pipes=True,
    panels={
        "Inputs": "base rename per_task allow_unpaired",
        "How much to keep": "keep max_bytes bits min_quality lossless scope values",
        "Data": "data max_samples batch_size trust_remote_code",
        "Gates": "fail_above",
        "Output": "output base_id",
    },
)
def prune(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK=]MODEL",
            help="Fine-tunes: folders, .safetensors or .bin files, LoRA adapters, artifacts; @FILE: a text file with one a line.",
        ),
    ],
    base: options.Base,
    output: Annotated[
        str,
        typer.Option(
            "--output", "-o", metavar="OUT", help="The artifact, a .safetensors file, or - for stdout; for several fine-tunes a folder."
        ),
    ],
    keep: Annotated[
        Optional[str],
        typer.Option("--keep", "-k", metavar="DENSITY", help="Keep this share of the entries, largest changes first: 10% or 0.1."),
    ] = None,
    max_bytes: Annotated[
        Optional[str],
        typer.Option("--max-bytes", metavar="SIZE", help="Least error in at most this size, over all tasks together: 3MB."),
    ] = None,
    bits: Annotated[
        Optional[str],
        typer.Option("--bits", metavar="NUMBER", help="Least error at this many bits per parameter, heads not counted: 0.1."),
    ] = None,
    min_quality: Annotated[
        Optional[str],
        typer.Option(
            "--min-quality",
            metavar="SHARE",
            help="Fewest bytes that keep this share of the task vector's energy: 90%. With --data: of the fine-tune's answers.",
        ),
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Keep every changed entry: unpack returns the fine-tune bit for bit.")
    ] = False,
    scope: Annotated[
        str,
        typer.Option(
            "--scope",
            metavar="global|tensor|sign",
            help="With --keep: the largest of the whole task vector, of each tensor, or of each tensor's increases and of its decreases.",
        ),
    ] = "global",
    values: Annotated[
        str,
        typer.Option(
            "--values",
            metavar="auto|exact|bf16|log2|sign",
            help="With --keep. auto: exact for 16-bit weights, bf16 differences for wider ones; log2: only sign and octave; "
            "sign: only the sign, and one scale a tensor.",
        ),
    ] = "auto",
    data: Annotated[
        Optional[list[str]],
        typer.Option(
            "--data",
            "-d",
            metavar="[TASK=]FILE",
            help="Examples on which outputs come nearer to the fine-tune's (--max-bytes, --bits), or answers are counted (--min-quality). "
            "No labels needed. Repeatable.",
        ),
    ] = None,
    max_samples: Annotated[
        Optional[int], typer.Option("--max-samples", min=1, metavar="N", help="With --data: use the first N examples of each file.")
    ] = None,
    batch_size: Annotated[
        Optional[int],
        typer.Option("--batch-size", min=1, metavar="N", help="With --data: examples per step. Default: 64; language models 4 or 16."),
    ] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    fail_above: Annotated[
        Optional[list[str]],
        typer.Option(
            "--fail-above",
            metavar="METRIC=VALUE",
            help="Exit with 3 and write nothing above a bound: error=0.3 (relative, of any task), bytes=3MB (of all artifacts).",
        ),
    ] = None,
    per_task: Annotated[
        Optional[str], typer.Option("--per-task", metavar="REGEX", help="Store tensors whose names match whole (heads).")
    ] = None,
    rename: options.Rename = None,
    allow_unpaired: Annotated[
        bool, typer.Option("--allow-unpaired", help="Store tensors without a partner whole, even above 10% of the bytes.")
    ] = False,
    base_id: Annotated[
        Optional[str], typer.Option("--base-id", metavar="ID", help="Public name of the base to record, e.g. org/name@commit.")
    ] = None,
    *,
    cluster: options.Cluster,
    publishing: options.Publishing,
    run: options.Running,
) -> None:
    """Compress fine-tunes to what they add to a base: a share of the entries, or the least error for the bytes.

    peru prune MODEL --base BASE -o a.safetensors --keep 10%

    peru prune sst2=MODEL_A news=MODEL_B --base BASE -o deltas/ --keep 5%

    peru prune MODEL --base BASE -o a.safetensors --max-bytes 3MB

    peru prune a=MODEL_A b=MODEL_B --base BASE -o d/ --bits 0.1

    peru prune MODEL --base BASE -o a.safetensors --max-bytes 3MB --data texts.jsonl

    peru prune MODEL --base BASE -o a.safetensors --min-quality 99% --data texts.jsonl

    peru prune MODEL --base BASE -o a.safetensors --lossless

    peru prune step-1200/ --base step-1100/ -o - --lossless | ssh host peru unpack - --base /models/step-1100 --in-place

    --keep writes sparse deltas: Post-Pruning, or PERU-FFT if the base is a merge. --max-bytes, --bits and --min-quality choose rank and
    precision for each tensor, at one price for all. With --data, what --max-bytes and --bits store is then tuned on examples.

    peru prune @models.txt --base BASE -o deltas/ --keep 5% --executor ray

    If prune --keep was killed, type the same command again to continue it; --force starts afresh.
    """
    goal = parse_goal(max_bytes, bits, min_quality, bool(data))
    if (keep is not None) + lossless + (goal is not None) != 1:
        raise UsageError(
            "say how much to keep: --keep DENSITY, --max-bytes SIZE, --bits NUMBER, --min-quality SHARE or --lossless",
            "for example --max-bytes 3MB or --keep 10%",
        )
    if goal is not None and (scope, values) != ("global", "auto"):
        raise UsageError("--scope and --values go with --keep", "leave them out: peru chooses the coding of each tensor")
    if scope not in ("global", "tensor", "sign"):
        raise UsageError(f"--scope {scope!r} is not global, tensor or sign")
    if values not in ("auto", "exact", "bf16", "log2", "sign"):
        raise UsageError(f"--values {values!r} is not auto, exact, bf16, log2 or sign")
    address = cluster.address(run.device)
    if address is not None and "sign" in (scope, values):
        raise UsageError("--scope sign and --values sign run on this machine", "leave --executor out")
    if data and goal is None:
        raise UsageError("--data goes with --max-bytes, --bits or --min-quality", "for example --max-bytes 3MB --data FILE")
    if not data and (max_samples is not None or batch_size is not None or trust_remote_code):
        raise UsageError("--max-samples, --batch-size and --trust-remote-code go with --data", "add --data FILE, or leave them out")
    if address is not None and goal is not None:
        raise UsageError("--executor ray goes with --keep or --lossless", "leave it out: --max-bytes, --bits and --min-quality run here")
    density = options.parse_density(keep) if keep is not None else None
    options.check_base_id(base_id)
    gates = parse_gates(fail_above or [])
    if address is None and not run.dry_run:
        from peru_cli.kernels.compiling.build import begin_beside

        begin_beside()

    from peru_cli.checkpoints.base_name import name_base
    from peru_cli.checkpoints.hub.session import stream_hub
    from peru_cli.checkpoints.local.atomic import folder_of
    from peru_cli.checkpoints.resolve import default_task, read_lists, split_arguments
    from peru_cli.finetunes.nodes import Sources, There
    from peru_cli.finetunes.verify import verify_expanded
    from peru_cli.prune import run as job
    from peru_cli.prune.doubts import find_doubts
    from peru_cli.prune.sources import WorkerSources
    from peru_cli.streaming.cluster import cluster_at
    from peru_cli.streaming.tiles import DEFAULT_TILE
    from peru_cli.vectors.settings import streaming

    arguments = split_arguments(read_lists(models))
    out = Path(output)
    several = len(arguments) > 1 or output.endswith("/") or out.is_dir()
    if several and console.data_on_stderr:
        raise UsageError("-o - writes one artifact, and several fine-tunes are given", "-o DIR/ writes one for each")
    if not several and out.suffix != ".safetensors":
        raise UsageError(f"-o {output} should end in .safetensors, or in / for a folder of artifacts")
    targets = [out / f"{a.task or default_task(a.model)}.safetensors" if several else out for a in arguments]
    if address is not None:
        stream_hub()
    stored = lossless and job.all_quantized([base, *(a.model for a in arguments)])
    opened = Sources(base, tuple(arguments), tuple(rename or ()), stored, unpacked=True).open()
    opened_base, fines = opened.base, opened.fines
    assert opened_base is not None
    for line in opened.said:
        console.note(line)
    tasks = [(a.task or default_task(a.model), m, t) for a, m, t in zip(arguments, fines, targets, strict=True)]
    chosen = job.PruneOptions(density, scope, values, per_task, allow_unpaired=allow_unpaired, codes=stored, gates=gates)
    place = destination(publishing, run.force, output)
    planned = job.plan_prune(opened_base, tasks, chosen, run.force or run.dry_run, new_folder=several)
    for warning in [w for checkpoint in (opened_base, *(c for _, c, _ in tasks)) for w in checkpoint.warnings]:
        console.warn(warning)
    console.note(f"base {base}: {opened_base.kind}, {plural(len(opened_base.tensors), 'tensor')}, {si_bytes(opened_base.nbytes)}")
    for task in planned:
        if task.unpaired is not None:
            console.warn(task.unpaired)
        _say_plan(task, chosen)
        for doubt in find_doubts(opened_base, task.vector):
            console.warn(f"{task.vector.name}: {doubt}")
    if goal is not None:
        from peru_cli.inference.remote_code import trusting

        console.note(f"target: {goal}")
        with trusting([base, *(a.model for a in arguments)], trust_remote_code):
            running = _read(data, opened_base, planned, run.device, batch_size or 0, max_samples) if data else None
            if run.dry_run:
                console.result([_planned(task, chosen) | {"goal": goal.encode()} for task in planned])
                return
            settings = run.device, run.threads, run.tile_entries
            _to_goal(opened_base, opened.given, planned, goal, gates, base_id, settings, (out, several, run.sync), place, running)
        return
    fetched = job.fetch_bytes(opened_base, planned, chosen)
    if fetched:
        again = density is not None and scope == "global"
        why = "; up to half as much again if the sampled threshold misses; --scope tensor fetches less" if again else ""
        console.note(f"fetching {si_bytes(fetched)} from the Hub in ranges{why}")
    if run.dry_run:
        console.note("sizes depend on the weights: `peru inspect MODEL --base BASE` reads them and predicts")
        console.result([_planned(task, chosen) | ({"fetch_bytes": fetched} if fetched else {}) for task in planned])
        return
    tile = run.tile_entries or DEFAULT_TILE
    chosen = replace(chosen, base_name=name_base(opened_base, base_id))
    passes = (1 if density is None else 2) + (scope == "sign") + (values == "sign")
    tasks_named = tuple(task.vector.name for task in planned)
    total = passes * sum(opened_base.tensors[n].entries for n in {n for t in planned for n in t.vector.pairs})
    with (
        folder_of(out, several),
        console.progress(total, "prune") as progress,
        cluster_at(address, lambda: WorkerSources(There.of(opened), chosen, tasks_named, tile)) as elsewhere,
        streaming(run.device if address is None else "cpu", run.threads, tile, progress.advance, elsewhere) as how,
    ):
        verify_expanded(opened.given, how, progress.step)
        results = job.prune(opened_base, planned, chosen, how, run.sync, progress.step, console.note, fresh=run.force)
    _report(results, publish(place, targets, "prune"))


def _read(data: list[str], base: Checkpoint, planned: list[PruneTask], device: str, batch_size: int, most: int | None) -> Running:
    """The examples of all tasks, and whether models take them, as far as headers and side files show it."""
    from peru_cli.inference.task_models import check_fine_tune, read_data

    running = read_data(data, tuple(task.vector.name for task in planned), device, batch_size, "--data", most)
    for task in planned:
        check_fine_tune(task.vector.fine, base, running.examples[task.vector.name])
    return running


def _to_goal(
    base: Checkpoint, opened: list[Checkpoint], planned: list[PruneTask], goal: Goal, gates: Sequence[Gate], base_id: str | None,
    settings: tuple[str, int | None, int | None], output: tuple[Path, bool, bool], place: Destination | None, running: Running | None,
) -> None:  # fmt: skip
    """Write mixed artifacts that meet a goal. `output` is the path, whether it is a folder, and whether to sync it to disk."""
    from peru_cli.checkpoints.base_name import name_base
    from peru_cli.checkpoints.local.atomic import folder_of
    from peru_cli.finetunes.verify import verify_expanded
    from peru_cli.prune.mixed.run import prune_mixed
    from peru_cli.prune.mixed.show import report
    from peru_cli.vectors.settings import streaming

    named = name_base(base, base_id)
    out, several, sync = output
    total = 2 * sum(task.entries for task in planned)
    with folder_of(out, several), console.progress(total, "prune") as progress, streaming(*settings, progress.advance) as how:
        verify_expanded(opened, how, progress.step)
        results = prune_mixed(base, planned, goal, named, how, sync, progress.step, console.note, gates, running)
    report(results, publish(place, [task.target for task in planned], "prune"))


def _say_plan(task: PruneTask, chosen: PruneOptions) -> None:
    pairing, fine = task.vector.pairing, task.vector.fine
    console.note(f"{task.vector.name}: {fine.label}, {fine.kind}, {plural(len(fine.tensors), 'tensor')}, {si_bytes(fine.nbytes)}")
    console.note(f"  {plural(len(pairing.pairs), 'tensor')} paired ({pairing.prefix}), {count(task.entries)} entries")
    grown = [pair.fine.name for pair in pairing.pairs if pair.grown]
    if grown:
        console.note(f"  more rows than the base, new rows stored whole: {listed(grown)}")
    if pairing.whole:
        names = ", ".join(info.name for info in pairing.whole[:4]) + (", ..." if len(pairing.whole) > 4 else "")
        console.note(f"  stored whole, {si_bytes(sum(info.nbytes for info in pairing.whole))}: {names}")
    for info, other in pairing.reshaped[:3]:
        console.note(f"    {info.name} has shape {list(info.shape)}, {list(other.shape)} in the base")
    if chosen.density is not None:
        share = f"{100 * float(chosen.density):.4g}%"
        if chosen.scope == "sign":
            console.note(f"  keeping {share} of each tensor's increases, and of its decreases")
        else:
            console.note(f"  keeping {count(int(chosen.density * task.entries))} entries ({share}), scope {chosen.scope}")


def _planned(task: PruneTask, chosen: PruneOptions) -> dict[str, object]:
    return {
        "task": task.vector.name,
        "output": options.written_to(task.target),
        "entries": task.entries,
        "keep": None if chosen.density is None or chosen.scope == "sign" else int(chosen.density * task.entries),
        "paired": len(task.vector.pairing.pairs),
        "whole": [info.name for info in task.vector.pairing.whole],
    }


def _report(results: list[PruneResult], published: dict[str, object]) -> None:
    for result in results:
        if result.not_finite:
            console.warn(f"{result.task}: {count(result.not_finite)} kept entries differ by NaN or infinity; they are stored exactly")
    rows = [
        [
            r.task,
            options.written_to(r.path),
            si_bytes(r.file_bytes),
            f"{r.fine_bytes / r.file_bytes:.1f}x",
            f"{r.bits_per_parameter:.4f}",
            f"{r.relative_error:.4f}",
            f"{100 * r.kept / r.entries:.3g}%",
            count(r.kept),
            f"{100 * r.changed / r.entries:.3g}%",
            si_bytes(r.whole_bytes),
        ]
        for r in results
    ]
    console.table(
        ["task", "artifact", ">size", ">smaller", ">bits/param", ">relative error", "?>density", "?>kept", "?>changed", "?>stored whole"],
        rows,
    )
    console.result(
        [
            {
                "task": r.task,
                "path": options.written_to(r.path),
                "file_bytes": r.file_bytes,
                "delta_bytes": r.delta_bytes,
                "whole_bytes": r.whole_bytes,
                "side_bytes": r.side_bytes,
                "fine_tune_bytes": r.fine_bytes,
                "entries": r.entries,
                "changed": r.changed,
                "kept": r.kept,
                "bits_per_parameter": r.bits_per_parameter,
                "not_finite": r.not_finite,
                "largest_error": r.largest_error,
                "relative_error": r.relative_error,
                "whole": [info.name for info in r.whole],
                **published,
            }
            for r in results
        ]
    )


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(prune)
