"""What `peru eval` looks at: models, adapters, artifacts and merges as tensors in memory, under their checkpoint's names.

Nothing is written: an artifact is put onto the base's tensors (jobs/live.py), copied off, and taken away again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from peru_cli.artifacts.container import artifact_kind, is_artifact
from peru_cli.artifacts.pack import Pack
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.artifacts.superposed import KIND as PACK
from peru_cli.checkpoints.adapterexpand import LoraCheckpoint
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import open_file
from peru_cli.checkpoints.places import size_of
from peru_cli.checkpoints.resolve import check_task, open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError
from peru_cli.evaluation.data import Examples
from peru_cli.evaluation.models import TEXT, Inputs, build_model, encode, fit_labels, kind_of, load_config
from peru_cli.jobs.expand import Overlaid, open_fine_tune
from peru_cli.jobs.live import apply
from peru_cli.jobs.packplan import check_pack_base
from peru_cli.jobs.retrieve import Retrieval
from peru_cli.jobs.unpack import check_base, side_files

HEADS = "heads"  # beside a merge: OUT/heads/TASK.safetensors
_CONFIG = re.compile(r"(generation_)?config\.json")
_PROCESSOR = re.compile(r"(pre)?processor_config\.json")
_TOKENIZER = re.compile(r"(tokenizer|vocab|merges|special_tokens|added_tokens|bpe|chat_template).*|.*\.(model|spm|tiktoken)")


@dataclass
class Subject:
    """A model in memory: tensors as its checkpoint names them, side files, and the bytes that it takes on the disk."""

    label: str
    state: dict[str, torch.Tensor]
    files: dict[str, bytes]
    nbytes: int
    head_bytes: int = 0  # of the task's head beside a merge, which `nbytes` leaves out
    own_head: bool = True  # False where a task's head was put onto a merge, whose config counts another one


class Base:
    """A base whose tensors are read once, when first needed."""

    def __init__(self, model: str) -> None:
        self.checkpoint = open_model(model)

    @cached_property
    def table(self) -> dict[str, torch.Tensor]:
        """All tensors, in the dtypes of the files."""
        return read_tensors(self.checkpoint)


def read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors in memory. BadFile for dtypes that torch lacks."""
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


def open_subject(model: str, task: str, base: Base | None) -> Subject:
    """Read what a user names.

    Args:
        model: a checkpoint, a merge with heads, a LoRA adapter, an artifact or a pack; the last three need a base.
        task: whose head is taken where a merge has several; "" where tasks have no names.

    Raises:
        UsageError: no such file, no base where one is needed, or a merge without a head for this task.
        Mismatch: the base is another one. BadFile: a file is damaged.
    """
    path = Path(model)
    if is_artifact(path):
        if base is None:
            raise UsageError(f"{model} is a peru artifact: it needs its base", "add --base BASE")
        if artifact_kind(path) == PACK:
            with Pack(path) as pack:
                return _retrieved(pack, task, base, model)
        with SparseDelta(path) as artifact:
            return _applied(artifact, base, model)
    with open_fine_tune(model, None if base is None else base.checkpoint) as opened:
        state = read_tensors(opened)
        if isinstance(opened, (LoraCheckpoint, Overlaid)):
            state = {opened.fine_name(name): tensor for name, tensor in state.items()}
        files = {name: file.read_bytes() for name, file in opened.side_files.items()}
        adapter = isinstance(opened, (LoraCheckpoint, Overlaid))
        mine = [f for f in opened.files if not adapter or base is None or f not in base.checkpoint.files]
    subject = Subject(model, state, files, sum(size_of(file) for file in set(mine)))
    return _with_head(subject, path / HEADS, task) if (path / HEADS).is_dir() else subject


def _applied(artifact: SparseDelta, base: Base, label: str) -> Subject:
    """The fine-tune of an artifact: the base's tensors with the artifact on them, copied off."""
    check_base(artifact, base.checkpoint)
    with apply(base.table, artifact):
        state = {}
        for record in artifact.index.tensors:
            name = artifact.prefix.base_name(record.info.name)
            ours = name if name is not None and name in base.table else record.info.name
            state[record.info.name] = base.table[ours].clone()
    files, _ = side_files(artifact, base.checkpoint)
    return Subject(label, state, files, size_of(artifact.path))


