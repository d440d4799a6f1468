"""What every method that routes plans and writes alike: tasks, their own tensors, the base's tensors, linear layers."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from peru_cli.artifacts.packs.routed import FLOATS, LinearLayer, RoutedWriter
from peru_cli.artifacts.packs.superposed import PackedTensor, PackIndex, PackMode, TaskRecord, TaskTensor
from peru_cli.checkpoints.architectures import is_output, is_tied
from peru_cli.checkpoints.digests import SHORT, checkpoint_digest
from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.module import LINEAR
from peru_cli.checkpoints.pairing import Pair
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.lora.extract_plan import weight_of
from peru_cli.merge.plan import Options, check_same, plan_merge
from peru_cli.methods.compact.superpose import MOST_TASKS
from peru_cli.pack.seal import decimal, side_file
from peru_cli.vectors.family import StreamSettings, TaskVector


@dataclass(frozen=True)
class Given:
    """What the command line says: options by name (None: not typed), which layers by name, heads, and a dtype."""

    options: Mapping[str, Any] = field(default_factory=dict)
    target: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    per_task: str | None = None
    dtype: Dtype | None = None

    def wants(self, name: str) -> bool:
        """Whether --target and --exclude let a layer be routed."""
        if self.target is not None and not self.target.search(name):
            return False
        return self.exclude is None or not self.exclude.search(name)


@dataclass
class RoutedPlan:
    """What is written, from headers alone. `rest` are pairs with a difference that no layer holds; `metadata` are a method's own keys."""

    base: Checkpoint
    vectors: list[TaskVector]
    tensors: list[PackedTensor]
    rest: list[str]
    heads: dict[str, list[TensorInfo]]
    same: dict[str, list[Pair]]
    dtype: Dtype
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def entries(self) -> int:
        """Entries that one task's pass reads."""
        return sum(tensor.info.entries for tensor in self.tensors if tensor.info.dtype.compressible)

    @property
    def own_bytes(self) -> int:
        """Bytes of tasks' own tensors."""
        return sum(info.nbytes for heads in self.heads.values() for info in heads)


@dataclass
class TaskReport:
    """What was written for a task. `norm` is that of its task vector; `error` and `cosine` compare that with what is stored of it."""

    name: str
    norm: float
    error: float
    cosine: float
    nbytes: int
    whole_bytes: int


@dataclass
class RoutedResult:
    """What was written. `layers` counts linear layers; `more` is a method's own, for --json."""

    path: Path
    file_bytes: int
    layers: int
    tasks: list[TaskReport]
    more: dict[str, Any] = field(default_factory=dict)


P = TypeVar("P", bound=RoutedPlan)


class Method(ABC, Generic[P]):
    """One method, with its options. Each module of this folder that the table names has one, called `Chosen`."""

    blocks = "blocks"  # what its blocks are called in tables

    @abstractmethod
    def __init__(self, given: Given) -> None:
        """UsageError for impossible options."""

    @abstractmethod
    def plan(self, base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]]) -> P:
        """Plan the artifact. Mismatch reports all problems at once; UsageError for options that do not fit."""

    @abstractmethod
    def most_bytes(self, plan: P) -> int:
        """The most that its blocks can take."""

    @abstractmethod
    def say(self, plan: P) -> list[str]:
        """What is routed and how, in lines."""

    @abstractmethod
    def planned(self, plan: P) -> dict[str, Any]:
        """The same for --json of a dry run."""

    @abstractmethod
    def make(self, plan: P, target: Path, how: StreamSettings, sync: bool, note: Callable[[str], None]) -> RoutedResult:
        """Write the artifact."""


