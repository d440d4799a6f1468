"""The pass of a merge over whole matrices: each thread takes one tensor of all tasks as soon as memory allows.

Threads take tensors, not parts of them, and linear algebra runs on one thread each, so any number of threads gives the
same bytes. A tensor waits until the tensors in progress leave enough memory."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import si_bytes
from peru_cli.errors import BadFile, UsageError
from peru_cli.merge.plan import MergePlan, Slot
from peru_cli.methods.delta import Bits, cast_bits
from peru_cli.methods.matrices import PANEL, Matrices, MatrixRule, SpectralRule
from peru_cli.methods.rules import Rule
from peru_cli.streaming.arrays import BITS, CPU, Host
from peru_cli.streaming.engine import Reads
from peru_cli.streaming.memory import free_memory
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings

if TYPE_CHECKING:
    import torch

_PART = 1 << 16  # entries converted at once, to stay in the CPU's cache
_SHARE = 0.7  # of the free memory


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: (out, -1); a vector is one row."""
    entries = 1
    for side in shape:
        entries *= side
    return (shape[0], entries // shape[0]) if len(shape) >= 2 else (1, entries)


def taken(plan: MergePlan, rule: Rule) -> dict[int, MatrixRule]:
    """The slots that are merged as matrices, with their rules."""
    found = {}
    for number, slot in enumerate(plan.slots):
        own = rule.at(number)
        if slot.info.entries and isinstance(own, MatrixRule) and own.takes(slot.info.name, slot.info.shape):
            found[number] = own
    return found


def _itemsize(slot: Slot) -> int:
    return 8 if any(info.dtype.name == "F64" for info in (*slot.inputs, slot.base)) else 4


def needed(slot: Slot, rule: MatrixRule) -> int:
    """Bytes held at once while a tensor is merged, including the base's."""
    rows, columns = as_matrix(slot.info.shape)
    if rule.by_rows:
        rows = min(rows, max(1, PANEL // columns))
    stored = max(info.dtype.bits // 8 for info in (*slot.inputs, slot.base))
    return rule.held(rows, columns, len(slot.inputs), _itemsize(slot)) + 2 * rows * columns * stored


def check_memory(plan: MergePlan, rule: Rule) -> None:
    """UsageError if a matrix of the merge does not fit into memory."""
    room = int(free_memory() * _SHARE)
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


class _Panel(Matrices):
    """Rows `first` to `last` of one tensor, read from the checkpoints."""

    def __init__(self, plan: MergePlan, slot: Slot, rule: MatrixRule, device: Any, first: int, last: int) -> None:
        self._plan, self._slot, self._vectors, self._device = plan, slot, rule.on_vectors, device
        self.name, self.shape, self.first = slot.info.name, slot.info.shape, first
        self.columns = as_matrix(slot.info.shape)[1]
        self.rows, self.tasks = last - first, len(slot.inputs)
        self._kind = "f8" if _itemsize(slot) == 8 else "f4"
        self._base: Bits | None = None

    def _read(self, source: Checkpoint, info: TensorInfo) -> Bits:
        n = self.rows * self.columns
        room = bytearray(info.dtype.nbytes(n))
        source.read_into(info.name, info.dtype.nbytes(self.first * self.columns), memoryview(room))
        return np.frombuffer(room, BITS[info.dtype.bits])

    def _base_bits(self) -> Bits:
        if self._base is None:
            assert self._plan.base is not None
            self._base = self._read(self._plan.base, self._slot.base)
        return self._base

    def base(self) -> Host:
        out = np.empty(self.rows * self.columns, self._kind)
        CPU.copy(CPU.widen(self._base_bits(), self._slot.base.dtype, np.empty_like(out)), out)
        return out.reshape(self.rows, self.columns)

    def __getitem__(self, task: int) -> Host:
        info, kept = self._slot.inputs[task], self._slot.base
        fine = self._read(self._plan.vectors[self._slot.task(task)].fine, info)
        out = np.empty(len(fine), self._kind)
        room = np.empty(min(_PART, len(fine)), self._kind)
        for at in range(0, len(fine), _PART):
            bits, part = fine[at : at + _PART], out[at : at + _PART]
            CPU.copy(CPU.widen(bits, info.dtype, part), part)
            if self._vectors:
                base = cast_bits(CPU, self._base_bits()[at : at + _PART], kept.dtype, info.dtype)
                np.subtract(part, CPU.widen(base, info.dtype, room[: len(part)]), out=part)
            if not np.isfinite(part.sum()) and not np.isfinite(part).all():  # a sum is faster than a test of each entry
                if self._vectors:
                    part[bits == base] = 0  # masks of -inf, the same in all models
                self._refuse(task, at, part)
        return out.reshape(self.rows, self.columns)

    def _refuse(self, task: int, at: int, part: Host) -> None:
        wrong = np.flatnonzero(~np.isfinite(part))
        if len(wrong):
            entry = self.first * self.columns + at + int(wrong[0])
            label = self._plan.vectors[self._slot.task(task)].fine.label
            against = ", or the base is" if self._vectors else ""
            raise BadFile(
                f"{label}: {self.name!r} is NaN or infinite at entry {entry:,}{against}",
                f"a model with such weights is broken: repair it, or keep the tensor for each task: --per-task '^{re.escape(self.name)}$'",
            )

    def tensor(self, task: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self[task]).to(self._device, torch.float64, copy=True)


class MergeMatrices:
    """Merge, round once, write. Each tile of the engine is one tensor."""

    def __init__(
        self, plan: MergePlan, rules: Mapping[int, MatrixRule], how: StreamSettings, slots: Sequence[int], writer: CheckpointWriter
    ) -> None:
        self._plan, self._rules, self._slots, self._writer = plan, [rules[slot] for slot in slots], slots, writer
        self._device = getattr(how.xp, "device", "cpu")
        self._room = int(free_memory() * _SHARE)
        self._held = 0
        self._freed = threading.Condition()

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
        slot, rule = self._plan.slots[self._slots[tile.tensor]], self._rules[tile.tensor]
        with self._reserved(needed(slot, rule)):
            self._merge(slot, rule)
        if self._writer.journal is not None:
            self._writer.journal.claim(slot.info.name, [[] for _ in self._plan.vectors])

    def commit(self, tile: Tile, result: None) -> None:
        pass

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass

    @contextmanager
    def _reserved(self, nbytes: int) -> Iterator[None]:
        """Reserve memory. A tensor that runs alone may exceed what is free."""
        with self._freed:
            self._freed.wait_for(lambda: not self._held or self._held + nbytes <= self._room)
            self._held += nbytes
        try:
            yield
        finally:
            with self._freed:
                self._held -= nbytes
                self._freed.notify_all()

    def _panels(self, slot: Slot, rule: MatrixRule) -> Iterator[_Panel]:
        rows, columns = as_matrix(slot.info.shape)
        height = max(1, PANEL // columns) if rule.by_rows else rows
        for first in range(0, rows, height):
            yield _Panel(self._plan, slot, rule, self._device, first, min(first + height, rows))

    def _merge(self, slot: Slot, rule: MatrixRule) -> None:
        sums: list[float] = []
        if rule.measures:
            for panel in self._panels(slot, rule):
                found = rule.measure(panel)
                sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        for panel in self._panels(slot, rule):
            panel.sums = sums
            merged = rule.merge_matrix(panel)
            host: Host = np.ascontiguousarray(merged if isinstance(merged, np.ndarray) else merged.cpu().numpy()).reshape(-1)
            if rule.on_vectors:
                host = host + panel.base().reshape(-1)
            self._write(slot, panel, host, rule.on_vectors)

    def _write(self, slot: Slot, panel: _Panel, values: Host, on_vectors: bool) -> None:
        dtype = slot.info.dtype
        start = panel.first * panel.columns
        bits = CPU.narrow(values, dtype)
        doubles = CPU.widen(bits, dtype, np.empty(len(bits), self._kind_of(slot)))
        if not np.isfinite(doubles.sum()) and len(wrong := np.flatnonzero(~np.isfinite(doubles) & ~self._masked(panel, on_vectors))):
            where = f"entry {start + int(wrong[0]):,}"
            if np.isnan(values[wrong[0]]):
                raise BadFile(f"the merged {slot.info.name!r} is not a number at {where}, though all inputs are", "please report it")
            raise BadFile(
                f"the merged {slot.info.name!r} does not fit {dtype.name} at {where}",
                "use a wider dtype (--dtype bf16 or fp32), or smaller weights and scale",
            )
        self._writer.write(slot.info.name, dtype.nbytes(start), np.ascontiguousarray(bits).data.cast("B"))

    def _kind_of(self, slot: Slot) -> str:
        return "f8" if slot.info.dtype.name == "F64" else "f4"

    def _masked(self, panel: _Panel, on_vectors: bool) -> Host:
        """Entries where the base itself is not finite, which stay unchanged; bools (n,)."""
        if not on_vectors:
            return np.zeros(panel.rows * panel.columns, np.bool_)
        masked: Host = ~np.isfinite(panel.base().reshape(-1))
        return masked
