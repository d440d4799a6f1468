"""`peru unpack`."""

from __future__ import annotations

import sys
from typing import Annotated, Optional

import typer

from peru_cli import options
from peru_cli.console import console
from peru_cli.errors import UsageError
from peru_cli.publish.command import destination, publish


@options.shared()
def unpack(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="What `peru prune`, `shuffle-pack` or `merge` wrote, or a LoRA adapter.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT", help="A folder, a .safetensors file, or - for one file on stdout.")
    ],
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
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest size of a shard.")] = "5GB",
    *,
    publishing: options.Publishing,
    run: options.Running,
) -> None:
    """Rebuild a fine-tune from its base and an artifact, a pack or a LoRA adapter; from a merge, the model with one task's head.

    peru unpack a.safetensors --base BASE -o restored/

    peru unpack a.safetensors --base BASE -o restored.safetensors

    peru unpack a.safetensors --base BASE -o - | sha256sum

    peru unpack org/artifact-repo --task a -o a/

    peru unpack pack.safetensors --task a --base BASE -o a/

    peru unpack merged/ --task a -o a/
    """
    wanted = options.parse_dtype(dtype) if dtype is not None else None
    shard_bytes = options.parse_size(max_shard_size, "--max-shard-size")
    to_pipe = output == "-"
    if to_pipe and sys.stdout.isatty():
        raise UsageError("-o - writes a checkpoint to stdout, and stdout is a terminal", "redirect it to a pipe or a file")
    console.data_on_stderr = to_pipe

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
        total = sum(info.entries for info in tensors) * (2 if to_pipe and source.proves else 1)
        with console.progress(total, "unpack") as progress, streaming(run.device, run.threads, run.tile_entries, progress.advance) as how:
            unpack_to(source, out.writer(tensors, files), how, progress.step)
    if not to_pipe:
        console.note(f"wrote {output}" + (f": {source.proves} verified" if source.proves else ""))
        named = source.metadata.get("peru.base", source.base.public_name) if source.base is not None else base
        console.result(result | publish(destined, [out.target], "unpack", (named,) if named is not None else ()))


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(unpack)
