"""The pass that writes sparse deltas: select entries, digest base and result, fill and encode blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from peru_cli.artifacts.index import EXACT, NOT_ROUNDED, Stream
from peru_cli.artifacts.sparse_delta import Array, BlockWriter, Entries, FilledBlock
from peru_cli.checkpoints.bundle import Bundle, members, pieces_of
from peru_cli.checkpoints.digests import TensorDigest, leaves
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.methods.compact.delta import add_rounded, round_difference
from peru_cli.methods.compact.magnitude import Threshold, key_value, take_equals
from peru_cli.streaming.aligned import read_bits
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.engine import Reads
from peru_cli.streaming.tiles import CHUNK, Tile
from peru_cli.vectors.family import Aligned, Buffers, Family


@dataclass
class Sink:
    """Where one task's kept entries go, with running counts."""

    writer: BlockWriter
    streams: list[Stream]
    octaves: bool = False  # of rounded values, keep only sign and octave above the threshold
    thresholds: list[Threshold] = field(default_factory=list)  # one for each slot, or one for all
    quotas: list[int] = field(default_factory=list)  # equals that may still be taken, by threshold
    kept: dict[str, int] = field(default_factory=dict)  # by the fine-tune's tensor name
    result: dict[str, TensorDigest] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)  # stream position of a base tensor's first entry
    changed: int = 0  # entries, if thresholds were searched for
    not_finite: int = 0  # kept entries whose difference is NaN or infinite
    largest_error: float = 0.0  # largest rounding error
    energy: float = 0.0  # squared norm of the task vector's finite entries; 0 if nothing is lost
    missed: float = 0.0  # squared norm of the rebuilt fine-tune minus the original, over the same entries

    @property
    def relative_error(self) -> float:
        """Norm of what is lost over the norm of the task vector, to four digits: the same for all tiles, threads and devices."""
        return float(f"{math.sqrt(self.missed / self.energy):.4g}") if self.missed else 0.0

    def add_threshold(self, threshold: Threshold) -> None:
        """Add the threshold of the next slot, or of all slots."""
        self.thresholds.append(threshold)
        self.quotas.append(threshold.equals or 0)

    def stream_number(self, dtype: Dtype) -> int:
        """The index of a dtype's stream."""
        return next(i for i, stream in enumerate(self.streams) if stream.dtype is dtype)


@dataclass
class Candidates:
    """Entries of a tile that one task may keep. All arrays are (candidates,) unless said otherwise, on the CPU."""

    aligned: Aligned
    result: Array  # the tile as the artifact will rebuild it, once `bits` are put in; (tile,)
    positions: Array  # within the tile, ascending
    equal: Array | None  # which ones equal the threshold
    values: Array
    bits: Array  # the result's bits there
    energy: Array  # squared norm of the task vector, by CHUNK of the tile; (chunks,)
    missed: Array  # the same for what is lost if all candidates are kept
    exact: Array | None = None  # exact differences, if values are rounded
    errors: Array | None = None  # of rounding
    infinite: Array | None = None  # which differences are not finite
    is_fine: bool = False  # whether `result` is the fine-tune itself, so that nothing is to be put in

    def keep(self, stays: Array) -> None:
        """Drop all candidates except those at these indices."""
        for name in ("positions", "values", "bits", "exact", "errors", "infinite"):
            if (array := getattr(self, name)) is not None:
                setattr(self, name, array[stays])


class Watcher(Protocol):
    """Is told of the pass's progress."""

    def reached(self, tile: Tile) -> None:
        """A tile was committed. Called in canonical order."""
        ...

    def finished(self, tile: Tile) -> None:
        """Everything that follows from a tile is done. Called from any thread."""
        ...


