"""Open an argument as a fine-tune: a full checkpoint, a LoRA adapter, a peru artifact or one task of a pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peru_cli.artifacts.container import artifact_kind, find_artifact, is_artifact
from peru_cli.artifacts.mixed.reader import Mixed
from peru_cli.artifacts.mixed.writer import KIND as MIXED
from peru_cli.artifacts.packs.masks import KINDS, open_pack
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.routed import KIND as ROUTED
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.artifacts.single import SingleArtifact
from peru_cli.checkpoints.checks.usable import usable
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.local.files import BytesFile, read_header
from peru_cli.checkpoints.lora.adapter import REST, find_adapters, is_adapter, is_lora_file
from peru_cli.checkpoints.lora.expand import LoraCheckpoint
from peru_cli.checkpoints.places import Place, locate
from peru_cli.checkpoints.quantized.fp8 import Dequantized
from peru_cli.checkpoints.resolve import as_recorded, open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError
from peru_cli.finetunes.adapter import AdapterWithRest
from peru_cli.finetunes.delta import DeltaOnBase
from peru_cli.finetunes.fine_tune import Artifact, FromArtifact, check_base
from peru_cli.finetunes.mixed import MixedOnBase
from peru_cli.finetunes.pack_task import TaskOfPack, base_of_pack
from peru_cli.finetunes.update import is_update, open_update
from peru_cli.shown import listed

MERGE_METHOD = "peru.merge.method"  # in the metadata of a merge


def open_fine_tune(model: str, base: Checkpoint | None, task: str | None = None, stored: bool = False) -> Checkpoint:
    """Open a model, an adapter, an artifact or one task of a pack. All but the first need their base: UsageError without it.

    A folder or repo that holds one artifact stands for it; if it holds several, `task` selects one. FP8 weights of a full
    checkpoint are read as floats, unless `stored` asks for the tensors in its files."""
    opened = _open(model, base, task, stored)
    below = opened.below if isinstance(opened, Dequantized) else opened
    if below.expanded and base is not None:
        base.echo()
    return opened


def _open(model: str, base: Checkpoint | None, task: str | None, stored: bool) -> Checkpoint:
    path = locate(model)
    if is_update(path):
        if base is None:
            raise UsageError(f"{model} is a weight update: it can be expanded only with its base", "add --base BASE")
        return open_update(path, model, base)
    if (path.is_dir() and is_adapter(path)) or is_lora_file(path):
        return open_adapter(path, model, base)
    path = artifact_for(path, task)
    if path.is_dir() and not any(path.glob("*.safetensors")) and (several := find_adapters(path)):
        names = listed(str(folder) for folder in several.values())
        raise UsageError(f"{model} holds several adapters: {names}", "name one of them")
    if path.is_file() and path.suffix == ".safetensors":
        opened = open_file(path, model)
        if "peru.format" in opened.metadata:
            opened.close()
            if base is None:
                raise UsageError(f"{model} is a peru artifact and needs its base", "add --base BASE")
            try:
                made = open_artifact(path, model, lambda artifact: as_recorded(base, recorded_dtypes(artifact)), task or None)
            except UsageError as error:
                raise UsageError(error.message, f"write TASK={model}" if error.hint == "--task NAME" else error.hint) from error
            return made if stored or made.base is base else usable(made)
        return usable(opened, stored)
    return open_model(model, stored)


def open_compact(path: Place) -> Artifact:
    """Open an artifact of one or several fine-tunes, without its base. BadFile if it is damaged or of an unknown kind.

    UsageError for routed experts, which are no fine-tune's weights."""
    kind = artifact_kind(path)
    if kind == ROUTED:
        raise UsageError(
            f"{path} holds routed experts: every input chooses its own, so there is no single checkpoint in it",
            "`peru eval` and `peru route` run it, `peru_cli.apply` installs it in a model",
        )
    return open_pack(path) if kind in KINDS else Mixed(path) if kind == MIXED else SparseDelta(path)


