"""Several fine-tunes aligned with one base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peru_cli.checkpoints.bundle import alike, bundle
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pair, Pairing
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.methods.compact.delta import INFINITE_KEY, cast_bits
from peru_cli.streaming.aligned import TileBuffer, read_runs
from peru_cli.streaming.arrays import Array, Arrays, Differences
from peru_cli.streaming.engine import Elsewhere, Reads
from peru_cli.streaming.tiles import Strip, Tile, TilePlan

KEPT_BYTES = 128 << 20  # bytes from the network kept for a second pass: all of a small model, or one tensor


@dataclass
class TaskVector:
    """A fine-tune and its base."""

    name: str
    fine: Checkpoint
    pairing: Pairing
    pairs: dict[str, Pair] = field(init=False)  # pairs with a difference, by the base's tensor name
    wide: bool = field(init=False)  # whether keys are float64: true if any paired tensor is

    def __post_init__(self) -> None:
        self.pairs = self.pairing.deltas
        self.wide = any("F64" in (pair.fine.dtype.name, pair.base.dtype.name) for pair in self.pairs.values())

    @property
    def infinite_key(self) -> int:
        """The key of differences that are not finite."""
        return INFINITE_KEY[self.wide]


@dataclass(frozen=True)
class StreamSettings:
    """How to stream. Nothing here changes a result."""

    xp: Arrays
    threads: int
    tile_entries: int
    advance: Callable[[int], None] = lambda entries: None
    elsewhere: Elsewhere | None = None  # computes the tiles of passes that can be spread over machines


class Buffers:
    """One thread's buffers: a tile of the base, a tile of a fine-tune, keys."""

    def __init__(self, how: StreamSettings, tasks: Sequence[TaskVector], width: int) -> None:
        """`width` is the number of bytes of the widest entry."""
        self.base, self.fine = (TileBuffer(how.xp, how.tile_entries, width) for _ in range(2))
        self.differences = {wide: how.xp.differences(how.tile_entries, wide) for wide in {task.wide for task in tasks}}


@dataclass(frozen=True)
class Station:
    """Where tiles are computed one after another: a family, and one thread's buffers. `held` is what one order leaves for the next."""

    family: Family
    buffers: Buffers
    held: dict[Any, Any] = field(default_factory=dict)


@dataclass
class Aligned:
    """One task's part of a tile: the base's bits cast to its dtype and its own bits, (n,), and added rows.

    Without a base (for a method that merges the weights themselves) `base` is empty and only `fine` is set."""

    task: int
    pair: Pair
    base: Array
    fine: Array
    grown: Array

    def weights(self, xp: Arrays, out: Array) -> Array:
        """The fine-tune's weights in `out`, (n,) float32 or float64."""
        weights = xp.widen(self.fine, self.pair.fine.dtype, out)
        return weights if weights is out else xp.copy(weights, out)

    def difference(self, xp: Arrays, out: Array, room: Callable[[], Array], base_weights: Array | None = None) -> Array:
        """fine - base in `out`, (n,) float32 or float64, unclipped: infinity and NaN pass through.

        Args:
            room: returns an array like `out` to widen the base into.
            base_weights: the base in its own dtype, already widened; used for tasks of that dtype."""
        dtype = self.pair.fine.dtype
        if base_weights is None or dtype is not self.pair.base.dtype:
            base_weights = xp.widen(self.base, dtype, room())
        return xp.subtract(xp.widen(self.fine, dtype, out), base_weights, out=out)


def _of_task(pairs: Mapping[str, Pair], slots: Sequence[TensorInfo], tensor: int) -> TensorInfo | None:
    pair = pairs.get(slots[tensor].name)
    return pair.fine if pair is not None else None


