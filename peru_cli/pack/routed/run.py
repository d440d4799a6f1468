"""`peru shuffle-pack --method smile`: the plan, and one pass that factors every layer's task vectors and writes them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from peru_cli.artifacts.packs.routed import FACTOR_DTYPES, ExpertRecord, RoutedIndex, RoutedLayer, RoutedWriter
from peru_cli.artifacts.packs.superposed import PackedTensor, PackIndex, PackMode, TaskRecord, TaskTensor
from peru_cli.checkpoints.architectures import is_output, is_tied
from peru_cli.checkpoints.digests import SHORT, checkpoint_digest
from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.module import LINEAR
from peru_cli.checkpoints.lora.writer import as_bytes, round_to
from peru_cli.checkpoints.pairing import Pair
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch, UsageError
from peru_cli.lora.extract_plan import weight_of
from peru_cli.merge.plan import Options, check_same, plan_merge
from peru_cli.methods.compact.smile import expert_factors
from peru_cli.methods.compact.superpose import MOST_TASKS
from peru_cli.pack.seal import decimal, side_file
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings, TaskVector
from peru_cli.vectors.task_matrix import TaskMatrix


@dataclass(frozen=True)
class RoutedOptions:
    """Ranks of experts and routers, how many tasks answer together, and which layers are routed.

    `dtype` is that of the experts; without it, that of most layers."""

    rank: int = 16
    gate: int = 4
    top: int = 1
    target: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    per_task: str | None = None
    dtype: Dtype | None = None


@dataclass
class RoutedPlan:
    """What is written, from headers alone. `rest` are pairs with a difference that no layer holds: they stay as in the base."""

    base: Checkpoint
    vectors: list[TaskVector]
    tensors: list[PackedTensor]
    layers: list[RoutedLayer]
    rest: list[str]
    heads: dict[str, list[TensorInfo]]
    same: dict[str, list[Pair]]
    options: RoutedOptions
    dtype: Dtype
    metadata: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def entries(self) -> int:
        """Entries that one task's pass reads."""
        return sum(tensor.info.entries for tensor in self.tensors if tensor.info.dtype.compressible)

    def expert_bytes(self) -> int:
        """The most that one task's experts can take."""
        numbers = 0
        for layer in self.layers:
            rank = min(self.options.rank, layer.inputs, layer.outputs)
            numbers += rank * (layer.inputs + layer.outputs) + (layer.outputs if layer.bias is not None else 0)
        return self.dtype.nbytes(numbers)


@dataclass
class TaskReport:
    """What was written for a task. `error` and `cosine` compare its whole task vector with what its experts hold."""

    name: str
    norm: float
    error: float
    cosine: float
    expert_bytes: int
    whole_bytes: int


@dataclass
class RoutedResult:
    """What was written."""

    path: Path
    file_bytes: int
    layers: int
    tasks: list[TaskReport]


def plan_routed(base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], options: RoutedOptions) -> RoutedPlan:
    """Plan the artifact. Mismatch reports all problems at once; UsageError for impossible options."""
    if len(tasks) > MOST_TASKS:
        raise UsageError(f"{len(tasks)} tasks are too many: an artifact holds at most {MOST_TASKS}")
    if options.gate > options.rank:
        raise UsageError(f"--gate-rank {options.gate} is more than --rank {options.rank}", "the router uses the expert's first directions")
    if options.top > len(tasks):
        raise UsageError(f"--top-k {options.top} of {len(tasks)} tasks")
    merged = plan_merge(base, sorted(tasks), True, Options(options.per_task, dtype=options.dtype, verb="packed"))
    config, infos = base.config(), {slot.base.name: slot.base for slot in merged.slots}
    layers, held = [], set[str]()
    for info in infos.values():
        weight = weight_of(info.name, Pair(info, info), config)
        if weight is None or weight.kind != LINEAR or (is_output(info.name) and is_tied(config)) or not _is_wanted(info.name, options):
            continue
        bias = infos.get(weight.name + ".bias")
        bias = bias if bias is not None and bias.shape == (weight.rows,) else None
        layers.append(RoutedLayer(info, bias, weight.transposed, []))
        held |= {info.name} | ({bias.name} if bias is not None else set())
    if not layers:
        raise Mismatch(f"{base.label} has no linear layer that the models share", "SMILE gives experts to linear layers only")
    shared = infos | {pair.base.name: pair.base for pair in merged.same}  # the latter once for each task
    tensors = [PackedTensor(info, PackMode.BASE, info.dtype) for info in shared.values()]
    named = {"peru.rank": str(options.rank), "peru.gate": str(options.gate), "peru.top": str(options.top)}
    return RoutedPlan(
        base, merged.vectors, sorted(tensors, key=lambda tensor: tensor.info.name), sorted(layers, key=lambda layer: layer.weight.name),
        sorted(set(infos) - held), merged.heads,
        {v.name: [p for p in merged.same if v.fine.tensors.get(p.fine.name) is p.fine] for v in merged.vectors},
        options, options.dtype or _dtype_of(layers), named, check_same(merged),
    )  # fmt: skip


