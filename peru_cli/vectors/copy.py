"""Copy a checkpoint into a writer, tile by tile, in any dtype. Compact forms are expanded while they are read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from peru_cli.checkpoints.bundle import Bundle, alike, bundle, pieces_of
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.methods.compact.delta import Bits, cast_bits, infinity
from peru_cli.streaming.aligned import TileBuffer, read_raw
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.engine import Reads, run
from peru_cli.streaming.tiles import Tile, TilePlan
from peru_cli.vectors.family import StreamSettings


def in_dtype(info: TensorInfo, dtype: Dtype | None) -> TensorInfo:
    """A tensor as it will be written: floating tensors get `dtype`."""
    return TensorInfo(info.name, dtype, info.shape) if dtype is not None and info.dtype.compressible else info


class _Copy:
    """The pass: read a tile, cast it, write it."""

    def __init__(self, source: Checkpoint, writer: CheckpointWriter, names: Mapping[str, str], how: StreamSettings) -> None:
        self._source, self._writer, self._how = source, writer, how
        pairs = [(info, source.tensors[names.get(info.name, info.name)]) for info in writer.order]
        runs = list(alike(pairs, lambda pair: pair[0].entries, _together))
        self._outputs = [bundle([info for info, _ in run]) for run in runs]
        self._inputs = [bundle([info for _, info in run]) for run in runs]

    @property
    def plan(self) -> TilePlan:
        """Its tiles."""
        return TilePlan([info.entries for info in self._outputs], self._how.tile_entries)

    def reads(self) -> Reads:
        return [(self._source, lambda tensor: self._inputs[tensor])]

    def buffers(self) -> TileBuffer:
        widest = max((info.dtype.bits for info in self._inputs), default=8)
        return TileBuffer(CPU, self._how.tile_entries, max(widest // 8, 1))

    def apply(self, tile: Tile, buffers: TileBuffer) -> memoryview:
        info, wanted = self._inputs[tile.tensor], self._outputs[tile.tensor].dtype
        raw = read_raw(self._source, info, tile, buffers)
        if wanted is info.dtype or not len(raw):
            return raw
        bits = np.frombuffer(raw, BITS[info.dtype.bits])
        cast = cast_bits(CPU, bits, info.dtype, wanted)
        refuse_overflow(self._source.label, TensorInfo(info.name, wanted, info.shape), bits, info.dtype, cast)
        return memoryview(cast.view(np.uint8))

    def commit(self, tile: Tile, result: memoryview) -> memoryview:
        if self._writer.ordered:
            self._write(tile, result)
        return result

    def finish(self, tile: Tile, committed: memoryview, buffers: TileBuffer) -> None:
        if not self._writer.ordered:
            self._write(tile, committed)

    def _write(self, tile: Tile, data: memoryview) -> None:
        info = self._outputs[tile.tensor]
        if isinstance(info, Bundle):
            parts = list(pieces_of(info, 0, data))
            self._writer.write_whole([piece for _, _, piece in parts], [member.name for member, _, _ in parts])
        else:
            self._writer.write(info.name, info.dtype.nbytes(tile.start), data)


def _together(pair: tuple[TensorInfo, TensorInfo]) -> Dtype | None:
    """What tensors of a bundle share; None for one that stays alone because it is cast or may end within a byte."""
    wanted, info = pair
    return info.dtype if info.dtype is wanted.dtype and info.dtype.bits % 8 == 0 else None


def refuse_overflow(label: str, info: TensorInfo, bits: Bits, source: Dtype, cast: Bits) -> None:
    """Raise BadFile if a finite value became infinite when it was cast to the tensor's dtype."""
    if _overflows(bits, source, cast, info.dtype):
        raise BadFile(f"{label}: {info.name} does not fit {info.dtype.name}", "use --dtype bf16 or fp32")


def _overflows(bits: Bits, source: Dtype, cast: Bits, target: Dtype) -> bool:
    """Whether a finite value became infinite."""
    if CPU.largest_magnitude(cast) < infinity(target):
        return False
    infinite = (cast & ((1 << (target.bits - 1)) - 1)) == infinity(target)
    return bool((infinite & ((bits & ((1 << (source.bits - 1)) - 1)) < infinity(source))).any())


def copy_checkpoint(source: Checkpoint, writer: CheckpointWriter, how: StreamSettings, names: Mapping[str, str] | None = None) -> None:
    """Fill a writer with a checkpoint's tensors, in the writer's order and dtypes. The caller enters and commits it.

    Args:
        names: maps the writer's name of a tensor to the source's, if they differ.

    Raises BadFile if a value does not fit its new dtype."""
    step = _Copy(source, writer, names or {}, how)
    run(step, step.plan, how.threads, how.advance)
