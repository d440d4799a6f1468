"""`peru chain add|get|list|verify|prune|squash`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peru_cli import options
from peru_cli.console import console, plural, si_bytes
from peru_cli.errors import EXIT_FAILED, BadFile, UsageError

if TYPE_CHECKING:
    from peru_cli.chain.links import Chain
    from peru_cli.chain.write import Written

FULL_EVERY = 50

Run = Annotated[str, typer.Argument(metavar="RUN", help="The chain: a folder of links, step-1200.safetensors and so on.")]
Step = Annotated[str, typer.Argument(metavar="STEP", help="The step's number, or `last`.")]

app = typer.Typer(
    name="chain",
    cls=options.Group,
    no_args_is_help=True,
    help="Keep the checkpoints of a training run: one whole, then what changed, bit for bit.",
)


@options.shared(lacks=["force", "summary"], panels={"Inputs": "step", "How to store": "full_every full lossless"})
def add(
    run_folder: Run,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The checkpoint: a folder or a file.")],
    step: Annotated[
        Optional[int], typer.Option("--step", min=0, metavar="N", help="The step's number. Default: the digits at the end of the name.")
    ] = None,
    full_every: Annotated[
        int,
        typer.Option(
            "--full-every",
            min=1,
            metavar="N",
            help="Store every N-th step whole. A smaller N takes more space, but steps are rebuilt faster.",
        ),
    ] = FULL_EVERY,
    full: Annotated[bool, typer.Option("--full", help="Store this step whole.")] = False,
    lossless: Annotated[bool, typer.Option("--lossless", help="Keep every changed entry. Chains always do.", show_default=False)] = True,
    *,
    run: options.Running,
) -> None:
    """Append a checkpoint to a chain, as its changes since the step before.

    peru chain add run/ step-1200/ --lossless

    peru chain add run/ model.safetensors --step 1200

    A missing chain is created. A kill at any moment leaves the chain as it was, or with the new step.
    """
    from peru_cli.chain import write
    from peru_cli.chain.links import Chain, form, read_chain
    from peru_cli.checkpoints.local.atomic import only_writer
    from peru_cli.checkpoints.resolve import open_model
    from peru_cli.vectors.settings import streaming

    folder, number = Path(run_folder), _step_of(model, step)
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise UsageError(f"{folder.absolute().parent}: no such folder, so {folder.name} cannot be created there")
    with open_model(model, stored=True) as source:
        if run.dry_run:
            chain = read_chain(folder) if folder.exists() else Chain(folder, {})
            on = write.place_of(chain, number, full_every, full)
            console.note(f"step {number} would be stored {form(on)}")
            console.result({"step": number, "on": on})
            return
        with only_writer(folder, make=True):
            chain = read_chain(folder)
            _warn(chain)
            if write.is_there(chain, number, source):
                console.note(f"{folder} already has step {number}, with the same weights")
                console.result({"step": number, "on": chain.links[number].on, "bytes": chain.links[number].nbytes, "written": False})
                return
            on = write.place_of(chain, number, full_every, full)
            total = sum(info.entries for info in source.tensors.values())
            with console.progress(2 * total, "chain") as progress, streaming(*_how(run), progress.advance) as how:
                written = write.append(chain, folder, source, number, on, how, run.sync, progress.step)
    console.note(f"added {_told(written)}, {source.nbytes / max(written.nbytes, 1):.1f} times smaller than the checkpoint")
    console.result({"step": number, "on": on, "bytes": written.nbytes, "changed": written.changed, "written": True})


@options.shared(lacks=["summary"])
def get(
    run_folder: Run,
    step: Step,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT", help="A folder, a .safetensors file, or - for one file on stdout.")
    ],
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest size of a shard.")] = "5GB",
    *,
    run: options.Running,
) -> None:
    """Write a step of a chain as the checkpoint that was added, bit for bit.

    peru chain get run/ 1180 -o restored/

    peru chain get run/ last -o - | ssh host "cat > model.safetensors"
    """
    from peru_cli.chain.links import read_chain
    from peru_cli.chain.read import open_step
    from peru_cli.checkpoints.places import locate
    from peru_cli.unpack.run import Output, report, unpack_to
    from peru_cli.vectors.settings import streaming

    if output == "-" and sys.stdout.isatty():
        raise UsageError("-o - writes a checkpoint to stdout, and stdout is a terminal", "redirect it to a pipe or a file")
    console.data_on_stderr = output == "-"
    out = Output(output, options.parse_size(max_shard_size, "--max-shard-size"), run.sync)
    out.check(run.force or run.dry_run)
    chain = read_chain(locate(run_folder))
    number = _step(chain, step)
    with open_step(chain, number) as source:
        tensors, files = out.plan(source, None)
        result = report(source, output, tensors, files) | {"step": number, "links": len(chain.way(number))}
        if not run.dry_run:
            total = sum(info.entries for info in tensors) * (2 if out.to_pipe else 1)
            with console.progress(total, "chain") as progress, streaming(*_how(run), progress.advance) as how:
                unpack_to(source, out.writer(tensors, files), how, progress.step)
            if not out.to_pipe:
                console.note(f"wrote {output}: step {number} verified")
    console.result(result)


@options.shared(lacks=["force", "dry_run", "no_sync", "stream", "device", "threads", "tile_entries", "summary"])
def list_(run_folder: Run, *, run: options.Running) -> None:
    """List the steps of a chain, and how each is stored. Reads headers only.

    peru chain list run/
    """
    from peru_cli.chain.links import form, read_chain
    from peru_cli.checkpoints.places import locate

    chain = read_chain(locate(run_folder))
    lost = {step: (f"step {cause.step} {cause.problem}" if (cause := chain.cause(step)) else "") for step in chain.links}
    columns, rows = ["step", "stored", ">size", "?digest"], list[list[str]]()
    for link in chain.links.values():
        rows.append([str(link.step), form(link.on), si_bytes(link.nbytes), link.result[:16]] + [lost[link.step]] * any(lost.values()))
    console.table(columns + ["lost"] * any(lost.values()), rows)
    _warn(chain)
    console.note(f"{plural(len(chain.links), 'step')}, {si_bytes(sum(link.nbytes for link in chain.links.values()))}")
    console.result(
        [{"step": k.step, "on": k.on, "bytes": k.nbytes, "result": k.result, "lost": lost[k.step] or None} for k in chain.links.values()]
    )


@options.shared(lacks=["force", "dry_run", "no_sync", "stream", "summary"])
def verify(run_folder: Run, *, run: options.Running) -> None:
    """Read a whole chain and check every step. Reports what is broken, what is lost with it, and what is left.

    peru chain verify run/

    The exit code is 1 if a step is lost.
    """
    from peru_cli.chain.links import read_chain
    from peru_cli.chain.verify import verify_chain
    from peru_cli.checkpoints.local import inputs
    from peru_cli.vectors.settings import streaming

    with console.progress(0, "verify") as progress, streaming(*_how(run), progress.advance) as how:
        chain, verdicts = verify_chain(read_chain(Path(run_folder)), how)
    inputs.check()
    console.table(["step", "verdict", "why"], [[str(v.step), "lost" if v.lost else "sound", v.lost] for v in verdicts])
    console.result([asdict(verdict) for verdict in verdicts])
    if losses := chain.losses():
        console.error("\n  ".join(losses))
        raise typer.Exit(EXIT_FAILED)


@options.shared(lacks=["force", "stream", "summary"])
def prune(
    run_folder: Run,
    keep_every: Annotated[int, typer.Option("--keep-every", min=1, metavar="N", help="Keep the steps divisible by N, and the last one.")],
    *,
    run: options.Running,
) -> None:
    """Remove steps from a chain. The remaining steps stay the same, bit for bit.

    peru chain prune run/ --keep-every 100
    """
    from peru_cli.chain.links import spans

    def chosen(chain: Chain) -> set[int]:
        last = max(chain.links, default=None)
        steps = {step for step in chain.links if step % keep_every and step != last}
        console.note(f"{'would remove' if run.dry_run else 'removing'} {spans(steps, chain.links) or 'nothing'}")
        return steps

    _drop(run_folder, chosen, run)


@options.shared(lacks=["force", "stream", "summary"])
def squash(
    run_folder: Run,
    first: Annotated[int, typer.Argument(metavar="FIRST", help="The step that the new link builds on.")],
    last: Annotated[int, typer.Argument(metavar="LAST", help="The step that the new link rebuilds.")],
    output: Annotated[
        Optional[str],
        typer.Option("--output", "-o", metavar="OUT", help="Write the link to this .safetensors file, and leave the chain as it is."),
    ] = None,
    *,
    run: options.Running,
) -> None:
    """Merge several links into one: store LAST as a change of FIRST, and remove the steps between them.

    peru chain squash run/ 1100 1200

    peru chain squash run/ 1100 1200 -o update.safetensors
    """
    from peru_cli.chain import write
    from peru_cli.chain.links import read_chain, spans
    from peru_cli.checkpoints.local.atomic import check_target
    from peru_cli.vectors.settings import streaming

    if first >= last:
        raise UsageError(f"step {last} does not come after step {first}")
    if output is not None:
        if not output.endswith(".safetensors"):
            raise UsageError(f"-o {output} should end in .safetensors")
        check_target(Path(output), force=False)
        chain = read_chain(Path(run_folder))
        chain.way(last)
        if run.dry_run:
            console.result({"step": last, "on": first, "output": output})
            return
        with console.progress(0, "squash") as progress, streaming(*_how(run), progress.advance) as how:
            written = write.squash(chain, first, last, Path(output), how, run.sync, progress.step)
        console.note(f"wrote {output}: {_told(written)}")
        console.result({"step": last, "on": first, "output": output, "bytes": written.nbytes})
        return

    def chosen(chain: Chain) -> set[int]:
        if first not in [link.step for link in chain.way(last)]:
            raise UsageError(
                f"step {last} does not build on step {first}", "`peru chain list` shows which step each builds on; -o takes any two"
            )
        steps = {step for step in chain.links if first < step < last}
        console.note(f"{'would remove' if run.dry_run else 'removing'} {spans(steps, chain.links) or 'nothing'}")
        return steps

    _drop(run_folder, chosen, run)


def _drop(run_folder: str, chosen: Callable[[Chain], set[int]], run: options.Running) -> None:
    from peru_cli.chain import write
    from peru_cli.chain.links import read_chain
    from peru_cli.checkpoints.local.atomic import only_writer
    from peru_cli.vectors.settings import streaming

    folder = Path(run_folder)
    read_chain(folder)
    with only_writer(folder):
        chain = read_chain(folder)
        if losses := chain.losses():
            raise BadFile("\n  ".join(losses), "add what is missing again, or remove the files of the steps that are lost")
        steps = chosen(chain)
        if run.dry_run:
            console.result({"removed": sorted(steps)})
            return
        before = sum(link.nbytes for link in chain.links.values())
        with console.progress(0, "chain") as progress, streaming(*_how(run), progress.advance) as how:
            written = write.drop(chain, folder, steps, how, run.sync, progress.step)
        for each in written:
            console.note(f"rewrote {_told(each)}")
        chain = read_chain(folder)
    after = sum(link.nbytes for link in chain.links.values())
    console.note(f"{plural(len(chain.links), 'step')} left, {si_bytes(after)} where there were {si_bytes(before)}")
    console.result({"removed": sorted(steps), "rewritten": [each.step for each in written], "bytes": after, "bytes_before": before})


def _step_of(model: str, given: int | None) -> int:
    """The number of a new step: the given one, or the digits at the end of the model's name."""
    from peru_cli.checkpoints.resolve import default_task

    if given is not None:
        return given
    found = re.search(r"\d{1,18}$", default_task(model))
    if found is None:
        raise UsageError(f"the name {model} does not end in a step number", "add --step N")
    return int(found.group())


def _step(chain: Chain, text: str) -> int:
    """Parse a step of a chain. UsageError if the argument is not one."""
    if text == "last" and chain.links:
        return max(chain.links)
    if not re.fullmatch(r"\d{1,18}", text):
        raise UsageError(f"{text!r} is not a step's number", "`peru chain list` shows them")
    return int(text)


def _how(run: options.Running) -> tuple[str, int | None, int | None]:
    return run.device, run.threads, run.tile_entries


def _told(written: Written) -> str:
    from peru_cli.chain.links import form

    share = f", {100 * written.changed / written.entries:.3g}% changed" if written.entries else ""
    return f"step {written.step} {form(written.on)}: {si_bytes(written.nbytes)}{share}"


def _warn(chain: Chain) -> None:
    if losses := chain.losses():
        console.warn("\n  ".join(losses))


def register(parent: typer.Typer) -> None:
    """Add the commands to the app."""
    for name, command in {"add": add, "get": get, "list": list_, "verify": verify, "prune": prune, "squash": squash}.items():
        app.command(name, cls=options.Command)(command)
    parent.add_typer(app)