def _is_wanted(name: str, options: RoutedOptions) -> bool:
    if options.target is not None and not options.target.search(name):
        return False
    return options.exclude is None or not options.exclude.search(name)


def _dtype_of(layers: Sequence[RoutedLayer]) -> Dtype:
    """The dtype of most layers, or float32 if that is wider."""
    dtypes = [layer.weight.dtype for layer in layers]
    most = max(dict.fromkeys(dtypes), key=dtypes.count)
    return most if most.name in FACTOR_DTYPES else BY_NAME["F32"]


@dataclass
class _Part:
    """One item of the pass: an expert, or a tensor whose difference is only measured."""

    task: int
    pair: Pair
    layer: RoutedLayer | None = None
    bias: Pair | None = None


class _Factor:
    """The pass. A tile is one layer of one task, or a tensor that stays as in the base."""

    def __init__(self, plan: RoutedPlan, writer: RoutedWriter, how: StreamSettings) -> None:
        self._plan, self._writer, self._device = plan, writer, torch.device(how.xp.name)
        self.parts: list[_Part] = []
        for layer in plan.layers:
            for number, vector in enumerate(plan.vectors):
                bias = vector.pairs.get(layer.bias.name) if layer.bias is not None else None
                self.parts.append(_Part(number, vector.pairs[layer.weight.name], layer, bias))
        for name in plan.rest:
            pairs = ((number, vector.pairs.get(name)) for number, vector in enumerate(plan.vectors))
            self.parts += [_Part(number, pair) for number, pair in pairs if pair is not None]
        self.squared = [0.0] * len(plan.vectors)
        self.squared_error = [0.0] * len(plan.vectors)
        self._waiting: list[tuple[bytes, int, float]] = []  # the experts of one layer: block, rank, squared norm of its task vector

    def tiles(self) -> list[Tile]:
        """One tile for each part."""
        return [Tile(i, i, 0, part.pair.entries) for i, part in enumerate(self.parts)]

    def buffers(self) -> None:
        return None

    def apply(self, tile: Tile, buffers: None) -> tuple[bytes, int, float, float]:
        """The expert's block and rank; the squared norm of the task vector there, and of what the expert loses of it."""
        part = self.parts[tile.tensor]
        if part.layer is None:
            squared = float(self._difference(part, part.pair).square().sum())
            return b"", 0, squared, squared
        plan, layer, fine = self._plan, part.layer, self._plan.vectors[part.task].fine
        rows, columns = layer.weight.shape
        matrix = TaskMatrix(fine, plan.base, part.pair, rows, columns, 0, self._device)
        name = layer.weight.name

        def stored(tensor: torch.Tensor) -> torch.Tensor:
            return round_to(tensor, plan.dtype, name).double()

        found = expert_factors(matrix, plan.options.rank, layer.transposed, stored, name)
        squared, squared_error = found.squared, found.squared_error
        pieces = [found.right, found.left.T]
        if layer.bias is not None:
            difference = self._difference(part, part.bias) if part.bias is not None else torch.zeros(layer.outputs)
            squared += float(difference.square().sum())
            pieces.append(difference)
        data = b"".join(bytes(as_bytes(round_to(piece.double().cpu(), plan.dtype, name))) for piece in pieces)
        return data, len(found.right), squared, squared_error

    def _difference(self, part: _Part, pair: Pair) -> torch.Tensor:
        """Fine-tune minus base of a whole tensor, float64 (n,)."""
        matrix = TaskMatrix(self._plan.vectors[part.task].fine, self._plan.base, pair, pair.entries, 1, 0, torch.device("cpu"))
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(panel.view(-1).double() for _, panel in matrix.row_panels())])

    def commit(self, tile: Tile, result: tuple[bytes, int, float, float]) -> None:
        data, rank, squared, squared_error = result
        part = self.parts[tile.tensor]
        self.squared[part.task] += squared
        self.squared_error[part.task] += squared_error
        if part.layer is None:
            return
        self._waiting.append((data, rank, squared - squared_error))
        if len(self._waiting) < len(self.squared):
            return
        waiting, self._waiting = self._waiting, []
        if any(rank for _, rank, _ in waiting):
            part.layer.experts = [ExpertRecord(rank, self._writer.append_expert(data)) for data, rank, _ in waiting]
        else:  # no task changes the weight, so there is nothing to choose by: the layer stays as in the base, with its bias
            self.squared_error = [error + held for error, (_, _, held) in zip(self.squared_error, waiting, strict=True)]

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


