"""The passes of packing: measure the task vectors, then move, flip, round and add them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from peru_cli.artifacts.packs.pack import Sums, as_sums, sum_leaves
from peru_cli.artifacts.packs.superposed import PackedTensor, PackMode
from peru_cli.artifacts.packs.writer import PackWriter
from peru_cli.checkpoints.digests import Digests, leaves
from peru_cli.errors import BadFile
from peru_cli.methods.compact.superpose import LARGEST, flip
from peru_cli.pack.orders import Leaves, Measuring, Superposed, Superposing
from peru_cli.pack.plan import PackPlan
from peru_cli.streaming.aligned import TileBuffer, read_bits
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.tiles import CHUNK, Tile
from peru_cli.vectors.family import Family, StreamSettings

if TYPE_CHECKING:
    from peru_cli.pack.base import NewBase

Doubles = np.ndarray[Any, np.dtype[np.float64]]
PIECE = CHUNK // 2  # entries of one inner product: so few that no linear algebra library uses several threads


def inner_products(rows: Doubles) -> list[Doubles]:
    """Tables (rows, rows) of inner products, one for each piece of (rows, n). The pieces do not depend on the tile."""
    count, n = rows.shape
    tables = []
    for start in range(0, n, PIECE):
        table = np.empty((count, count))
        for i in range(count):
            for j in range(i + 1):
                table[i, j] = table[j, i] = np.dot(rows[i, start : start + PIECE], rows[j, start : start + PIECE])
        tables.append(table)
    return tables


class PackBuffers:
    """One thread's buffers."""

    def __init__(self, how: StreamSettings, rows: int, width: int) -> None:
        self.base, self.fine = (TileBuffer(CPU, how.tile_entries, width) for _ in range(2))
        self.vectors = {kind: np.empty(how.tile_entries, kind) for kind in ("f4", "f8")}
        self.cast = {kind: np.empty(how.tile_entries, kind) for kind in ("f4", "f8")}
        self.rows = np.empty((rows, how.tile_entries))


