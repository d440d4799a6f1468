"""The few operations that need another spelling on CPU and on CUDA; the results are the same bits.

On a CPU, torch 2.13's comparisons into bool take 5 times as long as NumPy's (0.7 against 0.12 ns an
entry), and `nonzero` and `bincount` twice as long: there the same memory is seen through NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.errors import UsageError

BITS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a torch device; UsageError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is not auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name}: no such GPU ({torch.cuda.device_count()} found)", "use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not auto, cpu, cuda or cuda:N")
    return device


class TileBuffer:
    """Reused room for one tile of one input: filled on the CPU, seen as bits on the device."""

    def __init__(self, entries: int, device: torch.device, bytes_per_entry: int = 8) -> None:
        self._host = torch.empty(entries * bytes_per_entry, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._device = device

    def view(self, nbytes: int) -> memoryview:
        """The first `nbytes` bytes, to be filled."""
        return self._host.numpy().data[:nbytes]

    def bits(self, entries: int, dtype: Dtype) -> torch.Tensor:
        """The entries as signed integers of the dtype's width, on the device; (entries,)."""
        host = self._host[: dtype.nbytes(entries)].view(BITS[dtype.bits])
        return host if self._device.type == "cpu" else host.to(self._device)


def count_unequal(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many entries of two integer tensors differ."""
    if a.is_cuda:
        return int(torch.count_nonzero(a != b))
    return int(np.count_nonzero(a.numpy() != b.numpy()))


def where_unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Ascending int64 positions at which two integer tensors differ; (found,)."""
    if a.is_cuda:
        return torch.nonzero(a != b).view(-1)
    return torch.from_numpy(np.flatnonzero(a.numpy() != b.numpy()))


def where_at_least(keys: torch.Tensor, low: int) -> torch.Tensor:
    """Ascending int64 positions of the keys that are `low` or more; (found,)."""
    if keys.is_cuda:
        return torch.nonzero(keys >= low).view(-1)
    array = keys.numpy()
    return torch.from_numpy(np.flatnonzero(array >= array.dtype.type(low)))


def values_at_least(keys: torch.Tensor, low: int) -> np.ndarray[Any, np.dtype[Any]]:
    """The keys that are `low` or more, in order, on the CPU; (found,)."""
    if keys.is_cuda:
        return keys[keys >= low].cpu().numpy()
    array = keys.numpy()
    return array.take(np.flatnonzero(array >= array.dtype.type(low)))  # twice as fast as a boolean index


def largest(keys: torch.Tensor) -> int:
    """The largest entry of a non-empty integer tensor."""
    return int(keys.max()) if keys.is_cuda else int(keys.numpy().max())


def gather(values: torch.Tensor, positions: torch.Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """values[positions] on the CPU; (n,), (k,) -> (k,)."""
    if values.is_cuda:
        return values[positions].cpu().numpy()
    return values.numpy().take(positions.numpy())


def not_negative(values: torch.Tensor) -> torch.Tensor:
    """1 where an entry is 0 or more (-0.0 is), else 0; (n,) -> uint8 (n,)."""
    if values.is_cuda:
        return (values >= 0).view(torch.uint8)
    return torch.from_numpy(np.greater_equal(values.numpy(), 0)).view(torch.uint8)


def greater(a: torch.Tensor, b: torch.Tensor | int) -> torch.Tensor:
    """1 where a is above b, else 0; (n,) and (n,) or a number -> uint8 (n,)."""
    if a.is_cuda:
        return (a > b).view(torch.uint8)
    array = a.numpy()
    other = b.numpy() if isinstance(b, torch.Tensor) else array.dtype.type(b)
    return torch.from_numpy(np.greater(array, other)).view(torch.uint8)


def count_ones(flags: torch.Tensor) -> int:
    """How many of the flags (uint8, 0 or 1) are 1."""
    return int(flags.sum()) if flags.is_cuda else int(np.count_nonzero(flags.numpy()))


def as_ones(flags: np.ndarray[Any, np.dtype[np.bool_]], device: torch.device) -> torch.Tensor:
    """A bool array as uint8 on a device; (n,)."""
    return torch.from_numpy(flags.view(np.uint8)).to(device)


def first_ones(flags: torch.Tensor, quota: int) -> torch.Tensor:
    """The first `quota` of the ones, the rest 0; uint8 (n,) -> uint8 (n,)."""
    return flags * (torch.cumsum(flags, 0, dtype=torch.int64) <= quota).view(torch.uint8)