def plan_tasks(
    base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], given: Given
) -> tuple[dict[str, Any], dict[str, TensorInfo], list[LinearLayer]]:
    """The fields of a RoutedPlan that all methods share, the floating tensors that the models share, and its linear layers, by name."""
    if len(tasks) > MOST_TASKS:
        raise UsageError(f"{len(tasks)} tasks are too many: an artifact holds at most {MOST_TASKS}")
    merged = plan_merge(base, sorted(tasks), True, Options(given.per_task, dtype=given.dtype, verb="packed"))
    config, infos = base.config(), {slot.base.name: slot.base for slot in merged.slots}
    layers = []
    for info in infos.values():
        weight = weight_of(info.name, Pair(info, info), config)
        if weight is None or weight.kind != LINEAR or (is_output(info.name) and is_tied(config)) or not given.wants(info.name):
            continue
        bias = infos.get(weight.name + ".bias")
        layers.append(LinearLayer(info, bias if bias is not None and bias.shape == (weight.rows,) else None, weight.transposed))
    shared = infos | {pair.base.name: pair.base for pairs in merged.same.values() for pair in pairs}
    tensors = [PackedTensor(info, PackMode.BASE, info.dtype) for info in shared.values()]
    fields = {
        "base": base,
        "vectors": merged.vectors,
        "tensors": sorted(tensors, key=lambda tensor: tensor.info.name),
        "heads": merged.heads,
        "same": {vector.name: merged.same.get(vector.name, []) for vector in merged.vectors},
        "warnings": check_same(merged),
    }
    return fields, infos, sorted(layers, key=lambda layer: layer.weight.name)


def most_common(layers: Sequence[LinearLayer]) -> Dtype:
    """The dtype of most layers, or float32 if that is wider."""
    dtypes = [layer.weight.dtype for layer in layers]
    most = max(dict.fromkeys(dtypes), key=dtypes.count)
    return most if most.name in FLOATS else BY_NAME["F32"]


@dataclass
class Kept:
    """Of one task: the squared norms of its task vector and of what is lost of it, and the cosine; None for a projection."""

    squared: float
    lost: float
    cosine: float | None = None


def record_tasks(plan: RoutedPlan, kept: Sequence[Kept], writer: RoutedWriter) -> tuple[PackIndex, list[bytes]]:
    """Digest base and fine-tunes and append tasks' own tensors, after all blocks. The index of the pack, and the side files to store."""
    contents: dict[bytes, bytes] = {}
    for tensor in plan.tensors:
        tensor.base_digest = plan.base.digest(tensor.info.name)[:SHORT]
        plan.base.agree({tensor.info.name: tensor.base_digest})
    tasks = [_record(plan, number, one, contents) for number, one in enumerate(kept)]
    for task, vector in zip(tasks, plan.vectors, strict=True):
        for own in task.tensors:
            vector.fine.digest(own.info.name, writer.append_whole)
    stored = sorted(contents.items())
    pack = PackIndex([], plan.tensors, [], tasks, [(len(content), digest) for digest, content in stored])
    return pack, [content for _, content in stored]


def _record(plan: RoutedPlan, number: int, kept: Kept, contents: dict[bytes, bytes]) -> TaskRecord:
    vector = plan.vectors[number]
    lost = min(kept.lost / kept.squared, 1.0) if kept.squared else 0.0
    cosine = math.sqrt(1 - lost) if kept.cosine is None else kept.cosine
    heads = sorted(plan.heads[vector.name], key=lambda info: info.name)
    pairs = [*vector.pairing.pairs, *plan.same[vector.name]]
    digests = {name: vector.fine.digest(name) for name in [*(pair.fine.name for pair in pairs), *(info.name for info in heads)]}
    record = TaskRecord(
        vector.name, vector.pairing.prefix, 0, checkpoint_digest(digests), len(plan.vectors),
        decimal(math.sqrt(kept.squared), 6), decimal(math.sqrt(lost)), decimal(cosine),
    )  # fmt: skip
    record.tensors = [TaskTensor(info, digests[info.name][:SHORT]) for info in heads]
    of_base = plan.base.side_files
    record.files = [
        side_file(name, place.read_bytes(), of_base[name].read_bytes() if name in of_base else None, contents)
        for name, place in sorted(vector.fine.side_files.items())
    ]
    return record


def report_of(task: TaskRecord, nbytes: int) -> TaskReport:
    """A task's report."""
    return TaskReport(task.name, float(task.norm), float(task.error), float(task.cosine), nbytes, task.whole_bytes)
