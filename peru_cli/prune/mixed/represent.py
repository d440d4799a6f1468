"""Code every tensor at one price: its parts, their error, and the bytes of all artifacts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from peru_cli.artifacts.index import Mode, SideFile
from peru_cli.artifacts.mixed.index import MixedRecord
from peru_cli.artifacts.mixed.writer import MixedCounter, Represented
from peru_cli.checkpoints.digests import SHORT
from peru_cli.methods.mixed import dense
from peru_cli.methods.mixed.directions import choose_scales, missed_by, quantised
from peru_cli.methods.mixed.rates import bits, entropy
from peru_cli.methods.mixed.scales import scale_of
from peru_cli.methods.mixed.sums import add_difference, rounded_error
from peru_cli.methods.mixed.weights import VECTOR, regain, weight_of
from peru_cli.prune.mixed.decompose import Item, Spill, spectrum_of
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Price:
    """The squared error that one bit is worth. With `of_outputs` it is weighted by the kind of tensor, as outputs feel it;
    otherwise only vectors are.

    If no multiplier comes close to the limit, some tensors get a lower one."""

    multiplier: float
    of_outputs: bool
    lower: float = 0.0
    lowered: frozenset[int] = frozenset()  # the numbers of the tensors with it

    def of(self, item: Item) -> float:
        """The price for a tensor."""
        multiplier = self.lower if item.number in self.lowered else self.multiplier
        if self.of_outputs:
            return multiplier / weight_of(item.name, item.columns > 0)
        return multiplier if item.columns else multiplier / VECTOR


@dataclass
class Frame:
    """What an artifact holds at any price: records of all tensors in canonical order, side files, other bytes."""

    records: list[MixedRecord]
    files: list[SideFile]
    header_bytes: int
    whole_bytes: int
    side_bytes: int

    def copies(self) -> list[MixedRecord]:
        """Records to fill in. They already have digests, of the right length."""
        return [
            replace(
                record,
                whole_digest=bytes(SHORT) if record.mode == Mode.WHOLE or record.base_rows else b"",
                base_digest=bytes(SHORT) if record.mode in (Mode.DELTA, Mode.COPY) else b"",
            )
            for record in self.records
        ]


def represent(item: Item, spill: Spill, price: Price) -> tuple[Represented, float]:
    """A tensor's parts at a price, and the squared error of the result, rounded to the fine-tune's dtype."""
    parts = Represented()
    if item.fixed is not None:
        return item.fixed, _missed(item, spill, item.fixed)
    if item.columns:
        spectrum, rows = spectrum_of(item, spill)
        found = quantised(spectrum, price.of(item), price.of_outputs)
        if found is None:
            return parts, item.squared
        parts.left, parts.right, parts.scales, parts.rows = found.left, found.right, found.scales, rows
        return parts, rounded_error(found.squared_errors, item.columns, item.ulps)
    plain = dense.quantised(spill.get(item.held[0]), price.of(item))
    if plain is None:
        return parts, item.squared
    parts.dense, parts.dense_scale = plain.integers, plain.scale
    return parts, _missed_plain(item, spill, plain.integers, plain.scale)


def _missed(item: Item, spill: Spill, parts: Represented) -> float:
    """The squared error of parts that were chosen before, as far as the held directions tell."""
    if item.columns and parts.left is not None and parts.right is not None and parts.scales is not None:
        missed = missed_by(spectrum_of(item, spill)[0], parts.left, parts.right, parts.scales)
        return rounded_error(missed, item.columns, item.ulps)
    if parts.dense is None:
        return item.squared
    return _missed_plain(item, spill, parts.dense, parts.dense_scale)


def _missed_plain(item: Item, spill: Spill, integers: Array, scale: int) -> float:
    """The squared error of integers in place of a tensor's values, as rounded to its dtype."""
    values, base = (spill.get(held) for held in item.held)
    dtype, added = item.pair.fine.dtype, integers * scale_of(np.array([scale]))
    if dtype.bits == 16:
        result = CPU.widen(add_difference(base, dtype, added), dtype, np.empty(len(base)))
        added = result - CPU.widen(base, dtype, np.empty(len(base)))
    return float(np.square(values - added).sum())


