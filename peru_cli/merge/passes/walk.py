"""The walk of a merge over aligned tiles of all inputs: read them, settle in order what trims keep, and show them to the rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peru_cli.checkpoints.bundle import cut
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.kernels.merging import elections
from peru_cli.kernels.merging.elections import MOST, within
from peru_cli.merge.plan import MergePlan, family_of
from peru_cli.merge.slots import Slot
from peru_cli.methods.compact.magnitude import Threshold
from peru_cli.methods.rules import Kept, Rule, RuleInput, Scratch
from peru_cli.streaming.aligned import TileBuffer, read_bits
from peru_cli.streaming.arrays import Array
from peru_cli.streaming.engine import Reads, expect
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import Aligned, StreamSettings


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
    """One trim of one task's tile: the threshold's key (None: it keeps everything) and the number of equals that may be taken."""

    key: int | None
    equals: int = 0


@dataclass
class Settled:
    """What a trim keeps of a tile: magnitude patterns from `low` on; of those equal to it only the first so many, if that is given."""

    low: int = 0
    first: int | None = None


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


class Walk(ABC):
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
        self._family = family_of(plan, how)

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
        self.read(tile, room)
        if not self._rule.trims:
            return []
        slot = self._plan.slots[self.slot_number(tile)]
        return [self._trim(tile, slot, number, room) for number in range(len(room.aligned))]

    def read(self, tile: Tile, room: MergeBuffers) -> None:
        """Read a tile of all inputs."""
        slot = self._plan.slots[self.slot_number(tile)]
        bits = None
        if self._reads_base:
            _, bits = read_bits(self._family.base, slot.base, tile, room.base)
            room.hold(bits, slot.base.dtype)
        room.aligned = [
            self._family.align(slot.task(i), slot.base.name, tile, bits, room.inputs[i]) for i in range(len(slot.inputs))
        ]  # fmt: skip

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
        """RuleInput.add, applied to the task's own bits."""
        aligned = room.aligned[number]
        n, dtype, base = len(aligned.fine), aligned.pair.fine.dtype, room.base_weights() if self._reads_base else None
        if base is not None and dtype is not aligned.pair.base.dtype:
            base = self._xp.widen(aligned.base, dtype, room.scratch("cast", n))
        out = room.scratch("sum", n) if total is None else total
        self._xp.accumulate(out, aligned.fine, dtype.name, base, flags, (first, second), total is None)
        return out

    def _in_one_loop(self, slot: Slot, room: MergeBuffers) -> bool:
        """Whether a tile's inputs all have the output's dtype, of at most 32 bits: then loops take their bits."""
        dtype = slot.info.dtype
        same = self._kind == "f4" and (not self._reads_base or slot.base.dtype is dtype)
        return same and all(aligned.pair.fine.dtype is dtype for aligned in room.aligned)

    def _within(self, number: int, room: MergeBuffers, low: int, high: int | None) -> tuple[Array, int]:
        """Entries of a task whose magnitudes have patterns from `low` to `high`, bools (n,), and their number."""
        xp, aligned = self._xp, room.aligned[number]
        if xp.compiled and self._kind == "f4":
            return within(aligned.fine, aligned.pair.fine.dtype.name, aligned.base, low, MOST if high is None else high)
        vector = self._input(number, room, "trimmed")
        flags, _, _ = xp.trim(vector, low - 1)
        if high is not None:
            flags = xp.logical_and(flags, xp.equal(xp.trim(vector, high)[0], False))
        return flags, xp.count(flags)

    def _trim(self, tile: Tile, slot: Slot, number: int, room: MergeBuffers) -> list[Trimmed]:
        result = []
        task = slot.task(number)
        for trim, quotas in zip(self._decided.thresholds, self._quotas[task], strict=True):
            group = self.slot_number(tile) if len(trim[task]) > 1 else 0
            threshold = trim[task][group]
            if threshold.keeps_all:
                result.append(Trimmed(None))
            else:
                # Once no equals may be taken any more, that never changes: they are not counted.
                equals = self._within(number, room, threshold.key, threshold.key)[1] if quotas[group] else 0
                result.append(Trimmed(threshold.key, equals))
        return result

    def commit(self, tile: Tile, result: list[list[Trimmed]]) -> list[list[Settled]]:
        """Settle which equals are kept."""
        number = self.slot_number(tile)
        if tile.start == 0 and result:
            self._begin(number)
        settled: list[list[Settled]] = []
        for input_number, trims in enumerate(result):
            task = self._plan.slots[number].task(input_number)
            settled.append([])
            for index, trim in enumerate(trims):
                quotas = self._quotas[task][index]
                group = number if len(quotas) > 1 else 0
                taken = min(trim.equals, quotas[group])
                quotas[group] -= taken
                self._equals[number][task][index] += trim.equals
                if trim.key is None:
                    settled[-1].append(Settled())
                elif not taken:
                    settled[-1].append(Settled(trim.key + 1))
                else:
                    settled[-1].append(Settled(trim.key, None if taken == trim.equals else taken))
        return settled

    def _kept(self, settled: list[list[Settled]], room: MergeBuffers, number: int, index: int) -> Kept:
        """RuleInput.kept."""
        xp, chosen = self._xp, settled[number][index]
        if chosen.first is None:
            return Kept(chosen.low)
        equal = self._within(number, room, chosen.low, chosen.low)[0]
        few = xp.logical_and(equal, xp.running_count(equal) <= chosen.first)
        return Kept(flags=xp.logical_or(self._within(number, room, chosen.low + 1, None)[0], few))

    def _flags(self, room: MergeBuffers, number: int, kept: Kept) -> Array | None:
        """RuleInput.flags."""
        if not kept.low and kept.high is None:
            return kept.flags
        flags, _ = self._within(number, room, kept.low, kept.high)
        return flags if kept.flags is None else self._xp.logical_and(flags, kept.flags)

    def _elected(self, slot: Slot, room: MergeBuffers, kept: Sequence[Kept], before: Sequence[tuple[float, float]]) -> int:
        """RuleInput.elected."""
        if self._xp.compiled and self._in_one_loop(slot, room):
            bits = [aligned.fine for aligned in room.aligned]
            return elections.elected(bits, slot.info.dtype.name, room.base_bits, ranges(kept), before)
        inputs = [self._input(number, room, f"input{number}") for number in range(len(kept))]
        return self._xp.elected(inputs, [self._flags(room, number, each) for number, each in enumerate(kept)], before)

    def _begin(self, number: int) -> None:
        self._equals[number] = [[0 for _ in self._rule.trims] for _ in self._plan.vectors]
        for quotas, owed in zip(self._quotas, self._owed[number], strict=True):
            for trim, equals in zip(quotas, owed, strict=True):
                if len(trim) == 1:
                    trim[0] = max(trim[0] - equals, 0)

    def view(self, tile: Tile, settled: list[list[Settled]], room: MergeBuffers) -> RuleInput:
        """The tile as rules see it."""
        number = self.slot_number(tile)
        slot, rule, n = self._plan.slots[number], self._rule, tile.stop - tile.start

        def inputs(task: int) -> Array:
            return self._input(task, room, f"input{task if rule.holds_all else task % 2}")

        parts = [(info.name, first, stop - first) for info, first, stop in cut(slot.info, tile.start, tile.stop)]
        return RuleInput(
            slot.info.name, number, tile.start, parts, n, len(slot.inputs), self._xp, room.base_weights, inputs, partial(self._add, room),
            partial(self._kept, settled, room), partial(self._flags, room), partial(self._elected, slot, room), room.scratch,
            slot.info.shape, self._decided.majority,
        )  # fmt: skip

    @abstractmethod
    def compute(self, tile: Tile, settled: list[list[Settled]], room: MergeBuffers) -> Any:
        """The result for a tile that has been read; valid until the buffers are used again."""

    @abstractmethod
    def collect(self, tile: Tile, result: Any) -> None:
        """Take a tile's result. Called from any thread."""

    def finish(self, tile: Tile, committed: list[list[Settled]], room: MergeBuffers) -> None:
        self.collect(tile, self.compute(tile, committed, room))

    # -- on other machines (streaming/cluster.py) -----------------------------------------------------------

    @property
    def inputs(self) -> int:
        """Models that each tile is read from."""
        return len(self._plan.vectors) + self._reads_base

    def order(self, tiles: Sequence[Tile]) -> Walking | None:
        """Count the entries that equal thresholds, if there are any."""
        return Walking(type(self).__name__, self._decided, self._slots) if self._rule.trims else None

    def take(self, tiles: Sequence[Tile], reply: list[list[list[Trimmed]]] | None) -> Walking:
        """Settle which of them are kept."""
        settled = [self.commit(tile, found) for tile, found in zip(tiles, reply or [[] for _ in tiles], strict=True)]
        return Walking(type(self).__name__, self._decided, self._slots, settled)

    def done(self, tiles: Sequence[Tile], reply: list[Any]) -> None:
        """Take the results."""
        for tile, result in zip(tiles, reply, strict=True):
            self.collect(tile, result)


@dataclass(frozen=True)
class Walking:
    """An order for a worker's walk: trim these tiles or, once it is settled what that keeps, compute their results."""

    kind: str  # the class of the walk
    decided: Decided
    slots: Sequence[int]
    settled: list[list[list[Settled]]] | None = None  # by tile

    def compute(self, station: Any, tiles: Sequence[Tile]) -> list[Any]:
        """A reply for each tile. `station` has the worker's walks."""
        walk: Walk = station.walk(self.kind, self.decided, self.slots)
        room: MergeBuffers = station.room(walk)
        expect(walk.reads(), tiles)
        if self.settled is None:
            return [walk.apply(tile, room) for tile in tiles]
        found = []
        for tile, settled in zip(tiles, self.settled, strict=True):
            walk.read(tile, room)
            found.append(copy(walk.compute(tile, settled, room)))
        return found


def ranges(kept: Sequence[Kept]) -> list[elections.Range]:
    """Kept entries as loops take them."""
    return [(each.low, MOST if each.high is None else each.high, each.flags) for each in kept]
