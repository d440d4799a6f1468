"""`peru prune`: sparse deltas of one or several fine-tunes against a base that is read only once.

With the pre-trained model as base this is Post-Pruning (PERU paper, section 4.1), with a merged model PERU-FFT."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from peru_cli.artifacts.container import artifact_kind
from peru_cli.checkpoints.checks.unpaired import judge
from peru_cli.checkpoints.digests import digest_of_lines
from peru_cli.checkpoints.local.atomic import check_room, check_target, may_go_on, partial_path
from peru_cli.checkpoints.local.journal import Journal, notes_at
from peru_cli.checkpoints.lora.adapter import is_adapter, is_lora_file
from peru_cli.checkpoints.pairing import Pairing, pair_checkpoints
from peru_cli.checkpoints.places import locate, size_of
from peru_cli.checkpoints.quantized.layout import is_quantized
from peru_cli.checkpoints.resolve import open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.kernels.compiling.build import compile_beside
from peru_cli.kernels.deltas import counts, places, selects
from peru_cli.methods.compact.magnitude import ALL_CHANGED, Threshold
from peru_cli.prune.artifact import SEALED, Job, PruneOptions, PruneResult, PruneTask, is_in_place
from peru_cli.prune.gates import check
from peru_cli.prune.journal import PruneLog
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import DEFAULT_TILE
from peru_cli.vectors.family import Family, StreamSettings, TaskVector
from peru_cli.vectors.selection import Select, Sink
from peru_cli.vectors.signs import scales, sign_thresholds, without_zeros
from peru_cli.vectors.threshold_journal import ThresholdJournal
from peru_cli.vectors.thresholds import counted_bytes, find_thresholds
from peru_cli.version import __version__

__all__ = ["PruneOptions", "PruneResult", "PruneTask", "all_quantized", "fetch_bytes", "plan_prune", "prune"]


def plan_prune(
    base: Checkpoint, tasks: list[tuple[str, Checkpoint, Path]], options: PruneOptions, force: bool, new_folder: bool = False
) -> list[PruneTask]:
    """Check everything that headers can show, before any tensor is read. Every problem is an error.

    With `new_folder`, the folder of the targets may be created later."""
    planned = []
    left = notes_at(_journal_path(tasks[0][2])) if tasks else {}
    for name, fine, target in tasks:
        pairing = pair_with(fine, base, options)
        task = PruneTask(TaskVector(name, fine, pairing), target, options.density)
        chosen = re.compile(options.per_task) if options.per_task is not None else None
        task.unpaired = judge(fine, base, pairing, chosen, options.allow_unpaired)
        if not task.entries:
            raise UsageError(f"{fine.label} and {base.label} share no floating-point tensors: there is nothing to prune")
        if options.density is not None and int(options.density * task.entries) == 0:
            raise UsageError(f"--keep {float(options.density):g} of {task.entries:,} entries keeps nothing", "keep more")
        if options.values in ("bf16", "log2", "sign") and options.density is None:
            raise UsageError(f"--lossless and --values {options.values} contradict each other", "leave one out")
        task.in_place = not force and is_in_place(target, left)
        check_target(target, force or task.in_place, new_folder)
        check_room(target, sum(info.nbytes for info in pairing.whole))
        planned.append(task)
    return planned


def pair_with(fine: Checkpoint, base: Checkpoint, options: PruneOptions) -> Pairing:
    """Pair a fine-tune's tensors with the base's."""
    pairing = pair_checkpoints(fine, base, options.per_task)
    if options.codes:
        coded = [pair.fine.dtype.is_code and pair.fine.dtype is pair.base.dtype for pair in pairing.pairs]
        pairing.pairs = [replace(pair, coded=is_code) for pair, is_code in zip(pairing.pairs, coded, strict=True)]
    return pairing


def all_quantized(models: Sequence[str]) -> bool:
    """Whether all of these are full checkpoints of quantised weights: then --lossless keeps their codes and scales unchanged."""
    for model in models:
        place = locate(model)
        if is_adapter(place) or is_lora_file(place) or artifact_kind(place) is not None:
            return False
        with open_model(model, stored=True) as checkpoint:
            if not is_quantized(checkpoint.tensors):
                return False
    return True


def prune(
    base: Checkpoint,
    tasks: list[PruneTask],
    options: PruneOptions,
    how: StreamSettings,
    sync: bool,
    note: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = lambda text: None,
    fresh: bool = False,
) -> list[PruneResult]:
    """Write the artifacts. All of them appear, or none. Continues where a killed run stopped, unless `fresh`.

    GateMissed if the result does not pass `options.gates`."""
    family = Family(base, [task.vector for task in tasks], how, options.bundled)
    path, key = _journal_path(tasks[0].target), _key(base, tasks, options, len(family.slots))
    for task in tasks:
        if task.in_place and SEALED not in notes_at(path, key):
            check_target(task.target, force=False)  # another command has put it there
    with ExitStack() as stack:
        jobs = [Job(number, base, task, options, sync) for number, task in enumerate(tasks)]
        for job in jobs:
            stack.enter_context(job.writer)
        select = Select(family, [job.sink for job in jobs])
        files = [job.writer.container.file for job in jobs]
        journal = Journal(path, key, files, sync, lambda journal: not fresh and all(job.holds(journal) for job in jobs))
        stack.push(lambda *exc: journal.close() if may_go_on(exc) else journal.remove())
        for job in jobs:
            job.journal = journal
        _passes(family, jobs, select, journal, options, note, say)
        sealed = [job.seal(select) for job in jobs]
        for line in check(options.gates, [result for result, _ in sealed]):
            say(line)
        journal.note(SEALED, {result.path.name: digest for result, digest in sealed})
        journal.flush()
        for job in jobs:
            job.commit()
        journal.remove()
        return [result for result, _ in sealed]


def _passes(
    family: Family,
    jobs: list[Job],
    select: Select,
    journal: Journal,
    options: PruneOptions,
    note: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Find thresholds, then select, encode and write, except for what the journal has."""
    how, slots = family.how, len(family.slots)
    if how.xp.compiled and how.elsewhere is None and options.density is not None:
        dtypes = {(pair.fine.dtype.name, "f8" if task.wide else "f4") for task in family.tasks for pair in task.pairs.values()}
        # The longest first.
        compile_beside([loop for loops in (selects, counts, places) for each in sorted(dtypes) for loop in loops(*each)])
    log = PruneLog(journal, family, select, [job.sink for job in jobs])
    per_slot, signs = options.by_tensor, options.values == "sign"
    first = log.restore(per_slot)
    if journal.notes:
        say(f"continuing after {first} of {slots} tensors of an earlier run" if first else "continuing where an earlier run stopped")
    select.watcher = log
    if per_slot:
        # Tensor by tensor, so that network data is not requested twice.
        note("selecting and encoding")
        how.advance((2 + signs) * sum(family.entries[:first]))
        for slot in range(first if signs else 0):
            _set_scales(family, jobs, range(slot, slot + 1), journal)
        for slot in range(first, slots):
            _set_thresholds(family, jobs, range(slot, slot + 1))
            if signs:
                _set_scales(family, jobs, range(slot, slot + 1), journal)
            run(select, family.tiles(slot), how.threads, how.advance, how.elsewhere)
            family.forget()
        return
    if not first:
        note("finding thresholds" if options.density is not None else "comparing with the base")
        _set_thresholds(family, jobs, range(slots), ThresholdJournal(journal, "threshold", family.ranged))
    if signs:
        _set_scales(family, jobs, range(slots), journal)
    note("selecting and encoding")
    how.advance(sum(family.entries[:first]))
    run(select, family.plan(first), how.threads, how.advance, how.elsewhere)
    family.forget()


