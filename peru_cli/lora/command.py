"""`peru svd-lora`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.publish.command import destination, publish

if TYPE_CHECKING:
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.lora.extract_plan import Extraction
    from peru_cli.lora.ranks import AdapterReport, Wanted
    from peru_cli.lora.resize import Resize


@options.shared(
    lacks=["tile_entries"],
    panels={
        "Inputs": "base per_task",
        "How much to keep": "rank energy max_bytes uniform_rank exact",
        "Output": "output dtype rest base_id",
    },
)
def svd_lora(
    models: Annotated[
        list[str],
        typer.Argument(metavar="[TASK=]MODEL...", help="LoRA adapters; with --base also full fine-tunes.", show_default=False),
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="Folder of the new adapter; for several inputs OUT/TASK/.")],
    base: options.OptionalBase = None,
    rank: Annotated[Optional[int], typer.Option("--rank", "-r", metavar="Q", help="Keep Q singular values of every matrix.")] = None,
    energy: Annotated[
        Optional[str],
        typer.Option("--energy", metavar="SHARE", help="Keep this share of the energy of every matrix: 99% or 0.99."),
    ] = None,
    max_bytes: Annotated[
        Optional[str],
        typer.Option("--max-bytes", metavar="SIZE", help="Choose the ranks: least total error in at most this size."),
    ] = None,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="bf16|fp16|fp32", help="Data type of the factors. Default: that of the input.")
    ] = None,
    uniform_rank: Annotated[
        bool, typer.Option("--uniform-rank", help="Pad all modules with zeros to one rank, for llama.cpp and old diffusers.")
    ] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Use dense singular value decompositions. Slow; for comparison.")] = False,
    rest: Annotated[
        str,
        typer.Option(
            "--rest",
            metavar="modules|delta",
            help="Full fine-tunes: put norms and heads into the adapter (PEFT's modules_to_save), or into a delta beside it.",
        ),
    ] = "modules",
    per_task: Annotated[
        Optional[str], typer.Option("--per-task", metavar="REGEX", help="Full fine-tunes: store tensors whose names match whole.")
    ] = None,
    base_id: Annotated[
        Optional[str], typer.Option("--base-id", metavar="ID", help="Full fine-tunes: public name of the base to record, e.g. org/name.")
    ] = None,
    *,
    publishing: options.Publishing,
    run: options.Running,
) -> None:
    """Make LoRA adapters smaller (PERU-LoRA), or turn full fine-tunes into LoRA adapters. PEFT, vLLM, diffusers and llama.cpp read them.

    peru svd-lora ADAPTER -o small/ --rank 16

    peru svd-lora ADAPTER -o small/ --energy 99%

    peru svd-lora ADAPTER -o small/ --max-bytes 4MB

    peru svd-lora MODEL --base BASE -o adapter/ --rank 32

    peru svd-lora a=ADAPTER b=ADAPTER -o out/ --rank 8
    """
    wanted = _wanted(rank, energy, max_bytes, dtype, uniform_rank, exact)
    if rest not in ("modules", "delta"):
        raise UsageError(f"--rest {rest!r} is not modules or delta")
    if base is None and (per_task is not None or base_id is not None or rest != "modules"):
        raise UsageError("--per-task, --base-id and --rest apply to full fine-tunes, which need their base", "add --base BASE")
    options.check_base_id(base_id)

    from peru_cli.checkpoints.local.atomic import check_target
    from peru_cli.checkpoints.places import size_of
    from peru_cli.checkpoints.resolve import default_task, open_model, split_arguments
    from peru_cli.vectors.settings import streaming

    arguments = split_arguments(models)
    target = Path(output)
    several = len(arguments) > 1
    opened_base = open_model(base) if base is not None else None
    resizes: list[Resize] = []
    extractions: list[tuple[Extraction, Path]] = []
    for argument in arguments:
        name = argument.task or default_task(argument.model)
        where = Path(name) if several else Path(".")
        if not _open_adapters(argument.model, name if several else "", where, opened_base, resizes):
            extractions.append((_open_full(argument.model, name, opened_base, per_task), where))
    if resizes and extractions:
        raise UsageError("adapters and full fine-tunes cannot be combined in one run", "run the command once for each kind")
    check_target(target, run.force or run.dry_run)
    _check_output(target, output, resizes)
    place = destination(publishing, run.force, output)
    total = sum(m.down.entries + m.up.entries for job in resizes for m in job.adapter.modules)
    total += sum(weight.pair.entries for plan, _ in extractions for weight in plan.weights)
    for job in resizes:
        console.note(f"{job.adapter.label}: {job.adapter.kind}, {si_bytes(size_of(job.adapter.weights))}")
    for plan, _ in extractions:
        _say_plan(plan)
    if run.dry_run:
        console.result([_planned(job.name, len(job.adapter.modules), target / job.folder) for job in resizes]
                       + [_planned(plan.name, len(plan.weights), target / where) for plan, where in extractions])  # fmt: skip
        return
    with console.progress(total, "svd-lora") as progress, streaming(run.device, run.threads, None, progress.advance) as how:
        if extractions:
            from peru_cli.checkpoints.base_name import name_base
            from peru_cli.lora import extract as extracting

            chosen = extracting.Options(rest == "modules", name_base(opened_base, base_id) if opened_base is not None else None)
            reports = extracting.extract_all(extractions, target, wanted, chosen, how, run.sync, progress.step)
        else:
            from peru_cli.lora.resize import resize

            reports = resize(resizes, target, wanted, how, run.sync, progress.step)
    _report(reports, publish(place, [target], "svd-lora"))
    if any(len({m.rank for m in report.modules}) > 1 for report in reports) and all(job.adapter.config for job in resizes):
        console.note("ranks differ by module: llama.cpp needs --uniform-rank")


def _wanted(
    rank: Optional[int], energy: Optional[str], max_bytes: Optional[str], dtype: Optional[str], uniform: bool, exact: bool
) -> Wanted:
    given = [name for name, value in (("--rank", rank), ("--energy", energy), ("--max-bytes", max_bytes)) if value is not None]
    if len(given) != 1:
        said = " and ".join(given) if given else "nothing"
        raise UsageError(f"say how much to keep: one of --rank, --energy and --max-bytes, not {said}", "for example --rank 16")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} keeps nothing", "a rank is 1 or more")
    share = float(options.parse_density(energy, "--energy")) if energy is not None else None
    size = options.parse_size(max_bytes, "--max-bytes") if max_bytes is not None else None
    chosen = options.parse_dtype(dtype) if dtype is not None else None
    if chosen is not None and chosen.bits > 32:
        raise UsageError("--dtype fp64: no program loads such an adapter", "use fp32")

    from peru_cli.lora.ranks import Wanted

    return Wanted(rank, share, size, chosen, uniform, exact)


def _open_adapters(model: str, name: str, where: Path, base: Optional[Checkpoint], jobs: list[Resize]) -> bool:
    """Add the adapters of a folder or file to the jobs. False if there are none whose factors can be truncated.

    Given a base, checks that they fit it. Without one, UsageError for an adapter whose updates are not products of two thin factors."""
    from peru_cli.checkpoints.lora.adapter import Adapter, find_adapters, is_lora_file
    from peru_cli.checkpoints.lora.expand import LoraCheckpoint
    from peru_cli.checkpoints.places import locate
    from peru_cli.lora.resize import Resize

    path = locate(model)
    found = {"": path} if is_lora_file(path) else find_adapters(path)
    for inner, folder in found.items():
        label = model if not inner else str(folder)
        adapter = Adapter(folder, label)
        if adapter.products or adapter.foreign or not adapter.modules:
            adapter.close()
            if base is None or len(found) > 1:
                hint = (
                    "name it alone, with --base BASE" if base is not None else "add --base BASE: peru then factors what the adapter changes"
                )
                raise UsageError(f"{label}: {adapter.kind}: it has no thin factors that could be truncated", hint)
            return False
        jobs.append(Resize("/".join(part for part in (name, inner) if part), adapter, where / inner))
        if base is not None:
            LoraCheckpoint(folder, label, base).close()
    return bool(found)


def _open_full(model: str, name: str, base: Optional[Checkpoint], per_task: Optional[str]) -> Extraction:
    from peru_cli.checkpoints.names.translated import bring_together
    from peru_cli.checkpoints.resolve import open_model
    from peru_cli.finetunes.open import open_fine_tune
    from peru_cli.lora.extract_plan import plan_extraction

    if base is None:
        opened = open_model(model)
        opened.close()
        raise UsageError(f"{model} is not a LoRA adapter but a {opened.kind}", "for an adapter from a full fine-tune, add --base BASE")
    together, said = bring_together([open_fine_tune(model, base)], base)
    for line in said:
        console.note(line)
    return plan_extraction(name, together[0], base, per_task)


def _check_output(target: Path, output: str, jobs: list[Resize]) -> None:
    """A single output file needs a single adapter that came from a file."""
    if target.suffix == ".safetensors" and not output.endswith("/"):
        if len(jobs) != 1 or jobs[0].adapter.config:
            raise UsageError(f"-o {output}: a PEFT adapter is a folder", f"write -o {target.with_suffix('')}/")
        if target.is_dir():
            raise UsageError(f"{output} is a folder, so no file can be written there", f"-o {output}/ writes a folder")


def _say_plan(plan: Extraction) -> None:
    pairing = plan.pairing
    console.note(f"{plan.name}: {plan.fine.label}, {plan.fine.kind}, {si_bytes(plan.fine.nbytes)}")
    console.note(f"  {plural(len(pairing.pairs), 'tensor')} paired ({pairing.prefix}), {plural(len(plan.weights), 'low-rank weight')}")
    for warning in [*plan.fine.warnings, *plan.warnings]:
        console.warn(warning)


def _planned(name: str, modules: int, target: Path) -> dict[str, Any]:
    return {"task": name, "modules": modules, "output": str(target)}


def _report(reports: list[AdapterReport], published: dict[str, Any]) -> None:
    for report in reports:
        rows = [
            [
                m.name,
                "x".join(map(str, [*([m.blocks] if m.blocks > 1 else []), m.rows, m.columns])),
                "-" if m.rank_before is None else str(m.rank_before),
                str(m.rank),
                f"{m.error:.4g}",
                f"{100 * m.energy:.4g}%",
                si_bytes(m.bytes),
            ]
            for m in report.modules
        ]
        console.table(["module", ">shape", ">rank", ">kept", ">error", ">energy", ">bytes"], rows)
        _totals(report)
    console.result([_json(report) | published for report in reports])


def _totals(report: AdapterReport) -> None:
    from peru_cli.checkpoints.lora.adapter import REST

    numbers, paper = sum(m.numbers for m in report.modules), sum(m.papers_count for m in report.modules)
    before = f"{'the fine-tune' if report.notes else 'the input'}'s {si_bytes(report.bytes_before)}"
    ratio = report.bytes_before / report.total_bytes
    parts = f" (adapter {si_bytes(report.file_bytes)}, delta beside it {si_bytes(report.rest_bytes)})" if report.rest_bytes else ""
    size = f"{si_bytes(report.total_bytes)}{parts}, " + (f"{ratio:.1f}x smaller than {before}" if ratio >= 1 else f"larger than {before}")
    console.line(f"{report.path}: {size}; relative error {report.error:.4g}")
    console.line(f"  factors: {count(numbers)} numbers, {count(paper)} by the paper's count, q (d_out + d_in + 1)")
    if not report.notes:
        if report.kept_bytes:
            console.line(f"  other tensors, unchanged: {si_bytes(report.kept_bytes)}")
        return
    notes = report.notes
    if notes["modules_to_save"]:
        console.line(f"  modules_to_save, {si_bytes(notes['modules_to_save_bytes'])}: {_some(notes['modules_to_save'])}")
    if notes["biases"]:
        console.line(f"  biases of {plural(notes['biases'], 'module')}: in lora_B.bias")
    if notes["delta_tensors"]:
        console.line(f"  in {REST}, {si_bytes(report.rest_bytes)}, which PEFT does not read: {_some(notes['delta_tensors'])}")
    if notes["unchanged"]:
        console.line(f"  unchanged: {plural(notes['unchanged'], 'tensor')}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _json(report: AdapterReport) -> dict[str, Any]:
    return {
        "task": report.name,
        "path": str(report.path),
        "bytes": report.total_bytes,
        "file_bytes": report.file_bytes,
        "bytes_before": report.bytes_before,
        "kept_bytes": report.kept_bytes,
        "delta_bytes": report.rest_bytes,
        "relative_error": report.error,
        "parameters": sum(m.numbers for m in report.modules),
        "papers_count": sum(m.papers_count for m in report.modules),
        "modules": [m.json() for m in report.modules],
        **report.notes,
    }


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("svd-lora", cls=options.Command)(svd_lora)
