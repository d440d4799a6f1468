"""Aligned inputs: the same run of entries from several checkpoints, read into reused buffers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peru_cli.checkpoints.bundle import Bundle
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.streaming.arrays import BITS, Array, Arrays, Host
from peru_cli.streaming.tiles import Tile


class TileBuffer:
    """A reused buffer for one tile of one input: filled on the host, viewed as bits on the device."""

    def __init__(self, xp: Arrays, entries: int, bytes_per_entry: int) -> None:
        self._xp, self._host = xp, xp.room(entries * bytes_per_entry)

    def view(self, nbytes: int) -> memoryview:
        """The first `nbytes` bytes, to fill."""
        return self._host.data[:nbytes]

    def bits(self, nbytes: int, bits_per_entry: int) -> Array:
        """The first `nbytes` bytes as signed integers of a dtype's width, on the device."""
        return self._xp.upload(self._host[:nbytes].view(BITS[bits_per_entry]))


def clip(tile: Tile, entries: int) -> int:
    """How many entries of the tile a tensor of this size has."""
    return max(0, min(tile.stop, entries) - tile.start)


def read_bytes(source: Checkpoint, info: TensorInfo, start: int, n: int) -> bytearray:
    """The bytes of `n` entries of any tensor or bundle, in newly allocated memory."""
    room = bytearray(info.dtype.nbytes(n))
    _fill(source, info, start, memoryview(room))
    return room


def read_entries(source: Checkpoint, info: TensorInfo, start: int, n: int) -> Host:
    """Entries of a floating tensor or bundle as integers of its width, in newly allocated memory; (n,)."""
    return np.frombuffer(read_bytes(source, info, start, n), BITS[info.dtype.bits])


def read_raw(source: Checkpoint, info: TensorInfo, tile: Tile, buffer: TileBuffer) -> memoryview:
    """Read a tensor's part of a tile. The bytes stay in the buffer until its next use."""
    view = buffer.view(info.dtype.nbytes(clip(tile, info.entries)))
    if len(view):
        _fill(source, info, tile.start, view)
    return view


def _fill(source: Checkpoint, info: TensorInfo, start: int, buffer: memoryview) -> None:
    """Fill a buffer with entries of a tensor or a bundle, from `start` on."""
    if isinstance(info, Bundle):
        source.read_bundle(info, start, buffer)
    else:
        source.read_into(info.name, info.dtype.nbytes(start), buffer)


def _lent(source: Checkpoint, info: TensorInfo, start: int, n: int) -> memoryview | None:
    """Entries of a tensor in the source's own memory, if they are there."""
    return source.view(info.name, info.dtype.nbytes(start), info.dtype.nbytes(n)) if n and not isinstance(info, Bundle) else None


def read_bits(source: Checkpoint, info: TensorInfo, tile: Tile, buffer: TileBuffer, lend: bool = False) -> tuple[memoryview, Array]:
    """Read a floating tensor's part of a tile: its bytes, and its entries as integers on the device, (n,).

    With `lend`, for a pass on the CPU that changes neither, both may be the source's own memory."""
    if lend and (lent := _lent(source, info, tile.start, clip(tile, info.entries))) is not None:
        return lent, np.frombuffer(lent, BITS[info.dtype.bits])
    view = read_raw(source, info, tile, buffer)
    return view, buffer.bits(len(view), info.dtype.bits)


def read_runs(source: Checkpoint, info: TensorInfo, runs: Sequence[tuple[int, int]], buffer: TileBuffer, lend: bool = False) -> Array:
    """Read entries `start` to `stop` of each run, as far as the tensor has them, one after another; integers on the device, (n,).

    `lend` as for `read_bits`, if there is only one run."""
    if lend and len(runs) == 1:
        (start, stop) = runs[0]
        if (lent := _lent(source, info, start, max(0, min(stop, info.entries) - start))) is not None:
            return np.frombuffer(lent, BITS[info.dtype.bits])
    filled = 0
    for start, stop in runs:
        if nbytes := info.dtype.nbytes(max(0, min(stop, info.entries) - start)):
            _fill(source, info, start, buffer.view(filled + nbytes)[filled:])
            filled += nbytes
    return buffer.bits(filled, info.dtype.bits)
