"""`peru merge`: merge several models tile by tile. The bytes are the same for any tile size, thread count and device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.local.journal import Journal
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.errors import UsageError
from peru_cli.kernels.compiling.build import Kernel, compile_beside
from peru_cli.kernels.deltas import counts
from peru_cli.kernels.merging import elections
from peru_cli.kernels.merging.panels import vectors
from peru_cli.kernels.rounding import ROUNDS
from peru_cli.merge.passes.matrices import MergeMatrices, check_memory, taken
from peru_cli.merge.passes.then import After, Gather
from peru_cli.merge.passes.tiles import Elect, Merge, Products
from peru_cli.merge.passes.walk import Decided
from peru_cli.merge.plan import MergePlan, family_of, in_bundles, in_dtype
from peru_cli.methods.compact.delta import cast_bits
from peru_cli.methods.compact.magnitude import ALL_CHANGED, Threshold
from peru_cli.methods.rules import Rule
from peru_cli.methods.then.table import Pass
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import DEFAULT_TILE as ONE_INPUT_TILE
from peru_cli.streaming.tiles import TilePlan
from peru_cli.vectors.family import Family, StreamSettings
from peru_cli.vectors.threshold_journal import ThresholdJournal
from peru_cli.vectors.thresholds import find_thresholds

DEFAULT_TILE = 1 << 18  # entries; smaller tiles fit caches better, but threads then wait for each other at every operation


def check_trims(plan: MergePlan, rule: Rule) -> None:
    """UsageError for a density that keeps nothing."""
    for task, vector in enumerate(plan.vectors if rule.trims else ()):
        sizes = {0: plan.entries}
        if rule.scope == "tensor":
            sizes = {number: slot.info.entries for number, slot in enumerate(plan.slots) if slot.of(task) is not None}
        if not any(_keeps(plan, rule, 0, task, n, slot) for slot, n in sizes.items()):
            raise UsageError(
                f"--keep keeps nothing of {vector.name}: less than one of {max(sizes.values(), default=0):,} entries", "keep more"
            )


def together(plan: MergePlan, rule: Rule, how: StreamSettings) -> MergePlan:
    """The plan as passes take it: small tensors are bundled if the method allows it."""
    if rule.entrywise and plan.then is None and plan.fp8 is None:  # a bundle has one dtype, and codes are merged as float32
        return in_bundles(plan, Family(plan.reference, plan.vectors, how, bundled=True))
    return plan


def searched(plan: MergePlan, how: StreamSettings) -> Family:
    """The family over which thresholds are searched: these passes hold one task's tile at a time, the others hold all tasks'."""
    return family_of(plan, replace(how, tile_entries=max(how.tile_entries, ONE_INPUT_TILE)))


def merge(
    plan: MergePlan, rule: Rule, writer: CheckpointWriter, how: StreamSettings, note: Callable[[str], None] = lambda text: None
) -> None:
    """Write all merged and copied tensors. The caller enters and commits the writer.

    If the writer has a journal, tensors that an earlier run wrote are skipped.

    Raises BadFile if an input is not finite where it matters, or the result does not fit its dtype.
    """
    plan = together(plan, rule, how)
    if how.xp.compiled and how.elsewhere is None:
        compile_beside(_loops(plan, rule))
    journal = writer.journal
    done = journal.done if journal is not None else {}
    if journal is not None and "decided" in journal.notes:
        decided = Decided.decode(journal.notes["decided"])
    else:
        decided = decide(plan, rule, how, note, journal)
        if journal is not None:
            journal.note("decided", decided.encode())
    if rule.wants_products:
        rule.decide(decided.products)
    check_memory(plan, rule)  # again: methods with data know only now which matrices they take
    after = None
    if plan.then is not None:
        after = After(plan, rule, plan.then, how, writer)
        if plan.then.gathers:
            plan.then.settle(_gathered(plan, rule, plan.then, decided, writer, how, note))
    note("merging")
    _all(plan, rule, decided, [number for number, slot in enumerate(plan.slots) if slot.info.name not in done], writer, how, after)
    _copy(plan, writer)
    _average(plan, rule, writer)


def _loops(plan: MergePlan, rule: Rule) -> list[Kernel]:
    """The loops that are worth compiling beside each other: those of trims, and the method's own."""
    dtypes = {info.dtype.name for slot in plan.slots for info in (*slot.inputs, slot.base)}
    if not dtypes <= ROUNDS.keys():
        return []
    rules = list({id(each): each for each in (rule.at(number) for number in range(len(plan.slots)))}.values())
    found: list[Kernel] = []
    for dtype in sorted(dtypes):
        found += [*counts(dtype, "f4"), *elections.trims(dtype)] if rule.trims else []
        found += [loop for each in rules for loop in each.loops(dtype)]
        found += vectors(dtype) if rule.on_vectors and taken(plan, rule) else []
    return found


def _gathered(
    plan: MergePlan, rule: Rule, then: Pass, decided: Decided, writer: CheckpointWriter, how: StreamSettings, note: Callable[[str], None]
) -> list[float]:
    """What a pass gathers from all merged tensors, or gathered in an earlier run."""
    journal = writer.journal
    if journal is not None and "gathered" in journal.notes:
        return [float(value) for value in journal.notes["gathered"]]
    note("measuring the merge")
    gather = Gather(plan, rule, then, how, writer)
    _all(plan, rule, decided, range(len(plan.slots)), writer, how, gather)
    if journal is not None:
        journal.note("gathered", gather.sums())
    return gather.sums()


