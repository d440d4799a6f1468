"""`peru shuffle-pack --method wemoe`: task arithmetic for all but the MLPs, whose differences trained routers weigh."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.artifacts.mixed.reader import Mixed
from peru_cli.artifacts.packs.routed import FLOATS, RoutedWriter
from peru_cli.artifacts.packs.superposed import PackIndex
from peru_cli.artifacts.packs.wemoe import METHOD, GatedMlp, Seen, WemoeIndex, encode_wemoe, known_numbers
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.lora.writer import as_bytes, round_to
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import plural, si_bytes
from peru_cli.errors import Mismatch, UsageError
from peru_cli.inference.task_models import Running, check_fine_tune, read_data
from peru_cli.methods.compact.wemoe import Router
from peru_cli.pack.routed.mlps import find_mlps
from peru_cli.pack.routed.plan import Given, Kept, Method, RoutedPlan, RoutedResult, plan_tasks, record_tasks, report_of
from peru_cli.pack.routed.train import Trained, Training, train
from peru_cli.pack.routed.views import Some, Summed, vector_of
from peru_cli.prune.artifact import PruneTask
from peru_cli.prune.mixed.goal import Goal
from peru_cli.prune.mixed.run import MixedResult, prune_mixed
from peru_cli.vectors.family import StreamSettings

_REST = "rest"  # what the first difference calls its task


@dataclass(frozen=True)
class WemoeOptions:
    """`scale` is lambda, `depth` the number of layers of a router, `bits` what differences may take for each of their entries."""

    scale: float = 0.3
    depth: int = 2
    bits: float = 0.3
    training: Training = field(default_factory=Training)


@dataclass
class WemoePlan(RoutedPlan):
    """`rest` is summed at the scale. `examples` are those of each task, or None if nothing is trained."""

    mlps: list[GatedMlp] = field(default_factory=list)
    examples: Running | None = None

    @property
    def gated(self) -> list[str]:
        """Names of the MLPs' tensors, in canonical order."""
        return sorted(info.name for mlp in self.mlps for layer in mlp.layers for info in layer.held)

    @property
    def difference_entries(self) -> int:
        """Entries of all differences: of the rest, and of every task's MLPs."""
        sizes = {tensor.info.name: tensor.info.entries for tensor in self.tensors}
        return sum(sizes[name] for name in self.rest) + len(self.vectors) * sum(sizes[name] for name in self.gated)


