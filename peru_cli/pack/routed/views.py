"""Fine-tunes seen in other ways: only some of their tensors, or all of them added to the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pair, Pairing, Prefix
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.methods.compact.delta import cast_bits, infinity
from peru_cli.streaming.aligned import read_entries
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import TaskVector


class Some(Checkpoint):
    """Some tensors of a fine-tune under the base's names, without side files."""

    def __init__(self, fine: Checkpoint, pairs: Mapping[str, Pair]) -> None:
        """`pairs` are these tensors, by the base's names."""
        self.label, self.kind, self.metadata, self.warnings = fine.label, fine.kind, {}, []
        self.side_files: Mapping[str, Place] = {}
        self._fine, self._pairs = fine, pairs
        self.tensors = {name: TensorInfo(name, pair.fine.dtype, pair.fine.shape) for name, pair in pairs.items()}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._fine.read_into(self._pairs[name].fine.name, offset, buffer)


class Summed(Checkpoint):
    """Base + scale * the sum of task vectors, of some tensors, in the base's dtypes; task arithmetic."""

    def __init__(self, base: Checkpoint, vectors: Sequence[TaskVector], names: Sequence[str], scale: float) -> None:
        self.label, self.kind, self.metadata, self.warnings = base.label, "a sum of task vectors", {}, []
        self.side_files: Mapping[str, Place] = {}
        self._base, self._vectors, self._scale = base, vectors, scale
        self.tensors = {name: base.tensors[name] for name in names}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        info = self.tensors[name]
        start, n = offset // (info.dtype.bits // 8), len(buffer) // (info.dtype.bits // 8)
        bits = read_entries(self._base, info, start, n)
        total = np.zeros(n)
        for vector in self._vectors:
            if (pair := vector.pairs.get(name)) is not None:
                dtype = pair.fine.dtype
                below = CPU.widen(cast_bits(CPU, bits, info.dtype, dtype), dtype, np.empty(n))
                total += CPU.widen(read_entries(vector.fine, pair.fine, start, n), dtype, np.empty(n)) - below
        found = CPU.narrow(CPU.widen(bits, info.dtype, np.empty(n)) + self._scale * total, info.dtype)
        if CPU.largest_magnitude(found) >= infinity(info.dtype):
            raise BadFile(f"the sum of the task vectors of {name} is not finite", "a smaller --scale may help")
        buffer[:] = found.data.cast("B")


def vector_of(name: str, view: Checkpoint, base: Checkpoint) -> TaskVector:
    """A view as a task vector."""
    return TaskVector(name, view, Pairing(Prefix(), [Pair(info, base.tensors[own]) for own, info in sorted(view.tensors.items())]))