def _retrieved(pack: Pack, task: str, base: Base, label: str) -> Subject:
    """What a pack gives back of a task: the base's tensors with it on them, copied off."""
    retrieval = Retrieval(pack, pack.task(task or None))
    check_pack_base(pack, base.checkpoint)
    fine_name = retrieval.task.fine_name
    with apply(base.table, pack, task=retrieval.task.name):
        state = {fine_name(record.info.name): base.table[record.info.name].clone() for record in pack.index.tensors}
        for name in (tensor.info.name for tensor in retrieval.task.tensors):
            ours = name if name in base.table else next(key for key in base.table if fine_name(key) == name)
            state[name] = base.table[ours].clone()
    files, _ = retrieval.side_files(base.checkpoint)
    return Subject(label, state, files, size_of(pack.path))


def _with_head(merge: Subject, folder: Path, task: str) -> Subject:
    """A merge under one task's head."""
    known = sorted(file.stem for file in folder.glob("*.safetensors"))
    if task not in known:
        said = f"{merge.label} has no head for {task!r}" if task else f"{merge.label} has a head for each task"
        raise UsageError(said, f"name the task of the data: --data TASK=FILE; it has {', '.join(known) or 'none'}")
    file = folder / f"{check_task(task)}.safetensors"
    with open_file(file, str(file)) as head:
        merge.state |= read_tensors(head)
    merge.own_head = False
    merge.head_bytes = size_of(file)
    return merge


def fill_files(own: Mapping[str, bytes], others: Sequence[Mapping[str, bytes]]) -> dict[str, bytes]:
    """Side files of a model, and what it lacks from the first other that has it: config, processor, and the tokenizer whole."""
    found: dict[str, bytes] = {}
    for part in (_CONFIG, _PROCESSOR, _TOKENIZER):
        for files in (own, *others):
            if chosen := {name: content for name, content in files.items() if part.fullmatch(name)}:
                found |= chosen
                break
    return found


@dataclass(frozen=True)
class Settings:
    """How models run: the dtype that they compute in, where, and the window of language models (tokens)."""

    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    context: int | None = None
    attention: str | None = None  # transformers' attn_implementation
    threads: int | None = None  # on the CPU; None chooses by the model's size


@dataclass
class Loaded:
    """A model that is ready to run and the examples as it takes them; `kind` as evaluation/models.py has them."""

    label: str
    kind: str
    model: Any
    inputs: Inputs
    reading: object  # what decided the inputs besides the examples


def load(
    subject: Subject, examples: Examples, others: Sequence[Mapping[str, bytes]], settings: Settings, like: Loaded | None = None
) -> Loaded:
    """Build a subject's model and encode examples for it.

    Args:
        others: side files to fall back on, of what it is compared with and of its base. A merge under a task's head
            takes the config of the first of them, if there is one: its own counts the labels of no head.
        like: has read the same examples already; they are not encoded again if that would give the same.

    Raises BadFile or Mismatch, before any forward pass, for everything that does not fit.
    """
    own = dict(subject.files)
    if not subject.own_head and any("config.json" in files for files in others):
        own.pop("config.json", None)
    files = fill_files(own, others)
    config = load_config(files, subject.label)
    kind = kind_of(examples, config, subject.label)
    fit_labels(config, kind, subject.state)
    reading = [kind, *(getattr(config, name, None) for name in ("model_type", "max_position_embeddings", "image_size", "num_channels"))]
    reading.append({name: content for name, content in files.items() if not _CONFIG.fullmatch(name)})
    if like is not None and like.reading == reading:
        inputs = like.inputs
        if kind == TEXT and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = like.model.config.pad_token_id
    else:
        inputs = encode(examples, files, config, kind, subject.label, settings.context)
    model = build_model(
        subject.state, config, kind, subject.label, dtype=settings.dtype, device=settings.device, attention=settings.attention
    )
    return Loaded(subject.label, kind, model, inputs, reading)
