"""The passes of a merge over aligned tiles of all inputs: trim in order, then elect, measure or merge and write."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from peru_cli.checkpoints.bundle import cut, members, pieces_of
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.kernels.merging import inner_products
from peru_cli.merge.passes.then import After
from peru_cli.merge.plan import MergePlan, Slot
from peru_cli.methods.compact.delta import Bits, cast_bits, infinity
from peru_cli.methods.compact.magnitude import Threshold
from peru_cli.methods.rules import Result, Rule, RuleInput, Scratch
from peru_cli.streaming.aligned import TileBuffer, read_bits
from peru_cli.streaming.arrays import CPU, Array
from peru_cli.streaming.engine import Reads
from peru_cli.streaming.tiles import CHUNK, Tile
from peru_cli.vectors.family import Aligned, Family, StreamSettings

Doubles = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Decided:
    """Results of the passes before the last one: thresholds by trim, task and group; signs; products by slot."""

    thresholds: list[list[list[Threshold]]] = field(default_factory=list)
    majority: int = 0
    products: dict[int, list[list[float]]] = field(default_factory=dict)

    def encode(self) -> Any:
        """As JSON."""
        thresholds = [[[[t.key, t.equals] for t in task] for task in trim] for trim in self.thresholds]
        return {"thresholds": thresholds, "majority": self.majority, "products": list(self.products.items())}

    @classmethod
    def decode(cls, value: Any) -> Decided:
        """Inverse of `encode`."""
        thresholds = [[[Threshold(*pair) for pair in task] for task in trim] for trim in value["thresholds"]]
        return cls(thresholds, value["majority"], dict(value["products"]))


@dataclass
class Trimmed:
    """One trim of one task's tile: bools of the entries above the threshold and of those at or above it; (n,).

    Both are None if the trim keeps everything. `at_least` is None if no equals may be taken any more."""

    above: Array | None
    at_least: Array | None
    equals: int


class MergeBuffers:
    """One thread's buffers."""

    def __init__(self, how: StreamSettings, tasks: int, width: int, kind: str) -> None:
        self.base = TileBuffer(how.xp, how.tile_entries, width)
        self.inputs = [TileBuffer(how.xp, how.tile_entries, width) for _ in range(tasks)]
        self.scratch = Scratch(how.xp, how.tile_entries, kind)
        self.base_bits: Array = None
        self.aligned: list[Aligned] = []
        self._xp = how.xp
        self._dtype: Dtype | None = None
        self._weights: Array = None

    def hold(self, bits: Array, dtype: Dtype) -> None:
        """Set the base's bits of a tile."""
        self.base_bits, self._dtype, self._weights = bits, dtype, None

    def base_weights(self) -> Array:
        """The base's weights, widened when they are first asked for; (n,)."""
        if self._weights is None:
            assert self._dtype is not None
            self._weights = self._xp.widen(self.base_bits, self._dtype, self.scratch("base", len(self.base_bits)))
        return self._weights


