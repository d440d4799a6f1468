"""`peru inspect`."""

from __future__ import annotations

import math
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.checkpoints.local import inputs
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.shown import listed

if TYPE_CHECKING:
    from peru_cli.checkpoints.places import Place
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.inspect.compare import Comparison, Plan
    from peru_cli.inspect.run import ArtifactReport
    from peru_cli.prune.mixed.run import Foreseen
    from peru_cli.vectors.family import TaskVector

BUDGETS = (0.02, 0.05, 0.1, 0.3, 1.0)  # bits a parameter of the mixed artifacts that are predicted

Plot = Annotated[Optional[Path], typer.Option("--plot", metavar="FILE.png|svg", help="Also draw a plot (needs matplotlib).")]


@options.shared(lacks=["force", "dry_run", "no_sync", "tile_entries"])
def inspect(
    model: Annotated[str, typer.Argument(metavar="X", help="A checkpoint, an artifact or a LoRA adapter.")],
    base: options.OptionalBase = None,
    plot: Plot = None,
    per_task: Annotated[
        Optional[str], typer.Option("--per-task", metavar="REGEX", help="With --base: tensors that prune would store whole.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every tensor. Default: repeated layers share a row.")] = False,
    *,
    run: options.Running,
) -> None:
    """Show what a checkpoint, an artifact or an adapter holds, or what a fine-tune changed and what storing it would cost.

    peru inspect X

    peru inspect ADAPTER --plot spectrum.png

    peru inspect MODEL --base BASE --plot frontier.png

    With --base, --plot also predicts mixed artifacts (prune --bits) at several budgets, and draws error over size for all choices.
    """
    from peru_cli.artifacts.container import artifact_kind, find_artifact
    from peru_cli.artifacts.mixed.writer import KIND as MIXED
    from peru_cli.artifacts.packs.masks import KIND as MASKS
    from peru_cli.artifacts.packs.masks import KINDS
    from peru_cli.artifacts.packs.routed import KIND as ROUTED
    from peru_cli.checkpoints.hub.session import current_session
    from peru_cli.checkpoints.lora.adapter import is_adapter, is_lora_file
    from peru_cli.checkpoints.names.translated import bring_together
    from peru_cli.checkpoints.places import locate
    from peru_cli.checkpoints.resolve import open_model
    from peru_cli.inspect.masks import show_masks
    from peru_cli.inspect.mixed import show_mixed
    from peru_cli.inspect.pack import show_pack
    from peru_cli.inspect.ranks import show_adapter
    from peru_cli.inspect.routed import show_routed
    from peru_cli.reports.plots import check_plot

    session = current_session()
    session.stream = run.stream or base is None  # headers are read as ranges in any case
    place = find_artifact(locate(model))
    kind = artifact_kind(place)
    artifact = kind is not None
    adapter = not artifact and (is_adapter(place) or is_lora_file(place))
    if artifact or adapter:
        session.stream = run.stream
    if plot is not None:
        check_plot(plot)
        if not artifact and not adapter and base is None:
            raise UsageError("--plot needs an artifact, an adapter, or a fine-tune with its --base")
    if adapter:
        show_adapter(model, base, plot, run.device, run.threads, every)
    elif artifact:
        if base is not None:
            raise UsageError(f"{model} is an artifact; --base goes with a checkpoint", "unpack it to compare it with its base")
        if kind == MASKS:
            show_masks(place, plot)
        elif kind == MIXED:
            show_mixed(place, plot, every)
        elif kind == ROUTED:
            show_routed(place, plot, every)
        elif kind in KINDS:
            show_pack(place, plot)
        else:
            _artifact(place, plot, every)
    elif base is None:
        with open_model(model, stored=True) as checkpoint:
            _checkpoint(checkpoint)
    else:
        with open_model(model) as fine, open_model(base) as opened:
            together, said = bring_together([fine], opened)
            for line in said:
                console.note(line)
            _pair(together[0], opened, per_task, plot, run.device, run.threads, every)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _checkpoint(checkpoint: Checkpoint) -> None:
    from peru_cli.inspect.run import group_tensors, inspect_checkpoint

    for warning in checkpoint.warnings:
        console.warn(warning)
    totals = inspect_checkpoint(checkpoint)
    groups = group_tensors(list(checkpoint.tensors.values()))
    rows = [[g.pattern, g.dtype, _shape(g.shape), str(g.count), si_bytes(g.nbytes)] for g in groups]
    dtypes = ", ".join(f"{count(n)} {dtype}" for dtype, n in totals["entries_by_dtype"].items())
    console.line(f"{checkpoint.label}: {checkpoint.kind}, {plural(totals['tensors'], 'tensor')}, {si_bytes(totals['bytes'])}; {dtypes}")
    if totals["side_files"]:
        console.line(f"files: {listed(totals['side_files'])}")
    console.table(["tensor", "dtype", "shape", ">count", ">bytes"], rows)
    tensors = [{"name": t.name, "dtype": t.dtype.name, "shape": t.shape, "bytes": t.nbytes} for t in checkpoint.tensors.values()]
    inputs.check()
    console.result({**totals, "groups": [asdict(g) for g in groups], "tensor_list": sorted(tensors, key=lambda t: str(t["name"]))})


