"""Post-Pruning: keep the entries of the task vector with the largest magnitude, exactly k of them.

Source: PERU paper, section 4.1 (Post-Pruning, PERU-FFT): theta_0 + top_m(theta_t - theta_0).

The k-th largest key of billions is found without sorting or holding them: count the keys above a window
and those within it by bins; the counts add up over tiles, threads and machines. A window predicted from a
sample usually holds the answer in bins of one key each, and one count decides. If not, the counts say
where to look next, so it ends after a few counts whatever the data.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.streaming.arrays import Array, Arrays

Keys = np.ndarray[Any, np.dtype[Any]]  # int32 or int64
Weights = np.ndarray[Any, np.dtype[np.float64]]
MAX_BINS = 1 << 20
_FLUSH = 1 << 18  # keys collected before they are binned


@dataclass(frozen=True)
class Threshold:
    """Keep every key above `key`, and the first `equals` of those that equal it, in canonical order.

    `key` 0 with `equals` None keeps all changed entries.
    """

    key: int
    equals: int | None = None

    @property
    def keeps_all(self) -> bool:
        """Whether every changed entry is kept."""
        return self.equals is None


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
        """The finest window of at most MAX_BINS bins that holds the keys `low` to `high`, both included."""
        shift = 0
        while ((high - low) >> shift) + 1 > MAX_BINS:
            shift += 1
        return cls(low, shift, ((high - low) >> shift) + 1)


@dataclass
class Counted:
    """What a run of entries adds to a tally: keys above the window, changed entries, the bins of keys within it (k,).

    `times` says how many keys each of the bins stands for, (k,); None for one each.
    """

    above: int
    changed: int
    bins: Keys
    times: Keys | None = None

    @classmethod
    def together(cls, parts: list[Counted]) -> Counted:
        """Several as one, each bin once, ascending."""
        bins = np.concatenate([part.bins for part in parts])
        times = np.concatenate([np.ones(len(part.bins), np.int64) if part.times is None else part.times for part in parts])
        distinct, where = np.unique(bins, return_inverse=True)
        summed = np.zeros(len(distinct), np.int64)
        np.add.at(summed, where, times)
        return cls(sum(part.above for part in parts), sum(part.changed for part in parts), distinct, summed)


class Tally:
    """Statistics of one window that add up: keys above it, keys in each bin, changed entries.

    Any thread may add; all share one table of bins, which is most of what the search holds.
    """

    def __init__(self, window: Window) -> None:
        self.window = window
        self.above = 0
        self.changed = 0
        self._bins = np.zeros(window.bins, dtype=np.int64)
        self._waiting: list[Keys] = []
        self._waiting_size = 0
        self._lock = threading.Lock()

    def count(self, xp: Arrays, keys: Array, changed: int) -> Counted:
        """Count a tile's keys (n,), of which `changed` entries differ from the base; for `add`."""
        window = self.window
        reaching = xp.greater_equal(keys, window.low)
        beyond = window.low + (window.bins << window.shift)
        over = xp.greater_equal(keys, beyond) if beyond <= np.iinfo(f"i{keys.itemsize}").max else None
        above = xp.count(over) if over is not None else 0
        # Few keys are within the window and many above it: picking out these few is the fast part.
        within = reaching if over is None else xp.not_equal(reaching, over, out=over)
        bins = xp.download(xp.take(keys, xp.where(within))) - window.low
        if window.shift:
            bins >>= window.shift
        return Counted(above, changed, bins)

    def add(self, counted: Counted) -> None:
        """Add what was counted."""
        with self._lock:
            self.above += counted.above
            self.changed += counted.changed
            if counted.times is not None:
                np.add.at(self._bins, counted.bins, counted.times)
                return
            self._waiting.append(counted.bins)
            self._waiting_size += len(counted.bins)
            if self._waiting_size >= _FLUSH:
                self._flush()

    def add_keys(self, xp: Arrays, keys: Array, changed: int) -> None:
        """Count a tile's keys (n,), of which `changed` entries differ from the base, and add that."""
        self.add(self.count(xp, keys, changed))

    def missed(self, k: int, largest_key: int, n: int) -> tuple[int, int, int, int] | None:
        """If the k-th largest of n keys is not in the window: its rank among the keys on its side, their bounds and number."""
        inside = int(self.bins().sum())
        if self.above >= k:
            return k, self.window.low + (self.window.bins << self.window.shift), largest_key, self.above
        if self.above + inside < k:
            return k - self.above - inside, 0, self.window.low - 1, n - self.above - inside
        return None

    def _flush(self) -> None:
        if self._waiting:
            np.add.at(self._bins, np.concatenate(self._waiting), 1)
            self._waiting, self._waiting_size = [], 0

    def bins(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Keys in each bin; int64 (bins,)."""
        self._flush()
        return self._bins


def decide(tally: Tally, k: int, largest_key: int) -> Threshold | Window:
    """The threshold that keeps exactly k entries, or the window to count next.

    Args:
        tally: counts over all n entries.
        k: how many entries to keep; if no more have changed, all of those are kept.
        largest_key: the key of infinite differences.
    """
    if tally.changed <= k:
        return ALL_CHANGED
    window, bins = tally.window, tally.bins()
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
    """The threshold when all keys are at hand; (n,)."""
    if changed <= k:
        return ALL_CHANGED
    key = int(np.partition(keys, len(keys) - k)[len(keys) - k])
    return Threshold(key, k - int(np.count_nonzero(keys > key)))


def predict_window(sample: Keys, weights: Weights, k: int, largest_key: int) -> Window:
    """A window that very likely holds the k-th largest key, from a sample of keys; (s,).

    `weights` says how many keys each sampled one stands for, (s,): tensors differ more from each other than
    within themselves, and a sample never meets each in its due proportion. The margin is 5% of the rank
    and four standard deviations of a fair sample's rank: real samples are runs of neighbours, less
    independent than that. It shrinks until each bin is one key: a miss costs one more count sometimes,
    wider bins one always.
    """
    if weights.min() == weights.max():  # of one tensor: sorting alone is far faster than sorting indices
        descending = np.sort(sample)[::-1]
        rank = np.cumsum(weights)
    else:
        order = np.argsort(sample)[::-1]
        descending, rank = sample[order], np.cumsum(weights[order])  # keys at or above each, as far as the sample can tell
    margin = 0.05 * k + (4 * (k / rank[-1] * len(sample)) ** 0.5 + 2) * rank[-1] / len(sample)
    while True:
        first, last = (int(np.searchsorted(rank, k + side)) for side in (-margin, margin))
        high = int(descending[first]) if first > 0 else largest_key
        low = int(descending[last]) if last < len(sample) else 0
        window = Window.over(max(low, 0), max(high, low, 0))
        if not window.shift or margin < 0.001 * k:
            return window
        margin *= 0.7


def take_equals(equal: Keys, quota: int) -> Keys:
    """Positions of the candidates that stay when only the first `quota` equals may; bool (n,) -> int64."""
    return np.flatnonzero(~equal | (np.cumsum(equal) <= quota))
