"""Several fine-tunes aligned with one base, and the search for thresholds over their task vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from peru_cli.checkpoints.bundle import MOST, bundle
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pair, Pairing
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.methods.delta import INFINITE_KEY, cast_bits
from peru_cli.methods.magnitude import Counted, Keys, Tally, Threshold, Window, decide, exact_threshold, predict_window
from peru_cli.streaming.aligned import TileBuffer, read_bits, read_runs
from peru_cli.streaming.arrays import Array, Arrays, Differences
from peru_cli.streaming.engine import Reads, run
from peru_cli.streaming.tiles import Strip, Tile, TilePlan
from peru_cli.vectors.threshold_journal import Found, ThresholdJournal

SAMPLE_RUNS = 1024
RANGED_RUN = 4  # runs this many times as long, and this many times fewer, if each run is a request
SAMPLE_RUN = 1024  # entries; SAMPLE_RUNS * SAMPLE_RUN keys are held at once, 4 or 8 MB a task
KEPT_BYTES = 128 << 20  # bytes from the network kept for a second pass: all of a small model, or one tensor
SLOT_RUNS = 128  # for a single tensor: sorting a larger sample costs more than a narrower window saves
STRIP_RUNS = 32  # runs that one thread processes together: asking for a single run costs more than processing it


@dataclass
class TaskVector:
    """A fine-tune and its base."""

    name: str
    fine: Checkpoint
    pairing: Pairing
    pairs: dict[str, Pair] = field(init=False)  # pairs with a difference, by the base's tensor name
    wide: bool = field(init=False)  # whether keys are float64: true if any paired tensor is

    def __post_init__(self) -> None:
        self.pairs = {pair.base.name: pair for pair in self.pairing.pairs if pair.is_delta}
        self.wide = any("F64" in (pair.fine.dtype.name, pair.base.dtype.name) for pair in self.pairs.values())

    @property
    def infinite_key(self) -> int:
        """The key of differences that are not finite."""
        return INFINITE_KEY[self.wide]


@dataclass(frozen=True)
class StreamSettings:
    """How to stream. Nothing here changes a result."""

    xp: Arrays
    threads: int
    tile_entries: int
    advance: Callable[[int], None] = lambda entries: None


class Buffers:
    """One thread's buffers: a tile of the base, a tile of a fine-tune, keys."""

    def __init__(self, how: StreamSettings, tasks: Sequence[TaskVector]) -> None:
        widths = [d.bits // 8 for t in tasks for p in t.pairs.values() for d in (p.fine.dtype, p.base.dtype)]
        self.base, self.fine = (TileBuffer(how.xp, how.tile_entries, max(widths, default=1)) for _ in range(2))
        self.differences = {wide: how.xp.differences(how.tile_entries, wide) for wide in {task.wide for task in tasks}}


@dataclass
class Aligned:
    """One task's part of a tile: the base's bits cast to its dtype and its own bits, (n,), and added rows.

    Without a base (for a method that merges the weights themselves) `base` is empty and only `fine` is set."""

    task: int
    pair: Pair
    base: Array
    fine: Array
    grown: Array

    def weights(self, xp: Arrays, out: Array) -> Array:
        """The fine-tune's weights in `out`, (n,) float32 or float64."""
        weights = xp.widen(self.fine, self.pair.fine.dtype, out)
        return weights if weights is out else xp.copy(weights, out)

    def difference(self, xp: Arrays, out: Array, room: Callable[[], Array], base_weights: Array | None = None) -> Array:
        """fine - base in `out`, (n,) float32 or float64, unclipped: infinity and NaN pass through.

        Args:
            room: returns an array like `out` to widen the base into.
            base_weights: the base in its own dtype, already widened; used for tasks of that dtype."""
        dtype = self.pair.fine.dtype
        if base_weights is None or dtype is not self.pair.base.dtype:
            base_weights = xp.widen(self.base, dtype, room())
        return xp.subtract(xp.widen(self.fine, dtype, out), base_weights, out=out)


def _of_task(pairs: Mapping[str, Pair], slots: Sequence[TensorInfo], tensor: int) -> TensorInfo | None:
    pair = pairs.get(slots[tensor].name)
    return pair.fine if pair is not None else None


class Family:
    """A base and task vectors, slot by slot. A slot is a base tensor that any of them pairs with, or a bundle of small ones."""

    def __init__(self, base: Checkpoint, tasks: Sequence[TaskVector], how: StreamSettings, bundled: bool = False) -> None:
        """With `bundled`, passes over all tensors need not tell small ones apart."""
        self.base, self.tasks, self.how = base, tasks, how
        names = sorted({name for task in tasks for name in task.pairs})
        runs = list(_runs(base, tasks, names)) if bundled else [[name] for name in names]
        self.slots: list[TensorInfo] = [bundle([base.tensors[name] for name in run]) for run in runs]
        self.pairs = [_pairs_of(task, self.slots, runs) for task in tasks]
        self.ranged = base.ranged or any(task.fine.ranged for task in tasks)  # whether anything comes over the network
        self.entries = [max([s.entries] + [pairs[s.name].fine.entries for pairs in self.pairs if s.name in pairs]) for s in self.slots]

    def plan(self, first: int = 0) -> TilePlan:
        """Tiles of all slots, or of those from `first` on, each as long as its longest tensor."""
        return TilePlan([0 if i < first else n for i, n in enumerate(self.entries)], self.how.tile_entries)

    def tiles(self, slot: int) -> list[Tile]:
        """Tiles of one slot."""
        return [tile._replace(tensor=slot) for tile in TilePlan(self.entries[slot : slot + 1], self.how.tile_entries)]

    def buffers(self) -> Buffers:
        """One thread's buffers."""
        return Buffers(self.how, self.tasks)

    def each(self, slot: TensorInfo, tile: Tile | Strip, base_bits: Array, buffers: Buffers, wanted: Sequence[int]) -> Iterator[Aligned]:
        """Read the tile of each wanted task in turn. Each result is valid until the next one."""
        for number in wanted:
            if slot.name in self.pairs[number]:
                aligned = self.align(number, slot.name, tile, base_bits, buffers.fine)
                if len(aligned.fine) or len(aligned.grown):
                    yield aligned

    def align(self, number: int, slot: str, tile: Tile | Strip, base_bits: Array | None, buffer: TileBuffer) -> Aligned:
        """Read a task's part of a tile of a base tensor, given the base's bits there; valid until the buffer's next use."""
        pair = self.pairs[number][slot]
        fine = read_runs(self.tasks[number].fine, pair.fine, tile.runs, buffer)
        if base_bits is None:
            return Aligned(number, pair, fine[:0], fine, fine[:0])
        n = len(base_bits)
        return Aligned(number, pair, cast_bits(self.how.xp, base_bits, pair.base.dtype, pair.fine.dtype), fine[:n], fine[n:])

    def reads(self, slots: Sequence[TensorInfo], wanted: Iterable[int]) -> Reads:
        """What a pass over these slots reads of the base and of the wanted tasks."""
        yield self.base, lambda tensor: slots[tensor]
        for number in wanted:
            yield self.tasks[number].fine, partial(_of_task, self.pairs[number], slots)

    def forget(self) -> None:
        """Drop what earlier passes kept."""
        for source in (self.base, *(task.fine for task in self.tasks)):
            source.forget()

    def fits(self, slots: Sequence[TensorInfo]) -> bool:
        """Whether the network data of these slots may be kept between two passes."""
        return self.ranged_bytes(slots) <= KEPT_BYTES

    def ranged_bytes(self, slots: Sequence[TensorInfo]) -> int:
        """Bytes of these slots that come over the network, for the base and all tasks."""
        ranged = [pairs for task, pairs in zip(self.tasks, self.pairs, strict=True) if task.fine.ranged]
        pairs = [pair for slot in slots for mine in ranged if (pair := mine.get(slot.name)) is not None]
        return sum(slot.nbytes for slot in slots if self.base.ranged) + sum(pair.fine.nbytes for pair in pairs)

    def differences(self, aligned: Aligned, buffers: Buffers) -> Differences:
        """The comparer of one task's tile with the base's."""
        return buffers.differences[self.tasks[aligned.task].wide]


def _runs(base: Checkpoint, tasks: Sequence[TaskVector], names: Sequence[str]) -> Iterator[list[str]]:
    """Split names into runs, each of one base tensor, or of small ones that are alike in all tasks."""
    run: list[str] = []
    alike: object = None
    size = 0
    for name in names:
        info, pairs = base.tensors[name], [task.pairs.get(name) for task in tasks]
        n = info.entries
        alone = n > MOST or any(pair is not None and pair.grown for pair in pairs)
        kind = None if alone else (info.dtype, [pair and pair.fine.dtype for pair in pairs])
        if run and (kind is None or kind != alike or size + n > MOST):
            yield run
            run, size = [], 0
        run.append(name)
        alike, size = kind, size + n
    if run:
        yield run


def _pairs_of(task: TaskVector, slots: Sequence[TensorInfo], runs: Sequence[Sequence[str]]) -> Mapping[str, Pair]:
    """A task's pairs by slot name."""
    if all(len(run) == 1 for run in runs):
        return task.pairs
    return {
        slot.name: task.pairs[run[0]] if len(run) == 1 else Pair(bundle([task.pairs[name].fine for name in run]), slot)
        for slot, run in zip(slots, runs, strict=True)
        if run[0] in task.pairs
    }


class _Group:
    """Slots that share a threshold: all of them, or one."""

    def __init__(self, family: Family, slots: range) -> None:
        self.family, self.slots = family, slots
        self.tensors = [family.slots[i] for i in slots]
        self.entries = [tensor.entries for tensor in self.tensors]
        self._sample = SAMPLE_RUN * (SAMPLE_RUNS if len(slots) > 1 else SLOT_RUNS)

    def slot(self, tile: Tile | Strip) -> TensorInfo:
        return self.family.slots[self.slots[tile.tensor]]

    def sample(self) -> tuple[list[Strip], bool]:
        """Short runs spread evenly over the group, or all of it if that is no more (the flag)."""
        strips: list[Strip] = []
        total = sum(self.entries)
        everything = total <= self._sample
        step = 1.0 if everything else total / self._sample
        due = 0.0  # runs are cut from pieces of SAMPLE_RUN entries; every step-th piece is taken
        tile = self.family.how.tile_entries
        run = SAMPLE_RUN * (RANGED_RUN if self.family.ranged else 1)
        size, together = (tile, 1) if everything else (run, min(STRIP_RUNS, tile // run))
        for tensor, entries in enumerate(self.entries):
            runs: list[tuple[int, int]] = []
            for start in range(0, entries, size):
                if due < 1.0:
                    runs.append((start, min(start + size, entries)))
                    due += step
                due -= 1.0
            strips += [Strip.of(len(strips) + i, tensor, runs[at : at + together]) for i, at in enumerate(range(0, len(runs), together))]
        return strips, everything


class _Sample:
    """Collects keys of all tasks, in order."""

    keeps = True  # the next pass counts the same entries

    def __init__(self, group: _Group, wanted: Sequence[int]) -> None:
        self._group, self._wanted = group, wanted
        self.keys: dict[int, list[Keys]] = {number: [] for number in wanted}
        self._tensors: dict[int, list[int]] = {number: [] for number in wanted}  # the tensor of each piece
        self.changed = dict.fromkeys(wanted, 0)

    def buffers(self) -> Buffers:
        return self._group.family.buffers()

    def apply(self, tile: Strip, buffers: Buffers) -> list[tuple[int, Keys, int]]:
        family, slot = self._group.family, self._group.slot(tile)
        base_bits = read_runs(family.base, slot, tile.runs, buffers.base)
        found = []
        for a in family.each(slot, tile, base_bits, buffers, self._wanted):
            keys = family.differences(a, buffers).keys(a.base, a.fine, a.pair.fine.dtype.name).copy()
            found.append((a.task, keys, int(np.count_nonzero(keys >= 0))))
        return found

    def reads(self) -> Reads:
        return self._group.family.reads(self._group.tensors, self._wanted)

    def commit(self, tile: Strip, result: list[tuple[int, Keys, int]]) -> None:
        for number, keys, changed in result:
            self.keys[number].append(keys)
            self._tensors[number].append(tile.tensor)
            self.changed[number] += changed

    def window(self, number: int, k: int, within: tuple[int, int, int] | None = None) -> Window:
        """A window that very likely contains the task's threshold. Each sampled key stands for its share of its tensor.

        With `within` (lowest key, highest key, their number), only keys in that range count."""
        sizes = np.array([len(keys) for keys in self.keys[number]])
        tensors = np.array(self._tensors[number])
        sampled = np.bincount(tensors, weights=sizes, minlength=len(self._group.entries))
        weights = np.repeat((np.array(self._group.entries) / np.maximum(sampled, 1))[tensors], sizes)
        keys = np.concatenate(self.keys[number])
        if within is None:
            return predict_window(keys, weights, k, self._group.family.tasks[number].infinite_key)
        low, high, n = within
        inside = (keys >= low) & (keys <= high)
        if not inside.any():
            return Window.over(low, high)
        keys, weights = keys[inside], weights[inside]
        return predict_window(keys, weights * (n / weights.sum()), k, high)

    def finish(self, tile: Strip, committed: None, buffers: Buffers) -> None:
        pass


class _Count:
    """Tallies the windows of several tasks over the slots from `first` on. `tallies` start with the journal's counts."""

    def __init__(self, group: _Group, windows: dict[int, Window], log: ThresholdJournal | None) -> None:
        self._group, self._log = group, log
        self.tallies = {number: Tally(window) for number, window in windows.items()}
        self.keeps = group.family.fits(group.tensors)
        self.first = 0
        if log is not None:
            self.first = log.counted(self.tallies)

    def plan(self) -> TilePlan:
        """Tiles that the journal has not counted."""
        entries = [0 if i < self.first else n for i, n in enumerate(self._group.entries)]
        return TilePlan(entries, self._group.family.how.tile_entries)

    def reads(self) -> Reads:
        return self._group.family.reads(self._group.tensors, self.tallies)

    def buffers(self) -> Buffers:
        return self._group.family.buffers()

    def apply(self, tile: Tile, buffers: Buffers) -> dict[int, Counted]:
        family, slot = self._group.family, self._group.slot(tile)
        _, base_bits = read_bits(family.base, slot, tile, buffers.base)
        found = {}
        for a in family.each(slot, tile, base_bits, buffers, list(self.tallies)):
            found[a.task] = self.tallies[a.task].count(family.differences(a, buffers), a.base, a.fine, a.pair.fine.dtype.name)
        return found

    def commit(self, tile: Tile, result: dict[int, Counted]) -> None:
        for number, counted in result.items():
            self.tallies[number].add(counted)
        if self._log is not None and tile.stop == self._group.entries[tile.tensor]:
            self._log.count(self.tallies, tile.tensor)

    def finish(self, tile: Tile, committed: None, buffers: Buffers) -> None:
        pass


def _nothing(task: TaskVector) -> Threshold:
    """The threshold that keeps no entry."""
    return Threshold(task.infinite_key + 1, 0)


def _sampled(group: _Group, wanted: Sequence[int]) -> tuple[_Sample, bool]:
    """A sample of some tasks' keys, and whether it holds all of them."""
    how = group.family.how
    sample = _Sample(group, wanted)
    strips, everything = group.sample()
    run(sample, strips, how.threads, how.advance if everything else lambda entries: None)
    return sample, everything


def _predict(group: _Group, sample: _Sample, everything: bool, kept: dict[int, int]) -> tuple[dict[int, Found], dict[int, Window]]:
    """Thresholds that the sample settles, and windows for the others."""
    family = group.family
    found: dict[int, Found] = {}
    windows: dict[int, Window] = {}
    for number, k in kept.items():
        keys, task = sample.keys[number], family.tasks[number]
        if not keys or (everything and not k):
            found[number] = Found(_nothing(task), sample.changed[number])
        elif everything:
            found[number] = Found(exact_threshold(np.concatenate(keys), sample.changed[number], k), sample.changed[number])
        else:
            windows[number] = sample.window(number, k) if k else Window(task.infinite_key, 0, 1)
    return found, windows


def find_thresholds(family: Family, slots: range, kept: dict[int, int], log: ThresholdJournal | None = None) -> dict[int, Found]:
    """The threshold of each task over some slots that keeps exactly the requested number of entries.

    Args:
        kept: for each task (index), how many of its entries in these slots to keep.
        log: results of an earlier run, which are reused, and where to record those of this run.

    Reads a sample, then usually everything once. Exact for any data (methods/magnitude.py)."""
    group = _Group(family, slots)
    how = family.how
    sample: _Sample | None = None
    known = log.known() if log is not None else None
    if known is None:
        sample, everything = _sampled(group, list(kept))
        known = (*_predict(group, sample, everything, kept), 0)
    found, windows, counts = known
    while True:
        if log is not None:
            log.begin(found, windows, counts)
        if not windows:
            return found
        count = _Count(group, windows, log)
        how.advance(sum(group.entries[: count.first]))
        run(count, count.plan(), how.threads, how.advance)
        for number in list(windows):
            tally = count.tallies[number]
            task = family.tasks[number]
            decision = decide(tally, kept[number], task.infinite_key) if kept[number] else _nothing(task)
            if isinstance(decision, Window):
                missed = tally.missed(kept[number], task.infinite_key, sum(group.entries)) if not counts else None
                if missed is not None and sample is None:
                    sample, _ = _sampled(group, list(windows))
                windows[number] = decision if missed is None or sample is None else sample.window(number, missed[0], missed[1:])
            else:
                found[number] = Found(decision, tally.changed)
                del windows[number]
        counts += 1  # predict again from the counts, once; then bisect


def counted_bytes(family: Family, slots: range) -> int:
    """Network bytes that the threshold search takes and the next pass requests again: everything but the sample."""
    group = _Group(family, slots)
    strips, _ = group.sample()
    total = family.ranged_bytes(group.tensors)
    for source, info_of in family.reads(group.tensors, range(len(family.tasks))):
        for strip in strips if source.ranged else ():
            info = info_of(strip.tensor)
            total -= (
                sum(info.dtype.nbytes(max(0, min(stop, info.entries) - start)) for start, stop in strip.runs) if info is not None else 0
            )
    return total
