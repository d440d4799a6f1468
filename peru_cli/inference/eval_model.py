"""What `peru eval` looks at: models, adapters, artifacts and merges, from their headers first and then as tensors in memory.

Nothing is written: an artifact is put onto the base's tensors (live/apply.py), copied off, and taken away again; a pack's
task is computed beside them (live/pack.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from peru_cli.artifacts.container import artifact_kind, is_artifact
from peru_cli.artifacts.packs.masks import KINDS, open_pack
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.lora.adapter import is_adapter
from peru_cli.checkpoints.lora.expand import LoraCheckpoint
from peru_cli.checkpoints.places import Place, children, locate, size_of
from peru_cli.checkpoints.resolve import check_task, open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError
from peru_cli.finetunes.expand import Overlaid, artifact_for, open_fine_tune
from peru_cli.finetunes.pack_base import check_pack_base
from peru_cli.finetunes.rebuild import check_base, side_files
from peru_cli.finetunes.retrieve import Retrieval
from peru_cli.live.apply import apply
from peru_cli.live.pack import task_tensors

HEADS = "heads"  # beside a merge: OUT/heads/TASK.safetensors


Tensors = dict[str, torch.Tensor]


@dataclass
class EvalModel:
    """A model by its header: shapes of its tensors by its checkpoint's names, side files, and the bytes that it takes on the disk.

    `read` gives the tensors themselves, in the dtypes of the files.
    """

    label: str
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, bytes]
    nbytes: int
    read: Callable[[], Tensors]
    head_bytes: int = 0  # of the task's head beside a merge, which `nbytes` leaves out
    own_head: bool = True  # False where a task's head was put onto a merge, whose config counts another one

    @property
    def parameters(self) -> int:
        """Entries of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def in_memory(label: str, state: Tensors, files: dict[str, bytes], nbytes: int) -> EvalModel:
    """A model whose tensors are at hand."""
    return EvalModel(label, {name: tuple(tensor.shape) for name, tensor in state.items()}, files, nbytes, lambda: state)


class Base:
    """A base whose tensors are read once, when first needed, with the packs of it that were looked at. Also a context manager."""

    def __init__(self, model: str) -> None:
        self.checkpoint = open_model(model)
        self._packs: dict[str, Pack] = {}
        self._verified: set[str] = set()

    @cached_property
    def table(self) -> dict[str, torch.Tensor]:
        """All tensors, in the dtypes of the files."""
        return read_tensors(self.checkpoint)

    def pack(self, path: Place) -> Pack:
        """A pack, opened once for all its tasks. BadFile if it is damaged, Mismatch if it is of another base."""
        known = self._packs.get(str(path))
        if known is not None:
            return known
        pack = open_pack(path)
        try:
            check_pack_base(pack, self.checkpoint)
        except BaseException:
            pack.close()
            raise
        self._packs[str(path)] = pack
        return pack

    def task_tensors(self, path: Place, task: str) -> Tensors:
        """A pack's task. The first one verifies the base; the pack's sums stay decoded for the next ones, 2 bytes each."""
        found = task_tensors(self.table, self.pack(path).load_sums(), task, verify=str(path) not in self._verified)
        self._verified.add(str(path))
        return found

    def close(self) -> None:
        """Release the files."""
        for pack in self._packs.values():
            pack.close()
        self._packs = {}
        self.checkpoint.close()

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors in memory. BadFile for dtypes that torch lacks."""
    if checkpoint.ranged:
        checkpoint.expect([(name, 0, info.nbytes) for name, info in checkpoint.tensors.items()])
    return {name: _tensor(checkpoint, info) for name, info in checkpoint.tensors.items()}


def _tensor(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    kind = getattr(torch, info.dtype.torch_name or "", None)
    if kind is None:
        raise BadFile(f"{checkpoint.label}: torch has no dtype for {info.name!r} ({info.dtype.name})")
    data = bytearray(info.nbytes)
    if not data:
        return torch.empty(info.shape, dtype=kind)
    checkpoint.read_into(info.name, 0, memoryview(data))
    return torch.frombuffer(data, dtype=kind).view(info.shape)


def open_eval_model(model: str, task: str, base: Base | None) -> EvalModel:
    """Look at what a user names; no tensor is read yet.

    Args:
        model: a checkpoint, a merge with heads, a LoRA adapter, an artifact or a pack; the last three need a base.
        task: whose head is taken where a merge has several; "" where tasks have no names.

    Raises:
        UsageError: no such file, no base where one is needed, or a merge without a head for this task.
        Mismatch: the base is another one. BadFile: a file is damaged.
    """
    path = locate(model)
    if not (path.is_dir() and is_adapter(path)):
        path = artifact_for(path, task or None)
    if is_artifact(path):
        if base is None:
            raise UsageError(f"{model} is a peru artifact: it needs its base", "add --base BASE")
        if artifact_kind(path) in KINDS:
            return _packed(base.pack(path), task, base, model)
        with SparseDelta(path) as artifact:
            return _artifact(artifact, base, model)
    under = None if base is None else base.checkpoint
    with open_fine_tune(model, under) as opened:
        files = {name: file.read_bytes() for name, file in opened.side_files.items()}
        adapter = isinstance(opened, (LoraCheckpoint, Overlaid))
        mine = [f for f in opened.files if not adapter or base is None or f not in base.checkpoint.files]
        shapes = {_fine_name(opened, name): info.shape for name, info in opened.tensors.items()}

    def read() -> Tensors:
        with open_fine_tune(model, under) as opened:
            return {_fine_name(opened, name): tensor for name, tensor in read_tensors(opened).items()}

    subject = EvalModel(model, shapes, files, sum(size_of(file) for file in set(mine)), read)
    return _with_head(subject, path / HEADS, task) if (path / HEADS).is_dir() else subject


def _fine_name(opened: Checkpoint, name: str) -> str:
    """A tensor's name in the fine-tune; an adapter's have the base's names."""
    return opened.fine_name(name) if isinstance(opened, (LoraCheckpoint, Overlaid)) else name


