"""`peru export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from peru_cli import options
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.shown import listed

_TO = ("sglang", "prime-rl", "trl", "shira", "gguf")


@options.shared(
    lacks=["device", "threads", "tile_entries"],
    panels={"Inputs": "base task", "Output": "output to step base_step"},
)
def export(
    model: Annotated[str, typer.Argument(metavar="X", help="An artifact, a pack, a LoRA adapter or a fine-tuned checkpoint.")],
    *,
    base: options.OptionalBase = None,
    task: Annotated[Optional[str], typer.Option("--task", metavar="TASK", help="Which task of a pack or folder.")] = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT", help="A new folder; for SGLang weight_v000001 and so on.")],
    to: Annotated[str, typer.Option("--to", metavar="|".join(_TO), help="The engine or trainer that reads it.")],
    step: Annotated[
        Optional[int], typer.Option("--step", metavar="N", help="Number of this update. Default for SGLang: what the folder's name says.")
    ] = None,
    base_step: Annotated[
        Optional[int], typer.Option("--base-step", metavar="M", help="The update that must be applied before. Default: N - 1.")
    ] = None,
    run: options.Running,
) -> None:
    """Write a fine-tune's changes in the format of a serving engine, a trainer or PEFT.

    peru export a.safetensors --base BASE --to sglang -o weight_v000001

    peru export step-20.safetensors --base step-10/ --to prime-rl --step 20 --base-step 10 -o update/

    peru export a.safetensors --base BASE --to shira -o shira/

    peru export adapter/ --to gguf -o adapter.gguf

    --to shira writes a PEFT adapter of sparse differences, --to gguf a LoRA adapter for llama.cpp;
    the others write new values, tensor by tensor. Artifacts are verified. Nothing appears in OUT if base or artifact are wrong.
    """
    if to not in _TO:
        raise UsageError(f"--to {to!r} is not one of {', '.join(_TO)}")

    from peru_cli.checkpoints.local.atomic import PartialDirectory, check_target
    from peru_cli.checkpoints.resolve import open_model
    from peru_cli.export.changes import Changes
    from peru_cli.export.formats import FORMATS, parse_step
    from peru_cli.finetunes.fine_tune import FromArtifact
    from peru_cli.finetunes.open import open_fine_tune
    from peru_cli.finetunes.verify import verify_expanded
    from peru_cli.vectors.settings import streaming

    target = Path(output)
    if to in ("shira", "gguf") and (step is not None or base_step is not None):
        raise UsageError("--step and --base-step number weight updates, and an adapter has no number", "leave them out")
    if to == "gguf":
        _gguf(model, base, task, target, run)
        return
    if base is None:
        raise UsageError(f"--to {to} compares with the base", "add --base BASE")
    if to == "shira":
        _shira(model, base, task, target, run)
        return
    number = parse_step(to, target, step, base_step)
    check_target(target, run.force or run.dry_run)
    _need_zstandard(to)
    with open_model(base) as below, open_fine_tune(model, below, task) as fine:
        changes = Changes(fine, below)
        changes.check_in_place()
        console.note(f"{fine.label}: {fine.kind}, {plural(len(changes.targets), 'tensor')}, on {below.label}")
        if run.dry_run:
            console.result({"output": output, "to": to, "step": number.number, "base_step": number.before, "tensors": len(changes.targets)})
            return
        if not isinstance(fine, FromArtifact):  # an artifact is verified while it is read
            with streaming("cpu", None, None, lambda entries: None) as how:
                verify_expanded([fine], how)
        with PartialDirectory(target, run.sync) as folder, console.progress(changes.entries, "export") as progress:
            written = FORMATS[to](changes, folder.path, number, progress.advance)
            changes.prove()
            folder.commit()
    share = f"{count(written.changed)} entries ({100 * written.changed / max(changes.entries, 1):.3g}%)"
    console.note(f"wrote {output}: {share} in {plural(written.tensors, 'tensor')}, {si_bytes(written.nbytes)}")
    console.result(
        {
            "output": output, "to": to, "step": number.number, "base_step": number.before, "bytes": written.nbytes,
            "changed": written.changed, "entries": changes.entries, "changed_tensors": written.tensors,
        }
    )  # fmt: skip


def _shira(model: str, base: str, task: str | None, target: Path, run: options.Running) -> None:
    from peru_cli.checkpoints.local.atomic import PartialDirectory, check_room, check_target
    from peru_cli.checkpoints.resolve import open_model
    from peru_cli.export.changes import Changes
    from peru_cli.export.shira import config_of, plan_shira, write_shira
    from peru_cli.finetunes.open import open_fine_tune
    from peru_cli.finetunes.verify import verify_expanded
    from peru_cli.vectors.settings import streaming

    check_target(target, run.force or run.dry_run)
    with open_model(base) as below, open_fine_tune(model, below, task) as fine, console.progress(0, "export") as progress:
        with streaming("cpu", None, None, progress.advance) as how:
            verify_expanded([fine], how, progress.step)
        changes = Changes(fine, below, proven=False)
        plan = plan_shira(changes, progress.advance)
        for warning in plan.extraction.warnings:
            console.warn(warning)
        console.note(f"{fine.label}: {fine.kind}; {plural(len(plan.sparse), 'linear layer')} sparse with r = {plan.rank}, "
                     f"{plural(len(plan.rest.modules), 'module')} whole, {si_bytes(plan.nbytes)}")  # fmt: skip
        result = {"output": str(target), "to": "shira", "entries": changes.entries, "changed": sum(plan.counts.values()), **config_of(plan)}
        if run.dry_run:
            console.result(result)
            return
        check_room(target, plan.nbytes)
        with PartialDirectory(target, run.sync) as folder:
            inexact = write_shira(plan, changes, folder.path, run.sync, progress.advance)
            folder.commit()
    if inexact:
        console.warn(f"{count(inexact)} entries come back off by a rounding of float32: no float32 difference gives them exactly")
    console.note(f"wrote {target}")
    console.result(result | {"inexact": inexact})


def _gguf(model: str, base: str | None, task: str | None, target: Path, run: options.Running) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UsageError("--to gguf needs the package gguf, which is not installed", "pip install 'peru-cli[gguf]'") from error
    from peru_cli.checkpoints.local.atomic import check_target
    from peru_cli.export.gguf_adapter import open_adapter, plan_gguf, write_gguf

    if task is not None:
        raise UsageError("--task names a task of a pack, and --to gguf takes one adapter", "leave it out")
    if target.suffix != ".gguf":
        raise UsageError(f"-o {target} should end in .gguf")
    check_target(target, run.force or run.dry_run)
    adapter, config = open_adapter(model, base)
    with adapter:
        plan = plan_gguf(adapter, config)
        console.note(f"{adapter.label}: {adapter.kind}; for {plan.architecture}, alpha {plan.alpha:g}, {si_bytes(plan.nbytes)} in float32")
        if plan.left_out:
            console.warn(f"left out, because llama.cpp has the base's own: {listed(plan.left_out)}. Wrong if the vocabulary was resized")
        result = {"output": str(target), "to": "gguf", "architecture": plan.architecture, "alpha": plan.alpha, "modules": len(plan.names)}
        if run.dry_run:
            console.result(result | {"tensor_bytes": plan.nbytes})
            return
        nbytes = write_gguf(plan, target, run.sync)
    console.note(f"wrote {target}: {si_bytes(nbytes)}")
    console.result(result | {"tensor_bytes": plan.nbytes, "bytes": nbytes})


def _need_zstandard(to: str) -> None:
    if to != "sglang":
        return
    try:
        import zstandard  # noqa: F401
    except ImportError as error:
        raise UsageError("SGLang's format needs zstandard, which is not installed", "pip install 'peru-cli[export]'") from error


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(export)
