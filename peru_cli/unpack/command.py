"""`peru unpack`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peru_cli import options
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.publish.command import destination, publish
from peru_cli.shown import listed

if TYPE_CHECKING:
    from peru_cli.checkpoints.dtypes import Dtype


@options.shared()
def unpack(
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT|-", help="What `peru prune`, `shuffle-pack` or `merge` wrote, or a LoRA adapter; - for a file on stdin."
        ),
    ],
    output: Annotated[
        Optional[str], typer.Option("--output", "-o", metavar="OUT", help="A folder, a .safetensors file, or - for one file on stdout.")
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Change the base's own files into the fine-tune. A killed run is finished by the same command."),
    ] = False,
    base: Annotated[
        Optional[str], typer.Option("--base", "-b", metavar="BASE", help="The base. Default: the Hub model that the artifact names.")
    ] = None,
    task: Annotated[
        Optional[str],
        typer.Option("--task", metavar="TASK", help="Which task, if there are several: in a pack, a merge, or a folder of artifacts."),
    ] = None,
    dtype: Annotated[
        Optional[str],
        typer.Option("--dtype", metavar="bf16|fp16|fp32|fp64", help="Data type of the output. Default: that of the fine-tune."),
    ] = None,
    max_shard_size: Annotated[
        Optional[str], typer.Option("--max-shard-size", metavar="SIZE", help="Largest size of a shard. Default: 5GB.")
    ] = None,
    *,
    publishing: options.Publishing,
    run: options.Running,
) -> None:
    """Rebuild a fine-tune from its base and an artifact, a pack or a LoRA adapter; from a merge, the model with one task's head.

    peru unpack a.safetensors --base BASE -o restored/

    peru unpack a.safetensors --base BASE -o restored.safetensors

    peru unpack a.safetensors --base BASE -o - | sha256sum

    peru unpack a.safetensors --base DIR --in-place

    peru prune step-1200/ --base step-1100/ -o - --lossless | ssh host peru unpack - --base /models/step-1100 --in-place

    peru unpack org/artifact-repo --task a -o a/

    peru unpack pack.safetensors --task a --base BASE -o a/

    peru unpack merged/ --task a -o a/
    """
    wanted = options.parse_dtype(dtype) if dtype is not None else None
    shard_bytes = options.parse_size("5GB" if max_shard_size is None else max_shard_size, "--max-shard-size")
    if in_place:
        given = {"-o": output, "--dtype": dtype, "--max-shard-size": max_shard_size, "--push": publishing.push, "--force": run.force}
        if wrong := [option for option, value in given.items() if value]:
            raise UsageError(f"--in-place keeps the base's files as they are but for their values, so {wrong[0]} does not go with it")
        if base is None:
            raise UsageError("--in-place changes the base, so it must be named", "add --base DIR")
        with options.from_stdin(artifact) as given_artifact:
            _in_place(given_artifact, artifact, base, task, run)
        return
    if output is None:
        raise UsageError("say where to: -o OUT", "or --in-place to change the base itself")
    to_pipe = output == "-"
    if to_pipe and sys.stdout.isatty():
        raise UsageError("-o - writes a checkpoint to stdout, and stdout is a terminal", "redirect it to a pipe or a file")
    console.data_on_stderr = to_pipe
    with options.from_stdin(artifact) as given_artifact:
        _unpack(given_artifact, output, base, task, wanted, shard_bytes, publishing, run)


def _unpack(
    artifact: str, output: str, base: str | None, task: str | None, wanted: Dtype | None, shard_bytes: int,
    publishing: options.Publishing, run: options.Running,
) -> None:  # fmt: skip
    from peru_cli.unpack.run import Output, choose, open_source, report, unpack_to
    from peru_cli.vectors.settings import streaming

    chosen = choose(artifact, task)
    out = Output(output, shard_bytes, run.sync)
    out.check(run.force or run.dry_run)
    destined = destination(publishing, run.force, output)
    source = open_source(artifact, chosen, base, task, wanted)
    with source:
        tensors, files = out.plan(source, wanted)
        result = report(source, output, tensors, files)
        if run.dry_run:
            console.result(result)
            return
        total = sum(info.entries for info in tensors) * (2 if out.to_pipe and source.proves else 1)
        with console.progress(total, "unpack") as progress, streaming(run.device, run.threads, run.tile_entries, progress.advance) as how:
            unpack_to(source, out.writer(tensors, files), how, progress.step)
    if not out.to_pipe:
        console.note(f"wrote {output}" + (f": {source.proves} verified" if source.proves else ""))
        named = source.metadata.get("peru.base", source.base.public_name) if source.base is not None else base
        console.result(result | publish(destined, [out.target], "unpack", (named,) if named is not None else ()))


def _in_place(artifact: str, named: str, base: str, task: str | None, run: options.Running) -> None:
    """Patch the base, after finishing what an earlier run began. `named` is the artifact as the user named it."""
    from peru_cli.checkpoints.local.atomic import only_writer
    from peru_cli.checkpoints.local.patch import finish, is_begun
    from peru_cli.unpack import in_place
    from peru_cli.unpack.run import choose, open_source
    from peru_cli.vectors.settings import streaming

    folder, said = in_place.folder_of_base(base), named if named != "-" else "the artifact on stdin"
    with only_writer(folder):
        if is_begun(folder):
            console.note(f"{folder} is half patched: {'would finish' if run.dry_run else 'finishing'} what an earlier run began")
            if run.dry_run:
                console.result({"base": base, "finishes": True})
                return
            with console.progress(0, "unpack") as progress:
                done = finish(folder, run.sync, progress.advance)
            if done.artifact == in_place.seal_of_artifact(artifact):
                console.note(f"{base} is now what {said} gives: base and result verified")
                console.result({"base": base, "artifact": named, "finished": True})
                return
        with open_source(artifact, choose(artifact, task), base, task, None) as source:
            made = in_place.plan(source, folder)
            console.note(
                f"{source.heading} {plural(len(made.tensors), 'tensor')}; a journal of at most {si_bytes(made.room)} beside {base}"
            )
            result = {"base": base, "artifact": named, "tensors": len(made.tensors), "files": sorted(made.side)}
            if run.dry_run:
                console.result(result | {"journal_bytes": made.room})
                return
            total = 2 * sum(placed.info.entries for placed in made.tensors)
            with console.progress(total, "unpack") as progress, streaming("cpu", run.threads, run.tile_entries, progress.advance) as how:
                done_now = in_place.patch(made, how, run.sync, progress.step)
    if done_now.journal_bytes:
        changed = f"{count(done_now.changed)} values changed" + (f", {listed(sorted(made.side))} replaced" if made.side else "")
        console.note(f"{base} is now what {said} gives: {changed}; base and result verified")
    else:
        console.note(f"{base} already is what {said} gives: nothing to do")
    console.result(result | {"changed": done_now.changed, "journal_bytes": done_now.journal_bytes})


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(unpack)