def _artifact(path: Place, plot: Path | None, every: bool) -> None:
    from peru_cli.artifacts.reader import SparseDelta
    from peru_cli.inspect.run import describe_record, inspect_artifact, side_file_names, value_kind
    from peru_cli.reports.fold import fold
    from peru_cli.reports.plots import plot_densities

    with SparseDelta(path) as artifact:
        report = inspect_artifact(artifact)
        meta = report.metadata
        console.line(f"{path}: {meta['peru.kind']}, task {meta['peru.task']}, {si_bytes(report.file_bytes)}")
        console.line(f"base:     {meta.get('peru.base', 'not recorded (prune --base-id records it)')}")
        lossless = meta["peru.density"] == "lossless"
        density = "lossless" if lossless else f"--keep {100 * float(Fraction(meta['peru.density'])):g}%, scope {meta['peru.scope']}"
        console.line(f"kept:     {count(int(meta['peru.kept']))} of {count(report.entries)} entries ({density})")
        console.line(f"changed:  {count(int(meta['peru.changed']))}")
        for stream in report.streams:
            console.line(f"values:   {stream.dtype.name}, {count(stream.kept)} {value_kind(stream)}")
        if "peru.largest_error" in meta:
            console.line(f"largest error of a kept entry: {float(meta['peru.largest_error']):.3g}")
        if files := side_file_names(artifact):
            console.line(f"files:    {listed(files)}")
        _parts(report)
        from peru_cli.artifacts.index import Mode

        deltas = [r for r in report.records if r.mode == Mode.DELTA]
        densities = {r.info.name: r.kept / max(r.base_entries, 1) for r in report.records}
        kinds = fold(
            report.records, lambda r: r.info.name, lambda r: r.info.name if every else (r.info.dtype, r.info.shape, describe_record(r))
        )
        rows = [
            [
                name,
                str(len(members)),
                members[0].info.dtype.name,
                _shape(members[0].info.shape),
                describe_record(members[0]),
                count(kept := sum(r.kept for r in members)),
                f"{100 * kept / max(sum(r.base_entries for r in members), 1):.2f}%" if members[0].mode == Mode.DELTA else "",
            ]
            for name, members in kinds
        ]
        console.line()
        console.table(["tensor", "?>count", "?dtype", "shape", "stored as", "?>kept", ">density"], rows)
        console.result(_artifact_json(report))
        if plot is not None:
            plot_densities(plot, [r.info.name for r in deltas], [densities[r.info.name] for r in deltas])
            console.note(f"drew {plot}")


def _parts(report: ArtifactReport) -> None:
    n = max(report.entries, 1)
    streams = {"positions": report.bound.positions, "values": report.bound.values}
    counted: list[tuple[str, int, float | None]] = [
        (part, nbytes, streams.get(part)) for part, nbytes in report.parts.items() if part not in ("whole tensors", "side files")
    ]
    counted.append(("positions + values", report.stream_bytes, report.bound.total))
    counted.append(("delta in all", report.delta_bytes, report.bound.total))
    rows = [
        [part, count(nbytes), f"{8 * nbytes / n:.4f}"] + (["", ""] if not bound else [f"{bound / n:.4f}", f"{8 * nbytes / bound:.3f}"])
        for part, nbytes, bound in counted
    ]
    rows += [[part, count(report.parts[part]), "", "", ""] for part in ("whole tensors", "side files")]
    console.line()
    console.table(["part", ">bytes", ">bits/param", ">entropy bound", ">ratio"], rows)
    console.remark("entropy bound: the least for entries coded one by one, in bits/param; a ratio below 1 is better than that")


def _artifact_json(report: ArtifactReport) -> dict[str, Any]:
    return {
        "metadata": report.metadata,
        "file_bytes": report.file_bytes,
        "delta_bytes": report.delta_bytes,
        "parts": report.parts,
        "entries": report.entries,
        "bits_per_parameter": 8 * report.delta_bytes / max(report.entries, 1),
        "bound_bits": {"positions": report.bound.positions, "values": report.bound.values},
        "stream_ratio": 8 * report.stream_bytes / report.bound.total if report.bound.total else None,
        "delta_ratio": 8 * report.delta_bytes / report.bound.total if report.bound.total else None,
        "tensors": [
            {"name": r.info.name, "dtype": r.info.dtype.name, "shape": r.info.shape, "kept": r.kept, "entries": r.info.entries}
            for r in report.records
        ],
    }


