"""Read artifacts of kind `mixed`: any range of a tensor's difference, exactly. Every byte is checked before it is used."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.index import Mode
from peru_cli.artifacts.mixed.index import CONTEXTS, DENSE, LEFT, LOW_RANK, RIGHT, ROWS, SCALES, ULPS, ULPS_OF, MixedRecord, decode_mixed
from peru_cli.artifacts.mixed.streams import IntegerReader
from peru_cli.artifacts.mixed.writer import KIND, check_mixed_metadata
from peru_cli.artifacts.single import SingleArtifact
from peru_cli.errors import BadFile
from peru_cli.methods.mixed.scales import MAX_SCALE, is_exact, run_of_product, scale_of

_CACHED_FACTORS = 4  # tensors whose decoded factors are cached: at any time the threads' tiles lie in one or two
Floats = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Factors:
    """left (rows, k) int16, right (k, columns) int16, scale indices (k,); `rows` ascending, None for all."""

    left: Integers
    right: Integers
    scales: Integers
    rows: Integers | None


@dataclass(frozen=True)
class _Place:
    """Where a tensor's integers begin."""

    table: int  # in LEFT, RIGHT and SCALES
    rows: int
    factors: dict[int, int]  # by context
    dense: int
    ulps: int


class Mixed(SingleArtifact[MixedRecord]):
    """An opened mixed artifact. Thread-safe."""

    def _open(self) -> None:
        if (kind := self.metadata.get("peru.kind")) != KIND:
            raise BadFile(f"an artifact of kind {kind!r}, not {KIND}")
        check_mixed_metadata(self.metadata)
        self.index = decode_mixed(self.container.index)
        counted = sum(record.base_entries for record in self.index.tensors if record.mode == Mode.DELTA)
        if int(self.metadata["peru.entries"]) != counted:
            raise BadFile(f"its metadata has 'peru.entries' as {self.metadata['peru.entries']}, its index has {counted}")
        self.integers = IntegerReader(self.path, self.index, partial(self.container.read, "blocks"))
        self._settle(self.index.tensors, self.index.files, self.integers.nbytes)
        self._factors: BlockCache[Factors] = BlockCache(_CACHED_FACTORS)

    def difference(self, record: MixedRecord, start: int, stop: int) -> Floats | None:
        """What to add to the base from entry `start` to `stop`, float64 (stop - start,). None if nothing changes."""
        low = self._low_rank(record, start, stop) if record.parts & LOW_RANK else None
        if not record.parts & DENSE:
            return low
        dense: Floats = self.plain(record, start, stop) * scale_of(np.array([record.scale]))
        return dense if low is None else low + dense

    def plain(self, record: MixedRecord, start: int, stop: int) -> Integers:
        """The integers of a tensor's DENSE part from entry `start` to `stop`, int16 (stop - start,)."""
        return self.integers.get(record.context, self._places[record.info.name].dense + start, stop - start)

    def ulps(self, record: MixedRecord, start: int, stop: int) -> Integers | None:
        """ULP steps to apply afterwards, integers of the dtype's width (stop - start,). None if there are none."""
        if not record.parts & ULPS:
            return None
        return self.integers.get(ULPS_OF[record.info.dtype.bits], self._places[record.info.name].ulps + start, stop - start)

    def factors(self, record: MixedRecord) -> Factors:
        """A tensor's factors, decoded and checked."""
        return self._factors.get(record.info.name, lambda: self._decode_factors(record))

    def _low_rank(self, record: MixedRecord, start: int, stop: int) -> Floats:
        f = self.factors(record)
        return run_of_product(f.left, f.right, f.scales, f.rows, start, stop)

    def _decode_factors(self, record: MixedRecord) -> Factors:
        place, get = self._places[record.info.name], self.integers.get
        lefts, rights, scales = self._tables(record, place.table)
        left = np.empty((record.factor_rows, record.rank), np.int16)
        right = np.empty((record.rank, record.columns), np.int16)
        at = dict(place.factors)
        for i, (a, b) in enumerate(zip(lefts, rights, strict=True)):
            left[:, i] = get(int(a), at[int(a)], record.factor_rows)
            at[int(a)] += record.factor_rows
            right[i] = get(int(b), at[int(b)], record.columns)
            at[int(b)] += record.columns
        if not is_exact(np.abs(left.astype(np.int32)).max(0), np.abs(right.astype(np.int32)).max(1), scales):
            raise BadFile(f"{self.path}: the factors of {record.info.name!r} span more than sums can hold")
        rows = None
        if record.kept_rows:
            gaps = get(ROWS, place.rows, record.kept_rows).astype(np.int64)
            rows = np.cumsum(gaps) + np.arange(record.kept_rows)
            if int(rows[-1]) >= record.rows:
                raise BadFile(f"{self.path}: the rows of {record.info.name!r} lie beyond its end")
        return Factors(left, right, scales, rows)

    def _tables(self, record: MixedRecord, at: int) -> tuple[Integers, Integers, Integers]:
        """Contexts of both factors, and scale indices, for each direction of a tensor; (k,) each."""
        lefts, rights, steps = (self.integers.get(table, at, record.rank) for table in (LEFT, RIGHT, SCALES))
        scales = np.cumsum(steps, dtype=np.int64)
        contexts = np.concatenate((lefts, rights))
        if contexts.min() < 0 or contexts.max() >= CONTEXTS or np.abs(scales).max() > MAX_SCALE:
            raise BadFile(f"{self.path}: the directions of {record.info.name!r} have invalid contexts or scales")
        return lefts, rights, scales

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """Where the integers of every tensor begin. BadFile if the streams hold something else."""
        at: Counter[int] = Counter()
        places = {}
        for record in self.index.tensors:
            before = dict(at)
            table = at[LEFT]
            factors = {context: at[context] for context in range(CONTEXTS)}
            if record.parts & LOW_RANK:
                lefts, rights, _ = self._tables(record, table)
                for contexts, each in ((lefts, record.factor_rows), (rights, record.columns)):
                    for context, times in zip(*np.unique(contexts, return_counts=True), strict=True):
                        at[int(context)] += int(times) * each
                at[LEFT] += record.rank
                at[ROWS] += record.kept_rows
            dense = at[record.context]
            if record.parts & DENSE:
                at[record.context] += record.base_entries
            ulps = ULPS_OF.get(record.info.dtype.bits, 0)
            places[record.info.name] = _Place(table, before.get(ROWS, 0), factors, dense, at[ulps])
            if record.parts & ULPS:
                at[ulps] += record.base_entries
        for stream in self.index.streams:
            if stream.number < CONTEXTS and at[stream.number] != stream.count:
                raise BadFile(f"{self.path}: its stream {stream.number} has {stream.count} integers, its tensors {at[stream.number]}")
        return places