def make_routed(
    plan: RoutedPlan, target: Path, how: StreamSettings, sync: bool, note: Callable[[str], None] = lambda text: None
) -> RoutedResult:
    """Write the artifact. BadFile for values that cannot be factored."""
    note("factoring")
    contents: dict[bytes, bytes] = {}
    with RoutedWriter(target, plan.metadata, sync) as writer:
        step = _Factor(plan, writer, how)
        run(step, step.tiles(), how.threads, how.advance)
        plan.layers = [layer for layer in plan.layers if layer.experts]
        if not plan.layers:
            raise Mismatch(f"no linear layer of the models differs from {plan.base.label}", "routed experts hold linear layers only")
        note("digesting")
        for tensor in plan.tensors:
            tensor.base_digest = plan.base.digest(tensor.info.name)[:SHORT]
            plan.base.agree({tensor.info.name: tensor.base_digest})
        tasks = [_record(plan, step, number, contents) for number in range(len(plan.vectors))]
        for task, vector in zip(tasks, plan.vectors, strict=True):
            for own in task.tensors:
                vector.fine.digest(own.info.name, writer.append_whole)
        stored = sorted(contents.items())
        pack = PackIndex([], plan.tensors, [], tasks, [(len(content), digest) for digest, content in stored])
        nbytes = writer.finish(RoutedIndex(pack, plan.dtype, plan.layers), [content for _, content in stored])
    reports = []
    for number, task in enumerate(tasks):
        experts = sum(plan.dtype.nbytes(layer.numbers(number)) for layer in plan.layers)
        reports.append(TaskReport(task.name, float(task.norm), float(task.error), float(task.cosine), experts, task.whole_bytes))
    return RoutedResult(target, nbytes, len(plan.layers), reports)


def _record(plan: RoutedPlan, step: _Factor, number: int, contents: dict[bytes, bytes]) -> TaskRecord:
    vector, squared = plan.vectors[number], step.squared[number]
    lost = min(step.squared_error[number] / squared, 1.0) if squared else 0.0
    heads = sorted(plan.heads[vector.name], key=lambda info: info.name)
    pairs = [*vector.pairing.pairs, *plan.same[vector.name]]
    digests = {name: vector.fine.digest(name) for name in [*(pair.fine.name for pair in pairs), *(info.name for info in heads)]}
    record = TaskRecord(
        vector.name, vector.pairing.prefix, 0, checkpoint_digest(digests), len(plan.vectors),
        decimal(math.sqrt(squared), 6), decimal(math.sqrt(lost)), decimal(math.sqrt(1 - lost)),
    )  # fmt: skip
    record.tensors = [TaskTensor(info, digests[info.name][:SHORT]) for info in heads]
    of_base = plan.base.side_files
    record.files = [
        side_file(name, place.read_bytes(), of_base[name].read_bytes() if name in of_base else None, contents)
        for name, place in sorted(vector.fine.side_files.items())
    ]
    return record