class Chosen(Method[WemoePlan]):
    """WEMoE as the command line asks for it."""

    blocks = "MLPs"

    def __init__(self, given: Given) -> None:
        typed = {name: value for name, value in given.options.items() if value is not None}
        self.given = given
        default, how = WemoeOptions(), Training()
        self.options = WemoeOptions(
            _scale(typed.get("--scale", str(default.scale))), typed.get("--router-layers", default.depth),
            typed.get("--bits", default.bits),
            Training(
                typed.get("--steps", how.steps), typed.get("--learning-rate", how.rate), typed.get("--batch-size", how.batch),
                typed.get("--seed", how.seed),
            ),
        )  # fmt: skip
        if self.options.depth not in (1, 2):
            raise UsageError(f"--router-layers {self.options.depth} is not 1 or 2")
        if not (math.isfinite(self.options.training.rate) and self.options.training.rate > 0):
            raise UsageError("--learning-rate should be a number above 0")
        if not 0 < self.options.bits <= 64:
            raise UsageError(f"--bits {self.options.bits:g} is not a number above 0 and at most 64")
        if given.dtype is not None and given.dtype.name not in FLOATS:
            raise UsageError("routers are stored as bf16, fp16 or fp32", "choose one of them with --dtype")
        if self.options.training.steps and not typed.get("--data"):
            raise UsageError("routers are trained on inputs of every task, without labels", "add --data TASK=FILE for each, or --steps 0")

    def plan(self, base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]]) -> WemoePlan:
        options, given = self.options, self.given
        fields, infos, layers = plan_tasks(base, tasks, given)
        mlps = find_mlps(layers, given.target is not None, base.label)
        held = {info.name for mlp in mlps for layer in mlp.layers for info in layer.held}
        named = {
            "peru.scale": repr(options.scale),
            "peru.layers": str(options.depth),
            "peru.bits": repr(float(options.bits)),
            "peru.steps": str(options.training.steps),
            "peru.seed": str(options.training.seed),
        }
        dtype = given.dtype or BY_NAME["F16"]
        plan = WemoePlan(**fields, rest=sorted(set(infos) - held), dtype=dtype, metadata=named, mlps=mlps)
        if options.training.steps:
            names = tuple(vector.name for vector in plan.vectors)
            most = given.options.get("--max-samples")
            read = read_data(given.options["--data"], names, "cpu", options.training.batch, "WEMoE", most)
            if any(found.labels is not None for found in read.examples.values()):
                plan.warnings.append("the labels in --data are not used: routers learn from inputs alone")
            unlabelled = {task: replace(found, labels=None) for task, found in read.examples.items()}
            for vector in plan.vectors:
                check_fine_tune(vector.fine, base, unlabelled[vector.name])
            plan.examples = replace(read, examples=unlabelled)
        return plan

    def most_bytes(self, plan: WemoePlan) -> int:
        return int(self.options.bits * plan.difference_entries / 8) + self._router_bytes(plan)

    def _router_bytes(self, plan: WemoePlan) -> int:
        tasks, more = len(plan.vectors), 4 * known_numbers(len(plan.vectors)) if self.options.training.steps else 0
        return sum(plan.dtype.nbytes(mlp.numbers(tasks, self.options.depth)) + more for mlp in plan.mlps)

    def say(self, plan: WemoePlan) -> list[str]:
        layers = plural(sum(len(mlp.layers) for mlp in plan.mlps), "linear layer")
        how, options = self.options.training, self.options
        first = (
            f"{plural(len(plan.mlps), 'MLP')}, {layers}: routers of {plural(options.depth, 'layer')}, {si_bytes(self._router_bytes(plan))}"
        )
        trained = f"{plural(how.steps, 'step')} of {how.batch} inputs of each task" if how.steps else "not trained"
        said = [f"{first}, {trained}"]
        return said + ([f"{plural(len(plan.rest), 'other tensor')}: the base's plus {options.scale:g} x the sum"] if plan.rest else [])

    def planned(self, plan: WemoePlan) -> dict[str, Any]:
        mlps = [[layer.weight.name for layer in mlp.layers] for mlp in plan.mlps]
        return {"mlps": mlps, "summed": plan.rest, "scale": self.options.scale, "most_bytes": self.most_bytes(plan)}

    def make(self, plan: WemoePlan, target: Path, how: StreamSettings, sync: bool, note: Callable[[str], None]) -> RoutedResult:
        """Write the artifact: code the differences, train routers on what was coded, and put it together."""
        with tempfile.TemporaryDirectory(prefix="peru-wemoe-") as scratch, forgetting(Path(scratch)):
            results = self._differences(plan, Path(scratch), how, note)
            parts = [result.path.read_bytes() for result in results]
            if not any(result.energy for result in results[1:]):
                raise Mismatch(f"no MLP of the models differs from {plan.base.label}", "there is nothing to route")
            kept = [Kept(result.energy, result.error, _cosine(result)) for result in results[1:]]
            trained = Trained([self._fresh(plan, mlp) for mlp in plan.mlps])
            if plan.examples is not None:
                draft = Path(scratch) / "draft.safetensors"
                note("digesting")
                self._write(plan, draft, parts, kept, trained, False)
                note("training routers")
                count = self.options.training.steps * sum(
                    min(self.options.training.batch, len(found)) for found in plan.examples.examples.values()
                )
                share = plan.entries * len(plan.vectors) / count  # the bar counts entries
                trained = train(draft, plan.base, plan.examples.examples, self.options.training, lambda n: how.advance(int(n * share)))
        note("writing")
        nbytes, pack = self._write(plan, target, parts, kept, trained, sync)
        reports = [report_of(task, len(part)) for task, part in zip(pack.tasks, parts[1:], strict=True)]
        layers = sum(len(mlp.layers) for mlp in plan.mlps)
        return RoutedResult(target, nbytes, layers, reports, self._more(plan, trained, len(parts[0])))

    def _differences(self, plan: WemoePlan, scratch: Path, how: StreamSettings, note: Callable[[str], None]) -> list[MixedResult]:
        """Code the rest and every task's MLPs, all at one price. The rest first."""
        base = plan.base
        views = [vector_of(_REST, Summed(base, plan.vectors, plan.rest, self.options.scale), base)]
        for vector in plan.vectors:
            pairs = {name: vector.pairs[name] for name in plan.gated if name in vector.pairs}
            views.append(vector_of(vector.name, Some(vector.fine, pairs), base))
        tasks = [PruneTask(view, scratch / f"{number}.safetensors", None) for number, view in enumerate(views)]
        return prune_mixed(base, tasks, Goal("bits", self.options.bits), None, how, False, note)

    def _fresh(self, plan: WemoePlan, mlp: GatedMlp) -> Router:
        options = self.options
        return Router.fresh(mlp.width, len(plan.vectors), options.depth, options.scale, options.training.seed, mlp.layers[0].weight.name)

    def _write(
        self, plan: WemoePlan, target: Path, parts: Sequence[bytes], kept: Sequence[Kept], trained: Trained, sync: bool
    ) -> tuple[int, PackIndex]:
        metadata = plan.metadata if trained.seen else plan.metadata | {"peru.steps": "0"}  # a draft's routers are as they start
        with RoutedWriter(target, METHOD, metadata, sync) as writer:
            for mlp, router in zip(plan.mlps, trained.routers, strict=True):
                what = f"the router of {mlp.layers[0].weight.name}"
                data = b"".join(as_bytes(round_to(t.double(), plan.dtype, what)) for t in router.tensors)
                known = () if router.known is None else (router.known.means, router.known.variances)
                mlp.digest = writer.append_block(data + b"".join(bytes(as_bytes(tensor)) for tensor in known))
            digests = [(len(part), writer.append_block(part)) for part in parts]
            pack, contents = record_tasks(plan, kept, writer)
            return writer.finish(encode_wemoe(WemoeIndex(pack, plan.dtype, plan.mlps, digests, trained.seen)), contents), pack

    def _more(self, plan: WemoePlan, trained: Trained, rest_bytes: int) -> dict[str, Any]:
        found: dict[str, Any] = {"rest_bytes": rest_bytes, "router_bytes": self._router_bytes(plan)}
        if trained.seen:
            found |= {"entropy": {"first": trained.before, "last": trained.after}, "routed_to": shares_sent(plan, trained.seen)}
        return found


@contextmanager
def forgetting(folder: Path) -> Iterator[None]:
    """What is read in a folder inside is no input of the command."""
    try:
        yield
    finally:
        inputs.forget(folder)


def shares_sent(plan: RoutedPlan, seen: Sequence[Seen]) -> dict[str, dict[str, float]]:
    """For each task, the share of its examples that went to each task."""
    names = [vector.name for vector in plan.vectors]
    return {task: dict(zip(names, (n / one.examples for n in one.sent), strict=True)) for task, one in zip(names, seen, strict=True)}


def _cosine(result: MixedResult) -> float:
    """The cosine between a difference and what is stored of it."""
    squared = 0.0
    with Mixed(result.path) as mixed:
        for record in mixed.index.tensors:
            found = mixed.difference(record, 0, record.info.entries) if record.parts else None
            squared += float(np.square(found).sum()) if found is not None else 0.0
    if not squared or not result.energy:
        return 0.0
    return min(max((squared + result.energy - result.error) / (2 * math.sqrt(squared * result.energy)), 0.0), 1.0)


def _scale(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not value:
        raise UsageError(f"--scale {text} is not a finite number other than 0", "WEMoE starts from task arithmetic at that scale")
    return value
