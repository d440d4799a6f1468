"""Post-Pruning: keep the entries of the task vector with the largest magnitude, exactly k of them.

Source: PERU paper, section 4.1 (Post-Pruning, PERU-FFT): theta_0 + top_m(theta_t - theta_0).

The k-th largest key of billions is found without sorting or holding them. Count the keys above a window, and those within
it by bins; the counts add up over tiles, threads and machines. A window predicted from a sample usually contains the answer
in bins of one key each, and one count decides. Otherwise the counts tell where to look next, so a few counts are enough
for any data."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.kernels.deltas import add_bins
from peru_cli.streaming.arrays import Array, Differences

Keys = np.ndarray[Any, np.dtype[Any]]  # int32 or int64
Weights = np.ndarray[Any, np.dtype[np.float64]]
Bins = np.ndarray[Any, np.dtype[np.int64]]
MAX_BINS = 1 << 20


@dataclass(frozen=True)
class Threshold:
    """Keep every key above `key`, and the first `equals` of the keys equal to it, in canonical order; all of them if it is None.

    `key` 0 with `equals` None keeps all changed entries. With `sides`, entries that grew and entries that shrank have their own least
    keys, and `key` is the smaller one."""

    key: int
    equals: int | None = None
    sides: tuple[int, int] | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether every changed entry is kept."""
        return self.equals is None and not self.key


ALL_CHANGED = Threshold(0)


def key_value(key: int, wide: bool) -> float:
    """The magnitude that a key stands for."""
    return float(np.int64(key).view(np.float64)) if wide else float(np.int32(key).view(np.float32))


@dataclass(frozen=True)
class Window:
    """Keys from `low` on in `bins` bins of 2^shift keys each."""

    low: int
    shift: int
    bins: int

    @classmethod
    def over(cls, low: int, high: int) -> Window:
        """The finest window of at most MAX_BINS bins that covers the keys `low` to `high`, both included."""
        shift = 0
        while ((high - low) >> shift) + 1 > MAX_BINS:
            shift += 1
        return cls(low, shift, ((high - low) >> shift) + 1)

    @property
    def high(self) -> int:
        """The last key in the window."""
        return self.low + (self.bins << self.shift) - 1


@dataclass
class Counted:
    """What a run of entries adds to a tally: keys above the window, changed entries, and the keys within it (k,)."""

    above: int
    changed: int
    within: Keys


def count_keys(room: Differences, base: Array, fine: Array, dtype: str, window: Window) -> Counted:
    """Count the keys of a run of entries, for `Tally.add`; bits (n,) and (n,)."""
    above, changed, within = room.count(base, fine, dtype, window.low, window.high)
    return Counted(above, changed, within)


