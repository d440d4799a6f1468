"""`--then`: a pass changes merged tensors before they are rounded and written.

After a method on entries, tiles are first assembled into tensors. A tensor is in memory from its first tile to its last. A pass that
must know something of all tensors first has them merged twice: `Gather`, then `After`."""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import numpy as np

from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.console import si_bytes
from peru_cli.errors import UsageError
from peru_cli.merge.layers import spots
from peru_cli.merge.passes.panels import MemoryShare, Panel, as_matrix, room_for_matrices, write_rounded
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.slots import Slot
from peru_cli.methods.rules import Rule
from peru_cli.methods.then.table import Pass
from peru_cli.streaming.arrays import Host
from peru_cli.vectors.family import StreamSettings

if TYPE_CHECKING:
    import torch


def needed(slot: Slot, then: Pass) -> int:
    """Bytes held at once while a pass changes a tensor, including the merged tensor and the base's."""
    return then.held(*as_matrix(slot.info.shape)) + 24 * slot.info.entries


def check_memory(plan: MergePlan, then: Pass) -> None:
    """UsageError for a pass over a matrix that does not fit into memory."""
    room = room_for_matrices()
    for slot in plan.slots:
        if then.takes(slot.info.name, slot.info.shape) and needed(slot, then) > room:
            raise UsageError(
                f"--then takes {si_bytes(needed(slot, then))} of memory for {slot.info.name}, but only {si_bytes(room)} are free",
                "leave --then out, or use a machine with more memory",
            )


class After:
    """Changes merged tensors, rounds them once and writes them."""

    writes = True  # so that a tensor is finished when it leaves here

    def __init__(self, plan: MergePlan, rule: Rule, then: Pass, how: StreamSettings, writer: CheckpointWriter) -> None:
        self._plan, self._rule, self._then, self._writer = plan, rule, then, writer
        self._device = getattr(how.xp, "device", "cpu")
        self._memory = MemoryShare()
        self._depths = {name: float(spot.depth) for name, spot in spots(info.name for info in plan.outputs).items()}
        self._parts: dict[int, Host] = {}  # merged weights of incomplete slots; (n,)
        self._lock = threading.Lock()

    def takes(self, slot: Slot) -> bool:
        """Whether the pass changes a tensor."""
        return bool(slot.info.entries) and self._then.takes(slot.info.name, slot.info.shape)

    def needed(self, slot: Slot) -> int:
        """See `needed`."""
        return needed(slot, self._then)

    def add(self, number: int, start: int, merged: Host) -> None:
        """Keep the merged weights of a tile, (k,), of a slot."""
        with self._lock:
            if number not in self._parts:
                self._parts[number] = np.empty(self._plan.slots[number].info.entries, merged.dtype)
        self._parts[number][start : start + len(merged)] = merged

    def finish_added(self, number: int) -> None:
        """Change and write a slot whose tiles have all been added."""
        with self._memory.reserved(self.needed(self._plan.slots[number])):
            self.finish(number, self._parts.pop(number), False)

    def finish(self, number: int, merged: Host, is_vector: bool) -> None:
        """Change and write a slot, given its merged task vector or weights, (n,)."""
        slot = self._plan.slots[number]
        vector, panel, counted, base = self._opened(number, merged, is_vector)
        changed = self._then.change(vector, panel, counted, self._depths[slot.info.name])
        values = (base + changed.cpu().numpy().reshape(-1)).astype(base.dtype)
        write_rounded(self._writer, slot, panel, values, True)

    def _opened(self, number: int, merged: Host, is_vector: bool) -> tuple[torch.Tensor, Panel, list[int], Host]:
        """A slot as passes see it: its merged task vector, the tasks' own, which of them count, and the base, (n,)."""
        import torch

        slot, weights = self._plan.slots[number], self._rule.at(number).parameters.weights
        panel = Panel(self._plan, slot, True, self._device)
        base = panel.base().reshape(-1)
        vector = merged.astype(np.float64) if is_vector else merged.astype(np.float64) - base
        if not np.isfinite(vector.sum()):
            vector = self._finite(slot, panel, vector, base)
        counted = [task for task in range(panel.tasks) if len(weights) != panel.tasks or weights[task]]
        return torch.from_numpy(vector.reshape(panel.rows, panel.columns)).to(self._device), panel, counted, base

    def _finite(self, slot: Slot, panel: Panel, vector: Host, base: Host) -> Host:
        """The vector with 0 where the base is not finite (masks of -inf). BadFile if an input or the result is otherwise not finite."""
        wrong = ~np.isfinite(vector)
        if (wrong & np.isfinite(base)).any():
            for task in range(panel.tasks):
                panel[task]
            write_rounded(self._writer, slot, panel, base + vector.astype(base.dtype), True)
        return np.where(wrong, 0.0, vector)


class Gather(After):
    """Gives a pass merged tensors to gather from, and writes nothing."""

    writes = False

    def __init__(self, plan: MergePlan, rule: Rule, then: Pass, how: StreamSettings, writer: CheckpointWriter) -> None:
        super().__init__(plan, rule, then, how, writer)
        self._found: dict[int, list[float]] = {}  # by slot, so that threads do not change the order of sums

    def takes(self, slot: Slot) -> bool:
        return bool(slot.info.entries)

    def finish(self, number: int, merged: Host, is_vector: bool) -> None:
        vector, panel, counted, _ = self._opened(number, merged, is_vector)
        self._found[number] = self._then.gather(vector, panel, counted)

    def sums(self) -> list[float]:
        """What all tensors have together, to nine digits: the same on every processor."""
        return [float(f"{math.fsum(column):.9g}") for column in zip(*(self._found[number] for number in sorted(self._found)), strict=True)]
