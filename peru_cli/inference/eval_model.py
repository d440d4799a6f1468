"""The models of `peru eval`: checkpoints, adapters, artifacts and merges, first by their headers, then as tensors in memory.

Nothing is written: an artifact's fine-tune, or a pack's task, is computed in memory beside the base's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from peru_cli.artifacts.container import is_artifact
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.checkpoints.lora.adapter import is_adapter
from peru_cli.checkpoints.lora.expand import LoraCheckpoint
from peru_cli.checkpoints.places import Place, locate, size_of
from peru_cli.checkpoints.resolve import open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.finetunes.adapter import AdapterWithRest, fine_name
from peru_cli.finetunes.fine_tune import FromArtifact
from peru_cli.finetunes.head import HEADS, HeadOverMerge
from peru_cli.finetunes.open import MERGE_METHOD, artifact_for, on_base, open_artifact, open_fine_tune
from peru_cli.finetunes.pack_task import TaskOfPack
from peru_cli.live.applied import verify_base
from peru_cli.live.memory import TensorTable, empty_tensor, fill, read_tensors

Tensors = dict[str, torch.Tensor]


@dataclass
class EvalModel:
    """A model by its header: shapes of its tensors by its checkpoint's names, side files, and its bytes on disk.

    `nbytes` is what only this model takes, at `place`; equal places count once. `shared_bytes` is what it shares with other tasks,
    at `shared`: a pack or a merge. `read` returns the tensors themselves, in the dtypes of the files."""

    label: str
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, bytes]
    nbytes: int
    read: Callable[[], Tensors]
    place: str = ""
    shared_bytes: int = 0
    shared: str = ""
    own_head: bool = True  # False if a task's head was put on a merge, whose config counts the classes of another head

    @property
    def parameters(self) -> int:
        """Number of entries of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def in_memory(label: str, state: Tensors, files: dict[str, bytes], nbytes: int) -> EvalModel:
    """A model whose tensors are already in memory."""
    return EvalModel(label, {name: tuple(tensor.shape) for name, tensor in state.items()}, files, nbytes, lambda: state)


class Base:
    """A base whose tensors are read once, on first use, and its opened packs. Also a context manager."""

    def __init__(self, model: str | Checkpoint) -> None:
        self.checkpoint = open_model(model) if isinstance(model, str) else model
        self._opened: dict[str, FromArtifact] = {}
        self._verified: set[str] = set()

    @cached_property
    def table(self) -> dict[str, torch.Tensor]:
        """All tensors, in the dtypes of the files."""
        return read_tensors(self.checkpoint)

    @cached_property
    def memory(self) -> TensorTable:
        """The same as a checkpoint."""
        return TensorTable(self.checkpoint.label, self.table, self.checkpoint.side_files)

    def open(self, path: Place, label: str, task: str | None) -> FromArtifact:
        """An artifact, or a task of a pack. A pack is opened once for all its tasks.

        Raises BadFile if it is damaged, Mismatch if it belongs to another base, UsageError if the pack has no such task."""
        known = self._opened.get(str(path))
        if known is not None:
            return TaskOfPack(known.pack, task, label, self.checkpoint) if isinstance(known, TaskOfPack) else known
        opened = self._opened[str(path)] = open_artifact(path, label, self.checkpoint, task)
        return opened

    def compute(self, source: FromArtifact) -> Tensors:
        """A fine-tune's tensors. Unchanged tensors are the base's own. The first task of a file verifies the base.

        The sums of a pack stay decoded for the next tasks, 2 bytes each."""
        artifact = source.artifact
        if isinstance(artifact, Pack):
            ours: FromArtifact = TaskOfPack(artifact.load_sums(), source.task, source.label, self.memory)
        else:
            ours = on_base(artifact, None, source.label, self.memory)
        based = {fine: origin.base.name for fine, origin in ours.origins.items() if origin.base is not None}
        if str(artifact.path) not in self._verified:
            verify_base(self.memory, ours.origins, based, artifact)
            self._verified.add(str(artifact.path))
        ours.verify_stored()
        new = {name: empty_tensor(ours.label, o.info) for name, o in ours.origins.items() if o.base is None or o.changes}
        fill(ours, new)
        return {name: new[name] if name in new else self.table[based[name]] for name in ours.tensors}

    def close(self) -> None:
        """Release the files."""
        for opened in self._opened.values():
            opened.close()
        self._opened = {}
        self.checkpoint.close()

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_eval_model(model: str, task: str, base: Base | None) -> EvalModel:
    """Open what a user names, without reading tensors.

    Args:
        model: a checkpoint, a merge with heads, a LoRA adapter, an artifact or a pack; the last three need a base.
        task: whose head to use if a merge has several; "" if tasks have no names.

    Raises:
        UsageError: the file does not exist, a base is needed but missing, or the merge has no head for this task.
        Mismatch: another base. BadFile: a damaged file."""
    path = locate(model)
    if not (path.is_dir() and is_adapter(path)):
        path = artifact_for(path, task or None)
    if is_artifact(path):
        if base is None:
            raise UsageError(f"{model} is a peru artifact: it needs its base", "add --base BASE")
        source = base.open(path, model, task or None)
        shapes = {name: info.shape for name, info in source.tensors.items()}
        own, place, shared, where = size_of(path), str(path), 0, ""
        if isinstance(source, TaskOfPack):
            own, place = source.pack.own_bytes(source.record), f"{path} {source.task}"
            shared, where = size_of(path) - sum(map(source.pack.own_bytes, source.pack.index.tasks)), str(path)
        elif MERGE_METHOD in base.checkpoint.metadata:
            shared, where = sum(size_of(file) for file in set(base.checkpoint.files)), base.checkpoint.label
        return EvalModel(model, shapes, source.contents()[0], own, lambda: base.compute(source), place, shared, where)
    if (path / HEADS).is_dir():
        return _under_head(path, model, task)
    under = None if base is None else base.checkpoint
    with open_fine_tune(model, under) as opened:
        files = {name: file.read_bytes() for name, file in opened.side_files.items()}
        adapter = isinstance(opened, (LoraCheckpoint, AdapterWithRest))
        mine = [f for f in opened.files if not adapter or base is None or f not in base.checkpoint.files]
        shapes = {fine_name(opened, name): info.shape for name, info in opened.tensors.items()}

    def read() -> Tensors:
        with open_fine_tune(model, under) as opened:
            return {fine_name(opened, name): tensor for name, tensor in read_tensors(opened).items()}

    return EvalModel(model, shapes, files, sum(size_of(file) for file in set(mine)), read, str(path))


def _under_head(folder: Place, label: str, task: str) -> EvalModel:
    """A merge under one task's head."""

    def opened() -> HeadOverMerge:
        return HeadOverMerge(folder, task, "name the task of the data: --data TASK=FILE; it has ")

    def read() -> Tensors:
        with opened() as model:
            return read_tensors(model)

    with opened() as model:
        shapes = {name: info.shape for name, info in model.tensors.items()}
        sizes = [size_of(file) for file in model.files]
        own = model.has_config
        return EvalModel(label, shapes, model.contents()[0], sizes[-1], read, f"{folder} {task}", sum(sizes[:-1]), str(folder), own)