def _journal_path(target: Path) -> Path:
    path = partial_path(target)
    return path.with_name(f"{path.name}-journal")


def _key(base: Checkpoint, tasks: list[PruneTask], options: PruneOptions, slots: int) -> str:
    """A digest of everything that determines the artifacts' bytes, and whether they are put in place."""
    named = options.base_name.metadata() if options.base_name is not None else None
    parts: list[object] = [__version__, str(options.density), options.scope, options.values, named, base.identity(), slots]
    parts += [gate.option for gate in options.gates]
    parts += options.about
    for task in tasks:
        pairing = task.vector.pairing
        pairs = digest_of_lines(f"{pair.fine.name}\0{pair.base.name}\0{pair.grown}" for pair in pairing.pairs)
        whole = [info.name for info in pairing.whole]
        parts.append([task.vector.name, task.target.name, task.vector.fine.identity(), pairing.prefix.encode(), pairs, whole])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _set_thresholds(family: Family, jobs: list[Job], slots: range, log: ThresholdJournal | None = None) -> None:
    """Find each task's threshold over some slots."""
    options = jobs[0].options
    density = options.density
    if density is None:
        for job in jobs:
            job.sink.add_threshold(ALL_CHANGED)
        return
    if options.scope == "sign":
        for job, each in zip(jobs, sign_thresholds(family, slots.start, density), strict=True):
            job.sink.add_threshold(each.threshold)
            job.sink.changed += each.changed
        return
    names = [family.slots[slot].name for slot in slots]
    entries = [sum(pair.entries for name in names if (pair := pairs.get(name)) is not None) for pairs in family.pairs]
    found = find_thresholds(family, slots, {number: int(density * n) for number, n in enumerate(entries)}, log)
    for number, job in enumerate(jobs):
        threshold = found[number].threshold
        job.sink.add_threshold(without_zeros(threshold) if options.values == "sign" else threshold, found[number].equals)
        job.sink.changed += found[number].changed


