"""The pass of a merge over whole matrices: each thread takes one tensor of all tasks as soon as memory allows.

Linear algebra runs on one thread each, so any number of threads gives the same bytes. A tensor waits until the tensors in
progress leave enough memory. A large tensor that is merged by panels of rows goes alone, and threads share its panels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.console import si_bytes
from peru_cli.errors import UsageError
from peru_cli.merge.passes.panels import (
    MemoryShare,
    Panel,
    as_matrix,
    computed,
    itemsize,
    room_for_matrices,
    write_merged,
    write_result,
)
from peru_cli.merge.passes.then import After
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.slots import Slot
from peru_cli.methods.matrices import PANEL, Matrices, MatrixRule, Panels, SpectralRule
from peru_cli.methods.rules import Result, Rule
from peru_cli.streaming.arrays import Host
from peru_cli.streaming.engine import Reads, run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings

T = TypeVar("T")
_LARGE = 16  # panels of a tensor that threads share


def taken(plan: MergePlan, rule: Rule) -> dict[int, MatrixRule]:
    """The slots that are merged as matrices, with their rules."""
    found = {}
    for number, slot in enumerate(plan.slots):
        own = rule.at(number)
        if slot.info.entries and isinstance(own, MatrixRule) and own.takes(slot.info.name, slot.info.shape):
            found[number] = own
    return found


def needed(slot: Slot, rule: MatrixRule) -> int:
    """Bytes held at once while a tensor is merged, including the base's."""
    rows, columns = as_matrix(slot.info.shape)
    if rule.by_rows:
        rows = min(rows, max(1, PANEL // columns))
    stored = max(info.dtype.bits // 8 for info in (*slot.inputs, slot.base))
    return rule.held(rows, columns, len(slot.inputs), itemsize(slot)) + 2 * rows * columns * stored


def check_memory(plan: MergePlan, rule: Rule) -> None:
    """UsageError if a matrix of the merge does not fit into memory."""
    room = room_for_matrices()
    for number, own in taken(plan, rule).items():
        slot = plan.slots[number]
        if needed(slot, own) > room:
            size = " x ".join(map(str, as_matrix(slot.info.shape)))
            hint = "merge fewer models at once, or use a machine with more memory"
            if isinstance(own, SpectralRule):
                hint = f"--plain '^{re.escape(slot.info.name)}$' averages it instead"
            raise UsageError(
                f"merging {slot.info.name} ({size}) takes {si_bytes(needed(slot, own))} of memory, but only {si_bytes(room)} are free", hint
            )


def in_panels(slot: Slot, rule: MatrixRule) -> int:
    """Into how many panels a tensor is cut."""
    rows, columns = as_matrix(slot.info.shape)
    return -(-rows // _height(rows, columns, rule))


def _height(rows: int, columns: int, rule: MatrixRule) -> int:
    """Rows of a panel."""
    return max(1, PANEL // columns) if rule.by_rows else rows


def _vector(panel: Panel, merged: Host | Result) -> Host:
    """A panel's merged task vectors or weights; (n,)."""
    return computed(panel, merged) if isinstance(merged, Result) else merged


class _Each(Generic[T]):
    """A function for every panel of a tensor, with threads. Each tile of the engine is one panel."""

    def __init__(self, what: Callable[[Panel], T], panel: Callable[[int], Panel], then: Callable[[T], None]) -> None:
        self._what, self._panel, self._then = what, panel, then

    def buffers(self) -> None:
        return None

    def apply(self, tile: Tile, buffers: None) -> T:
        return self._what(self._panel(tile.number))

    def commit(self, tile: Tile, result: T) -> None:
        self._then(result)

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


class _Panels(Panels):
    """The panels of one tensor."""

    def __init__(self, plan: MergePlan, slot: Slot, rule: MatrixRule, device: object, threads: int) -> None:
        self._plan, self._slot, self._rule, self._device, self._threads = plan, slot, rule, device, threads
        self._rows, columns = as_matrix(slot.info.shape)
        self._height = _height(self._rows, columns, rule)
        self._studied: object = None
        self._studied = rule.study(self) if rule.studies else None

    def _panel(self, number: int) -> Panel:
        first = number * self._height
        last = min(first + self._height, self._rows)
        panel = Panel(self._plan, self._slot, self._rule.on_vectors, self._device, first, last)
        panel.number, panel.studied = number, self._studied
        return panel

    def each(self, what: Callable[[Matrices], T], then: Callable[[T], None] | None = None) -> list[T]:
        found: list[T] = []
        take = found.append if then is None else then
        count = -(-self._rows // self._height)
        if self._threads == 1:
            for number in range(count):
                take(what(self._panel(number)))
        else:
            run(_Each(what, self._panel, take), [Tile(number, 0, number, number + 1) for number in range(count)], self._threads)
        return found

    def merged(self, what: Callable[[Panel, Host | Result], T]) -> list[T]:
        """The result of a function of every panel and its merged task vectors or weights, (n,), or what they are computed from."""

        def merge(panel: Matrices) -> T:
            assert isinstance(panel, Panel)
            found = self._rule.merge_matrix(panel)
            if isinstance(found, Result):
                return what(panel, found)
            return what(panel, np.ascontiguousarray(found if isinstance(found, np.ndarray) else found.cpu().numpy()).reshape(-1))

        return self.each(merge)


class MergeMatrices:
    """Merge, round once, write. Each tile of the engine is one tensor."""

    def __init__(
        self, plan: MergePlan, rules: Mapping[int, MatrixRule], how: StreamSettings, slots: Sequence[int], writer: CheckpointWriter,
        after: After | None = None,
    ) -> None:  # fmt: skip
        self._plan, self._rules, self._slots, self._writer, self._after = plan, [rules[slot] for slot in slots], slots, writer, after
        self._how = how
        self._device = getattr(how.xp, "device", "cpu")
        self._memory = MemoryShare()

    def run(self) -> None:
        """Merge all tensors."""
        shared = [in_panels(self._plan.slots[slot], rule) >= _LARGE for slot, rule in zip(self._slots, self._rules, strict=True)]
        tiles = [Tile(n, n, 0, self._plan.slots[slot].info.entries) for n, slot in enumerate(self._slots)]
        alone = [tile._replace(number=n) for n, tile in enumerate(tile for tile in tiles if not shared[tile.tensor])]
        for tile in tiles:
            if shared[tile.tensor]:
                self._merge(tile, self._how.threads)
                self._how.advance(tile.stop)
        run(self, alone, self._how.threads, self._how.advance)

    def buffers(self) -> None:
        return None

    def reads(self) -> Reads:
        slots = [self._plan.slots[number] for number in self._slots]
        if any(rule.by_rows for rule in self._rules):
            return  # panels are read in other ranges than whole tensors
        if any(rule.on_vectors for rule in self._rules) and self._plan.base is not None:
            yield self._plan.base, lambda tensor: slots[tensor].base
        for task, vector in enumerate(self._plan.vectors):
            yield vector.fine, partial(lambda number, tensor: slots[tensor].of(number), task)

    def apply(self, tile: Tile, buffers: None) -> None:
        self._merge(tile, 1)

    def commit(self, tile: Tile, result: None) -> None:
        pass

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass

    def _write(self, slot: Slot, rule: MatrixRule, panel: Panel, merged: Host | Result) -> None:
        if isinstance(merged, Result):
            write_result(self._writer, slot, panel, merged)
        else:
            write_merged(self._writer, slot, panel, merged, rule.on_vectors)

    def _merge(self, tile: Tile, threads: int) -> None:
        """Merge a tensor with so many threads."""
        number, rule = self._slots[tile.tensor], self._rules[tile.tensor]
        slot = self._plan.slots[number]
        after = self._after if self._after is not None and self._after.takes(slot) else None
        room = threads * needed(slot, rule) + (after.needed(slot) if after is not None else 0)
        with self._memory.reserved(room):
            panels = _Panels(self._plan, slot, rule, self._device, threads)
            if after is None:
                panels.merged(partial(self._write, slot, rule))
            else:
                after.finish(number, np.concatenate(panels.merged(_vector)), rule.on_vectors)
        if after is None or after.writes:
            self._writer.claim(slot.info.name, [[] for _ in self._plan.vectors])