class Select:
    """One pass over the base and all tasks. `sinks` is parallel to the family's tasks."""

    def __init__(self, family: Family, sinks: list[Sink]) -> None:
        self._family, self._sinks = family, sinks
        self.watcher: Watcher | None = None
        self._lossless = False  # on the CPU: then a pass changes no tile, and tensors in memory are not copied
        self.base_digests = {info.name: TensorDigest(info.dtype, info.shape) for slot in family.slots for info in members(slot)}
        for pairs, sink in zip(family.pairs, sinks, strict=True):
            lengths = [0] * len(sink.streams)
            for slot in family.slots:
                if (pair := pairs.get(slot.name)) is not None:
                    number = sink.stream_number(pair.fine.dtype)
                    sink.offsets[slot.name] = lengths[number]
                    lengths[number] += pair.entries
                    for info in members(pair.fine):
                        sink.kept[info.name] = 0
                        sink.result[info.name] = TensorDigest(info.dtype, info.shape)

    def buffers(self) -> Buffers:
        exact = all(stream.values == EXACT for sink in self._sinks for stream in sink.streams)
        all_kept = all(threshold.keeps_all for sink in self._sinks for threshold in sink.thresholds)
        self._lossless = exact and all_kept and self._family.how.xp is CPU
        return self._family.buffers()

    def reads(self) -> Reads:
        return self._family.reads(self._family.slots, range(len(self._family.tasks)))

    def apply(self, tile: Tile, buffers: Buffers) -> list[Candidates]:
        slot = self._family.slots[tile.tensor]
        raw, base_bits = read_bits(self._family.base, slot, tile, buffers.base, self._lossless)
        for info, start, piece in pieces_of(slot, tile.start, raw) if len(raw) else ():
            self.base_digests[info.name].add_at(start, leaves(piece, info.dtype))
        wanted = range(len(self._family.tasks))
        return [self._candidates(a, tile, buffers) for a in self._family.each(slot, tile, base_bits, buffers, wanted, self._lossless)]

    def _candidates(self, aligned: Aligned, tile: Tile, buffers: Buffers) -> Candidates:
        sink, dtype, xp = self._sinks[aligned.task], aligned.pair.fine.dtype, self._family.how.xp
        task = self._family.tasks[aligned.task]
        threshold = sink.thresholds[_threshold_number(sink, tile)]
        infinite = equal = None
        sums = np.zeros((-(-len(aligned.base) // CHUNK), 2))
        room = self._family.differences(aligned, buffers)
        # Once no equals may be taken any more, that never changes: the entries need no check.
        exhausted = not threshold.keeps_all and not sink.quotas[_threshold_number(sink, tile)]
        if threshold.keeps_all:
            where, ulps, fine = room.changed(aligned.base, aligned.fine, dtype.name)
        else:
            where, found, ulps, fine = room.select(aligned.base, aligned.fine, dtype.name, threshold.key + exhausted, sums)
        energy, missed = sums[:, 0], sums[:, 1]
        if dtype.bits == 8:
            ulps = ulps.astype(np.int16)  # as the codec takes them
        if not threshold.keeps_all:
            equal = None if exhausted else found == threshold.key
            infinite = found == task.infinite_key
        exact = sink.streams[sink.stream_number(dtype)].values == EXACT
        whole = threshold.keeps_all and exact  # then the result is the fine-tune, and the base's tile need not be ours to change
        result = xp.download(aligned.fine if whole else aligned.base)
        if len(aligned.grown):
            result = np.concatenate((result, xp.download(aligned.grown)))
        elif len(self._sinks) > 1:  # a single task may use the buffers until its tile is finished: nobody else reads them
            result = result.copy()
        candidates = Candidates(aligned, result, where, equal, ulps, fine, energy, missed, infinite=infinite, is_fine=whole)
        if not exact:
            candidates.exact, base = candidates.values, result[where]
            least = key_value(threshold.key, task.wide) if sink.octaves else None
            candidates.values, apart = round_difference(base, fine, dtype, least)
            candidates.bits, _ = add_rounded(base, candidates.values, dtype)
            candidates.bits[apart] = fine[apart]
            back, given, before = (CPU.widen(bits, dtype, np.empty(len(bits))) for bits in (candidates.bits, fine, base))
            with np.errstate(invalid="ignore", over="ignore"):
                candidates.errors = np.abs(back - given)
                candidates.errors[apart] = 0.0
                candidates.missed = missed + _by_chunk(where, np.square(candidates.errors), len(missed))
                if threshold.keeps_all:
                    squares = np.square(given - before)
                    candidates.energy = _by_chunk(where, np.where(np.isfinite(squares), squares, 0.0), len(missed))
        return candidates

    def commit(self, tile: Tile, result: list[Candidates]) -> list[tuple[Candidates, list[FilledBlock]]]:
        committed = [(c, self._commit_one(tile, c)) for c in result]
        if self.watcher is not None:
            self.watcher.reached(tile)
        return committed

    def _commit_one(self, tile: Tile, c: Candidates) -> list[FilledBlock]:
        sink, pair, task = self._sinks[c.aligned.task], c.aligned.pair, self._family.tasks[c.aligned.task]
        if c.equal is not None:
            number = _threshold_number(sink, tile)
            equals = int(np.count_nonzero(c.equal))
            quota = sink.quotas[number]
            sink.quotas[number] -= min(equals, quota)
            if equals > quota:
                stays = take_equals(c.equal, quota)
                key = sink.thresholds[number].key
                gone = np.full(len(c.positions), np.square(key_value(key, task.wide)) if key < task.infinite_key else 0.0)
                gone -= np.square(c.errors) if c.errors is not None else 0.0
                gone[stays] = 0.0
                c.missed = c.missed + _by_chunk(c.positions, gone, len(c.missed))
                c.keep(stays)
        for energy, missed in zip(c.energy.tolist(), c.missed.tolist(), strict=True):
            sink.energy += energy
            sink.missed += missed
        if not len(c.positions):
            return []
        if c.infinite is not None:
            sink.not_finite += int(np.count_nonzero(c.infinite))
        if c.errors is not None:
            sink.largest_error = max(sink.largest_error, float(c.errors.max()))
        if isinstance(pair.fine, Bundle):
            upto = np.searchsorted(c.positions, pair.fine.ends).tolist()
            for info, before, after in zip(pair.fine.members, [0, *upto], upto, strict=False):
                sink.kept[info.name] = after - before
        else:
            sink.kept[pair.fine.name] += len(c.positions)
        apart = c.values[:0] if c.exact is None else c.exact[c.values == NOT_ROUNDED]
        entries = Entries(c.positions + (sink.offsets[pair.base.name] + tile.start), c.values, apart)
        return sink.writer.add(sink.stream_number(pair.fine.dtype), entries)

    def finish(self, tile: Tile, committed: list[tuple[Candidates, list[FilledBlock]]], buffers: Buffers) -> None:
        for c, blocks in committed:
            sink, pair = self._sinks[c.aligned.task], c.aligned.pair
            if not c.is_fine:
                CPU.put(c.result, c.positions, c.bits)
            raw = c.result.data.cast("B")
            for info, start, piece in pieces_of(pair.fine, tile.start, raw):
                sink.result[info.name].add_at(start, leaves(piece, info.dtype))
            for block in blocks:
                sink.writer.write(block)
        if self.watcher is not None:
            self.watcher.finished(tile)


def _threshold_number(sink: Sink, tile: Tile) -> int:
    return tile.tensor if len(sink.thresholds) > 1 else 0


def _by_chunk(positions: Array, values: Array, chunks: int) -> Array:
    """Sums of values by the CHUNK that contains them; float64 (chunks,)."""
    return np.bincount(positions // CHUNK, values, chunks)