def _all(
    plan: MergePlan, rule: Rule, decided: Decided, left: Sequence[int], writer: CheckpointWriter, how: StreamSettings, after: After | None
) -> None:
    """Merge these slots."""
    matrices = taken(plan, rule)
    tiled = [number for number in left if number not in matrices]
    tiles = TilePlan([plan.slots[i].info.entries for i in tiled], how.tile_entries)
    run(Merge(plan, rule, how, decided, tiled, writer, after), tiles, how.threads, how.advance, how.elsewhere)
    if matrices:
        MergeMatrices(plan, matrices, how, [number for number in left if number in matrices], writer, after).run()


def decide(plan: MergePlan, rule: Rule, how: StreamSettings, note: Callable[[str], None], journal: Journal | None = None) -> Decided:
    """Run all passes before the last one: thresholds, sign counts, inner products."""
    decided = Decided()
    slots = list(range(len(plan.slots)))
    if rule.trims:
        note("finding thresholds")
        assert plan.base is not None
        family = searched(plan, how)
        decided.thresholds = [_thresholds(plan, family, rule, index, journal) for index in range(len(rule.trims))]
    tiles = TilePlan([slot.info.entries for slot in plan.slots], how.tile_entries)
    if rule.wants_signs:
        note("counting signs")
        elect = Elect(plan, rule, how, decided, slots)
        run(elect, tiles, how.threads, how.advance, how.elsewhere)
        decided.majority = (elect.total > 0) - (elect.total < 0)
    if rule.wants_products:
        note("measuring angles")
        products = Products(plan, rule, how, decided, slots)
        run(products, tiles, how.threads, how.advance, how.elsewhere)
        decided.products = products.tables()
    return decided


def _keeps(plan: MergePlan, rule: Rule, trim: int, task: int, n: int, slot: int) -> int:
    """How many entries a trim leaves a task. Its index among a tensor's inputs may differ from its index among all tasks."""
    tasks = plan.slots[slot].tasks if rule.scope == "tensor" else None
    return rule.keeps(trim, task if tasks is None else tasks.index(task), n, slot)


def _thresholds(plan: MergePlan, family: Family, rule: Rule, index: int, journal: Journal | None) -> list[list[Threshold]]:
    """For each task, its threshold over the whole model, or one for each slot."""
    numbers = range(len(family.tasks))
    groups = [range(len(family.slots))] if rule.scope == "global" else [range(i, i + 1) for i in range(len(family.slots))]
    found: list[list[Threshold]] = [[] for _ in numbers]
    for group in groups:
        n = sum(family.slots[i].entries for i in group)
        there = [number for number in numbers if any(family.slots[i].name in family.pairs[number] for i in group)]
        kept = {number: _keeps(plan, rule, index, number, n, group.start) for number in there}
        log = ThresholdJournal(journal, f"trim {index} group {group.start}", family.ranged) if journal is not None else None
        trimmed = {number: k for number, k in kept.items() if k < n}
        thresholds = find_thresholds(family, group, trimmed, log) if trimmed else {}
        for number in numbers:
            found[number].append(thresholds[number].threshold if number in thresholds else ALL_CHANGED)
        if not family.fits(family.slots):
            family.forget()
    return found


def _average(plan: MergePlan, rule: Rule, writer: CheckpointWriter) -> None:
    """Running means and variances: the models' mean, weighted if the weights are shares; never outside the inputs' range."""
    given = rule.parameters.weights
    if "t" in rule.parameters.values and len(given) == 2:
        given = (1 - rule.parameters.number("t"), rule.parameters.number("t"))
    shares = given if min(given) >= 0 and sum(given) > 0 else (1.0,) * len(plan.vectors)
    for slot in plan.averaged:
        total = np.zeros(slot.info.entries)
        tasks = [slot.task(number) for number in range(len(slot.inputs))]
        own = [shares[task] for task in tasks] if len(shares) == len(plan.vectors) else [1.0] * len(tasks)
        for share, info, task in zip(own, slot.inputs, tasks, strict=True):
            bits = np.frombuffer(plan.vectors[task].fine.read(info.name), BITS[info.dtype.bits])
            total += share / sum(own) * cast_bits(CPU, bits, info.dtype, BY_NAME["F64"]).view(np.float64)
        writer.write(slot.info.name, 0, cast_bits(CPU, total.view(np.int64), BY_NAME["F64"], slot.info.dtype).data.cast("B"))


def _copy(plan: MergePlan, writer: CheckpointWriter) -> None:
    """Copy tensors of the reference, in the output's dtype."""
    for info in plan.copied:
        wanted = in_dtype(info, plan.dtype).dtype
        if wanted is info.dtype:
            writer.copy(info.name, plan.reference, info.name)
            continue
        for offset, piece in plan.reference.pieces(info.name):
            cast = cast_bits(CPU, np.frombuffer(piece, BITS[info.dtype.bits]), info.dtype, wanted)
            writer.write(info.name, offset * wanted.bits // info.dtype.bits, cast.data.cast("B"))