class _Walk:
    """Common part: read the tiles of all inputs, trim them in canonical order."""

    def __init__(
        self, plan: MergePlan, rule: Rule, how: StreamSettings, decided: Decided, slots: Sequence[int], done: dict[str, Any]
    ) -> None:
        """`slots` are the slots to walk over. For every other slot, `done` has its number of equals by task and trim."""
        self._plan, self._rule, self._how, self._decided, self._slots = plan, rule, how, decided, slots
        tasks, trims = range(len(plan.vectors)), range(len(rule.trims))
        # Equals that may still be taken, by task, trim and group: the whole model, or each slot.
        self._quotas = [[[threshold.equals or 0 for threshold in decided.thresholds[i][t]] for i in trims] for t in tasks]
        self._equals: dict[int, list[list[int]]] = {}  # of each slot so far
        self._owed = self._count_owed(done)
        infos = [info for slot in plan.slots for info in (*slot.inputs, slot.base)]
        self._width = max((info.dtype.bits // 8 for info in infos), default=4)
        self._kind = "f8" if any(info.dtype.name == "F64" for info in infos) else "f4"
        self._xp = how.xp
        self._reads_base = rule.on_vectors
        self._family = Family(plan.reference, plan.vectors, how, plan.bundled)

    def _count_owed(self, done: dict[str, Any]) -> dict[int, list[list[int]]]:
        """Equals of tensors that an earlier run wrote, summed up to the next slot of this walk."""
        owed, waiting = {}, [[0 for _ in self._rule.trims] for _ in self._plan.vectors]
        walked = set(self._slots)
        for number, slot in enumerate(self._plan.slots):
            if number in walked:
                owed[number] = waiting
                waiting = [[0 for _ in self._rule.trims] for _ in self._plan.vectors]
            elif slot.info.name in done:
                for mine, theirs in zip(waiting, done[slot.info.name], strict=True):
                    mine[:] = [a + b for a, b in zip(mine, theirs, strict=True)]
        return owed

    def slot_number(self, tile: Tile) -> int:
        return self._slots[tile.tensor]

    def reads(self) -> Reads:
        slots = [self._plan.slots[number].base for number in self._slots]
        base, *fines = self._family.reads(slots, range(len(self._plan.vectors)))
        return [base, *fines] if self._reads_base else fines

    def buffers(self) -> MergeBuffers:
        return MergeBuffers(self._how, len(self._plan.vectors), self._width, self._kind)

    def apply(self, tile: Tile, room: MergeBuffers) -> list[list[Trimmed]]:
        slot = self._plan.slots[self.slot_number(tile)]
        bits = None
        if self._reads_base:
            _, bits = read_bits(self._family.base, slot.base, tile, room.base)
            room.hold(bits, slot.base.dtype)
        room.aligned = [
            self._family.align(slot.task(i), slot.base.name, tile, bits, room.inputs[i]) for i in range(len(slot.inputs))
        ]  # fmt: skip
        if not self._rule.trims:
            return []
        return [self._trim(tile, slot, number, room) for number in range(len(room.aligned))]

    def _input(self, number: int, room: MergeBuffers, name: str) -> Array:
        """A task's difference from the base, or its weights, in the buffer of that name; (n,)."""
        aligned = room.aligned[number]
        n = len(aligned.fine)
        if not self._reads_base:
            return aligned.weights(self._xp, room.scratch(name, n))
        dtype, out = aligned.pair.fine.dtype, room.scratch(name, n)
        base = room.base_weights() if dtype is aligned.pair.base.dtype else self._xp.widen(aligned.base, dtype, room.scratch("cast", n))
        self._xp.accumulate(out, aligned.fine, dtype.name, base, None, (1.0, 1.0), True)
        return out

    def _add(self, room: MergeBuffers, total: Array | None, number: int, flags: Array | None, first: float, second: float) -> Array:
        """RuleInput.add, applied to the task's own bits, or to the vector that trimming has computed."""
        aligned, made = room.aligned[number], bool(self._rule.trims)
        n, dtype, base = len(aligned.fine), aligned.pair.fine.dtype, room.base_weights() if self._reads_base and not made else None
        bits, name = aligned.fine, dtype.name
        if made:
            bits, name = self._xp.view(room.scratch(f"input{number}", n), f"i{self._kind[1]}"), "F64" if self._kind == "f8" else "F32"
        elif base is not None and dtype is not aligned.pair.base.dtype:
            base = self._xp.widen(aligned.base, dtype, room.scratch("cast", n))
        out = room.scratch("sum", n) if total is None else total
        self._xp.accumulate(out, bits, name, base, flags, (first, second), total is None)
        return out

    def _trim(self, tile: Tile, slot: Slot, number: int, room: MergeBuffers) -> list[Trimmed]:
        xp, vector = self._xp, self._input(number, room, f"input{number}")
        result = []
        task = slot.task(number)
        for trim, quotas in zip(self._decided.thresholds, self._quotas[task], strict=True):
            group = self.slot_number(tile) if len(trim[task]) > 1 else 0
            threshold = trim[task][group]
            if threshold.keeps_all:
                result.append(Trimmed(None, None, 0))
            else:
                above, at_least, equals = xp.trim(vector, threshold.key)
                # Once no equals may be taken any more, that never changes: they are not counted.
                result.append(Trimmed(above, at_least, equals) if quotas[group] else Trimmed(above, None, 0))
        return result

    def commit(self, tile: Tile, result: list[list[Trimmed]]) -> list[list[Array | None]]:
        """Settle which equals are kept: a flag for each entry, or None for all."""
        number = self.slot_number(tile)
        if tile.start == 0 and result:
            self._begin(number)
        flags: list[list[Array | None]] = []
        for input_number, trims in enumerate(result):
            task = self._plan.slots[number].task(input_number)
            flags.append([])
            for index, trim in enumerate(trims):
                quotas = self._quotas[task][index]
                group = number if len(quotas) > 1 else 0
                taken = min(trim.equals, quotas[group])
                quotas[group] -= taken
                self._equals[number][task][index] += trim.equals
                if trim.at_least is not None and taken == trim.equals:
                    flags[-1].append(trim.at_least)
                elif trim.at_least is None or not taken:
                    flags[-1].append(trim.above)
                else:
                    flags[-1].append(self._first_equals(trim, taken))
        return flags

    def _first_equals(self, trim: Trimmed, quota: int) -> Array:
        """Entries above the threshold, and the first `quota` of its equals."""
        xp = self._xp
        equal = xp.not_equal(trim.at_least, trim.above)
        return xp.logical_or(trim.above, xp.logical_and(equal, xp.running_count(equal) <= quota))

    def _begin(self, number: int) -> None:
        self._equals[number] = [[0 for _ in self._rule.trims] for _ in self._plan.vectors]
        for quotas, owed in zip(self._quotas, self._owed[number], strict=True):
            for trim, equals in zip(quotas, owed, strict=True):
                if len(trim) == 1:
                    trim[0] = max(trim[0] - equals, 0)

    def view(self, tile: Tile, flags: list[list[Array | None]], room: MergeBuffers) -> RuleInput:
        """The tile as rules see it."""
        number = self.slot_number(tile)
        slot, rule, n = self._plan.slots[number], self._rule, tile.stop - tile.start

        def inputs(task: int) -> Array:
            if rule.trims:  # trimming has computed it
                return room.scratch(f"input{task}", n)
            return self._input(task, room, f"input{task if rule.holds_all else task % 2}")

        parts = [(info.name, first, stop - first) for info, first, stop in cut(slot.info, tile.start, tile.stop)]
        return RuleInput(
            slot.info.name, number, tile.start, parts, n, len(slot.inputs), self._xp, room.base_weights, inputs, partial(self._add, room),
            lambda task, index: flags[task][index], room.scratch, slot.info.shape, self._decided.majority,
        )  # fmt: skip


class Elect(_Walk):
    """Sums elected signs over the whole model."""

    def __init__(self, plan: MergePlan, rule: Rule, how: StreamSettings, decided: Decided, slots: Sequence[int]) -> None:
        super().__init__(plan, rule, how, decided, slots, {})
        self.total = 0
        self._lock = threading.Lock()

    def finish(self, tile: Tile, committed: list[list[Array | None]], room: MergeBuffers) -> None:
        signs = self._rule.elect(self.view(tile, committed, room))
        with self._lock:
            self.total += signs


class Products(_Walk):
    """Inner products of all inputs, tensor by tensor, summed in an order that does not depend on the tiles."""

    def __init__(self, plan: MergePlan, rule: Rule, how: StreamSettings, decided: Decided, slots: Sequence[int]) -> None:
        super().__init__(plan, rule, how, decided, slots, {})
        self._chunks: dict[int, dict[int, list[list[list[float]]]]] = {number: {} for number in slots}
        self._lock = threading.Lock()

    def finish(self, tile: Tile, committed: list[list[Array | None]], room: MergeBuffers) -> None:
        view = self.view(tile, committed, room)
        values = [self._xp.download(self._input(task, room, f"input{task}")) for task in range(view.tasks)]
        found = inner_products(values, CHUNK)
        for task, value in enumerate(values):
            if not all(map(math.isfinite, found[task][task])):
                finite = np.isfinite(value)
                entry = f"entry {tile.start + int(np.flatnonzero(~finite)[0]):,}" if not finite.all() else "some entry, squared"
                fine = self._plan.vectors[self._plan.slots[view.slot].task(task)].fine
                raise BadFile(f"{fine.label}: {view.name!r} is NaN or infinite at {entry}", "repair the model")
        with self._lock:
            self._chunks[self.slot_number(tile)][tile.start] = found

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


class Merge(_Walk):
    """The last pass: merge, round once, write."""

    def __init__(
        self, plan: MergePlan, rule: Rule, how: StreamSettings, decided: Decided, slots: Sequence[int], writer: CheckpointWriter,
        after: After | None = None,
    ) -> None:  # fmt: skip
        super().__init__(plan, rule, how, decided, slots, writer.journal.done if writer.journal is not None else {})
        self._writer, self._after = writer, after
        self._left = {number: plan.slots[number].info.entries for number in slots}
        self._lock = threading.Lock()

    def finish(self, tile: Tile, committed: list[list[Array | None]], room: MergeBuffers) -> None:
        number = self.slot_number(tile)
        slot = self._plan.slots[number]
        view = self.view(tile, committed, room)
        merged = self._rule.merge(view)
        after = self._after if self._after is not None and self._after.takes(slot) else None
        if after is None:
            bits, finite = self._round(merged, view, slot, room)
            if not finite:
                self._settle(tile, slot, bits, room)
            for info, start, piece in pieces_of(slot.info, tile.start, bits.data.cast("B")):
                self._writer.write(info.name, info.dtype.nbytes(start), piece)
        else:
            after.add(number, tile.start, self._xp.download(merged.compute(view) if isinstance(merged, Result) else merged))
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
        same = self._kind == "f4" and (not self._reads_base or slot.base.dtype is dtype)
        if same and isinstance(merged, Result) and not (merged.parts and self._rule.trims):
            base, scale = (None, 1.0) if merged.scale is None else (room.base_bits, merged.scale)
            if merged.parts and (base is None) is not self._reads_base and all(a.pair.fine.dtype is dtype for a in room.aligned):
                tasks, flags, *factors = zip(*merged.parts, strict=True)
                inputs = [room.aligned[task].fine for task in tasks]
                return self._xp.rounded_sum(inputs, dtype, base, flags, list(zip(*factors, strict=True)), merged.factor, scale)
            if not merged.parts and base is not None and merged.factor == 1.0:
                return self._xp.rounded_onto(merged.vector, dtype, base, scale)
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
            same = [_doubles(b, d).view(np.int64) == _doubles(value, source).view(np.int64) for _, d, b in found]
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
            if not np.isfinite(_doubles(bits, dtype)[i]):
                raise BadFile(
                    f"{model.label}: {info.name!r} is NaN or infinite at {where}, and the other inputs differ there",
                    "a model with such weights is broken: leave it out, or repair it",
                )

    def _refuse_result(self, info: TensorInfo, where: str, bits: Bits) -> None:
        """BadFile for a result that is not finite although all inputs are."""
        if np.isnan(_doubles(bits, info.dtype)[0]):
            raise BadFile(
                f"the merged {info.name!r} is not a number at {where}, though all inputs are",
                "the method divides zero by zero there: with fisher, raise --floor",
            )
        raise BadFile(
            f"the merged {info.name!r} does not fit {info.dtype.name} at {where}",
            "use a wider dtype (--dtype bf16 or fp32), or smaller weights and scale",
        )


def _doubles(bits: Bits, dtype: Dtype) -> Doubles:
    """Bits as float64; (n,)."""
    doubles: Doubles = CPU.widen(bits, dtype, np.empty(len(bits)))
    return doubles
