"""The search for thresholds over task vectors: a sample predicts a window, one pass counts within it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.kernels.deltas import add_bins
from peru_cli.methods.compact.magnitude import (
    Bins,
    Counted,
    Keys,
    Tally,
    Threshold,
    Window,
    count_keys,
    decide,
    exact_threshold,
    predict_window,
)
from peru_cli.streaming.aligned import read_bits, read_runs
from peru_cli.streaming.engine import Reads, expect, run
from peru_cli.streaming.tiles import Strip, Tile, TilePlan
from peru_cli.vectors.family import Buffers, Family, Station, TaskVector
from peru_cli.vectors.threshold_journal import Found, ThresholdJournal

SAMPLE_RUNS = 1024
RANGED_RUN = 4  # runs this many times as long, and this many times fewer, if each run is a request
SAMPLE_RUN = 1024  # entries; SAMPLE_RUNS * SAMPLE_RUN keys are held at once, 4 or 8 MB a task
SLOT_RUNS = 128  # for a single tensor: sorting a larger sample costs more than a narrower window saves
FORESEEN = 1 << 22  # counts by tile that a search holds at most, 8 bytes each
STRIP_RUNS = 32  # runs that one thread processes together: asking for a single run costs more than processing it


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

    def __init__(self, group: _Group, wanted: Sequence[int], keeps: bool) -> None:
        self._group, self._wanted, self.keeps = group, wanted, keeps
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
        self._group, self._windows, self._log = group, windows, log
        self.tallies = {number: Tally(window) for number, window in windows.items()}
        self._by_tile: list[tuple[int, list[Place], _Counts]] = []  # workers' counts in windows that tell all keys apart
        self._held = 0
        self.keeps = group.family.fits(group.tensors)
        self.first = 0
        if log is not None:
            self.first = log.counted(self.tallies, len(group.entries))

    def plan(self) -> TilePlan:
        """Tiles that the journal has not counted."""
        entries = [0 if i < self.first else n for i, n in enumerate(self._group.entries)]
        return TilePlan(entries, self._group.family.how.tile_entries)

    def reads(self) -> Reads:
        return self._group.family.reads(self._group.tensors, self.tallies)

    def buffers(self) -> Buffers:
        return self._group.family.buffers()

    def apply(self, tile: Tile, buffers: Buffers) -> dict[int, Counted]:
        return _counted(Station(self._group.family, buffers), self._group.slot(tile), tile, self._windows)

    def commit(self, tile: Tile, result: dict[int, Counted]) -> None:
        for number, counted in result.items():
            self.tallies[number].add(counted)
        self._note(tile)

    def _note(self, tile: Tile) -> None:
        if self._log is not None and tile.stop == self._group.entries[tile.tensor]:
            self._log.count(self.tallies, tile.tensor)

    def finish(self, tile: Tile, committed: None, buffers: Buffers) -> None:
        pass

    # -- on other machines (streaming/cluster.py) -----------------------------------------------------------

    @property
    def inputs(self) -> int:
        """Models that each tile is read from."""
        return 1 + len(self._windows)

    def order(self, tiles: Sequence[Tile]) -> _Counting:
        """What a worker needs to know of these tiles."""
        return _Counting(self._group.slots, self._windows)

    def take(self, tiles: Sequence[Tile], reply: dict[int, _Counts]) -> None:
        """Add a worker's counts. Nothing is left for it to do."""
        places = [(self._group.slots[tile.tensor], tile.start) for tile in tiles]
        for number, counts in reply.items():
            self.tallies[number].restore(counts.above, counts.changed, *counts.sums())
            if not self._windows[number].shift and self._held <= FORESEEN:
                self._held += len(counts.bins)
                self._by_tile.append((number, places, counts))
        self._note(tiles[-1])

    def equals(self, number: int, threshold: Threshold) -> dict[Place, int] | None:
        """How many entries of a task equal its threshold, by tile. None if that was not counted here for all of them."""
        window = self._windows[number]
        if threshold.equals is None or window.shift or self.first or not self._by_tile or self._held > FORESEEN:
            return None
        found: dict[Place, int] = {}
        for task, places, counts in self._by_tile:
            if task == number:
                found |= zip(places, counts.equal_to(threshold.key - window.low), strict=True)
        return found

    def done(self, tiles: Sequence[Tile], reply: None) -> None:
        """Nothing."""


_Small = np.ndarray[Any, np.dtype[np.int32]]
Place = tuple[int, int]  # a tile's slot and first entry


