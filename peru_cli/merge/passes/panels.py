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
from peru_cli.kernels import rounding
from peru_cli.kernels.merging import elections
from peru_cli.kernels.merging.panels import add_base, values_of
from peru_cli.kernels.merging.verbs import accumulate, disjoint
from peru_cli.merge.passes.walk import ranges
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.slots import Slot
from peru_cli.methods.compact.delta import Bits, cast_bits, infinity
from peru_cli.methods.matrices import Matrices
from peru_cli.methods.rules import Result
from peru_cli.streaming.arrays import BITS, CPU, Host
from peru_cli.streaming.memory import free_memory

if TYPE_CHECKING:
    import torch

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
        room = np.empty(info.dtype.nbytes(n), np.uint8)
        source.read_into(info.name, info.dtype.nbytes(self.first * self.columns), room.data)
        return room.view(BITS[info.dtype.bits])

    def base_bits(self) -> Bits:
        """The base's entries as bits of its dtype; (n,)."""
        if self._base is None:
            assert self._plan.base is not None
            self._base = self._read(self._plan.base, self._slot.base)
        return self._base

    def base(self) -> Host:
        out = np.empty(self.rows * self.columns, self._kind)
        values_of(self.base_bits(), None, self._slot.base.dtype.name, out)
        return out.reshape(self.rows, self.columns)

    def fine_bits(self, task: int) -> Bits:
        """A task's entries as bits of its dtype; (n,)."""
        return self._read(self._plan.vectors[self._slot.task(task)].fine, self._slot.inputs[task])

    def __getitem__(self, task: int) -> Host:
        info, kept = self._slot.inputs[task], self._slot.base
        fine, base = self.fine_bits(task), None
        out = np.empty(len(fine), self._kind)
        if self._vectors:
            base = cast_bits(CPU, self.base_bits(), kept.dtype, info.dtype)
        if not values_of(fine, base, info.dtype.name, out):
            if base is not None:
                out[fine == base] = 0  # masks of -inf, the same in all models
            self._refuse(task, out)
        return out.reshape(self.rows, self.columns)

    def _refuse(self, task: int, values: Host) -> None:
        """BadFile for the first entry that is not finite, if there is one."""
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            entry = self.first * self.columns + int(wrong[0])
            label = self._plan.vectors[self._slot.task(task)].fine.label
            against = ", or the base is" if self._vectors else ""
            raise BadFile(
                f"{label}: {self.name!r} is NaN or infinite at entry {entry:,}{against}",
                f"a model with such weights is broken: repair it, or keep the tensor for each task: --per-task '^{re.escape(self.name)}$'",
            )

    def tensor(self, task: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self[task]).to(self._device, torch.float64, copy=True)


def computed(panel: Panel, result: Result) -> Host:
    """The merged task vector that a result stands for; (n,)."""
    values = [panel[task].reshape(-1) for task in range(panel.tasks)]
    out: Host = np.empty_like(values[0])
    if (chosen := result.election) is not None:
        flags = [each.flags for each in chosen.kept]
        disjoint(values, flags, chosen.before, chosen.after, chosen.shares, chosen.strict, out)
    for number, (task, kept, *factors) in enumerate(result.parts):
        accumulate(out, values[task], "F32" if out.dtype == np.float32 else "F64", None, kept, (factors[0], factors[1]), not number)
    if result.scale != 1.0:
        out *= out.dtype.type(result.scale)
    return out


def write_result(writer: CheckpointWriter, slot: Slot, panel: Panel, result: Result) -> None:
    """Compute a result on the base, round and write it: in one loop if all inputs and the output have one dtype."""
    dtype, scale = slot.info.dtype, result.scale
    assert scale is not None and result.factor == 1.0
    if itemsize(slot) == 4 and all(info.dtype is dtype for info in (*slot.inputs, slot.base)):
        inputs, base = [panel.fine_bits(task) for task in range(panel.tasks)], panel.base_bits()
        if (chosen := result.election) is not None:
            given = ranges(chosen.kept), chosen.before, chosen.after, chosen.shares, chosen.strict, scale
            bits, finite = elections.merged(inputs, dtype.name, base, *given)
        else:
            tasks, flags, *factors = zip(*result.parts, strict=True)
            both = list(zip(*factors, strict=True))
            bits, finite = rounding.rounded_sum([inputs[task] for task in tasks], dtype.name, base, flags, both, 1.0, scale)
        if finite:
            writer.write(slot.info.name, dtype.nbytes(panel.first * panel.columns), bits.data.cast("B"))
            return
    write_merged(writer, slot, panel, computed(panel, result), True)


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


def write_merged(writer: CheckpointWriter, slot: Slot, panel: Panel, merged: Host, on_vectors: bool) -> None:
    """Round merged task vectors, on the base, or merged weights, (n,), and write them; overwrites them. BadFile if they do not fit."""
    write_rounded(writer, slot, panel, add_base(merged, panel.base_bits(), slot.base.dtype.name) if on_vectors else merged, on_vectors)


def write_rounded(writer: CheckpointWriter, slot: Slot, panel: Panel, values: Host, on_vectors: bool) -> None:
    """Round merged weights of a panel, (n,), and write them. BadFile if they do not fit."""
    dtype = slot.info.dtype
    start = panel.first * panel.columns
    bits = CPU.narrow(values, dtype)
    if CPU.largest_magnitude(bits) >= infinity(dtype):
        wrong = np.flatnonzero(((bits & ((1 << (dtype.bits - 1)) - 1)) >= infinity(dtype)) & ~_masked(panel, on_vectors))
        if len(wrong):
            _refuse_result(slot, start + int(wrong[0]), bool(np.isnan(values[wrong[0]])))
    writer.write(slot.info.name, dtype.nbytes(start), np.ascontiguousarray(bits).data.cast("B"))


def _refuse_result(slot: Slot, entry: int, is_nan: bool) -> None:
    """BadFile for a merged entry that is not finite."""
    where = f"entry {entry:,}"
    if is_nan:
        raise BadFile(f"the merged {slot.info.name!r} is not a number at {where}, though all inputs are", "please report it")
    raise BadFile(
        f"the merged {slot.info.name!r} does not fit {slot.info.dtype.name} at {where}",
        "use a wider dtype (--dtype bf16 or fp32), or smaller weights and scale",
    )


def _masked(panel: Panel, on_vectors: bool) -> Host:
    """Entries where the base itself is not finite, which stay unchanged; bools (n,)."""
    if not on_vectors:
        return np.zeros(panel.rows * panel.columns, np.bool_)
    masked: Host = ~np.isfinite(panel.base().reshape(-1))
    return masked
