"""`peru inspect MODEL --base BASE`: what changed, tensor by tensor, and what each density would cost."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import numpy as np

from peru_cli.artifacts.sparse_delta import Array
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.inspect.run import BINS, Bound, binary_entropy, entropy_bits, symbols
from peru_cli.methods.compact.delta import round_difference
from peru_cli.streaming.aligned import read_bits
from peru_cli.streaming.engine import Reads, run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import Aligned, Buffers, Family, StreamSettings, TaskVector

DENSITIES = (0.01, 0.05, 0.10, 0.20)
KEY_BINS = 1 << 16
_STREAM_OVERHEAD = 1.01  # what the codec takes above the bound, measured in benchmarks/
_TENSOR_BYTES = 40  # index bytes for each tensor
_FIXED_BYTES = 1500  # header bytes


@dataclass
class TensorChange:
    """How one tensor changed. Norms are Frobenius norms in float64, without entries that are not finite."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    entries: int
    changed: int = 0
    not_finite: int = 0
    squared_delta: float = 0.0
    squared_base: float = 0.0

    @property
    def norm(self) -> float:
        """||fine - base||."""
        return math.sqrt(self.squared_delta)

    @property
    def relative(self) -> float:
        """||fine - base|| / ||base||."""
        return math.sqrt(self.squared_delta / self.squared_base) if self.squared_base else math.inf if self.squared_delta else 0.0


def together(name: str, changes: list[TensorChange]) -> TensorChange:
    """Several tensors of one shape and dtype combined into one."""
    total = TensorChange(name, changes[0].shape, changes[0].dtype, 0)
    for change in changes:
        total.entries += change.entries
        total.changed += change.changed
        total.not_finite += change.not_finite
        total.squared_delta += change.squared_delta
        total.squared_base += change.squared_base
    return total


@dataclass
class Plan:
    """The predicted result of pruning to a density. `density` None is lossless."""

    density: float | None
    kept: int
    predicted_bytes: int
    bits_per_parameter: float
    relative_error: float  # ||dropped|| / ||fine - base||


@dataclass
class Comparison:
    """The content of `peru inspect MODEL --base BASE`."""

    changes: list[TensorChange]
    plans: list[Plan]
    entries: int
    changed: int
    not_finite: int = 0
    whole_bytes: int = 0
    norm: float = 0.0
    names: list[str] = field(default_factory=list)


