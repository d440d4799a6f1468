"""The k-th largest of the keys of a tensor that is read panel by panel: exact, without holding or sorting them all.

Keys are integers that sort like the numbers that they stand for. One pass counts them in bins. A second one collects the keys of
the bin that has the k-th largest, each once with its count, so that keys which many entries share take no room. Both add up, so
that threads change nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.kernels.merging.panels import between, count_bins
from peru_cli.kernels.merging.verbs import Flags
from peru_cli.methods.matrices import Matrices, Panels

Keys = np.ndarray[Any, np.dtype[Any]]  # int32 or int64
Bins = np.ndarray[Any, np.dtype[np.int64]]
_BINS = 20  # bits of a key by which it is counted


@dataclass(frozen=True)
class Taken:
    """Every key above `key` is among the k largest, and so many of those equal to it, the first in canonical order, by panel."""

    key: int
    equals: Sequence[int]


def ordered(numbers: Any) -> Keys:
    """Keys of float32 or float64, none of them NaN: int32 or int64. -0.0 has the key of 0.0; (...) -> (...)."""
    patterns: Keys = (numbers + numbers.dtype.type(0)).view(f"i{numbers.itemsize}")
    found: Keys = patterns ^ ((patterns >> (8 * numbers.itemsize - 1)) & np.iinfo(patterns.dtype).max)
    return found


def number_of(key: int, kind: str) -> float:
    """The number of a key; `kind` is f4 or f8."""
    width = 8 * int(kind[1])
    pattern = key if key >= 0 else key ^ ((1 << (width - 1)) - 1)
    return float(np.array(pattern, f"i{kind[1]}").view(kind))


class Counts:
    """Keys counted in bins of 2^shift keys. Each thread that counts has a table, for as long as it counts."""

    def __init__(self, kind: str) -> None:
        """`kind` is i4 or i8."""
        self._shift = 8 * int(kind[1]) - _BINS
        self._tables: list[Bins] = []
        self._lock = threading.Lock()

    def add(self, keys: Keys) -> None:
        """Count keys, (n,)."""
        with self._lock:
            table = self._tables.pop() if self._tables else np.zeros(1 << _BINS, np.int64)
        count_bins(keys, self._shift, 1 << (_BINS - 1), table)
        with self._lock:
            self._tables.append(table)

    def total(self) -> Bins:
        """The number of keys in each bin, from the lowest on."""
        total: Bins = np.sum(self._tables, axis=0, dtype=np.int64)
        return total

    def low(self, number: int) -> int:
        """The lowest key of a bin."""
        return (number - (1 << (_BINS - 1))) << self._shift


def largest(panels: Panels, counts: Counts, keys_of: Callable[[Matrices], Keys], ks: Sequence[int]) -> list[Taken]:
    """Where the k largest keys end, for each k from 1 to their number.

    Args:
        counts: has counted all of them.
        keys_of: a panel's keys, (n,)."""
    at_least = np.cumsum(counts.total()[::-1])[::-1]  # keys in a bin or above
    bins = [int(np.flatnonzero(at_least >= k)[-1]) for k in ks]
    windows = {number: (counts.low(number), counts.low(number + 1) - 1) for number in bins}

    def within(panel: Matrices) -> dict[int, tuple[Keys, Keys]]:
        keys = keys_of(panel)
        return {number: np.unique(between(keys, *window), return_counts=True) for number, window in windows.items()}

    found, result = panels.each(within), []
    for k, number in zip(ks, bins, strict=True):
        above = int(at_least[number + 1]) if number + 1 < len(at_least) else 0
        keys, where = np.unique(np.concatenate([each[number][0] for each in found]), return_inverse=True)
        times = np.bincount(where, np.concatenate([each[number][1] for each in found])).astype(np.int64)
        reached = above + np.cumsum(times[::-1])[::-1]  # keys at or above this one
        chosen = int(np.flatnonzero(reached >= k)[-1])
        left, equals = k - int(reached[chosen] - times[chosen]), []
        for own, own_times in (each[number] for each in found):
            there = int(own_times[own == keys[chosen]].sum())
            equals.append(min(there, left))
            left -= equals[-1]
        result.append(Taken(int(keys[chosen]), equals))
    return result


def kept(keys: Keys, taken: Taken, panel: int) -> Flags:
    """Which of a panel's keys are among the k largest; (n,) -> bools (n,)."""
    flags: Flags = keys > taken.key
    if taken.equals[panel]:
        flags[np.flatnonzero(keys == taken.key)[: taken.equals[panel]]] = True
    return flags
