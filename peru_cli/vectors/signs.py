"""What is looked for in each tensor before signs are stored: thresholds of each sign, and scales.

T-Switch keeps the largest changes of each tensor, those that grew and those that shrank apart, as signs times one scale a tensor:

    tau -> sign(tau) ||kept||_2 / sqrt(number kept)          for the kept entries of tau = fine - base, else 0

Of a sign's entries, the floor(share n) largest are kept, and all that equal the last of them; if that is none, all n are.

Source: Qi et al., Less is More: Efficient Model Merging with Binary Task Switch (2025), https://arxiv.org/abs/2412.00054, and its program
https://github.com/lfy-123/Binary-Task-Switch (process_matrix, binarize_matrix)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Generic, TypeVar

import numpy as np

from peru_cli.errors import BadFile
from peru_cli.methods.compact.delta import rises
from peru_cli.methods.compact.magnitude import Counted, Keys, Tally, Threshold, Window, decide, key_value
from peru_cli.streaming.aligned import read_bits
from peru_cli.streaming.engine import Reads, run
from peru_cli.streaming.tiles import CHUNK, Tile
from peru_cli.vectors.family import Aligned, Buffers, Family
from peru_cli.vectors.threshold_journal import Found

_FIRST_BINS = 16  # bits: a window of all keys has so many bins, of which each side of each task has a table
_OVERFLOW = float(np.finfo(np.float32).max) * (1 + 2.0**-25)  # from here on float64 rounds to infinity in float32
LEAST = 1  # the least key of a change; -0.0 for 0.0 is none
T = TypeVar("T")


class _Look(Generic[T]):
    """Looks at the keys of every task's tiles. What `look` gives is passed to `take` in canonical order."""

    def __init__(self, family: Family, slots: range, look: Callable[[int, Aligned, Keys], T], take: Callable[[int, int, T], None]) -> None:
        """`look` gets a slot, a tile of it, and the tile's keys, (n,); `take` a slot and a task."""
        self._family, self._look, self._take = family, look, take
        self.keeps = family.fits([family.slots[i] for i in slots])

    def buffers(self) -> Buffers:
        return self._family.buffers()

    def reads(self) -> Reads:
        return self._family.reads(self._family.slots, range(len(self._family.tasks)))

    def apply(self, tile: Tile, buffers: Buffers) -> list[tuple[int, T]]:
        family, slot = self._family, self._family.slots[tile.tensor]
        _, base_bits = read_bits(family.base, slot, tile, buffers.base)
        found = []
        for a in family.each(slot, tile, base_bits, buffers, range(len(family.tasks))):
            keys = family.differences(a, buffers).keys(a.base, a.fine, a.pair.fine.dtype.name)
            found.append((a.task, self._look(tile.tensor, a, keys)))
        return found

    def commit(self, tile: Tile, result: list[tuple[int, T]]) -> None:
        for task, value in result:
            self._take(tile.tensor, task, value)

    def finish(self, tile: Tile, committed: None, buffers: Buffers) -> None:
        pass


def sign_thresholds(family: Family, slot: int, share: Fraction) -> list[Found]:
    """Each task's threshold in one slot: its share of the entries that grew, and of those that shrank. Reads the slot twice, or more."""
    keys = {(task, side): LEAST for task in range(len(family.tasks)) for side in range(2)}
    shift = {wide: (63 if wide else 31) - _FIRST_BINS for wide in (False, True)}
    windows = {side: Window(LEAST, shift[family.tasks[side[0]].wide], 1 << _FIRST_BINS) for side in keys}
    changed: list[int] | None = None
    while windows:
        tallies = {side: Tally(window) for side, window in windows.items()}

        def look(_: int, a: Aligned, found: Keys, windows: dict[tuple[int, int], Window] = windows) -> list[tuple[int, Counted]]:
            grew = rises(family.how.xp.download(a.base), family.how.xp.download(a.fine))
            return [
                (side, _counted(found[(grew == (side == 0)) & (found >= LEAST)], windows[a.task, side]))
                for side in range(2)
                if (a.task, side) in windows
            ]

        def take(_: int, task: int, found: list[tuple[int, Counted]], tallies: dict[tuple[int, int], Tally] = tallies) -> None:
            for side, counted in found:
                tallies[task, side].add(counted)

        run(_Look(family, range(slot, slot + 1), look, take), family.tiles(slot), family.how.threads, family.how.advance)
        if changed is None:
            changed = [sum(tallies[task, side].changed for side in range(2)) for task in range(len(family.tasks))]
        after = {}
        for (task, side), tally in tallies.items():
            kept = int(share * tally.changed)
            decision = decide(tally, kept, family.tasks[task].infinite_key) if kept else Threshold(0)
            if isinstance(decision, Window):
                after[task, side] = decision
            else:
                keys[task, side] = max(decision.key, LEAST)
        windows = after
    sides = [(keys[task, 0], keys[task, 1]) for task in range(len(family.tasks))]
    return [Found(Threshold(min(pair), sides=pair), number) for pair, number in zip(sides, changed or [], strict=True)]