class _Measure:
    """First pass: changed entries, norms, and a histogram of keys; sums add up in canonical order."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._wide = family.tasks[0].wide
        self._shift = 47 if self._wide else 15
        self.keys = np.zeros(KEY_BINS, np.int64)
        pairs = family.tasks[0].pairs
        self.changes = {n: TensorChange(p.fine.name, p.fine.shape, p.fine.dtype.name, p.entries) for n, p in pairs.items()}

    def buffers(self) -> Buffers:
        return self._family.buffers()

    def reads(self) -> Reads:
        return self._family.reads(self._family.slots, range(len(self._family.tasks)))

    def _aligned(self, tile: Tile, buffers: Buffers) -> Aligned | None:
        slot = self._family.slots[tile.tensor]
        _, base_bits = read_bits(self._family.base, slot, tile, buffers.base)
        return next(self._family.each(slot, tile, base_bits, buffers, [0]), None)

    def apply(self, tile: Tile, buffers: Buffers) -> tuple[Array, int, int, float, float]:
        aligned = self._aligned(tile, buffers)
        if aligned is None or not len(aligned.base):
            return np.zeros(0, np.int64), 0, 0, 0.0, 0.0
        xp, n = self._family.how.xp, len(aligned.base)
        keys = self._family.differences(aligned, buffers).keys(aligned.base, aligned.fine, aligned.pair.fine.dtype.name)
        found = int(np.count_nonzero(keys >= 0))
        np.maximum(keys, 0, out=keys)
        values = keys.view(np.float64 if self._wide else np.float32).astype(np.float64)
        not_finite = int(np.count_nonzero(keys >= self._family.tasks[0].infinite_key))
        if not_finite:
            values[np.isinf(values)] = 0.0
        base = xp.download(xp.widen(aligned.base, aligned.pair.fine.dtype, xp.empty(n, "f8")))
        squared = float(np.dot(base, base))
        if not np.isfinite(squared):
            base = np.where(np.isfinite(base), base, 0.0)
            squared = float(np.dot(base, base))
        histogram = np.bincount(keys >> self._shift, minlength=KEY_BINS)
        histogram[0] -= n - found
        return histogram, found, not_finite, float(np.dot(values, values)), squared

    def commit(self, tile: Tile, result: tuple[Array, int, int, float, float]) -> None:
        histogram, changed, not_finite, delta, base = result
        change = self.changes[self._family.slots[tile.tensor].name]
        change.changed += changed
        change.not_finite += not_finite
        change.squared_delta += delta
        change.squared_base += base
        if len(histogram):
            self.keys += histogram

    def finish(self, tile: Tile, committed: None, buffers: Buffers) -> None:
        pass


class _Values:
    """Second pass: for each dtype, histograms of values by the number of thresholds that their key reaches."""

    def __init__(self, family: Family, thresholds: list[int]) -> None:
        self._family, self._thresholds = family, np.array(thresholds)  # ascending keys
        self._lock = threading.Lock()
        self._levels = len(thresholds) + 1
        self.lossy: dict[Dtype, Array] = {}
        self.lossless: dict[Dtype, Array] = {}
        self.raw: dict[Dtype, int] = {}
        self.places = np.zeros((len(family.slots), self._levels), np.int64)  # changed entries of each tensor by level
        self.changed = np.zeros(len(family.slots), np.int64)
        for pair in family.tasks[0].pairs.values():
            self.lossy.setdefault(pair.fine.dtype, np.zeros((self._levels, BINS), np.int64))
            self.lossless.setdefault(pair.fine.dtype, np.zeros(BINS, np.int64))
            self.raw.setdefault(pair.fine.dtype, 0)

    def buffers(self) -> Buffers:
        return self._family.buffers()

    def reads(self) -> Reads:
        return self._family.reads(self._family.slots, range(len(self._family.tasks)))

    def apply(self, tile: Tile, buffers: Buffers) -> None:
        slot = self._family.slots[tile.tensor]
        _, base_bits = read_bits(self._family.base, slot, tile, buffers.base)
        for aligned in self._family.each(slot, tile, base_bits, buffers, [0]):
            dtype = aligned.pair.fine.dtype
            positions, keys, ulps, fine = self._family.differences(aligned, buffers).select(aligned.base, aligned.fine, dtype.name, 0)
            base = self._family.how.xp.download(aligned.base)[positions]
            exact, raw = symbols(ulps)
            lossless = np.bincount(exact, minlength=BINS)
            large = np.flatnonzero(keys >= self._thresholds[0])
            keys, base, fine = keys[large], base[large], fine[large]
            coded = exact[large] if dtype.bits == 16 else round_difference(base, fine, dtype)[0].view(np.uint16)
            level = np.searchsorted(self._thresholds, keys, side="right")
            lossy = np.bincount(level * BINS + coded, minlength=self._levels * BINS).reshape(self._levels, BINS)
            at_level = np.bincount(level, minlength=self._levels)
            with self._lock:  # integers: the order in which threads add does not matter
                self.lossy[dtype] += lossy
                self.lossless[dtype] += lossless
                self.raw[dtype] += raw
                self.places[tile.tensor] += at_level
                self.changed[tile.tensor] += len(positions)

    def commit(self, tile: Tile, result: None) -> None:
        pass

    def finish(self, tile: Tile, committed: None, buffers: Buffers) -> None:
        pass


def compare(vector: TaskVector, family: Family, how: StreamSettings) -> Comparison:
    """Measure a task vector and predict what each density would cost. Reads both checkpoints twice."""
    measure = _Measure(family)
    run(measure, family.plan(), how.threads, how.advance)
    changes = [measure.changes[name] for name in sorted(measure.changes)]
    total, changed = vector.pairing.float_entries, sum(change.changed for change in changes)
    at_least = np.cumsum(measure.keys[::-1])[::-1]  # keys in this bin or above
    edges = [_edge(at_least, min(int(m * total), changed)) for m in DENSITIES]
    values = _Values(family, sorted(edge << measure._shift for edge in edges))
    run(values, family.plan(), how.threads, how.advance)
    sizes = np.array([slot.entries for slot in family.slots])
    whole = sum(info.nbytes for info in vector.pairing.whole)
    fixed = _FIXED_BYTES + _TENSOR_BYTES * len(vector.fine.tensors)
    energy = _bin_energy(measure.keys, measure._shift)
    plans = []
    for m, edge in zip(DENSITIES, edges, strict=True):
        level = len(DENSITIES) - DENSITIES.index(m)  # entries of this level or above reach the threshold
        kept = min(int(m * total), changed)
        share = kept / max(int(at_least[edge]), 1)  # of the entries that reach the threshold's bin
        bound = Bound(_positions(values.places[:, level:].sum(axis=1) * share, sizes))
        for histogram in values.lossy.values():
            bound.values += share * entropy_bits(histogram[level:].sum(axis=0))
        kept_energy = energy[edge:].sum() - (at_least[edge] - kept) * energy[edge] / max(measure.keys[edge], 1)
        error = math.sqrt(max(1.0 - kept_energy / energy.sum(), 0.0)) if energy.sum() else 0.0
        plans.append(_plan(m, kept, bound, fixed, whole, total, error))
    bound = Bound(_positions(values.changed, sizes))
    for dtype, histogram in values.lossless.items():
        bound.values += entropy_bits(histogram) + values.raw[dtype]
    plans.append(_plan(None, changed, bound, fixed, whole, total, 0.0))
    not_finite = sum(change.not_finite for change in changes)
    norm = math.sqrt(sum(change.squared_delta for change in changes))
    return Comparison(changes, plans, total, changed, not_finite, whole, norm)


def _edge(at_least: Array, kept: int) -> int:
    """The highest bin such that it and the bins above hold at least `kept` keys."""
    return int(np.flatnonzero(at_least >= max(kept, 1))[-1]) if len(np.flatnonzero(at_least >= max(kept, 1))) else 0


def _bin_energy(histogram: Array, shift: int) -> Array:
    """The squared magnitude of each bin's entries, from the bins' midpoints. Infinity counts as 0."""
    middles = (np.arange(len(histogram), dtype=np.int64) << shift) + (1 << (shift - 1))
    with np.errstate(over="ignore", invalid="ignore"):  # bins above infinity have no value
        values = middles.view(np.float64) if shift == 47 else middles.astype(np.int32).view(np.float32).astype(np.float64)
        squared = np.square(values)
    return np.where(np.isfinite(squared) & (histogram > 0), squared, 0.0) * histogram


def _positions(kept: Array, entries: Array) -> float:
    """Bits of the positions: the codec adapts to each tensor's share of kept entries; (tensors,), (tensors,)."""
    return sum(int(n) * binary_entropy(min(float(k) / int(n), 1.0)) for k, n in zip(kept, entries, strict=True) if n)


def _plan(density: float | None, kept: int, bound: Bound, fixed: int, whole: int, entries: int, error: float) -> Plan:
    delta = int(bound.total / 8 * _STREAM_OVERHEAD) + fixed
    return Plan(density, kept, delta + whole, 8 * delta / max(entries, 1), error)
