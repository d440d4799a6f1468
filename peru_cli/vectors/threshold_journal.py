"""The journal of the threshold search: what was sampled, counted and decided, so that a killed run can continue."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.artifacts.codecs import PCO, Integers, decode, encode
from peru_cli.checkpoints.local.journal import Journal
from peru_cli.methods.compact.magnitude import Tally, Threshold, Window

EVERY = 1.0  # seconds between two entries, if reading again costs nothing but time


@dataclass(frozen=True)
class Found:
    """A task's threshold over a group of slots, and how many of the group's entries changed."""

    threshold: Threshold
    changed: int
    equals: dict[tuple[int, int], int] | None = None  # by a tile's slot and first entry, how many equal the threshold, if workers counted


class Pace:
    """When to write an entry: always for network data, now and then otherwise."""

    def __init__(self, ranged: bool) -> None:
        self._every = 0.0 if ranged else EVERY
        self._at = time.monotonic()

    def due(self) -> bool:
        """Whether an entry is due. This restarts the interval."""
        now = time.monotonic()
        if now - self._at < self._every:
            return False
        self._at = now
        return True


class ThresholdJournal:
    """The entries of one search under a name. Call `count` in canonical order."""

    def __init__(self, journal: Journal, name: str, ranged: bool) -> None:
        self._journal, self._name, self._pace = journal, name, Pace(ranged)
        self._round = 0

    def known(self) -> tuple[dict[int, Found], dict[int, Window], int] | None:
        """Thresholds found, windows to count for the other tasks, and the number of counts so far. None for a new search."""
        rounds = 0
        while f"{self._name} round {rounds}" in self._journal.notes:  # keys are looked up: there may be a search for every tensor
            rounds += 1
        if not rounds:
            return None
        found, windows = self._journal.notes[f"{self._name} round {rounds - 1}"]
        return (
            {number: Found(Threshold(key, equals), changed) for number, key, equals, changed in found},
            {number: Window(*window) for number, *window in windows},
            rounds - 1,
        )

    def begin(self, found: dict[int, Found], windows: dict[int, Window], counts: int) -> None:
        """Record what is known before a count."""
        self._round = counts
        key = f"{self._name} round {counts}"
        if key not in self._journal.notes:
            settled = [[number, f.threshold.key, f.threshold.equals, f.changed] for number, f in found.items()]
            self._journal.note(key, [settled, [[number, w.low, w.shift, w.bins] for number, w in windows.items()]])

    def counted(self, tallies: dict[int, Tally], slots: int) -> int:
        """Add what an earlier run counted in this round, of so many slots. Returns the first one that it did not count."""
        first = 0
        for slot in range(slots):
            key = f"{self._name} count {self._round} {slot}"
            if key in self._journal.notes:
                first = slot + 1
                for number, above, changed, bins, times in self._journal.notes[key]:
                    tallies[number].restore(above, changed, _unpack(bins, True), _unpack(times, False))
        for tally in tallies.values():
            tally.news()  # already recorded
        return first

    def count(self, tallies: dict[int, Tally], slot: int) -> None:
        """Record that a slot and all before it were counted."""
        if self._pace.due():
            news = [(number, tally.news()) for number, tally in tallies.items()]
            noted = [[number, above, changed, _pack(bins, True), _pack(times, False)] for number, (above, changed, bins, times) in news]
            self._journal.note(f"{self._name} count {self._round} {slot}", noted)


def _pack(values: Integers, ascending: bool) -> Any:
    """Integers as [their number, the codec's bytes]."""
    if not len(values):
        return [0, ""]
    steps = np.diff(values, prepend=0) if ascending else values
    return [len(values), base64.b64encode(encode(steps.astype(np.uint64), PCO)).decode("ascii")]


def _unpack(packed: Any, ascending: bool) -> Integers:
    count, text = packed
    if not count:
        return np.zeros(0, np.int64)
    values = decode(base64.b64decode(text), PCO, "uint64", count).astype(np.int64)
    return np.cumsum(values) if ascending else values
