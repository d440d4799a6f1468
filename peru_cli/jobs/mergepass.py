"""The passes of a merge over aligned tiles of all inputs: trim in order, then elect, measure or merge and write."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.checkpoints.writer import CheckpointWriter
from peru_cli.errors import BadFile
from peru_cli.jobs.mergeplan import MergePlan, Slot
from peru_cli.jobs.taskvectors import How
from peru_cli.methods.delta import as_float, cast_bits, float_type
from peru_cli.methods.magnitude import Threshold
from peru_cli.methods.rules import Rule, Scratch
from peru_cli.methods.rules import Tile as RuleTile
from peru_cli.streaming.aligned import read_bits
from peru_cli.streaming.device import BITS, TileBuffer, count_ones, first_ones, greater, largest
from peru_cli.streaming.tiles import CHUNK, Tile

_FINITE = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0_0000_0000_0000}  # the pattern of infinity


@dataclass
class Decided:
    """What the passes before the last one found: thresholds by trim, task and group; signs; products by slot."""

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
    """One trim of one task's tile: entries above the threshold and those at or above it, as 0 or 1; (n,)."""

    above: torch.Tensor | None  # None where the trim keeps everything
    at_least: torch.Tensor | None
    equals: int


class Room:
    """One thread's buffers."""

    def __init__(self, how: How, tasks: int, width: int, kind: torch.dtype, outputs: Sequence[Dtype]) -> None:
        self.base = TileBuffer(how.tile_entries, how.device, width)
        self.inputs = [TileBuffer(how.tile_entries, how.device, width) for _ in range(tasks)]
        self.scratch = Scratch(how.tile_entries, how.device, kind)
        types = {dtype.name: float_type(dtype) for dtype in outputs}
        self.out = {name: torch.empty(how.tile_entries, dtype=t, device=how.device) for name, t in types.items()}
        self.base_bits: torch.Tensor = torch.empty(0)
        self.bits: list[torch.Tensor] = []
        self.uncast: list[torch.Tensor] = []  # the base in each task's dtype


