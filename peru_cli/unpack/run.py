"""`peru unpack`: open a fine-tune, copy it while every tile is digested, rename the copy into place."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peru_cli.artifacts.container import find_artifact
from peru_cli.checkpoints.base_name import base_of_adapter, find_base
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import check_target
from peru_cli.checkpoints.local.writer import CheckpointWriter, DirectoryWriter, FileWriter, PipeWriter
from peru_cli.checkpoints.lora.adapter import find_adapters, is_lora_file
from peru_cli.checkpoints.places import Place, children, locate, why_not_here
from peru_cli.checkpoints.resolve import open_model, open_recorded_base
from peru_cli.checkpoints.sidefiles import config_with_dtype
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import console, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.finetunes.adapter import AdapterOnBase
from peru_cli.finetunes.fine_tune import Artifact, FineTune, FromArtifact
from peru_cli.finetunes.head import HeadOverMerge, tasks_of
from peru_cli.finetunes.open import open_adapter, open_artifact, recorded_dtypes
from peru_cli.finetunes.update import is_update, open_update
from peru_cli.finetunes.verify import Proven, verify, verify_expanded
from peru_cli.shown import listed
from peru_cli.vectors.copy import copy_checkpoint, in_dtype
from peru_cli.vectors.family import StreamSettings


class Output:
    """Where a fine-tune goes: a directory, one file, or a pipe."""

    def __init__(self, output: str, max_shard_bytes: int, sync: bool) -> None:
        self.named, self.target, self._shard_bytes, self._sync = output, Path(output), max_shard_bytes, sync
        self.to_pipe = output == "-"
        self.to_folder = not self.to_pipe and (self.target.suffix != ".safetensors" or output.endswith("/"))

    def check(self, replace: bool) -> None:
        """UsageError if it exists and may not be replaced, or is a folder although a file is expected."""
        if not self.to_pipe:
            check_target(self.target, replace)
            if not self.to_folder and self.target.is_dir():
                raise UsageError(f"{self.named} is a folder, so no file can be written there", f"-o {self.named}/ writes a folder")

    def plan(self, source: FineTune, dtype: Dtype | None) -> tuple[list[TensorInfo], dict[str, bytes]]:
        """Tensors and side files as they will be written, floating tensors in `dtype`. Warns of side files that the base lacks."""
        files, missing = source.contents()
        if dtype is not None and "config.json" in files:
            files["config.json"] = config_with_dtype(files["config.json"], dtype)
        if self.to_folder and missing and source.base is not None:
            console.warn(f"{source.base.label} no longer has {listed(missing)}, so {self.target} will lack them, too")
        return [in_dtype(info, dtype) for info in source.tensors.values()], files

    def writer(self, tensors: list[TensorInfo], files: dict[str, bytes]) -> CheckpointWriter:
        """The writer for this output."""
        if self.to_pipe:
            return PipeWriter(sys.stdout.buffer, tensors)
        if self.to_folder:
            return DirectoryWriter(self.target, tensors, files, self._shard_bytes, self._sync)
        return FileWriter(self.target, tensors, self._sync)


def choose(named: str, task: str | None) -> Place:
    """Find the merge, artifact or adapter that an argument names. UsageError if there is none, or several."""
    place = locate(named)
    if tasks_of(place) or is_update(place):
        return place
    place = find_artifact(place, task)
    adapters = {} if place.is_file() else find_adapters(place)
    if adapters and "" not in adapters:
        raise UsageError(f"{named} holds several adapters: {listed(map(str, adapters.values()))}", "name one of them")
    if not place.is_file() and not adapters:
        if place.is_dir():
            whole = children(place, "*.safetensors") or children(place, "*.bin")
            said = "a checkpoint, which needs no unpacking" if whole else "no artifact or adapter in this folder"
            raise UsageError(f"{named}: {said}", "unpack takes what `peru prune`, `shuffle-pack` or `svd-lora` wrote")
        message, hint = why_not_here(named)
        special = Path(named).exists()
        raise UsageError(message if special else f"{named}: no such artifact or adapter", hint)
    return place


def open_source(named: str, place: Place, base: str | None, task: str | None, dtype: Dtype | None) -> FineTune:
    """Open the result of `choose` on its base: the one given, or the one that it names.

    Raises BadFile if it is damaged, Mismatch if the headers show another base, UsageError without a base or for a wrong task."""
    if tasks_of(place):
        return HeadOverMerge(place, task)
    if is_update(place):
        if base is None:
            raise UsageError(f"{named} is a weight update, which does not name its base", "add --base BASE")
        return open_update(place, named, open_model(base))
    if place.is_dir() or is_lora_file(place):
        opened = open_model(base if base is not None else base_of_adapter(place))
        return AdapterOnBase(open_adapter(place, named, opened), opened, dtype)

    def on_base(artifact: Artifact) -> Checkpoint:
        held = artifact.metadata.get("peru.task")
        if held is not None and task not in (None, held, place.name.removesuffix(".safetensors")):
            raise UsageError(f"--task {task}: {place} holds {held}", "leave --task out")
        return open_recorded_base(find_base(place, artifact.metadata, base), recorded_dtypes(artifact))

    return open_artifact(place, named, on_base, task)


def report(source: FineTune, output: str, tensors: list[TensorInfo], files: dict[str, bytes]) -> dict[str, Any]:
    """Print what will be written, and return the same for --json."""
    nbytes = sum(info.nbytes for info in tensors)
    console.note(f"{source.heading} {plural(len(tensors), 'tensor')}, {si_bytes(nbytes)}")
    for warning in source.warnings:
        console.warn(warning)
    named = {"task": source.task} if source.task is not None else {}
    return named | {"output": output, "bytes": nbytes, "tensors": len(tensors), "files": sorted(files)} | source.facts


def _read_all(source: Checkpoint) -> None:
    """Read every tensor, which checks all digests."""
    for name in source.tensors:
        for _ in source.pieces(name):
            pass


def unpack_to(source: FineTune, writer: CheckpointWriter, how: StreamSettings, note: Callable[[str], None]) -> None:
    """Copy a fine-tune into a writer and commit it. Before writing to a pipe, which cannot be undone, everything is verified first.

    Raises Mismatch for another base (naming the first tensors that differ), BadFile if the artifact was altered."""
    with writer:
        if isinstance(source, AdapterOnBase):
            verify_expanded([source.model], how, note)
        if writer.ordered and isinstance(source, FromArtifact):
            note("verifying before anything is written")
            verify(source, how)
        elif writer.ordered and (watch := inputs.current()) is not None and watch.has_digests:
            note("verifying before anything is written")
            _read_all(source)
            inputs.check()
        note("unpacking")
        if isinstance(source, FromArtifact):
            proven = Proven(source)
            copy_checkpoint(proven, writer, how)
            proven.prove()
        else:
            copy_checkpoint(source, writer, how)
        writer.commit()
