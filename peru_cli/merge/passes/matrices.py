"""The pass of a merge over whole matrices: each thread takes one tensor of all tasks as soon as memory allows.

Threads take tensors, not parts of them, and linear algebra runs on one thread each, so any number of threads gives the
same bytes. A tensor waits until the tensors in progress leave enough memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.console import si_bytes
from peru_cli.errors import UsageError
from peru_cli.merge.passes.panels import MemoryShare, Panel, as_matrix, itemsize, room_for_matrices, write_rounded
from peru_cli.merge.passes.then import After
from peru_cli.merge.plan import MergePlan, Slot
from peru_cli.methods.matrices import PANEL, MatrixRule, SpectralRule
from peru_cli.methods.rules import Rule
from peru_cli.streaming.arrays import Host
from peru_cli.streaming.engine import Reads
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings


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


class MergeMatrices:
    """Merge, round once, write. Each tile of the engine is one tensor."""

    def __init__(
        self, plan: MergePlan, rules: Mapping[int, MatrixRule], how: StreamSettings, slots: Sequence[int], writer: CheckpointWriter,
        after: After | None = None,
    ) -> None:  # fmt: skip
        self._plan, self._rules, self._slots, self._writer, self._after = plan, [rules[slot] for slot in slots], slots, writer, after
        self._device = getattr(how.xp, "device", "cpu")
        self._memory = MemoryShare()

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
        number, rule = self._slots[tile.tensor], self._rules[tile.tensor]
        slot = self._plan.slots[number]
        after = self._after if self._after is not None and self._after.takes(slot) else None
        with self._memory.reserved(needed(slot, rule) + (after.needed(slot) if after is not None else 0)):
            if after is None:
                for panel, merged in self._merged(slot, rule):
                    write_rounded(
                        self._writer, slot, panel, merged + panel.base().reshape(-1) if rule.on_vectors else merged, rule.on_vectors
                    )
            else:
                after.finish(number, np.concatenate([merged for _, merged in self._merged(slot, rule)]), rule.on_vectors)
        if after is None or after.writes:
            self._writer.claim(slot.info.name, [[] for _ in self._plan.vectors])

    def commit(self, tile: Tile, result: None) -> None:
        pass

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass

    def _panels(self, slot: Slot, rule: MatrixRule) -> Iterator[Panel]:
        rows, columns = as_matrix(slot.info.shape)
        height = max(1, PANEL // columns) if rule.by_rows else rows
        for first in range(0, rows, height):
            yield Panel(self._plan, slot, rule.on_vectors, self._device, first, min(first + height, rows))

    def _merged(self, slot: Slot, rule: MatrixRule) -> Iterator[tuple[Panel, Host]]:
        """Panels with their merged task vectors or weights; (n,)."""
        sums: list[float] = []
        if rule.measures:
            for panel in self._panels(slot, rule):
                found = rule.measure(panel)
                sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        for panel in self._panels(slot, rule):
            panel.sums = sums
            merged = rule.merge_matrix(panel)
            yield panel, np.ascontiguousarray(merged if isinstance(merged, np.ndarray) else merged.cpu().numpy()).reshape(-1)