class _Walk:
    """Common part: the task vectors of a tile, wherever in the model they come from."""

    def __init__(self, plan: PackPlan, how: StreamSettings, wide: bool = False) -> None:
        """With `wide`, differences are float64 in all tensors of a task that has an F64 tensor, as keys are."""
        self._plan, self._how, self._wide = plan, how, wide
        self._family = Family(plan.base, plan.vectors, how)
        self._sums = plan.sums
        self._whole = {tensor.info.name for tensor in self._sums if tensor.mode == PackMode.WEIGHTS}
        infos = [info for v in plan.vectors for pair in v.pairs.values() for info in (pair.fine, pair.base)]
        self._width = max((info.dtype.bits // 8 for info in infos), default=4)

    @property
    def inputs(self) -> int:
        """Models that each tile is read from: the base with each task, since tasks may take it from different tensors."""
        return 2 * len(self._plan.vectors)

    def buffers(self) -> PackBuffers:
        return PackBuffers(self._how, len(self._plan.vectors) + 1, self._width)

    def vector(self, number: int, source: str, tile: Tile, room: PackBuffers) -> tuple[memoryview, memoryview, Doubles]:
        """Bytes of base and fine-tune, and a task's difference (or its weights) as float32 (float64 for F64), (n,)."""
        vector = self._plan.vectors[number]
        base_raw, base_bits = read_bits(self._plan.base, vector.pairs[source].base, tile, room.base)
        aligned = self._family.align(number, source, tile, base_bits, room.fine)
        kind = "f8" if aligned.pair.fine.dtype.name == "F64" or (self._wide and vector.wide) else "f4"
        out, cast = (some[kind][: tile.stop - tile.start] for some in (room.vectors, room.cast))
        vectors = aligned.weights(CPU, out) if source in self._whole else aligned.difference(CPU, out, lambda: cast)
        return base_raw, aligned.fine.data.cast("B"), vectors

    def refuse(self, number: int, source: str, tile: Tile, what: str, room: PackBuffers) -> BadFile:
        """The error for a task's values, or the base's."""
        vector = self._plan.vectors[number]
        pair, name = vector.pairs[source], vector.pairs[source].fine.name
        base = CPU.widen(read_bits(self._plan.base, pair.base, tile, room.base)[1], pair.base.dtype, np.empty(tile.stop - tile.start))
        if not np.isfinite(base).all():
            where = tile.start + int(np.flatnonzero(~np.isfinite(base))[0])
            return BadFile(f"{self._plan.base.label}: {pair.base.name!r} is NaN or infinite at entry {where:,}", "repair the base")
        return BadFile(f"{vector.fine.label}: {name!r} {what} (entries {tile.start:,} to {tile.stop:,})", "leave it out, or repair it")


class Gather(_Walk):
    """Inner products of the unmoved task vectors, tensor by tensor."""

    def __init__(self, plan: PackPlan, how: StreamSettings, wide: bool = False) -> None:
        super().__init__(plan, how, wide)
        tasks = len(plan.vectors)
        self.tables = {tensor.info.name: np.zeros((tasks, tasks)) for tensor in self._sums}

    def apply(self, tile: Tile, room: PackBuffers) -> list[Doubles]:
        name, rows = self._sums[tile.tensor].info.name, room.rows[:-1, : tile.stop - tile.start]
        for number in range(len(rows)):
            rows[number] = self.vector(number, name, tile, room)[2]
        tables = inner_products(rows)
        for number in range(len(rows)):
            if not math.isfinite(sum(table[number, number] for table in tables)):
                raise self.refuse(number, name, tile, "differs from the base by NaN or infinity", room)
        return tables

    def commit(self, tile: Tile, result: list[Doubles]) -> None:
        total = self.tables[self._sums[tile.tensor].info.name]
        for table in result:
            total += table

    def finish(self, tile: Tile, committed: None, buffers: PackBuffers) -> None:
        pass

    # -- on other machines (streaming/cluster.py)

    def order(self, tiles: Sequence[Tile]) -> Measuring:
        """What a worker does with these tiles."""
        return Measuring()

    def take(self, tiles: Sequence[Tile], reply: list[list[Doubles]]) -> None:
        """Add up a worker's tables."""
        for tile, tables in zip(tiles, reply, strict=True):
            self.commit(tile, tables)

    def done(self, tiles: Sequence[Tile], reply: None) -> None:
        """Nothing is left."""


@dataclass
class Added:
    """A tile's sums, inner products of what was added and of the sums (the last row), and squared rounding errors, (T,)."""

    sums: Sums
    tables: list[Doubles]
    rounding: Doubles


class Superpose(_Walk):
    """Move, flip, round and add (or subtract) task vectors. Digests everything that is read and written."""

    def __init__(
        self, plan: PackPlan, how: StreamSettings, writer: PackWriter | None, new_base: NewBase | None = None, wide: bool = False
    ) -> None:
        """Plain sums go into `new_base`, if there is one. A worker of a cluster has no writer: it only applies."""
        super().__init__(plan, how, wide)
        self._writer, self._new_base = writer, new_base
        self._sources = [plan.arrangement.sources(v.name, plan.shifts[v.name]) for v in plan.vectors]
        self._infos = {t.info.name: t.info for t in self._sums}
        self._lock = threading.Lock()
        self.noted: dict[object, list[Leaves]] | None = None  # where a worker's digests go
        self._rows: dict[tuple[int, str], Any] = {}
        self._offsets = [0, *accumulate(tensor.info.entries for tensor in self._sums)]  # places in the stream of sums
        self.products = np.zeros((len(plan.vectors) + 1,) * 2)
        self.rounding = np.zeros(len(plan.vectors))
        self.base_digests = Digests(plan.base.tensors.get)
        self.sum_digests = Digests({t.info.name: as_sums(t.info) for t in self._sums}.get)
        self.results = [Digests(vector.fine.tensors.get) for vector in plan.vectors]

    def apply(self, tile: Tile, room: PackBuffers) -> Added:
        record, n = self._sums[tile.tensor], tile.stop - tile.start
        old, removing = self._plan.old, self._plan.removing
        sums = old.sums(old.records[record.info.name], tile.start, tile.stop).astype(np.int32) if old is not None else np.zeros(n, np.int32)
        rows = room.rows[:, :n]
        rounding = np.zeros(len(self._plan.vectors))
        for number, vector in enumerate(self._plan.vectors):
            source = self._sources[number].get(record.info.name, record.info.name)
            base_raw, fine_raw, steps = self.vector(number, source, tile, room)
            pair = vector.pairs[source]
            if number == 0:  # every task reads each base tensor once, each in a different order
                self._note("base", source, tile.start, leaves(base_raw, pair.base.dtype))
                if self._new_base is not None and record.is_target:
                    self._new_base.copy(self._infos[source], tile, base_raw)
            self._note(number, pair.fine.name, tile.start, leaves(fine_raw, pair.fine.dtype))
            if (signs := self._signs(number, record)) is not None:
                flip(steps, signs, tile.start)
            _in_steps(steps, record.exponent)
            rows[number] = steps
            np.rint(steps, out=steps)
            self._check(number, source, tile, steps, room)
            difference = rows[number] - steps
            for start in range(0, n, PIECE):
                piece = difference[start : start + PIECE]
                rounding[number] += np.dot(piece, piece)
            (np.subtract if removing else np.add)(sums, steps.astype(np.int32), out=sums)
        if self._new_base is not None and not record.is_target:
            self._new_base.merge(record, tile, base_raw, sums)
        sums = self.together(rows[:-1], sums)
        rows[-1] = sums
        area = 4.0**record.exponent
        tables = [] if removing else [table * area for table in inner_products(rows)]
        self._note("sums", record.info.name, tile.start, sum_leaves(sums))
        return Added(sums, tables, rounding * area)

    def _note(self, what: object, name: str, start: int, found: bytes) -> None:
        """Digests of a tile of the base, of a task (its number) or of the sums."""
        if self.noted is not None:
            self.noted.setdefault(what, []).append((name, start, found))
        else:
            trees = self.base_digests if what == "base" else self.sum_digests if what == "sums" else self.results[int(str(what))]
            trees.add_at(name, start, found)

    def together(self, rows: Doubles, sums: Sums) -> Sums:
        """What is stored: the sums of the rounded rows, unless a method puts something else in their place."""
        return sums

    def _signs(self, number: int, record: PackedTensor) -> Any:
        """Signs of a target tensor, cached."""
        if not record.is_target:
            return None
        key = number, record.info.name
        with self._lock:
            if key not in self._rows:
                # Tiles come in order, so earlier tensors' signs are rarely needed again.
                self._rows = {k: v for k, v in self._rows.items() if k[1] >= record.info.name}
                self._rows[key] = self._plan.arrangement.row(self._plan.vectors[number].name, record.info)
            return self._rows[key]

    def _check(self, number: int, source: str, tile: Tile, steps: Doubles, room: PackBuffers) -> None:
        if len(steps) and not (float(steps.max()) <= LARGEST and float(steps.min()) >= -LARGEST):
            finite = np.isfinite(steps).all()
            what = "has changes too large for the pack's step: use a coarser one (smaller --precision)" if finite else "is not finite"
            raise self.refuse(number, source, tile, what, room)

    def commit(self, tile: Tile, result: Added) -> list[tuple[int, Sums]]:
        self.tally(result)
        if self._new_base is not None and not self._sums[tile.tensor].is_target:
            return []
        assert self._writer is not None
        return self._writer.add(result.sums)

    def tally(self, result: Added) -> None:
        """Add up a tile's measurements, in canonical order."""
        for table in result.tables:
            self.products += table
        self.rounding += result.rounding

    def came_back(self, number: int) -> tuple[float, float]:
        """For a task's retrieved vector, unscaled: its squared norm, and its inner product with the task vector."""
        return float(self.products[-1, -1]), float(self.products[-1, number])

    def finish(self, tile: Tile, committed: list[tuple[int, Sums]], buffers: PackBuffers) -> None:
        assert self._writer is not None
        for block in committed:
            self._writer.write(block)

    # -- on other machines (streaming/cluster.py)

    def order(self, tiles: Sequence[Tile]) -> Superposing:
        """What a worker does with these tiles."""
        names, exponents = (v.name for v in self._plan.vectors), (tensor.exponent for tensor in self._sums)
        return Superposing(tuple(names), tuple(exponents), self._offsets[tiles[0].tensor] + tiles[0].start)

    def take(self, tiles: Sequence[Tile], reply: Superposed) -> None:
        """Write a worker's sums."""
        assert self._writer is not None
        for tables, rounding in zip(reply.tables, reply.rounding, strict=True):
            self.tally(Added(reply.part.head, tables, rounding))
        for what, noted in reply.noted.items():
            for name, start, found in noted:
                self._note(what, name, start, found)
        self._writer.splice(reply.part.head, reply.part.blocks, reply.part.tail)

    def done(self, tiles: Sequence[Tile], reply: None) -> None:
        """Nothing is left."""


def _in_steps(values: Doubles, exponent: int) -> None:
    """values / 2^exponent, exactly, in place."""
    if -126 <= exponent <= 126:
        np.multiply(values, values.dtype.type(2.0**-exponent), out=values)
    else:
        np.ldexp(values, -exponent, out=values)
