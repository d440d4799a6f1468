"""`peru unpack`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.console import console, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.publish.command import destination, publish


def unpack(
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="What `peru prune`, `shuffle-pack` or `merge` wrote, or a LoRA adapter.")
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT", help="A directory, a .safetensors file, or - for one file on stdout.")
    ],
    base: Annotated[
        Optional[str], typer.Option("--base", "-b", metavar="BASE", help="The base. Default: the one on the Hub that the artifact names.")
    ] = None,
    task: Annotated[
        Optional[str],
        typer.Option(
            "--task", metavar="TASK", help="Which task of a pack, of a merge that keeps heads, or of a folder or repo of artifacts."
        ),
    ] = None,
    dtype: Annotated[
        Optional[str], typer.Option("--dtype", metavar="bf16|fp16|fp32|fp64", help="Write floating tensors in this dtype.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest shard of a directory.")] = "5GB",
    push: options.Push = None,
    private: options.Private = False,
    revision: options.PushRevision = None,
    commit_message: options.CommitMessage = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    no_sync: options.NoSync = False,
    stream: options.Stream = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
    tile_entries: options.TileEntries = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Give a fine-tune back from its base and its artifact, its pack or its LoRA adapter; of a merge, the model under a task's head.

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
        raise UsageError("-o - writes a checkpoint to stdout, which is a terminal", "send it into a pipe or a file")
    console.data_on_stderr = to_pipe

    from peru_cli.artifacts.container import artifact_kind, find_artifact
    from peru_cli.artifacts.packs.masks import KINDS
    from peru_cli.artifacts.reader import SparseDelta
    from peru_cli.checkpoints.base_name import base_of_adapter, find_base
    from peru_cli.checkpoints.header import TensorInfo
    from peru_cli.checkpoints.local.atomic import check_target
    from peru_cli.checkpoints.local.writer import CheckpointWriter, DirectoryWriter, FileWriter, PipeWriter
    from peru_cli.checkpoints.lora.adapter import find_adapters, is_lora_file
    from peru_cli.checkpoints.places import locate, why_not_here
    from peru_cli.checkpoints.resolve import open_model, open_recorded_base
    from peru_cli.finetunes import rebuild as job
    from peru_cli.finetunes.head import tasks_of
    from peru_cli.vectors.settings import streaming

    target = Path(output)
    place = locate(artifact)
    is_merge = bool(tasks_of(place))
    if not is_merge:
        place = find_artifact(place, task)
    if not is_merge and not place.is_file() and not find_adapters(place):
        raise UsageError(f"{artifact}: no such artifact or adapter", why_not_here(artifact)[1])
    to_folder = not to_pipe and (target.suffix != ".safetensors" or output.endswith("/"))
    if not to_pipe:
        check_target(target, force or dry_run)
        if not to_folder and target.is_dir():
            raise UsageError(f"{output} is a folder, so no file can be written there", f"-o {output}/ writes a folder")
    destined = destination(push, private, revision, commit_message, force, output)

    def make_writer(tensors: list[TensorInfo], files: dict[str, bytes]) -> CheckpointWriter:
        if to_pipe:
            return PipeWriter(sys.stdout.buffer, tensors)
        if to_folder:
            return DirectoryWriter(target, tensors, files, shard_bytes, not no_sync)
        return FileWriter(target, tensors, not no_sync)

    def finished(named: Optional[str]) -> dict[str, Any]:
        return publish(destined, [target], "unpack", (named,) if named is not None else ())

    if is_merge:
        from peru_cli.unpack.head import unpack_head

        unpack_head(place, task, output, wanted, make_writer, dry_run, (device, threads, tile_entries), lambda: finished(base))
        return
    if place.is_dir() or is_lora_file(place):
        from peru_cli.unpack.adapter import unpack_adapter

        opened_base = open_model(base if base is not None else base_of_adapter(place))
        how_to = (device, threads, tile_entries)
        unpack_adapter(artifact, opened_base, output, wanted, make_writer, dry_run, how_to, lambda: finished(opened_base.public_name))
        return
    if artifact_kind(place) in KINDS:
        from peru_cli.unpack.pack import unpack_task

        unpack_task(place, task, base, output, wanted, make_writer, dry_run, (threads, tile_entries), finished)
        return
    opened = SparseDelta(place)
    if task not in (None, opened.metadata["peru.task"], place.name.removesuffix(".safetensors")):
        raise UsageError(f"--task {task}: {place} holds {opened.metadata['peru.task']}", "leave --task out")
    base = find_base(place, opened.metadata, base)
    recorded = {opened.base_name(r): r.base_dtype for r in opened.index.tensors if r.base_dtype is not None}
    opened_base = open_recorded_base(base, recorded)
    job.check_base(opened, opened_base)
    tensors = job.output_tensors(opened, wanted)
    files, missing = job.side_files(opened, opened_base)
    if wanted is not None and "config.json" in files:
        files["config.json"] = job.config_with_dtype(files["config.json"], wanted)
    nbytes = sum(info.nbytes for info in tensors)
    console.note(f"base {base}: {opened_base.kind}; {opened.metadata['peru.task']}: {plural(len(tensors), 'tensor')}, {si_bytes(nbytes)}")
    if dry_run:
        console.result({"task": opened.metadata["peru.task"], "bytes": nbytes, "tensors": len(tensors), "files": sorted(files)})
        return
    if to_folder and missing:
        console.warn(f"{base} lacks the {', '.join(missing)} that it had when the artifact was made: {target} will lack them too")
    total = sum(info.entries for info in tensors) * (2 if to_pipe else 1)
    with console.progress(total, "unpack") as progress, streaming(device, threads, tile_entries, progress.advance) as how:
        writer = make_writer(tensors, files)
        job.unpack_to(opened, opened_base, writer, how, progress.step)
    if not to_pipe:
        console.note(f"wrote {output}: base and result verified")
        result = {"task": opened.metadata["peru.task"], "output": output, "bytes": nbytes, "result_digest": opened.result_digest.hex()}
        console.result(result | finished(opened.metadata.get("peru.base", opened_base.public_name)))


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(unpack)