class Tally:
    """Statistics of one window that add up: keys above it, keys in each bin, changed entries.

    Any thread may add. All share one table of bins, which takes most of the search's memory."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.above = 0
        self.changed = 0
        self.bins = np.zeros(window.bins, dtype=np.int64)  # number of keys in each
        self._told: tuple[int, int, Bins] | None = None  # above, changed and bins at the last call of `news`
        self._lock = threading.Lock()

    def add(self, counted: Counted) -> None:
        """Add counts."""
        with self._lock:
            self.above += counted.above
            self.changed += counted.changed
            add_bins(self.bins, counted.within, self.window.low, self.window.shift)

    def restore(self, above: int, changed: int, bins: Bins, times: Bins) -> None:
        """Add what an earlier run counted: bins (k,), each listed once, and the number of keys in each."""
        self.above += above
        self.changed += changed
        self.bins[bins] += times

    def news(self) -> tuple[int, int, Bins, Bins]:
        """What was added since the last call, in the form that `restore` takes."""
        above, changed, before = self._told or (0, 0, np.zeros_like(self.bins))
        grown = np.flatnonzero(self.bins != before)
        times = self.bins[grown] - before[grown]
        before[grown] += times
        self._told = self.above, self.changed, before
        return self.above - above, self.changed - changed, grown, times

    def missed(self, k: int, largest_key: int, n: int) -> tuple[int, int, int, int] | None:
        """If the k-th largest of n keys is outside the window: its rank among the keys on its side, their bounds and number."""
        inside = int(self.bins.sum())
        if self.above >= k:
            return k, self.window.low + (self.window.bins << self.window.shift), largest_key, self.above
        if self.above + inside < k:
            return k - self.above - inside, 0, self.window.low - 1, n - self.above - inside
        return None


def decide(tally: Tally, k: int, largest_key: int) -> Threshold | Window:
    """The threshold that keeps exactly k entries, or the window to count next.

    Args:
        tally: counts over all n entries.
        k: how many entries to keep. If no more have changed, all changed entries are kept.
        largest_key: the key of infinite differences."""
    if tally.changed <= k:
        return ALL_CHANGED
    window, bins = tally.window, tally.bins
    if tally.above >= k:
        return Window.over(window.low + (window.bins << window.shift), largest_key)
    at_least = tally.above + np.cumsum(bins[::-1])[::-1]  # keys in this bin or above
    if at_least[0] < k:
        return Window.over(0, window.low - 1)
    chosen = int(np.flatnonzero(at_least >= k)[-1])
    low = window.low + (chosen << window.shift)
    if window.shift:
        return Window.over(low, low + (1 << window.shift) - 1)
    return Threshold(low, k - int(at_least[chosen] - bins[chosen]))


def exact_threshold(keys: Keys, changed: int, k: int) -> Threshold:
    """The threshold when all keys are in memory; (n,)."""
    if changed <= k:
        return ALL_CHANGED
    key = int(np.partition(keys, len(keys) - k)[len(keys) - k])
    return Threshold(key, k - int(np.count_nonzero(keys > key)))


def predict_window(sample: Keys, weights: Weights, k: int, largest_key: int) -> Window:
    """A window that very likely contains the k-th largest key, from a sample of keys; (s,).

    `weights` says how many keys each sampled key stands for, (s,): tensors differ more from each other than within themselves,
    and a sample never holds each in its exact proportion. The margin is 5% of the rank plus four standard deviations of a
    fair sample's rank, because real samples are runs of neighbours and less independent than that. The margin shrinks until
    each bin is one key: a miss sometimes costs one more count, wider bins always do."""
    if weights.min() == weights.max():  # from one tensor: sorting values is far faster than sorting indices
        descending = np.sort(sample)[::-1]
        rank = np.cumsum(weights)
    else:
        descending, order = _descending(sample)
        rank = weights[order]
        del order
        np.cumsum(rank, out=rank)  # estimated number of keys at or above each
    margin = 0.05 * k + (4 * (k / rank[-1] * len(sample)) ** 0.5 + 2) * rank[-1] / len(sample)
    while True:
        first, last = (int(np.searchsorted(rank, k + side)) for side in (-margin, margin))
        high = int(descending[first]) if first > 0 else largest_key
        low = int(descending[last]) if last < len(sample) else 0
        window = Window.over(max(low, 0), max(high, low, 0))
        if not window.shift or margin < 0.001 * k:
            return window
        margin *= 0.7


def _descending(keys: Keys) -> tuple[Keys, Keys]:
    """Keys from the largest down, and their places; (s,) each. Sorting keys and places as one number is several times as fast."""
    shift = (len(keys) - 1).bit_length()
    if keys.itemsize > 4 or shift > 31:
        order = np.argsort(keys, kind="stable")[::-1]
        return keys[order], order
    both = keys.astype(np.int64) << shift
    both += np.arange(len(keys))
    both.sort()
    both = both[::-1]
    places = both & ((1 << shift) - 1)
    both >>= shift
    return both, places


def take_equals(equal: Keys, quota: int) -> Keys:
    """Positions of the candidates that are kept if only the first `quota` equals may be; bool (n,) -> int64."""
    return np.flatnonzero(~equal | (np.cumsum(equal) <= quota))