class Family:
    """A base and task vectors, slot by slot. A slot is a base tensor that any of them pairs with, or a bundle of small ones."""

    def __init__(self, base: Checkpoint, tasks: Sequence[TaskVector], how: StreamSettings, bundled: bool = False) -> None:
        """With `bundled`, passes over all tensors need not tell small ones apart."""
        self.base, self.tasks, self.how = base, tasks, how
        names = sorted({name for task in tasks for name in task.pairs})
        runs = list(_runs(base, tasks, names)) if bundled else [[name] for name in names]
        self.slots: list[TensorInfo] = [bundle([base.tensors[name] for name in run]) for run in runs]
        self.pairs = [_pairs_of(task, self.slots, runs) for task in tasks]
        self.ranged = base.ranged or any(task.fine.ranged for task in tasks)  # whether anything comes over the network
        widths = (d.bits // 8 for task in tasks for pair in task.pairs.values() for d in (pair.fine.dtype, pair.base.dtype))
        self._width = max(widths, default=1)  # once: with a threshold for each tensor there are as many passes as tensors
        self.entries = [max([s.entries] + [pairs[s.name].fine.entries for pairs in self.pairs if s.name in pairs]) for s in self.slots]

    def streamed(self, how: StreamSettings) -> Family:
        """The same family, with other settings."""
        other = copy(self)
        other.how = how
        return other

    def plan(self, first: int = 0) -> TilePlan:
        """Tiles of all slots, or of those from `first` on, each as long as its longest tensor."""
        return TilePlan([0 if i < first else n for i, n in enumerate(self.entries)], self.how.tile_entries)

    def tiles(self, slot: int) -> list[Tile]:
        """Tiles of one slot."""
        return [tile._replace(tensor=slot) for tile in TilePlan(self.entries[slot : slot + 1], self.how.tile_entries)]

    def buffers(self) -> Buffers:
        """One thread's buffers."""
        return Buffers(self.how, self.tasks, self._width)

    def each(
        self, slot: TensorInfo, tile: Tile | Strip, base_bits: Array, buffers: Buffers, wanted: Sequence[int], lend: bool = False
    ) -> Iterator[Aligned]:  # fmt: skip
        """Read the tile of each wanted task in turn. Each result is valid until the next one. `lend` as for `read_bits`."""
        for number in wanted:
            if slot.name in self.pairs[number]:
                aligned = self.align(number, slot.name, tile, base_bits, buffers.fine, lend)
                if len(aligned.fine) or len(aligned.grown):
                    yield aligned

    def align(
        self, number: int, slot: str, tile: Tile | Strip, base_bits: Array | None, buffer: TileBuffer, lend: bool = False
    ) -> Aligned:  # fmt: skip
        """Read a task's part of a tile of a base tensor, given the base's bits there; valid until the buffer's next use."""
        pair = self.pairs[number][slot]
        fine = read_runs(self.tasks[number].fine, pair.fine, tile.runs, buffer, lend)
        if base_bits is None:
            return Aligned(number, pair, fine[:0], fine, fine[:0])
        n = len(base_bits)
        return Aligned(number, pair, cast_bits(self.how.xp, base_bits, pair.base.dtype, pair.fine.dtype), fine[:n], fine[n:])

    def reads(self, slots: Sequence[TensorInfo], wanted: Iterable[int]) -> Reads:
        """What a pass over these slots reads of the base and of the wanted tasks."""
        yield self.base, lambda tensor: slots[tensor]
        for number in wanted:
            yield self.tasks[number].fine, partial(_of_task, self.pairs[number], slots)

    def forget(self) -> None:
        """Drop what earlier passes kept."""
        for source in (self.base, *(task.fine for task in self.tasks)):
            source.forget()

    def fits(self, slots: Sequence[TensorInfo]) -> bool:
        """Whether the network data of these slots may be kept between two passes."""
        return self.ranged_bytes(slots) <= KEPT_BYTES

    def ranged_bytes(self, slots: Sequence[TensorInfo]) -> int:
        """Bytes of these slots that come over the network, for the base and all tasks."""
        ranged = [pairs for task, pairs in zip(self.tasks, self.pairs, strict=True) if task.fine.ranged]
        pairs = [pair for slot in slots for mine in ranged if (pair := mine.get(slot.name)) is not None]
        return sum(slot.nbytes for slot in slots if self.base.ranged) + sum(pair.fine.nbytes for pair in pairs)

    def differences(self, aligned: Aligned, buffers: Buffers) -> Differences:
        """The comparer of one task's tile with the base's."""
        return buffers.differences[self.tasks[aligned.task].wide]


def _runs(base: Checkpoint, tasks: Sequence[TaskVector], names: Sequence[str]) -> Iterator[list[str]]:
    """Split names into runs, each of one base tensor, or of small ones that are alike in all tasks."""

    def kind(name: str) -> object:
        pairs = [task.pairs.get(name) for task in tasks]
        if any(pair is not None and pair.grown for pair in pairs):
            return None
        return base.tensors[name].dtype, [pair and pair.fine.dtype for pair in pairs]

    return alike(names, lambda name: base.tensors[name].entries, kind)


def _pairs_of(task: TaskVector, slots: Sequence[TensorInfo], runs: Sequence[Sequence[str]]) -> Mapping[str, Pair]:
    """A task's pairs by slot name."""
    if all(len(run) == 1 for run in runs):
        return task.pairs
    return {
        slot.name: task.pairs[run[0]] if len(run) == 1 else Pair(bundle([task.pairs[name].fine for name in run]), slot)
        for slot, run in zip(slots, runs, strict=True)
        if run[0] in task.pairs
    }