def open_bytes(data: bytes | memoryview) -> Artifact:
    """An artifact whose bytes are at hand. BadFile if they are damaged, UsageError for a pack."""
    file = BytesFile(data)
    kind = read_header(file).metadata.get("peru.kind")
    if kind in (*KINDS, ROUTED):
        raise UsageError("a pack cannot be opened from memory", "write it to a file, and open that")
    return Mixed(file) if kind == MIXED else SparseDelta(file)


def on_base(artifact: Artifact, task: str | None, label: str, base: Checkpoint) -> FromArtifact:
    """An artifact, or a pack's task, as a checkpoint. UsageError if the pack has no such task."""
    if isinstance(artifact, Pack):
        return TaskOfPack(artifact, task, label, base)
    return MixedOnBase(artifact, label, base) if isinstance(artifact, Mixed) else DeltaOnBase(artifact, label, base)


def open_artifact(path: Place, label: str, base: Checkpoint | Callable[[Artifact], Checkpoint], task: str | None) -> FromArtifact:
    """An artifact, or a task of a pack, on its base, which may be looked up after the artifact is open.

    Raises BadFile if it is damaged, Mismatch if headers show another base, UsageError if the pack has no such task."""
    opened = open_compact(path)
    try:
        if isinstance(opened, Pack):
            opened.task(task)
        below = base if isinstance(base, Checkpoint) else base(opened)
        found = on_base(opened, task, label, below)
        check_base(found.origins.values(), opened, below)
    except BaseException:
        opened.close()
        raise
    return found


def recorded_dtypes(artifact: Artifact) -> dict[str, Dtype]:
    """The dtype of each of the base's tensors when an artifact was made, by the base's names."""
    if not isinstance(artifact, Pack):
        single: SingleArtifact[Any] = artifact
        return {single.base_name(record): record.base_dtype for record in single.records.values() if record.base_dtype is not None}
    return {origin.base.name: origin.base.dtype for origin in base_of_pack(artifact) if origin.base is not None}


def artifact_for(place: Place, task: str | None) -> Place:
    """The artifact that a folder or repo stands for: the only one, or the task's. Otherwise the place itself."""
    try:
        return find_artifact(place)
    except UsageError:
        if task is None:
            raise
        return find_artifact(place, task)


def find_routed(model: str) -> Place | None:
    """The file of routed experts that an argument names. None for anything else."""
    try:
        place = find_artifact(locate(model))
    except UsageError:  # a folder of several artifacts
        return None
    return place if artifact_kind(place) == ROUTED else None


def only_task(model: str) -> str | None:
    """The task of a pack that holds only one. None for everything else."""
    path = locate(model)
    if not is_artifact(path) or artifact_kind(path) not in KINDS:
        return None
    with open_pack(path) as pack:
        return next(iter(pack.tasks)) if len(pack.tasks) == 1 else None


def open_adapter(path: Place, label: str, base: Checkpoint | None) -> LoraCheckpoint | AdapterWithRest:
    """An adapter and the sparse delta beside it. UsageError without a base, or with a merge as base; Mismatch if it does not fit."""
    if base is None:
        raise UsageError(f"{label} is a LoRA adapter and needs its base", "add --base BASE")
    if MERGE_METHOD in base.metadata:
        raise UsageError(
            f"{label} is a LoRA adapter, but {base.label} is a merge, and no adapter was trained on it",
            "fold it into its own base first (peru unpack), or merge with --compress",
        )
    adapter = LoraCheckpoint(path, label, base)
    delta = adapter.folder / REST
    if not delta.is_file():
        return adapter
    try:
        rest = open_artifact(delta, str(delta), base, None)
        if not isinstance(rest, DeltaOnBase):
            rest.close()
            raise BadFile(f"{delta}: not a sparse delta", "make the adapter again")
    except BaseException:
        adapter.close()
        raise
    return AdapterWithRest(adapter, rest)