class _Walk:
    """Common part: read the tiles of all inputs, trim them in canonical order."""

    def __init__(self, plan: MergePlan, rule: Rule, how: How, decided: Decided, slots: Sequence[int], done: dict[str, Any]) -> None:
        """`slots` are those to walk over; `done` has for every other one how many equals it had, by task and trim."""
        self._plan, self._rule, self._how, self._decided, self._slots = plan, rule, how, decided, slots
        tasks, trims = range(len(plan.vectors)), range(len(rule.trims))
        self._quotas = [[decided.thresholds[i][t][0].equals or 0 for i in trims] for t in tasks]
        self._equals: dict[int, list[list[int]]] = {}  # of each slot so far
        self._owed = self._count_owed(done)
        infos = [info for slot in plan.slots for info in (*slot.inputs, slot.base)]
        self._width = max((info.dtype.bits // 8 for info in infos), default=4)
        self._kind = torch.float64 if any(info.dtype.name == "F64" for info in infos) else torch.float32
        self._reads_base = rule.on_vectors

    def _count_owed(self, done: dict[str, Any]) -> dict[int, list[list[int]]]:
        """Equals of tensors written by an earlier run, summed before the next slot that is walked over."""
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

    def buffers(self) -> Room:
        outputs = {slot.info.dtype.name: slot.info.dtype for slot in self._plan.slots}
        return Room(self._how, len(self._plan.vectors), self._width, self._kind, list(outputs.values()))

    def apply(self, tile: Tile, room: Room) -> list[list[Trimmed]]:
        slot = self._plan.slots[self.slot_number(tile)]
        room.bits, room.uncast = [], []
        if self._reads_base:
            assert self._plan.base is not None
            _, room.base_bits = read_bits(self._plan.base, slot.base, tile, room.base)
        for vector, info, buffer in zip(self._plan.vectors, slot.inputs, room.inputs, strict=True):
            room.bits.append(read_bits(vector.fine, info, tile, buffer)[1])
            if self._reads_base:
                room.uncast.append(cast_bits(room.base_bits, slot.base.dtype, info.dtype))
        if not self._rule.trims:
            return []
        if self._reads_base:
            self._load_base(slot, room)
        return [self._trim(tile, slot, number, room) for number in range(len(room.bits))]

    def _load_base(self, slot: Slot, room: Room) -> None:
        room.scratch("base", room.base_bits.numel()).copy_(as_float(room.base_bits, slot.base.dtype))

    def _input(self, slot: Slot, number: int, room: Room, name: str) -> torch.Tensor:
        """A task's difference from the base, or its weights, in room of that name; (n,)."""
        info, bits = slot.inputs[number], room.bits[number]
        n = bits.numel()
        value = room.scratch(name, n).copy_(as_float(bits, info.dtype))
        if not self._reads_base:
            return value
        if info.dtype is slot.base.dtype:
            return value.sub_(room.scratch("base", n))
        return value.sub_(room.scratch("cast", n).copy_(as_float(room.uncast[number], info.dtype)))

    def _trim(self, tile: Tile, slot: Slot, number: int, room: Room) -> list[Trimmed]:
        vector = self._input(slot, number, room, f"input{number}")
        keys = torch.abs(vector, out=room.scratch("keys", vector.numel())).view(BITS[64 if self._kind is torch.float64 else 32])
        result = []
        for trim in self._decided.thresholds:
            thresholds = trim[number]
            threshold = thresholds[self.slot_number(tile) if len(thresholds) > 1 else 0]
            if threshold.keeps_all:
                result.append(Trimmed(None, None, 0))
                continue
            above, at_least = greater(keys, threshold.key), greater(keys, threshold.key - 1)
            result.append(Trimmed(above, at_least, count_ones(at_least) - count_ones(above)))
        return result

    def commit(self, tile: Tile, result: list[list[Trimmed]]) -> list[list[torch.Tensor | None]]:
        """Settle which equals stay; a flag for each entry, None for all of them."""
        number = self.slot_number(tile)
        if tile.start == 0 and result:
            self._begin(number)
        flags: list[list[torch.Tensor | None]] = []
        for task, trims in enumerate(result):
            flags.append([])
            for index, trim in enumerate(trims):
                quota = self._quotas[task][index]
                self._quotas[task][index] -= min(trim.equals, quota)
                self._equals[number][task][index] += trim.equals
                if trim.above is None or trim.at_least is None:
                    flags[task].append(None)
                elif trim.equals <= quota:
                    flags[task].append(trim.at_least)
                elif not quota:
                    flags[task].append(trim.above)
                else:
                    flags[task].append(trim.above | first_ones(trim.at_least - trim.above, quota))
        return flags

    def _begin(self, number: int) -> None:
        self._equals[number] = [[0 for _ in self._rule.trims] for _ in self._plan.vectors]
        for task, quotas in enumerate(self._quotas):
            for index in range(len(quotas)):
                thresholds = self._decided.thresholds[index][task]
                if len(thresholds) > 1:
                    quotas[index] = thresholds[number].equals or 0
                else:
                    quotas[index] = max(quotas[index] - self._owed[number][task][index], 0)

    def view(self, tile: Tile, flags: list[list[torch.Tensor | None]], room: Room) -> RuleTile:
        """The tile as rules see it."""
        number = self.slot_number(tile)
        slot, n = self._plan.slots[number], tile.stop - tile.start
        if self._reads_base and not self._rule.trims:
            self._load_base(slot, room)

        def inputs(task: int) -> torch.Tensor:
            if self._rule.trims:
                return room.scratch(f"input{task}", n)
            return self._input(slot, task, room, f"input{task}" if self._rule.holds_all else "input")

        def kept(task: int, index: int) -> torch.Tensor:
            flag = flags[task][index]
            ones = room.scratch("kept", n)
            return ones.fill_(1.0) if flag is None else ones.copy_(flag)

        base = room.scratch("base", n) if self._reads_base else None
        tasks = len(self._plan.vectors)
        return RuleTile(
            slot.info.name, number, tile.start, n, tasks, base, inputs, kept, room.scratch, self._decided.majority
        )  # fmt: skip


class Elect(_Walk):
    """Sums elected signs over everything."""

    def __init__(self, plan: MergePlan, rule: Rule, how: How, decided: Decided, slots: Sequence[int]) -> None:
        super().__init__(plan, rule, how, decided, slots, {})
        self.total = 0
        self._lock = threading.Lock()

    def finish(self, tile: Tile, committed: list[list[torch.Tensor | None]], room: Room) -> None:
        signs = self._rule.elect(self.view(tile, committed, room))
        with self._lock:
            self.total += signs


class Products(_Walk):
    """Inner products of all inputs, tensor by tensor, summed in a fixed order whatever the tiles."""

    def __init__(self, plan: MergePlan, rule: Rule, how: How, decided: Decided, slots: Sequence[int]) -> None:
        super().__init__(plan, rule, how, decided, slots, {})
        self._chunks: dict[int, dict[int, list[list[list[float]]]]] = {number: {} for number in slots}
        self._lock = threading.Lock()

    def finish(self, tile: Tile, committed: list[list[torch.Tensor | None]], room: Room) -> None:
        view = self.view(tile, committed, room)
        values = [view.inputs(task).to(torch.float64, copy=True) for task in range(view.tasks)]
        found = [[_chunk_sums(a, b) for b in values] for a in values]
        for task, value in enumerate(values):
            if not all(map(math.isfinite, found[task][task])):
                finite = torch.isfinite(value).cpu().numpy()
                entry = f"entry {tile.start + int(np.flatnonzero(~finite)[0]):,}" if not finite.all() else "some entry, squared"
                raise BadFile(f"{self._plan.vectors[task].fine.label}: {view.name!r} is NaN or infinite at {entry}", "repair the model")
        with self._lock:
            self._chunks[self.slot_number(tile)][tile.start] = found

    def tables(self) -> dict[int, list[list[float]]]:
        """For each slot a table (tasks, tasks)."""
        tasks = range(len(self._plan.vectors))
        return {
            number: [[_in_order(value for _, found in sorted(tiles.items()) for value in found[i][j]) for j in tasks] for i in tasks]
            for number, tiles in self._chunks.items()
        }


def _in_order(values: Any) -> float:
    total = 0.0
    for value in values:  # not sum(), which compensates since Python 3.12
        total += value
    return total


def _chunk_sums(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Sums of a * b over chunks of 2^14 entries, each by halving: the same on every processor."""
    n = a.numel()
    chunks = torch.zeros(-(-n // CHUNK) * CHUNK, dtype=torch.float64, device=a.device)
    torch.mul(a, b, out=chunks[:n])
    rows = chunks.view(-1, CHUNK)
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rows = rows[:, :half] + rows[:, half:]
    return [float(value) for value in rows.view(-1).cpu()]


class Merge(_Walk):
    """The last pass: merge, round once, write."""

    def __init__(self, plan: MergePlan, rule: Rule, how: How, decided: Decided, slots: Sequence[int], writer: CheckpointWriter) -> None:
        super().__init__(plan, rule, how, decided, slots, writer.journal.done if writer.journal is not None else {})
        self._writer = writer
        self._left = {number: plan.slots[number].info.entries for number in slots}
        self._lock = threading.Lock()

    def finish(self, tile: Tile, committed: list[list[torch.Tensor | None]], room: Room) -> None:
        number = self.slot_number(tile)
        slot = self._plan.slots[number]
        merged = self._rule.merge(self.view(tile, committed, room))
        out = room.out[slot.info.dtype.name][: merged.numel()]
        out.copy_(merged.to(torch.float32) if merged.dtype is torch.float64 and slot.info.dtype.bits == 16 else merged)
        bits = out.view(BITS[slot.info.dtype.bits]).cpu()
        if _not_finite(bits, slot.info.dtype):
            self._settle(tile, slot, bits, room)
        self._writer.write(slot.info.name, slot.info.dtype.nbytes(tile.start), bits.view(torch.uint8).numpy().data)
        with self._lock:
            self._left[number] -= tile.stop - tile.start
            done = not self._left[number]
        if done and self._writer.journal is not None:
            self._writer.journal.claim(slot.info.name, self._equals.get(number, [[] for _ in self._plan.vectors]))

    def _settle(self, tile: Tile, slot: Slot, bits: torch.Tensor, room: Room) -> None:
        """Entries that are not finite and the same in all inputs stay (masks of -inf); any other is an error."""
        infinity = _FINITE[slot.info.dtype.name]
        at = torch.from_numpy(np.flatnonzero((bits.numpy() & _magnitudes(slot.info.dtype)) >= infinity))
        found = [(vector.fine, info.dtype, b.cpu()[at]) for vector, info, b in zip(self._plan.vectors, slot.inputs, room.bits, strict=True)]
        if self._reads_base:
            same = [_equal(b, u.cpu()[at]) for (_, _, b), u in zip(found, room.uncast, strict=True)]
            value, dtype = room.base_bits.cpu()[at], slot.base.dtype
        else:
            same = [
                _equal(as_float(b, d).double().view(torch.int64), as_float(found[0][2], found[0][1]).double().view(torch.int64))
                for _, d, b in found
            ]
            value, dtype = found[0][2], found[0][1]
        alike = np.logical_and.reduce(same)
        if not alike.all():
            self._refuse(slot, tile, at, int(np.flatnonzero(~alike)[0]), found)
        bits[at] = cast_bits(value, dtype, slot.info.dtype)

    def _refuse(self, slot: Slot, tile: Tile, at: torch.Tensor, i: int, found: list[tuple[Checkpoint, Dtype, torch.Tensor]]) -> None:
        where = f"entry {tile.start + int(at[i]):,}"
        for fine, dtype, bits in found:
            if not bool(torch.isfinite(as_float(bits, dtype)[i])):
                raise BadFile(
                    f"{fine.label}: {slot.info.name!r} is NaN or infinite at {where}, and the other inputs differ there",
                    "a model with such weights is broken: leave it out, or repair it",
                )
        raise BadFile(
            f"the merged {slot.info.name!r} does not fit {slot.info.dtype.name} at {where}",
            "write a wider dtype (--dtype bf16 or fp32), or lower the weights and the scale",
        )


def _equal(a: torch.Tensor, b: torch.Tensor) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Where two integer tensors are equal; (n,)."""
    equal: np.ndarray[Any, np.dtype[np.bool_]] = a.numpy() == b.numpy()
    return equal


def _magnitudes(dtype: Dtype) -> int:
    return (1 << (dtype.bits - 1)) - 1


def _not_finite(bits: torch.Tensor, dtype: Dtype) -> bool:
    return bool(bits.numel()) and largest(bits & _magnitudes(dtype)) >= _FINITE[dtype.name]
