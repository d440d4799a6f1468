"""Read tensors in memory as a checkpoint, and load a checkpoint's tensors into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from peru_cli.checkpoints.dtypes import BY_TORCH_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.streaming.engine import available_threads

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
_PIECE = 1 << 18  # entries computed at once: each call costs as much as 2^14 entries
_BATCH = 1 << 18  # entries that one thread takes at once: asking for more work costs more than a small tensor


def infos(table: Mapping[str, torch.Tensor]) -> dict[str, TensorInfo]:
    """The contents of a table, without what no checkpoint can hold (extra state, exotic dtypes)."""
    found = {}
    for name, tensor in table.items():
        dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch.")) if isinstance(tensor, torch.Tensor) else None
        if dtype is not None:
            found[name] = TensorInfo(name, dtype, tuple(tensor.shape))
    return found


def raw_bytes(tensor: torch.Tensor) -> Bytes:
    """A contiguous tensor's bytes: the same memory on the CPU, otherwise a copy."""
    found: Bytes = tensor.detach().cpu().view(-1).view(torch.uint8).numpy()
    return found


class TensorTable(Checkpoint):
    """Tensors in memory, on any device, as a checkpoint."""

    def __init__(self, label: str, table: Mapping[str, torch.Tensor], side_files: Mapping[str, Place] | None = None) -> None:
        self.label, self.kind, self.metadata, self.warnings = label, "tensors in memory", {}, []
        self.side_files = side_files or {}
        self.clear()
        self.add(table)

    def clear(self) -> None:
        """Release all tensors."""
        self._flat: dict[str, torch.Tensor] = {}
        self._bytes: dict[str, memoryview] = {}  # of tensors in CPU memory
        self.tensors: dict[str, TensorInfo] = {}

    def add(self, table: Mapping[str, torch.Tensor]) -> None:
        """Add more tensors. Contiguous ones are not copied."""
        for name, info in infos(table).items():
            flat = table[name].detach().reshape(-1)
            self.tensors[name], self._flat[name] = info, flat
            self._bytes.pop(name, None)
            if flat.device.type == "cpu":
                self._bytes[name] = raw_bytes(flat).data

    def view(self, name: str, offset: int, nbytes: int) -> memoryview | None:
        found = self._bytes.get(name)
        return found[offset : offset + nbytes] if found is not None else None

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if not len(buffer):
            return
        found = self.view(name, offset, len(buffer))
        if found is None:
            size = self._flat[name].element_size()
            found = raw_bytes(self._flat[name][offset // size : (offset + len(buffer)) // size]).data
        buffer[:] = found


def empty_tensor(label: str, info: TensorInfo, device: torch.device | str = "cpu") -> torch.Tensor:
    """Allocate a tensor. BadFile for dtypes that torch lacks."""
    kind = getattr(torch, info.dtype.torch_name or "", None)
    if kind is None:
        raise BadFile(f"{label}: torch has no dtype for {info.name!r} ({info.dtype.name})")
    return torch.empty(info.shape, dtype=kind, device=device)


def fill(source: Checkpoint, out: Mapping[str, torch.Tensor]) -> None:
    """Compute tensors of a fine-tune into memory, on all threads. `out` maps the source's names to contiguous tensors."""
    with ThreadPoolExecutor(available_threads()) as pool:
        for _ in pool.map(partial(_fill, source, out), _batches(out)):
            pass


def read_tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Load a checkpoint's tensors into memory. BadFile for dtypes that torch lacks."""
    tensors = {name: empty_tensor(checkpoint.label, info) for name, info in checkpoint.tensors.items()}
    if checkpoint.ranged:
        checkpoint.expect([(name, 0, info.nbytes) for name, info in checkpoint.tensors.items()])
    for name, tensor in tensors.items():
        if tensor.numel():
            checkpoint.read_into(name, 0, raw_bytes(tensor).data)
    return tensors


def _batches(out: Mapping[str, torch.Tensor]) -> Iterator[list[tuple[str, int]]]:
    """Pieces of all tensors in batches: each piece is a name and a first entry."""
    batch: list[tuple[str, int]] = []
    size = 0
    for name, tensor in out.items():
        for start in range(0, tensor.numel(), _PIECE):
            batch.append((name, start))
            size += min(_PIECE, tensor.numel() - start)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _fill(source: Checkpoint, out: Mapping[str, torch.Tensor], batch: list[tuple[str, int]]) -> None:
    for name, start in batch:
        piece = out[name].detach().view(-1)[start : start + _PIECE]
        there = piece if piece.device.type == "cpu" else torch.empty_like(piece, device="cpu")
        source.read_into(name, start * piece.element_size(), raw_bytes(there).data)
        if there is not piece:
            piece.copy_(there)