def size_of(frame: Frame, items: Iterable[Item], parts: Mapping[str, Represented]) -> int:
    """Bytes of a task's artifact."""
    records, counter = frame.copies(), MixedCounter()
    named = {record.info.name: record for record in records}
    for item in items:
        counter.add(named[item.name], parts[item.name])
    return frame.header_bytes + frame.whole_bytes + frame.side_bytes + counter.nbytes(records, frame.files)


class _Choose:
    """The pass that keeps parts. Each tile is one tensor."""

    def __init__(self, items: Sequence[Item], spill: Spill, price: Price) -> None:
        self._items, self._spill, self._price = items, spill, price
        self.parts: dict[str, Represented] = {}

    def buffers(self) -> None:
        return None

    def apply(self, tile: Tile, buffers: None) -> Represented:
        return represent(self._items[tile.tensor], self._spill, self._price)[0]

    def commit(self, tile: Tile, result: Represented) -> None:
        self.parts[self._items[tile.tensor].name] = result

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


def choose(items: Sequence[Item], spill: Spill, price: Price, how: StreamSettings) -> dict[str, Represented]:
    """The parts of a task's tensors at a price, by the fine-tune's names."""
    chosen = _Choose(items, spill, price)
    run(chosen, [Tile(i, i, 0, item.pair.entries) for i, item in enumerate(items)], how.threads)
    return chosen.parts


def estimate(items: Sequence[Item], spill: Spill, price: Price) -> tuple[float, float, list[int]]:
    """Estimated bytes and squared error at a price, without rounding anything, and which items want more directions than are held."""
    total, error, short = 0.0, 0.0, []
    for number, item in enumerate(items):
        if not item.columns:
            values = spill.get(item.held[0])
            plain = dense.quantised(values, price.of(item))
            total += entropy(plain.integers) if plain is not None else 0
            error += _missed_plain(item, spill, plain.integers, plain.scale) if plain is not None else item.squared
            continue
        values = spill.get(item.held[1])
        rows, columns = item.held[0].shape[0], item.columns
        multiplier = price.of(item)
        numbers, totals = choose_scales(values, rows, columns, multiplier)
        keep = totals < np.square(values)
        steps = scale_of(numbers[keep])
        each = rows * bits(np.sqrt(values[keep] / rows / steps)) + columns * bits(np.sqrt(values[keep] / columns / steps))
        total += float(each.sum())
        kept = float((np.square(values[keep]) - (totals[keep] - multiplier * each)).sum())
        missed = item.squared - kept
        if price.of_outputs:
            missed += kept * (regain(item.squared, kept) - 1) ** 2
        alike = spill.get(item.held[4]) * max(missed, 0.0) / max(item.squared, 1e-300)  # a row misses its share
        error += rounded_error(alike, columns, item.ulps) if keep.any() else item.squared
        if keep.all() and item.rank < item.most:
            short.append(number)
    return total / 8, error, short


class Trial:
    """The pass that counts bytes. Each tile is one tensor."""

    def __init__(self, items: Sequence[Item], frames: Sequence[Frame], spill: Spill, price: Price) -> None:
        self._items, self._spill, self._price = items, spill, price
        self._frames = frames
        self._records = [frame.copies() for frame in frames]
        self._named = [{record.info.name: record for record in records} for records in self._records]
        self._counters = [MixedCounter() for _ in frames]
        self.errors = [0.0 for _ in frames]

    def buffers(self) -> None:
        return None

    def apply(self, tile: Tile, buffers: None) -> tuple[Represented, float]:
        return represent(self._items[tile.tensor], self._spill, self._price)

    def commit(self, tile: Tile, result: tuple[Represented, float]) -> None:
        item = self._items[tile.tensor]
        self._counters[item.task].add(self._named[item.task][item.name], result[0])
        self.errors[item.task] += result[1]

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass

    def sizes(self) -> list[int]:
        """Bytes of each artifact."""
        return [
            frame.header_bytes + frame.whole_bytes + frame.side_bytes + counter.nbytes(records, frame.files)
            for frame, counter, records in zip(self._frames, self._counters, self._records, strict=True)
        ]


def try_out(items: Sequence[Item], frames: Sequence[Frame], spill: Spill, price: Price, how: StreamSettings) -> tuple[int, float]:
    """Bytes of all artifacts together and their squared error, at a price."""
    trial = Trial(items, frames, spill, price)
    run(trial, [Tile(i, i, 0, item.pair.entries) for i, item in enumerate(items)], how.threads)
    return sum(trial.sizes()), sum(trial.errors)