def _counted(keys: Keys, window: Window) -> Counted:
    inside = keys[(keys >= window.low) & (keys <= window.high)]
    return Counted(int(np.count_nonzero(keys > window.high)), len(keys), inside)


def without_zeros(threshold: Threshold) -> Threshold:
    """The threshold without differences of 0 (-0.0 for 0.0), which have no sign."""
    return threshold if threshold.key else Threshold(LEAST)


def scales(family: Family, slots: range, thresholds: Sequence[Callable[[int], Threshold]]) -> list[list[float]]:
    """For each task, the scale of the signs of what it keeps in each of these slots; 0 if that is nothing, or nothing finite.

    `thresholds` gives each task's by slot. A threshold of several slots has its equals in canonical order."""
    found: dict[tuple[int, int], list[tuple[Any, int, int]]] = {}

    def look(slot: int, a: Aligned, keys: Keys) -> tuple[Any, int, int]:
        """Squares of what is kept for sure, by chunk; how many these are; how many equal the threshold."""
        threshold, infinite = thresholds[a.task](slot), family.tasks[a.task].infinite_key
        least: Any = threshold.key if threshold.equals is None else threshold.key + 1
        if threshold.sides is not None:
            least = np.where(rises(family.how.xp.download(a.base), family.how.xp.download(a.fine)), *threshold.sides)
        at = np.flatnonzero((keys >= least) & (keys < infinite))
        values = keys[at].view(f"f{keys.itemsize}").astype(np.float64)
        if a.pair.fine.dtype.name != "F64":  # whose differences are taken in float32, where these are infinite
            at, values = at[values < _OVERFLOW], values[values < _OVERFLOW]
        with np.errstate(over="ignore"):  # refused below
            squares = np.square(values)
        return np.bincount(at // CHUNK, squares), len(at), int(np.count_nonzero(keys == threshold.key)) if threshold.equals else 0

    def take(slot: int, task: int, value: tuple[Any, int, int]) -> None:
        found.setdefault((task, slot), []).append(value)

    tiles = [tile for slot in slots for tile in family.tiles(slot)]
    run(_Look(family, slots, look, take), [t._replace(number=i) for i, t in enumerate(tiles)], family.how.threads, family.how.advance)
    return [
        _scales(family, slots, task, thresholds[task], {slot: found.get((task, slot), []) for slot in slots})
        for task in range(len(family.tasks))
    ]


def _scales(
    family: Family, slots: range, task: int, thresholds: Callable[[int], Threshold], found: dict[int, list[tuple[Any, int, int]]]
) -> list[float]:
    """One task's scales, from what `look` saw of each slot."""
    vector, result = family.tasks[task], []
    left: dict[int, int] = {}  # equals that may still be taken, by threshold
    for slot in slots:
        threshold = thresholds(slot)
        total, count, equals = 0.0, 0, 0
        for sums, kept, equal in found[slot]:
            for value in sums.tolist():
                total += value
            count, equals = count + kept, equals + equal
        taken = min(equals, left.setdefault(id(threshold), threshold.equals or 0))
        left[id(threshold)] -= taken
        if threshold.key < vector.infinite_key:
            total, count = total + taken * key_value(threshold.key, vector.wide) ** 2, count + taken
        scale = math.sqrt(total / count) if count else 0.0
        pair = family.pairs[task].get(family.slots[slot].name)
        if pair is not None and pair.fine.dtype.name != "F64":
            scale = float(np.float32(min(scale, float(np.finfo(np.float32).max))))
        if not math.isfinite(scale):
            name = pair.fine.name if pair is not None else ""
            raise BadFile(f"{vector.fine.label}: the changes of {name!r} are too large for one scale", "leave --values sign out")
        result.append(scale)
    return result