def _pair(
    fine: Checkpoint, base: Checkpoint, per_task: str | None, plot: Path | None, device: str, threads: int | None, every: bool
) -> None:
    from peru_cli.checkpoints.pairing import pair_checkpoints
    from peru_cli.inspect.compare import compare, together
    from peru_cli.inspect.ranks import show_ranks
    from peru_cli.reports.fold import fold
    from peru_cli.reports.plots import plot_comparison
    from peru_cli.vectors.family import Family, TaskVector
    from peru_cli.vectors.settings import streaming

    pairing = pair_checkpoints(fine, base, per_task)
    vector = TaskVector("fine-tune", fine, pairing)
    with console.progress(2 * pairing.float_entries, "inspect") as progress, streaming(device, threads, None, progress.advance) as how:
        comparison = compare(vector, Family(base, [vector], how), how)
    console.line(f"{fine.label} against {base.label}: {plural(len(pairing.pairs), 'tensor')} paired ({pairing.prefix})")
    changed = 100 * comparison.changed / max(comparison.entries, 1)
    console.line(f"{count(comparison.changed)} of {count(comparison.entries)} entries changed ({changed:.3g}%), norm {comparison.norm:.4g}")
    if comparison.not_finite:
        console.line(
            f"{count(comparison.not_finite)} differences are NaN or infinite and not counted in norms; prune keeps them first, and exactly"
        )
    if pairing.whole:
        console.line(f"stored whole, {si_bytes(comparison.whole_bytes)}: {listed(info.name for info in pairing.whole)}")
    console.line()
    changes = [
        (len(members), together(name, members))
        for name, members in fold(comparison.changes, lambda c: c.name, lambda c: c.name if every else (c.dtype, c.shape))
    ]
    rows = [
        [c.name, str(n), c.dtype, _shape(c.shape), f"{100 * c.changed / max(c.entries, 1):.2f}%", f"{c.norm:.4g}", f"{c.relative:.4g}"]
        for n, c in changes
    ]
    console.table(["tensor", "?>count", "?dtype", "shape", ">changed", "?>norm", ">relative"], rows)
    console.line()
    foreseen = _foreseen(vector, base, device, threads) if plot is not None else []
    _plans(comparison, foreseen, fine.nbytes)
    ranks = show_ranks(fine, base, per_task, device, threads, every)
    inputs.check()
    console.result(
        {
            "prefix": pairing.prefix.encode(),
            "fine_tune_bytes": fine.nbytes,
            **asdict(comparison),
            "mixed": [asdict(f) for f in foreseen],
            **ranks,
        }
    )
    if plot is not None:
        sparse = [(_density(p), p.predicted_bytes, p.relative_error) for p in comparison.plans]
        mixed = [(f"{f.bits:g} bits", f.file_bytes, f.relative_error) for f in foreseen]
        drawn = [c for c in comparison.changes if math.isfinite(c.relative)]  # a change relative to zeros has no value
        plot_comparison(
            plot,
            [c.name for c in drawn],
            [c.relative for c in drawn],
            {"--keep, --lossless": sparse, "--bits (mixed)": mixed},
            fine.nbytes,
        )
        console.note(f"drew {plot}")


def _density(plan: Plan) -> str:
    return "lossless" if plan.density is None else f"{100 * plan.density:g}%"


def _foreseen(vector: TaskVector, base: Checkpoint, device: str, threads: int | None) -> list[Foreseen]:
    """Predict mixed artifacts at several budgets. This needs a decomposition."""
    from peru_cli.prune.artifact import PruneTask
    from peru_cli.prune.mixed.run import foresee
    from peru_cli.vectors.settings import streaming

    task = PruneTask(vector, Path("foreseen.safetensors"), None)
    with console.progress(task.entries, "mixed") as progress, streaming(device, threads, None, progress.advance) as how:
        return foresee(base, task, BUDGETS, how)


def _plans(comparison: Comparison, foreseen: list[Foreseen], fine_bytes: int) -> None:
    rows = [
        [
            "--lossless" if p.density is None else f"--keep {_density(p)}",
            count(p.kept),
            si_bytes(p.predicted_bytes),
            f"{fine_bytes / max(p.predicted_bytes, 1):.1f}x",
            f"{p.bits_per_parameter:.3f}",
            f"{p.relative_error:.3f}",
        ]
        for p in comparison.plans
    ]
    rows += [
        [
            f"--bits {f.bits:g}",
            "",
            si_bytes(f.file_bytes),
            f"{fine_bytes / f.file_bytes:.1f}x",
            f"{f.bits_per_parameter:.3f}",
            f"{f.relative_error:.3f}",
        ]
        for f in foreseen
    ]
    console.table(["peru prune", "?>kept", ">predicted size", ">smaller", ">bits/param", ">relative error"], rows)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(inspect)