def _artifact(artifact: SparseDelta, base: Base, label: str) -> EvalModel:
    """The fine-tune of an artifact: the base's tensors with the artifact on them, copied off."""
    check_base(artifact, base.checkpoint)
    path = artifact.path

    def read() -> Tensors:
        with SparseDelta(path) as artifact, apply(base.table, artifact):
            state = {}
            for record in artifact.index.tensors:
                name = artifact.prefix.base_name(record.info.name)
                ours = name if name is not None and name in base.table else record.info.name
                state[record.info.name] = base.table[ours].clone()
        return state

    shapes = {record.info.name: record.info.shape for record in artifact.index.tensors}
    return EvalModel(label, shapes, side_files(artifact, base.checkpoint)[0], size_of(path), read)


def _packed(pack: Pack, task: str, base: Base, label: str) -> EvalModel:
    """What a pack gives back of a task."""
    retrieval = Retrieval(pack, pack.task(task or None))
    path, name = pack.path, retrieval.task.name
    shapes = {info.name: info.shape for info in retrieval.tensors()}
    return EvalModel(label, shapes, retrieval.side_files(base.checkpoint)[0], size_of(path), lambda: base.task_tensors(path, name))


def _with_head(merge: EvalModel, folder: Place, task: str) -> EvalModel:
    """A merge under one task's head."""
    known = [file.name.removesuffix(".safetensors") for file in children(folder, "*.safetensors")]
    if task not in known:
        said = f"{merge.label} has no head for {task!r}" if task else f"{merge.label} has a head for each task"
        raise UsageError(said, f"name the task of the data: --data TASK=FILE; it has {', '.join(known) or 'none'}")
    file = folder / f"{check_task(task)}.safetensors"
    with open_file(file, str(file)) as head:
        shapes = {name: info.shape for name, info in head.tensors.items()}
    under = merge.read

    def read() -> Tensors:
        with open_file(file, str(file)) as head:
            return under() | read_tensors(head)

    return replace(merge, shapes=merge.shapes | shapes, read=read, own_head=False, head_bytes=size_of(file))
