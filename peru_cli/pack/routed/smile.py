"""`peru shuffle-pack --method smile`: the plan, and one pass that factors every layer's task vectors and writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peru_cli.artifacts.packs.routed import RoutedWriter
from peru_cli.artifacts.packs.smile import METHOD, ExpertRecord, RoutedLayer, SmileIndex, encode_smile
from peru_cli.checkpoints.lora.writer import as_bytes, round_to
from peru_cli.checkpoints.pairing import Pair
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import plural
from peru_cli.errors import Mismatch, UsageError
from peru_cli.methods.compact.smile import expert_factors
from peru_cli.pack.routed.plan import Given, Kept, Method, RoutedPlan, RoutedResult, most_common, plan_tasks, record_tasks, report_of
from peru_cli.shown import listed
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings
from peru_cli.vectors.task_matrix import TaskMatrix


@dataclass(frozen=True)
class SmileOptions:
    """Ranks of experts and routers, and how many tasks answer together. `given` says which layers are routed.

    Experts have the dtype of `given`, or else that of most layers."""

    rank: int = 16
    gate: int = 4
    top: int = 1
    given: Given = field(default_factory=Given)


@dataclass
class SmilePlan(RoutedPlan):
    """`rest` stays as in the base."""

    layers: list[RoutedLayer] = field(default_factory=list)
    options: SmileOptions = field(default_factory=SmileOptions)

    def expert_bytes(self) -> int:
        """The most that one task's experts can take."""
        numbers = 0
        for layer in self.layers:
            rank = min(self.options.rank, layer.inputs, layer.outputs)
            numbers += rank * (layer.inputs + layer.outputs) + (layer.outputs if layer.bias is not None else 0)
        return self.dtype.nbytes(numbers)


def plan_smile(base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], options: SmileOptions) -> SmilePlan:
    """Plan the artifact. Mismatch reports all problems at once; UsageError for impossible options."""
    if options.gate > options.rank:
        raise UsageError(f"--gate-rank {options.gate} is more than --rank {options.rank}", "the router uses the expert's first directions")
    if options.top > len(tasks):
        raise UsageError(f"--top-k {options.top} of {len(tasks)} tasks")
    fields, infos, linear = plan_tasks(base, tasks, options.given)
    layers = [RoutedLayer(layer.weight, layer.bias, layer.transposed) for layer in linear]
    if not layers:
        raise Mismatch(f"{base.label} has no linear layer that the models share", "SMILE gives experts to linear layers only")
    held = {info.name for layer in layers for info in layer.held}
    named = {"peru.rank": str(options.rank), "peru.gate": str(options.gate), "peru.top": str(options.top)}
    dtype = options.given.dtype or most_common(layers)
    return SmilePlan(**fields, rest=sorted(set(infos) - held), dtype=dtype, metadata=named, layers=layers, options=options)


@dataclass
class _Part:
    """One item of the pass: an expert, or a tensor whose difference is only measured."""

    task: int
    pair: Pair
    layer: RoutedLayer | None = None
    bias: Pair | None = None


class _Factor:
    """The pass. A tile is one layer of one task, or a tensor that stays as in the base."""

    def __init__(self, plan: SmilePlan, writer: RoutedWriter, how: StreamSettings) -> None:
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
            part.layer.experts = [ExpertRecord(rank, self._writer.append_block(data)) for data, rank, _ in waiting]
        else:  # no task changes the weight, so there is nothing to choose by: the layer stays as in the base, with its bias
            self.squared_error = [error + held for error, (_, _, held) in zip(self.squared_error, waiting, strict=True)]

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


def make_smile(
    plan: SmilePlan, target: Path, how: StreamSettings, sync: bool, note: Callable[[str], None] = lambda text: None
) -> RoutedResult:
    """Write the artifact. BadFile for values that cannot be factored."""
    note("factoring")
    with RoutedWriter(target, METHOD, plan.metadata, sync) as writer:
        step = _Factor(plan, writer, how)
        run(step, step.tiles(), how.threads, how.advance)
        plan.layers = [layer for layer in plan.layers if layer.experts]
        if not plan.layers:
            raise Mismatch(f"no linear layer of the models differs from {plan.base.label}", "routed experts hold linear layers only")
        note("digesting")
        kept = [Kept(squared, lost) for squared, lost in zip(step.squared, step.squared_error, strict=True)]
        pack, contents = record_tasks(plan, kept, writer)
        nbytes = writer.finish(encode_smile(SmileIndex(pack, plan.dtype, plan.layers)), contents)
    sizes = [sum(plan.dtype.nbytes(layer.numbers(number)) for layer in plan.layers) for number in range(len(pack.tasks))]
    return RoutedResult(target, nbytes, len(plan.layers), [report_of(task, size) for task, size in zip(pack.tasks, sizes, strict=True)])


class Chosen(Method[SmilePlan]):
    """SMILE as the command line asks for it."""

    blocks = "experts"

    def __init__(self, given: Given) -> None:
        default, options = SmileOptions(), given.options
        rank = options.get("--rank") or default.rank
        self.options = SmileOptions(
            rank, options.get("--gate-rank") or min(default.gate, rank), options.get("--top-k") or default.top, given
        )

    def plan(self, base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]]) -> SmilePlan:
        return plan_smile(base, tasks, self.options)

    def most_bytes(self, plan: SmilePlan) -> int:
        return len(plan.vectors) * plan.expert_bytes()

    def say(self, plan: SmilePlan) -> list[str]:
        chosen = plan.options
        said = [f"{plural(len(plan.layers), 'linear layer')}: rank {chosen.rank}, router of {chosen.gate} directions, top {chosen.top}"]
        return said + ([f"{plural(len(plan.rest), 'other tensor')} stay as in the base: {listed(plan.rest)}"] if plan.rest else [])

    def planned(self, plan: SmilePlan) -> dict[str, Any]:
        names = [layer.weight.name for layer in plan.layers]
        return {"layers": names, "as_in_base": plan.rest, "expert_bytes": plan.expert_bytes()}

    def make(self, plan: SmilePlan, target: Path, how: StreamSettings, sync: bool, note: Callable[[str], None]) -> RoutedResult:
        return make_smile(plan, target, how, sync, note)
