"""What one task may keep of one tile, and what of that follows in order: pure functions of the tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peru_cli.artifacts.index import NOT_ROUNDED
from peru_cli.artifacts.sparse_delta import Array
from peru_cli.checkpoints.bundle import pieces_of
from peru_cli.checkpoints.digests import leaves
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.methods.compact.delta import add_rounded, add_signs, rises, round_difference, sign_differences
from peru_cli.methods.compact.magnitude import Threshold, key_value, take_equals
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.tiles import CHUNK
from peru_cli.vectors.family import Aligned, Buffers, Family, TaskVector

Leaves = list[tuple[str, int, bytes]]  # tensor, first entry, digests of the chunks from there on


def leaves_of(info: TensorInfo, start: int, raw: memoryview) -> Iterator[tuple[str, int, bytes]]:
    """Digests of a tile's chunks, by the tensors of the bundle that it is from."""
    for member, at, piece in pieces_of(info, start, raw):
        yield member.name, at, leaves(piece, member.dtype)


@dataclass(frozen=True)
class Rule:
    """Which entries of a tile one task keeps, and how their values are stored."""

    threshold: Threshold
    quota: int  # equals that may still be taken; earlier tiles may have taken some of them by the time this one is committed
    exact: frozenset[str]  # names of the dtypes whose differences are stored exactly
    octaves: bool  # of rounded values, keep only sign and octave above the threshold
    scale: float | None = None  # of rounded values, keep only the sign, and add this much


@dataclass
class Chosen:
    """What one task keeps of a tile. Arrays are (k,), k the number of kept entries."""

    task: int
    equals: int  # how many of them equal the threshold
    positions: Array  # within the tile, ascending
    values: Array
    apart: Array  # exact differences of those that are not rounded; at most (k,)
    energy: Array  # squared norm of the task vector, by CHUNK of the tile; (chunks,), or (0,) if nothing is lost
    missed: Array  # the same for what is lost
    not_finite: int  # how many differences are NaN or infinite
    largest_error: float  # of rounding


@dataclass
class Candidates:
    """Entries of a tile that one task may keep. All arrays are (candidates,) unless said otherwise, on the CPU."""

    aligned: Aligned
    result: Array  # the tile as the artifact will rebuild it, once `bits` are put in; (tile,)
    positions: Array  # within the tile, ascending
    equal: Array | None  # which ones equal the threshold
    values: Array
    bits: Array  # the result's bits there
    energy: Array  # squared norm of the task vector, by CHUNK of the tile; (chunks,), or (0,) if nothing is lost
    missed: Array  # the same for what is lost if all candidates are kept
    exact: Array | None = None  # exact differences, if values are rounded
    errors: Array | None = None  # of rounding
    infinite: Array | None = None  # which differences are not finite
    is_fine: bool = False  # whether `result` is the fine-tune itself, so that nothing is to be put in
    leaves: list[bytes] | None = None  # digests of the result's chunks by tensor, if they are known

    def choose(self, threshold: Threshold, quota: int, task: TaskVector) -> Chosen:
        """Drop all candidates that equal the threshold but the first `quota` of them."""
        equals = int(np.count_nonzero(self.equal)) if self.equal is not None else 0
        if self.equal is not None and equals > quota:
            stays = take_equals(self.equal, quota)
            key, equals = threshold.key, quota
            gone = np.full(len(self.positions), np.square(key_value(key, task.wide)) if key < task.infinite_key else 0.0)
            gone -= np.square(self.errors) if self.errors is not None else 0.0
            gone[stays] = 0.0
            self.missed = self.missed + _by_chunk(self.positions, gone, len(self.missed))
            for name in ("positions", "values", "bits", "exact", "errors", "infinite"):
                if (array := getattr(self, name)) is not None:
                    setattr(self, name, array[stays])
        apart = self.values[:0] if self.exact is None else self.exact[self.values == NOT_ROUNDED]
        not_finite = int(np.count_nonzero(self.infinite)) if self.infinite is not None else 0
        largest = float(self.errors.max()) if self.errors is not None and len(self.errors) else 0.0
        return Chosen(self.aligned.task, equals, self.positions, self.values, apart, self.energy, self.missed, not_finite, largest)

    def rebuilt(self, start: int) -> Iterator[tuple[str, int, bytes]]:
        """Digests of the tile as the artifact rebuilds it, which is put together now."""
        if self.leaves is not None:
            pieces = pieces_of(self.aligned.pair.fine, start, self.result.data.cast("B"))
            yield from ((member.name, at, found) for (member, at, _), found in zip(pieces, self.leaves, strict=True))
            return
        if not self.is_fine:
            CPU.put(self.result, self.positions, self.bits)
        yield from leaves_of(self.aligned.pair.fine, start, self.result.data.cast("B"))


def find_candidates(family: Family, aligned: Aligned, rule: Rule, buffers: Buffers) -> Candidates:
    """The candidates of one task in a tile.

    If the family has one task, `result` is the buffers' memory: it is valid until their next use."""
    dtype, xp, task = aligned.pair.fine.dtype, family.how.xp, family.tasks[aligned.task]
    threshold = rule.threshold
    infinite = equal = None
    exact = dtype.name in rule.exact
    whole = threshold.keeps_all and exact  # then the result is the fine-tune, and the base's tile need not be ours to change
    sums = np.zeros((0 if whole else -(-len(aligned.base) // CHUNK), 2))
    room = family.differences(aligned, buffers)
    # Once no equals may be taken any more, that never changes: the entries need no check.
    exhausted = threshold.equals is not None and not rule.quota
    if threshold.keeps_all:
        where, ulps, fine = room.changed(aligned.base, aligned.fine, dtype.name)
    else:
        where, found, ulps, fine = room.select(aligned.base, aligned.fine, dtype.name, threshold.key + exhausted, sums)
    energy, missed = sums[:, 0], sums[:, 1]
    if threshold.sides is not None:
        stays = found >= np.where(rises(xp.download(aligned.base)[where], fine), *threshold.sides)
        gone = np.square(found.view(f"f{found.itemsize}"), dtype=np.float64)
        missed = missed + _by_chunk(where, np.where(stays | (found == task.infinite_key), 0.0, gone), len(missed))
        where, found, ulps, fine = where[stays], found[stays], ulps[stays], fine[stays]
    if dtype.bits == 8:
        ulps = ulps.astype(np.int16)  # as the codec takes them
    if not threshold.keeps_all:
        equal = None if exhausted or threshold.equals is None else found == threshold.key
        infinite = found == task.infinite_key
    result = xp.download(aligned.fine if whole else aligned.base)
    if len(aligned.grown):
        result = np.concatenate((result, xp.download(aligned.grown)))
    elif len(family.tasks) > 1:  # a single task may use the buffers until its tile is finished: nobody else reads them
        result = result.copy()
    candidates = Candidates(aligned, result, where, equal, ulps, fine, energy, missed, infinite=infinite, is_fine=whole)
    if not exact:
        candidates.exact, base = candidates.values, result[where]
        least = key_value(threshold.key, task.wide) if rule.octaves else None
        if rule.scale is None:
            candidates.values, apart = round_difference(base, fine, dtype, least)
            candidates.bits, _ = add_rounded(base, candidates.values, dtype)
        else:
            candidates.values, apart = sign_differences(base, fine, dtype, rule.scale)
            candidates.bits, _ = add_signs(base, candidates.values, dtype, rule.scale)
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


def _by_chunk(positions: Array, values: Array, chunks: int) -> Array:
    """Sums of values by the CHUNK that contains them; float64 (chunks,)."""
    return np.bincount(positions // CHUNK, values, chunks)
