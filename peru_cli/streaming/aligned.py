"""Aligned inputs: the same run of entries out of several checkpoints, read into reused buffers."""

from __future__ import annotations

import torch

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.streaming.device import TileBuffer
from peru_cli.streaming.tiles import Tile


def clip(tile: Tile, entries: int) -> int:
    """How many entries of the tile a tensor of so many entries has."""
    return max(0, min(tile.stop, entries) - tile.start)


def read_raw(source: Checkpoint, info: TensorInfo, tile: Tile, buffer: TileBuffer) -> memoryview:
    """Read what a tensor has of a tile; the bytes lie in the buffer until its next use."""
    view = buffer.view(info.dtype.nbytes(clip(tile, info.entries)))
    if len(view):
        source.read_into(info.name, info.dtype.nbytes(tile.start), view)
    return view


def read_bits(source: Checkpoint, info: TensorInfo, tile: Tile, buffer: TileBuffer) -> tuple[memoryview, torch.Tensor]:
    """Read a floating tensor's part of a tile: its bytes, and its entries as integers on the device, (n,)."""
    view = read_raw(source, info, tile, buffer)
    return view, buffer.bits(clip(tile, info.entries), info.dtype)