def _set_scales(family: Family, jobs: list[Job], slots: range, journal: Journal) -> None:
    """Find each task's scale in each of some slots, or take those that an earlier run found."""
    key = f"scales {slots.start}"
    if key not in journal.notes:
        found = scales(family, slots, [partial(_threshold, job.sink) for job in jobs])
        journal.note(key, found)
    else:
        found = journal.notes[key]
    for job, own in zip(jobs, found, strict=True):
        job.sink.scales += own


def _threshold(sink: Sink, slot: int) -> Threshold:
    """The threshold of a slot."""
    return sink.thresholds[slot if len(sink.thresholds) > 1 else 0]


def fetch_bytes(base: Checkpoint, tasks: list[PruneTask], options: PruneOptions) -> int:
    """Bytes to fetch over the network if the sample predicts the thresholds well; 0 for local files."""
    if not base.ranged and not any(task.vector.fine.ranged for task in tasks):
        return 0
    family = Family(base, [task.vector for task in tasks], StreamSettings(CPU, 1, DEFAULT_TILE))
    twice = (
        []
        if options.density is None
        else [range(i, i + 1) for i in range(len(family.slots))]
        if options.by_tensor
        else [range(len(family.slots))]
    )
    total = family.ranged_bytes(family.slots)
    for slots in twice:
        if not family.fits(group := [family.slots[i] for i in slots]):
            total += 2 * family.ranged_bytes(group) if options.scope == "sign" else counted_bytes(family, slots)
            total += family.ranged_bytes(group) if options.values == "sign" else 0
    for task in tasks:
        fine, pairing = task.vector.fine, task.vector.pairing
        if fine.ranged:
            total += sum(info.nbytes for info in pairing.whole)
            total += sum(pair.fine.nbytes - pair.fine.dtype.nbytes(pair.entries) for pair in pairing.pairs if pair.grown)
        alike = [pair for pair in pairing.pairs if not pair.is_delta]
        total += sum(pair.fine.nbytes * fine.ranged + pair.base.nbytes * base.ranged for pair in alike)
        total += sum(size_of(file) for file in fine.side_files.values()) if fine.ranged else 0
        total += sum(size_of(base.side_files[name]) for name in fine.side_files if name in base.side_files) if base.ranged else 0
    return total