@dataclass
class _Counts:
    """A worker's counts of one task: keys above the window, changed entries; and which bins have keys, tile after tile.

    bins, times (n,); tiles (n,): the number of each tile in its batch, of so many."""

    above: int
    changed: int
    bins: _Small
    times: _Small
    tiles: _Small
    of: int

    def sums(self) -> tuple[Bins, Bins]:
        """All tiles together, as Tally.restore takes it."""
        bins, where = np.unique(self.bins, return_inverse=True)
        return bins.astype(np.int64), np.bincount(where, self.times, len(bins)).astype(np.int64)

    def equal_to(self, number: int) -> list[int]:
        """Keys in one bin, by tile."""
        there = self.bins == number
        found: list[int] = np.bincount(self.tiles[there], self.times[there], self.of).astype(np.int64).tolist()
        return found


@dataclass(frozen=True)
class _Counting:
    """A worker's order: count these windows, by task, over slots of the family."""

    slots: range
    windows: dict[int, Window]

    def compute(self, station: Station, tiles: Sequence[Tile]) -> dict[int, _Counts]:
        """Counts for some tiles, by task."""
        slots = [station.family.slots[i] for i in self.slots]
        expect(station.family.reads(slots, self.windows), tiles)
        found: dict[int, list[tuple[int, Counted, Bins, Bins]]] = {number: [] for number in self.windows}
        for at, tile in enumerate(tiles):
            for number, counted in _counted(station, slots[tile.tensor], tile, self.windows).items():
                found[number].append((at, counted, *self._bins(counted.within, self.windows[number])))
        return {number: self._packed(counts, len(tiles)) for number, counts in found.items() if counts}

    @staticmethod
    def _bins(within: Keys, window: Window) -> tuple[Bins, Bins]:
        if window.bins > len(within):
            return np.unique((within.astype(np.int64) - window.low) >> window.shift, return_counts=True)
        table = np.zeros(window.bins, np.int64)
        add_bins(table, within, window.low, window.shift)
        bins = np.flatnonzero(table)
        return bins, table[bins]

    @staticmethod
    def _packed(counts: list[tuple[int, Counted, Bins, Bins]], tiles: int) -> _Counts:
        numbers, counted, bins, times = zip(*counts, strict=True)
        where = np.repeat(np.array(numbers, np.int32), [len(each) for each in bins])
        of_bins, of_times = (np.concatenate(arrays).astype(np.int32) for arrays in (bins, times))
        above, changed = sum(each.above for each in counted), sum(each.changed for each in counted)
        return _Counts(above, changed, of_bins, of_times, where, tiles)


def _counted(station: Station, slot: TensorInfo, tile: Tile, windows: dict[int, Window]) -> dict[int, Counted]:
    """What a tile adds to the tally of each window's task."""
    family, buffers = station.family, station.buffers
    _, base_bits = read_bits(family.base, slot, tile, buffers.base)
    found = {}
    for a in family.each(slot, tile, base_bits, buffers, list(windows)):
        found[a.task] = count_keys(family.differences(a, buffers), a.base, a.fine, a.pair.fine.dtype.name, windows[a.task])
    return found


def _nothing(task: TaskVector) -> Threshold:
    """The threshold that keeps no entry."""
    return Threshold(task.infinite_key + 1, 0)


def _sampled(group: _Group, wanted: Sequence[int]) -> tuple[_Sample, bool]:
    """A sample of some tasks' keys, and whether it holds all of them."""
    how = group.family.how
    strips, everything = group.sample()
    # The next pass reads the same entries. But short runs that are kept would cut its requests into as many pieces.
    sample = _Sample(group, wanted, everything or group.family.fits(group.tensors))
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

    Reads a sample, then usually everything once. Exact for any data (methods/compact/magnitude.py)."""
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
        run(count, count.plan(), how.threads, how.advance, how.elsewhere)
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
                found[number] = Found(decision, tally.changed, count.equals(number, decision))
                del windows[number]
        counts += 1  # predict again from the counts, once; then bisect


def counted_bytes(family: Family, slots: range) -> int:
    """Network bytes that the threshold search takes if it keeps none for the next pass: a sample, then everything."""
    group = _Group(family, slots)
    strips, everything = group.sample()
    if everything:  # the sample is kept
        return 0
    total = family.ranged_bytes(group.tensors)
    for source, info_of in family.reads(group.tensors, range(len(family.tasks))):
        for strip in strips if source.ranged else ():
            info = info_of(strip.tensor)
            total += (
                sum(info.dtype.nbytes(max(0, min(stop, info.entries) - start)) for start, stop in strip.runs) if info is not None else 0
            )
    return total
