"""Several fine-tunes aligned with one base, and the search for thresholds over their task vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pair, Pairing
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.methods.delta import INFINITE_KEY, KeyRoom, cast_bits
from peru_cli.methods.magnitude import Keys, Tally, Threshold, Window, decide, exact_threshold, predict_window
from peru_cli.streaming.aligned import TileBuffer, read_bits, read_runs
from peru_cli.streaming.arrays import Array, Arrays
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Strip, Tile, TilePlan

SAMPLE_RUNS = 1024
SAMPLE_RUN = 1024  # entries; SAMPLE_RUNS * SAMPLE_RUN keys are held at once, 4 or 8 MB a task
SLOT_RUNS = 128  # for a single tensor: sorting a larger sample costs more than a narrower window saves
STRIP_RUNS = 32  # runs that one thread looks at together: a run alone costs more to ask for than to look at


@dataclass
class TaskVector:
    """A fine-tune against the base."""

    name: str
    fine: Checkpoint
    pairing: Pairing
    pairs: dict[str, Pair] = field(init=False)  # those that have a difference, by the base's tensor name
    wide: bool = field(init=False)  # whether keys are float64: if any paired tensor is

    def __post_init__(self) -> None:
        self.pairs = {pair.base.name: pair for pair in self.pairing.pairs if pair.is_delta}
        self.wide = any("F64" in (pair.fine.dtype.name, pair.base.dtype.name) for pair in self.pairs.values())

    @property
    def infinite_key(self) -> int:
        """The key of differences that are not finite."""
        return INFINITE_KEY[self.wide]


@dataclass(frozen=True)
class How:
    """How to stream: nothing here changes a result."""

    xp: Arrays
    threads: int
    tile_entries: int
    advance: Callable[[int], None] = lambda entries: None


class Buffers:
    """One thread's room: a tile of the base, a tile of a fine-tune, keys."""

    def __init__(self, how: How, tasks: Sequence[TaskVector]) -> None:
        widths = [d.bits // 8 for t in tasks for p in t.pairs.values() for d in (p.fine.dtype, p.base.dtype)]
        self.base, self.fine = (TileBuffer(how.xp, how.tile_entries, max(widths, default=1)) for _ in range(2))
        self.keys = {wide: KeyRoom(how.xp, how.tile_entries, wide) for wide in {task.wide for task in tasks}}


@dataclass
class Aligned:
    """What one task has of a tile: the base's bits cast to its dtype and its own, (n,), and rows that grew."""

    task: int
    pair: Pair
    base: Array
    fine: Array
    grown: Array


class Family:
    """A base and task vectors, slot by slot: a slot is a base tensor that any of them pairs with."""

    def __init__(self, base: Checkpoint, tasks: Sequence[TaskVector], how: How) -> None:
        self.base, self.tasks, self.how = base, tasks, how
        names = sorted({name for task in tasks for name in task.pairs})
        self.slots: list[TensorInfo] = [base.tensors[name] for name in names]
        self.entries = [max([s.entries] + [t.pairs[s.name].fine.entries for t in tasks if s.name in t.pairs]) for s in self.slots]

    def plan(self) -> TilePlan:
        """Tiles of all slots, each as long as its longest tensor."""
        return TilePlan(self.entries, self.how.tile_entries)

    def buffers(self) -> Buffers:
        """One thread's room."""
        return Buffers(self.how, self.tasks)

    def each(self, slot: TensorInfo, tile: Tile | Strip, base_bits: Array, buffers: Buffers, wanted: Sequence[int]) -> Iterator[Aligned]:
        """Read the tile of each wanted task in turn; one's tensors are valid until the next."""
        n = len(base_bits)
        for number in wanted:
            pair = self.tasks[number].pairs.get(slot.name)
            if pair is not None and len(fine := read_runs(self.tasks[number].fine, pair.fine, tile.runs, buffers.fine)):
                yield Aligned(number, pair, cast_bits(self.how.xp, base_bits, pair.base.dtype, pair.fine.dtype), fine[:n], fine[n:])

    def keys(self, aligned: Aligned, low: int, buffers: Buffers) -> Array:
        """Keys of one task's tile (see `KeyRoom.keys`)."""
        room = buffers.keys[self.tasks[aligned.task].wide]
        return room.keys(aligned.base, aligned.fine, aligned.pair.fine.dtype, low)

    def changed(self, aligned: Aligned) -> int:
        """How many entries of one task's tile differ from the base."""
        return self.how.xp.count(self.how.xp.not_equal(aligned.base, aligned.fine))


class _Group:
    """Slots that share a threshold: all of them, or one."""

    def __init__(self, family: Family, slots: range) -> None:
        self.family, self.slots = family, slots
        self.entries = [family.slots[i].entries for i in slots]
        self._sample = SAMPLE_RUN * (SAMPLE_RUNS if len(slots) > 1 else SLOT_RUNS)

    def slot(self, tile: Tile | Strip) -> TensorInfo:
        return self.family.slots[self.slots[tile.tensor]]

    def sample(self) -> tuple[list[Strip], bool]:
        """Short runs spread evenly over the group; all of it if that is no more (the flag)."""
        strips: list[Strip] = []
        total = sum(self.entries)
        everything = total <= self._sample
        step = 1.0 if everything else total / self._sample
        due = 0.0  # runs are cut from SAMPLE_RUN-sized pieces; every step-th piece is taken
        tile = self.family.how.tile_entries
        size, together = (tile, 1) if everything else (SAMPLE_RUN, min(STRIP_RUNS, tile // SAMPLE_RUN))
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

    def __init__(self, group: _Group, wanted: Sequence[int]) -> None:
        self._group, self._wanted = group, wanted
        self.keys: dict[int, list[Keys]] = {number: [] for number in wanted}
        self._tensors: dict[int, list[int]] = {number: [] for number in wanted}  # which tensor each piece is from
        self.changed = dict.fromkeys(wanted, 0)

    def buffers(self) -> Buffers:
        return self._group.family.buffers()

    def apply(self, tile: Strip, buffers: Buffers) -> list[tuple[int, Keys, int]]:
        family, slot = self._group.family, self._group.slot(tile)
        base_bits = read_runs(family.base, slot, tile.runs, buffers.base)
        return [
            (a.task, family.how.xp.download(family.keys(a, 0, buffers)).copy(), family.changed(a))
            for a in family.each(slot, tile, base_bits, buffers, self._wanted)
        ]

    def commit(self, tile: Strip, result: list[tuple[int, Keys, int]]) -> None:
        for number, keys, changed in result:
            self.keys[number].append(keys)
            self._tensors[number].append(tile.tensor)
            self.changed[number] += changed

    def window(self, number: int, k: int) -> Window:
        """Where the task's threshold very likely is; a sampled key stands for its share of its tensor."""
        sizes = np.array([len(keys) for keys in self.keys[number]])
        tensors = np.array(self._tensors[number])
        sampled = np.bincount(tensors, weights=sizes, minlength=len(self._group.entries))
        weights = np.repeat((np.array(self._group.entries) / np.maximum(sampled, 1))[tensors], sizes)
        return predict_window(np.concatenate(self.keys[number]), weights, k, self._group.family.tasks[number].infinite_key)

    def finish(self, tile: Strip, committed: None, buffers: Buffers) -> None:
        pass


class _Count:
    """Tallies the windows of several tasks."""

    def __init__(self, group: _Group, windows: dict[int, Window]) -> None:
        self._group = group
        self.tallies = {number: Tally(window) for number, window in windows.items()}

    def buffers(self) -> Buffers:
        return self._group.family.buffers()

    def apply(self, tile: Tile, buffers: Buffers) -> None:
        family, slot = self._group.family, self._group.slot(tile)
        _, base_bits = read_bits(family.base, slot, tile, buffers.base)
        for a in family.each(slot, tile, base_bits, buffers, list(self.tallies)):
            keys = family.keys(a, self.tallies[a.task].window.low, buffers)
            self.tallies[a.task].add_keys(family.how.xp, keys, family.changed(a))

    def commit(self, tile: Tile, result: None) -> None:
        pass

    def finish(self, tile: Tile, committed: None, buffers: Buffers) -> None:
        pass


@dataclass(frozen=True)
class Found:
    """A task's threshold over a group, and how many of the group's entries changed."""

    threshold: Threshold
    changed: int


def _nothing(task: TaskVector) -> Threshold:
    """The threshold that keeps no entry."""
    return Threshold(task.infinite_key + 1, 0)


def find_thresholds(family: Family, slots: range, kept: dict[int, int]) -> dict[int, Found]:
    """The threshold of each task over some slots, such that it keeps exactly so many entries.

    Args:
        kept: for each task (number), how many of its entries of these slots to keep.

    Reads a sample, then usually everything once; exact whatever the data (methods/magnitude.py).
    """
    group = _Group(family, slots)
    how = family.how
    sample = _Sample(group, list(kept))
    strips, everything = group.sample()
    run(sample, strips, how.threads, how.advance if everything else lambda entries: None)
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
    del sample
    plan = TilePlan(group.entries, how.tile_entries)
    while windows:
        count = _Count(group, windows)
        run(count, plan, how.threads, how.advance)
        for number in list(windows):
            tally = count.tallies[number]
            task = family.tasks[number]
            decision = decide(tally, kept[number], task.infinite_key) if kept[number] else _nothing(task)
            if isinstance(decision, Window):
                windows[number] = decision
            else:
                found[number] = Found(decision, tally.changed)
                del windows[number]
    return found
