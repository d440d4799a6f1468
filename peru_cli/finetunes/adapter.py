"""A LoRA adapter on its base, together with the sparse delta beside it, if there is one."""

from __future__ import annotations

import numpy as np

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.adapter import REST
from peru_cli.checkpoints.lora.expand import LoraCheckpoint
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.finetunes.delta import DeltaOnBase
from peru_cli.finetunes.fine_tune import FineTune, Witness
from peru_cli.methods.compact.delta import cast_bits
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.vectors.copy import refuse_overflow


class AdapterWithRest(Checkpoint):
    """An adapter on its base, and what the adapter could not hold, from the sparse delta beside it."""

    expanded = True

    def __init__(self, adapter: LoraCheckpoint, delta: DeltaOnBase) -> None:
        self.adapter, self.delta = adapter, delta
        self.label, self.metadata, self.warnings = adapter.label, adapter.metadata, adapter.warnings
        self.side_files, self.files = adapter.side_files, [*adapter.files, *delta.files]
        self.kind = f"{adapter.kind}, and {len(delta.tensors)} tensors from {REST}"
        self._from_delta: dict[str, str] = {}
        tensors = dict(adapter.tensors)
        for name, info in delta.tensors.items():
            base_name = adapter.prefix.base_name(name)
            ours = base_name if base_name is not None and base_name in tensors else name
            tensors[ours] = TensorInfo(ours, info.dtype, info.shape)
            self._from_delta[ours] = name
        self.tensors = tensors

    def fine_name(self, name: str) -> str:
        """The fine-tune's name of a tensor."""
        return self._from_delta.get(name) or self.adapter.fine_name(name)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name in self._from_delta:
            self.delta.read_into(self._from_delta[name], offset, buffer)
        else:
            self.adapter.read_into(name, offset, buffer)

    def close(self) -> None:
        self.adapter.close()
        self.delta.close()


class AdapterOnBase(FineTune):
    """An adapter on its base as unpack writes it: the fine-tune's names, updated weights rounded to the base's dtype, or `dtype`."""

    def __init__(self, model: LoraCheckpoint | AdapterWithRest, base: Checkpoint | None = None, dtype: Dtype | None = None) -> None:
        super().__init__()
        adapter = model.adapter if isinstance(model, AdapterWithRest) else model
        self.model, self.base = model, base
        self.label, self.kind, self.metadata, self.warnings = model.label, model.kind, model.metadata, model.warnings
        self.side_files, self.files = model.side_files, model.files
        self.heading = f"{self.label}: {self.kind}, on {base.label};" if base is not None else self.label
        self.facts = {"updated": sorted(adapter.updates)}
        self.names = {model.fine_name(name): name for name in model.tensors}  # the expanded adapter's names, by ours
        dtypes = {name: dtype or update.info.dtype for name, update in adapter.updates.items()}
        wide = [(ours, model.tensors[name]) for ours, name in self.names.items()]
        self.tensors = {ours: TensorInfo(ours, dtypes.get(info.name, info.dtype), info.shape) for ours, info in wide}

    def read_watched(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> None:
        info, wide = self.tensors[name], self.model.tensors[self.names[name]]
        if info.dtype is wide.dtype:
            self.model.read_into(wide.name, offset, buffer)
            return
        start, n = offset * 8 // info.dtype.bits, len(buffer) * 8 // info.dtype.bits
        room = self.room(wide.dtype.nbytes(n))
        self.model.read_into(wide.name, wide.dtype.nbytes(start), room)
        bits = np.frombuffer(room, BITS[wide.dtype.bits])
        cast = cast_bits(CPU, bits, wide.dtype, info.dtype)
        refuse_overflow(self.label, info, bits, wide.dtype, cast)
        buffer[:] = cast.data.cast("B")

    def close(self) -> None:
        self.model.close()


def as_unpacked(model: Checkpoint) -> Checkpoint:
    """An expanded adapter as unpack would write it. Any other model is returned unchanged."""
    return AdapterOnBase(model) if isinstance(model, (LoraCheckpoint, AdapterWithRest)) else model


def fine_name(model: Checkpoint, name: str) -> str:
    """A fine-tune's name for its tensor; tensors of an expanded adapter have the base's names."""
    return model.fine_name(name) if isinstance(model, (LoraCheckpoint, AdapterWithRest)) else name
