"""`peru shuffle-pack --method tall-masks|magnitude-masks|emr`: the sum of all task vectors, and a mask for each task."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from peru_cli.artifacts.packs.masks import MaskWriter
from peru_cli.checkpoints.digests import checkpoint_digest
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.methods.compact import masking
from peru_cli.methods.compact.magnitude import key_value
from peru_cli.methods.compact.masking import Overlap
from peru_cli.methods.compact.masks.table import MASKS, MaskMethod, build_masks
from peru_cli.methods.compact.superpose import quality
from peru_cli.pack.masks.passes import Cut, MaskGather, WriteMasks
from peru_cli.pack.measure import Measured, settle_steps
from peru_cli.pack.plan import PackOptions, PackPlan, plan_pack
from peru_cli.pack.seal import PackResult, PackSealer
from peru_cli.shown import listed
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import TilePlan
from peru_cli.vectors.family import Family, StreamSettings
from peru_cli.vectors.thresholds import find_thresholds


@dataclass(frozen=True)
class MaskOptions:
    """How masks are made. `thresholds` are by task, with "" for all others. A task without one gets the best of the grid."""

    method: str = "tall-masks"
    thresholds: Mapping[str, float] = field(default_factory=dict)
    keep: Fraction = Fraction(1, 10)  # for magnitude masks

    @property
    def passes(self) -> int:
        """How often everything is read if the sample predicts the magnitudes well."""
        return 3 if build_masks(self.method).ranked else 2


@dataclass
class TaskMask:
    """The result for one task's mask."""

    task: str
    threshold: float
    from_grid: bool
    kept: int
    nbytes: int
    scale: float | None = None  # the task's own, if it has one


@dataclass
class MaskResult:
    """What was written. `pack.best_scale` is that of the masked sums."""

    pack: PackResult
    method: str
    masks: list[TaskMask]


def plan_masks(base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], options: PackOptions, masks: MaskOptions) -> PackPlan:
    """Plan what is written. Mismatch reports all problems at once; UsageError for impossible options."""
    everything = re.compile("")
    plan = plan_pack(base, tasks, replace(options, decorrelate="none", signs=False, exclude=everything))
    plan.metadata = {"peru.method": masks.method} | {key: plan.metadata[key] for key in ("peru.scale", "peru.entries")}
    names = [vector.name for vector in plan.vectors]
    for name in masks.thresholds:
        if name and name not in names:
            raise UsageError(f"--threshold {name}=...: no model is called {name!r}", f"the tasks are {listed(names)}")
    if build_masks(masks.method).ranked:
        plan.metadata["peru.density"] = str(masks.keep)
        if not int(masks.keep * plan.entries):
            raise UsageError(f"--keep {float(masks.keep):g} of {plan.entries:,} entries keeps nothing", "keep more")
    return plan


def make_masks(
    plan: PackPlan,
    masks: MaskOptions,
    target: Path,
    how: StreamSettings,
    sync: bool,
    precision: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> MaskResult:
    """Write the artifact.

    Args:
        precision: bits of the step below the task vectors' RMS. The default is the fewest that do not change the error.

    Raises BadFile for values that cannot be summed."""
    scale = float(plan.metadata["peru.scale"])
    tiles = TilePlan([t.info.entries for t in plan.sums], how.tile_entries)
    method, scaled = build_masks(masks.method), MASKS[masks.method].scaled
    if method.ranked:
        note("finding thresholds")
    candidates = _candidates(plan, masks, method, how)
    note("measuring")
    gather = MaskGather(plan, how, method, candidates, scaled)
    run(gather, tiles, how.threads, how.advance)
    tables = gather.inner.tables
    everything = sum(tables.values(), np.zeros((len(plan.vectors),) * 2))
    measured = Measured(everything, np.zeros_like(everything), tables)
    bits = masking.default_precision(len(plan.vectors)) if precision is None else precision
    plan.metadata["peru.precision"] = str(settle_steps(plan, measured, bits))
    factors = [masking.rescaler(own, kept) for own, kept in gather.lengths.tolist()] if scaled else []
    if factors:
        plan.metadata["peru.scales"] = ",".join(map(repr, factors))
    cuts, predicted = [], []
    for task, own in enumerate(np.diag(everything).tolist()):
        exact = [_overlap(gather, task, number) for number in range(len(candidates[task]))]
        chosen = masking.choose_threshold(own, exact, scale)
        cuts.append(candidates[task][chosen])
        square = exact[chosen].square + _rounding(plan, gather, task, chosen)
        predicted.append(quality(own, square, exact[chosen].product, scale * (factors[task] if factors else 1.0)))
    note("masking")
    largest = {**plan.metadata, "peru.sums": "0" * 64}
    writer = MaskWriter(target, largest, len(plan.vectors), sync)
    with writer.pack:
        step = WriteMasks(plan, how, writer, method, cuts)
        run(step, tiles, how.threads, how.advance)
        for block in writer.rest():
            writer.write(block)
        overlaps = step.settle()
        for record, cut, overlap, digests in zip(writer.masks, cuts, overlaps, step.mask_digests, strict=True):
            record.threshold, record.kept = repr(cut.threshold), int(overlap.kept)
            record.digest = checkpoint_digest(digests.all([tensor.info.name for tensor in plan.sums]))
        result = PackSealer(plan, step.inner, writer.pack, measured, predicted, {}, None, None, how).finish(target, scale, factors)
    result.best_scale = masking.best_scale(overlaps)
    reports = _report(plan, candidates, cuts, writer)
    for report, factor in zip(reports, factors, strict=False):
        report.scale = factor
    return MaskResult(result, masks.method, reports)


def _report(plan: PackPlan, candidates: Sequence[Sequence[Cut]], cuts: Sequence[Cut], writer: MaskWriter) -> list[TaskMask]:
    return [
        TaskMask(vector.name, cut.threshold, len(found) > 1, record.kept, record.nbytes)
        for vector, found, cut, record in zip(plan.vectors, candidates, cuts, writer.masks, strict=True)
    ]


def _candidates(plan: PackPlan, masks: MaskOptions, method: MaskMethod, how: StreamSettings) -> list[list[Cut]]:
    """The candidate cuts of each task's mask: the method's thresholds, or the exact magnitude of those that rank."""
    if not method.ranked:
        given = [masks.thresholds.get(vector.name, masks.thresholds.get("")) for vector in plan.vectors]
        return [[Cut(threshold) for threshold in method.thresholds(typed)] for typed in given]
    family = Family(plan.base, plan.vectors, how)
    kept = int(masks.keep * plan.entries)
    found = find_thresholds(family, range(len(family.slots)), dict.fromkeys(range(len(plan.vectors)), kept))
    family.forget()
    cuts = []
    for number, vector in enumerate(plan.vectors):
        threshold = found[number].threshold
        cuts.append([Cut(key_value(max(threshold.key, 0), vector.wide), threshold.equals or 0)])
    return cuts


def _overlap(gather: MaskGather, task: int, number: int) -> Overlap:
    square, product, kept = sum(table[task, number] for table in gather.overlaps.values()).tolist()
    return Overlap(square, product, kept)


def _rounding(plan: PackPlan, gather: MaskGather, task: int, number: int) -> float:
    """What rounding all tasks to steps adds to the squared norm of what is kept."""
    kept = {name: float(table[task, number, 2]) for name, table in gather.overlaps.items()}
    added = 1 if "peru.scales" in plan.metadata else len(plan.vectors)  # a vector of the method's own is rounded once, not each task
    return added * sum(kept[tensor.info.name] * 4.0**tensor.exponent for tensor in plan.sums) / 12
