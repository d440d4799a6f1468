"""Adapters in common coordinates, as checkpoints that any method merges: the pass that makes them, and the one that leads back.

The first pass finds each module's coordinates and writes every adapter's small factors in them to the output's disk. A task's
matrix is their product, computed in panels of fixed rows as it is read. The last pass finds the coordinates again, which
costs less than keeping them. Each thread holds one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.local.writer import FileWriter
from peru_cli.checkpoints.lora.writer import as_bytes, factor_names, round_to
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.merge.adapters.modules import Family
from peru_cli.streaming.tiles import Tile

_PANEL = 1 << 16  # entries of a panel; the last bits of a product depend on it, so it never changes
DOUBLE = BY_NAME["F64"]


def core_tensors(family: Family) -> list[TensorInfo]:
    """What a task looks like in coordinates: a float64 matrix for each module, or for each of its experts."""
    return [TensorInfo(name, DOUBLE, module.shape(family.space)) for module in family.modules for name in module.names]


def spooled(family: Family, task: int) -> list[TensorInfo]:
    """The factors of one task's matrices: NAME.left (k, r) and NAME.right (r, n)."""
    found = []
    for module in family.modules:
        if (pair := module.pairs[task]) is not None:
            k, n = module.shape(family.space)
            for name in module.names:
                found += [TensorInfo(f"{name}.left", DOUBLE, (k, pair.rank)), TensorInfo(f"{name}.right", DOUBLE, (pair.rank, n))]
    return found


class _ModulePass:
    """One tile for each module."""

    def __init__(self, family: Family) -> None:
        self.family = family

    def tiles(self) -> list[Tile]:
        return [Tile(number, number, 0, module.entries) for number, module in enumerate(self.family.modules)]

    def buffers(self) -> None:
        return None

    def commit(self, tile: Tile, result: None) -> None:
        pass

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


class Spool(_ModulePass):
    """Writes every task's small factors."""

    def __init__(self, family: Family, writers: Sequence[FileWriter]) -> None:
        super().__init__(family)
        self._writers = writers

    def apply(self, tile: Tile, buffers: None) -> None:
        module = self.family.modules[tile.tensor]
        for name, (found, tasks) in zip(module.names, self.family.coordinates(module), strict=True):
            for task, (left, right) in zip(tasks, found.parts, strict=True):
                self._writers[task].write(f"{name}.left", 0, as_bytes(left))
                self._writers[task].write(f"{name}.right", 0, as_bytes(right))


class Lift(_ModulePass):
    """Leads merged matrices back to factors, and writes them."""

    def __init__(self, family: Family, merged: Checkpoint, wanted: Dtype | None, writer: FileWriter) -> None:
        super().__init__(family)
        self._merged, self._wanted, self._writer = merged, wanted, writer

    def apply(self, tile: Tile, buffers: None) -> None:
        module = self.family.modules[tile.tensor]
        blocks = []
        for name, (found, _) in zip(module.names, self.family.coordinates(module), strict=True):
            data = np.frombuffer(self._merged.read(name), "<f8").reshape(module.shape(self.family.space))
            blocks.append(found.factors(torch.from_numpy(data.copy())))
        dtype = self.family.dtype(module, self._wanted)
        for stored, factor in zip(factor_names(module.like, self.family.layout), module.like.join(blocks), strict=True):
            self._writer.write(stored, 0, as_bytes(round_to(factor, dtype, f"the merged {module.path}")))


class Cores(Checkpoint):
    """One task in coordinates. Modules that it lacks are 0; without a file, so are all (the base)."""

    expanded = True

    def __init__(self, tensors: Sequence[TensorInfo], label: str, kind: str, file: Path | None = None) -> None:
        self.label, self.kind = label, kind
        self.tensors = {info.name: info for info in tensors}
        self.metadata: Mapping[str, str] = {}
        self.side_files, self.warnings = {}, []
        self._file = open_file(file, label) if file is not None else None
        self.files = [file] if file is not None else []

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if self._file is None or f"{name}.left" not in self._file.tensors:
            buffer[:] = bytes(len(buffer))
            return
        _, n = self.tensors[name].shape
        step = max(1, _PANEL // n)
        left, right = self._matrix(f"{name}.left"), self._matrix(f"{name}.right")
        first, done = offset // (8 * n) // step * step, 0
        while done < len(buffer):
            panel = as_bytes(left[first : first + step] @ right)
            at = offset + done - first * n * 8
            part = panel[at : at + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done, first = done + len(part), first + step

    def _matrix(self, name: str) -> torch.Tensor:
        assert self._file is not None
        data = bytearray(self._file.read(name))
        return torch.frombuffer(data, dtype=torch.float64).view(self._file.tensors[name].shape)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
