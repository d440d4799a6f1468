"""The passes of a merge over aligned tiles of all inputs: trim in order, then elect, measure or merge and write."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from peru_cli.checkpoints.bundle import Bundle, cut, members, pieces_of
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.kernels.merging import elections
from peru_cli.kernels.merging.sums import inner_products
from peru_cli.merge.passes.then import After
from peru_cli.merge.passes.walk import Decided, MergeBuffers, Settled, Walk, ranges
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.slots import Slot
from peru_cli.methods.compact.delta import Bits, cast_bits, infinity
from peru_cli.methods.rules import Result, Rule, RuleInput
from peru_cli.streaming.arrays import CPU, Array, doubles
from peru_cli.streaming.tiles import CHUNK, Tile
from peru_cli.vectors.family import StreamSettings

Doubles = np.ndarray[Any, np.dtype[np.float64]]


class Elect(Walk):
    """Sums elected signs over the whole model."""

    def __init__(self, plan: MergePlan, rule: Rule, how: StreamSettings, decided: Decided, slots: Sequence[int]) -> None:
        super().__init__(plan, rule, how, decided, slots, {})
        self.total = 0
        self._lock = threading.Lock()

    def compute(self, tile: Tile, settled: list[list[Settled]], room: MergeBuffers) -> int:
        return self._rule.elect(self.view(tile, settled, room))

    def collect(self, tile: Tile, result: int) -> None:
        with self._lock:
            self.total += result


class Products(Walk):
    """Inner products of all inputs, tensor by tensor, summed in an order that does not depend on the tiles."""

    def __init__(self, plan: MergePlan, rule: Rule, how: StreamSettings, decided: Decided, slots: Sequence[int]) -> None:
        super().__init__(plan, rule, how, decided, slots, {})
        self._chunks: dict[int, dict[int, list[list[list[float]]]]] = {number: {} for number in slots}
        self._lock = threading.Lock()

    def compute(self, tile: Tile, settled: list[list[Settled]], room: MergeBuffers) -> list[list[list[float]]]:
        view = self.view(tile, settled, room)
        found = self._found(view, room)
        for task in range(view.tasks):
            if not all(map(math.isfinite, found[task][task])):
                finite = np.isfinite(self._xp.download(self._input(task, room, f"input{task}")))
                entry = f"entry {tile.start + int(np.flatnonzero(~finite)[0]):,}" if not finite.all() else "some entry, squared"
                fine = self._plan.vectors[self._plan.slots[view.slot].task(task)].fine
                raise BadFile(f"{fine.label}: {view.name!r} is NaN or infinite at {entry}", "repair the model")
        return found

    def collect(self, tile: Tile, result: list[list[list[float]]]) -> None:
        with self._lock:
            self._chunks[self.slot_number(tile)][tile.start] = result

    def _found(self, view: RuleInput, room: MergeBuffers) -> list[list[list[float]]]:
        """Inner products of a tile, by chunks."""
        slot = self._plan.slots[view.slot]
        if self._xp.compiled and self._in_one_loop(slot, room):
            base = room.base_bits if self._reads_base else None
            return inner_products([aligned.fine for aligned in room.aligned], base, f"{slot.info.dtype.name} f4", CHUNK)
        values = [self._xp.download(self._input(task, room, f"input{task}")) for task in range(view.tasks)]
        return inner_products(values, None, "F32 f4" if self._kind == "f4" else "F64 f8", CHUNK)

    def tables(self) -> dict[int, list[list[float]]]:
        """A table (tasks, tasks) for each slot that has one."""
        tables = {}
        for number, tiles in self._chunks.items():
            tasks = range(len(self._plan.slots[number].inputs))
            ordered = [found for _, found in sorted(tiles.items())]
            tables[number] = [[_in_order(value for found in ordered for value in found[i][j]) for j in tasks] for i in tasks]
        return tables


def _in_order(values: Any) -> float:
    total = 0.0
    for value in values:  # not sum(), which has used compensated summation since Python 3.12
        total += value
    return total


class Merge(Walk):
    """The last pass: merge, round once, write."""

    def __init__(
        self, plan: MergePlan, rule: Rule, how: StreamSettings, decided: Decided, slots: Sequence[int],
        writer: CheckpointWriter | None = None, after: After | None = None,
    ) -> None:  # fmt: skip
        """Without a writer it only computes."""
        super().__init__(plan, rule, how, decided, slots, writer.journal.done if writer is not None and writer.journal is not None else {})
        self._writer, self._after = writer, after
        self._left = {number: plan.slots[number].info.entries for number in slots}
        self._lock = threading.Lock()

    @property
    def inputs(self) -> int:
        """Four times the models that a tile is read from: results are large, and `peru` holds them until their turn comes."""
        return 4 * super().inputs

    def _follows(self, slot: Slot) -> After | None:
        """The pass that takes a slot's tensor."""
        return self._after if self._after is not None and self._after.takes(slot) else None

    def compute(self, tile: Tile, settled: list[list[Settled]], room: MergeBuffers) -> Array:
        """The tile's bits, or its floats if another pass takes them; on the host, (n,)."""
        slot = self._plan.slots[self.slot_number(tile)]
        view = self.view(tile, settled, room)
        merged = self._rule.merge(view)
        if self._follows(slot) is not None:
            return self._xp.download(merged.compute(view) if isinstance(merged, Result) else merged)
        bits, finite = self._round(merged, view, slot, room)
        if not finite:
            self._settle(tile, slot, bits, room)
        return bits

    def collect(self, tile: Tile, result: Array) -> None:
        assert self._writer is not None
        number = self.slot_number(tile)
        slot = self._plan.slots[number]
        after = self._follows(slot)
        if after is None:
            data = result.data.cast("B")
            if isinstance(slot.info, Bundle):  # one tile has all of it
                pieces = list(pieces_of(slot.info, tile.start, data))
                self._writer.write_whole([piece for _, _, piece in pieces], [info.name for info, _, _ in pieces])
            else:
                self._writer.write(slot.info.name, slot.info.dtype.nbytes(tile.start), data)
        else:
            after.add(number, tile.start, result)
        with self._lock:
            self._left[number] -= tile.stop - tile.start
            done = not self._left[number]
        if done and after is not None:
            after.finish_added(number)
        if done and (after is None or after.writes):
            parts = [info.name for info in members(slot.info)]
            self._writer.claim(slot.info.name, self._equals.get(number, [[] for _ in self._plan.vectors]), parts)

    def _round(self, merged: Array | Result, view: RuleInput, slot: Slot, room: MergeBuffers) -> tuple[Bits, bool]:
        """The bits of merged weights, on the host, and whether all are finite."""
        dtype = slot.info.dtype
        if (
            isinstance(merged, Result)
            and merged.factor == 1.0
            and merged.scale is not None
            and dtype is slot.base.dtype
            and self._kind == "f4"
        ):
            if merged.vector is not None:
                return self._xp.rounded_onto(merged.vector, dtype, room.base_bits, merged.scale)
            if (chosen := merged.election) is not None and self._xp.compiled and self._in_one_loop(slot, room):
                given = ranges(chosen.kept), chosen.before, chosen.after, chosen.shares, chosen.strict, merged.scale
                return elections.merged([aligned.fine for aligned in room.aligned], dtype.name, room.base_bits, *given)
        if isinstance(merged, Result) and not self._reads_base and merged.copies and room.aligned[0].pair.fine.dtype is dtype:
            return self._xp.download(room.aligned[0].fine), True  # entries that are not finite stay
        if isinstance(merged, Result) and merged.parts and (merged.scale is not None) is self._reads_base and self._in_one_loop(slot, room):
            tasks, flags, *factors = zip(*merged.parts, strict=True)
            base, scale = (None, 1.0) if merged.scale is None else (room.base_bits, merged.scale)
            inputs = [room.aligned[task].fine for task in tasks]
            return self._xp.rounded_sum(inputs, dtype, base, flags, list(zip(*factors, strict=True)), merged.factor, scale)
        floats = merged.compute(view) if isinstance(merged, Result) else merged
        bits = self._xp.download(self._xp.narrow(floats, dtype))
        return bits, CPU.largest_magnitude(bits) < infinity(dtype)

    def _settle(self, tile: Tile, slot: Slot, bits: Bits, room: MergeBuffers) -> None:
        """Entries that are not finite and equal in all inputs stay (masks of -inf). Any others are an error."""
        dtype, download = slot.info.dtype, self._xp.download
        at = np.flatnonzero((bits & ((1 << (dtype.bits - 1)) - 1)) >= infinity(dtype))
        found = [(self._plan.vectors[a.task].fine, a.pair.fine.dtype, download(a.fine)[at]) for a in room.aligned]
        if self._reads_base:
            same = [b == download(a.base)[at] for (_, _, b), a in zip(found, room.aligned, strict=True)]
            value, source = download(room.base_bits)[at], slot.base.dtype
        else:
            value, source = found[0][2], found[0][1]
            same = [doubles(b, d).view(np.int64) == doubles(value, source).view(np.int64) for _, d, b in found]
        alike = np.logical_and.reduce(same)
        if not alike.all():
            if self._reads_base and self._plan.base is not None:
                found.insert(0, (self._plan.base, source, value))
            i = int(np.flatnonzero(~alike)[0])
            entry = tile.start + int(at[i])
            info, start, _ = next(cut(slot.info, entry, entry + 1))
            self._refuse(info, f"entry {start:,}", i, found)
            self._refuse_result(info, f"entry {start:,}", bits[at[i] : at[i] + 1])
        bits[at] = cast_bits(CPU, value, source, dtype)

    def _refuse(self, info: TensorInfo, where: str, i: int, found: list[tuple[Checkpoint, Dtype, Bits]]) -> None:
        """BadFile for the first input that is not finite there, if any is."""
        for model, dtype, bits in found:
            if not np.isfinite(doubles(bits, dtype)[i]):
                raise BadFile(
                    f"{model.label}: {info.name!r} is NaN or infinite at {where}, and the other inputs differ there",
                    "a model with such weights is broken: leave it out, or repair it",
                )

    def _refuse_result(self, info: TensorInfo, where: str, bits: Bits) -> None:
        """BadFile for a result that is not finite although all inputs are."""
        if np.isnan(doubles(bits, info.dtype)[0]):
            raise BadFile(
                f"the merged {info.name!r} is not a number at {where}, though all inputs are",
                "the method divides zero by zero there: with fisher, raise --floor",
            )
        raise BadFile(
            f"the merged {info.name!r} does not fit {info.dtype.name} at {where}",
            "use a wider dtype (--dtype bf16 or fp32), or smaller weights and scale",
        )
