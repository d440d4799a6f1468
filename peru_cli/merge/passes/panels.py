"""Whole matrices of a merge: read from the checkpoints, held within the free memory, rounded and written."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.merge.plan import MergePlan, Slot
from peru_cli.methods.compact.delta import Bits, cast_bits
from peru_cli.methods.matrices import Matrices
from peru_cli.streaming.arrays import BITS, CPU, Host
from peru_cli.streaming.memory import free_memory

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


def itemsize(slot: Slot) -> int:
    """Bytes of an entry in the dtype that methods see."""
    return 8 if any(info.dtype.name == "F64" for info in (*slot.inputs, slot.base)) else 4


def room_for_matrices() -> int:
    """Bytes that matrices may take together."""
    return int(free_memory() * _SHARE)


class Panel(Matrices):
    """Rows `first` to `last` of one tensor, read from the checkpoints."""

    def __init__(self, plan: MergePlan, slot: Slot, on_vectors: bool, device: Any, first: int = 0, last: int | None = None) -> None:
        self._plan, self._slot, self._vectors, self._device = plan, slot, on_vectors, device
        self.name, self.shape, self.first = slot.info.name, slot.info.shape, first
        rows, self.columns = as_matrix(slot.info.shape)
        self.rows, self.tasks = (rows if last is None else last) - first, len(slot.inputs)
        self._kind = "f8" if itemsize(slot) == 8 else "f4"
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


class MemoryShare:
    """Limits the free memory that all threads' matrices may take together."""

    def __init__(self) -> None:
        self._room = room_for_matrices()
        self._held = 0
        self._freed = threading.Condition()

    @contextmanager
    def reserved(self, nbytes: int) -> Iterator[None]:
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


def write_rounded(writer: CheckpointWriter, slot: Slot, panel: Panel, values: Host, on_vectors: bool) -> None:
    """Round merged weights of a panel, (n,), and write them. BadFile if they do not fit."""
    dtype = slot.info.dtype
    start = panel.first * panel.columns
    bits = CPU.narrow(values, dtype)
    doubles = CPU.widen(bits, dtype, np.empty(len(bits), "f8" if dtype.name == "F64" else "f4"))
    if not np.isfinite(doubles.sum()) and len(wrong := np.flatnonzero(~np.isfinite(doubles) & ~_masked(panel, on_vectors))):
        where = f"entry {start + int(wrong[0]):,}"
        if np.isnan(values[wrong[0]]):
            raise BadFile(f"the merged {slot.info.name!r} is not a number at {where}, though all inputs are", "please report it")
        raise BadFile(
            f"the merged {slot.info.name!r} does not fit {dtype.name} at {where}",
            "use a wider dtype (--dtype bf16 or fp32), or smaller weights and scale",
        )
    writer.write(slot.info.name, dtype.nbytes(start), np.ascontiguousarray(bits).data.cast("B"))


def _masked(panel: Panel, on_vectors: bool) -> Host:
    """Entries where the base itself is not finite, which stay unchanged; bools (n,)."""
    if not on_vectors:
        return np.zeros(panel.rows * panel.columns, np.bool_)
    masked: Host = ~np.isfinite(panel.base().reshape(-1))
    return masked
