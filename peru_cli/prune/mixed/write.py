"""The last pass: write integers into the artifact, and compute digests and errors of the result of unpacking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peru_cli.artifacts.index import Mode
from peru_cli.artifacts.mixed.index import MixedRecord
from peru_cli.artifacts.mixed.writer import MixedWriter, Represented
from peru_cli.artifacts.single import whole_shape
from peru_cli.checkpoints.digests import SHORT, TensorDigest, leaves
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.methods.compact.delta import cast_bits
from peru_cli.methods.mixed.scales import run_of_product, scale_of
from peru_cli.methods.mixed.sums import Floats, add_difference
from peru_cli.prune.mixed.decompose import Item, Spill
from peru_cli.prune.mixed.represent import Price, represent
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.tiles import CHUNK, Tile
from peru_cli.vectors.family import TaskVector

_PIECE = 32 * CHUNK  # entries of a result computed at once


def difference(parts: Represented, start: int, stop: int) -> Floats | None:
    """What a tensor's parts add to the base from entry `start` to `stop`, float64 (stop - start,). None if nothing changes."""
    low = None
    if parts.left is not None and parts.right is not None and parts.scales is not None:
        low = run_of_product(parts.left, parts.right, parts.scales, parts.rows, start, stop)
    if parts.dense is None:
        return low
    plain: Floats = parts.dense[start:stop] * scale_of(np.array([parts.dense_scale]))
    return plain if low is None else low + plain


def result_of(base: Checkpoint, fine: Checkpoint, item: Item, parts: Represented) -> torch.Tensor:
    """A tensor as unpacking gives it, float32; entries that the base lacks are the fine-tune's own."""
    pair, dtype = item.pair, item.pair.fine.dtype
    raw = bytearray(dtype.nbytes(pair.fine.entries))
    fine.read_into(pair.fine.name, 0, memoryview(raw))
    bits = np.frombuffer(raw, BITS[dtype.bits])
    if pair.entries:
        room = bytearray(pair.base.dtype.nbytes(pair.entries))
        base.read_into(pair.base.name, 0, memoryview(room))
        cast = cast_bits(CPU, np.frombuffer(room, BITS[pair.base.dtype.bits]), pair.base.dtype, dtype)
        bits[: pair.entries] = add_difference(cast, dtype, difference(parts, 0, pair.entries))
    return torch.from_numpy(CPU.widen(bits, dtype, np.empty(len(bits)))).float().view(pair.fine.shape)


@dataclass
class _Made:
    parts: Represented
    predicted: float
    error: float
    base_digest: bytes
    digest: bytes


class Final:
    """The pass. Each tile is one tensor."""

    def __init__(
        self, base: Checkpoint, tasks: Sequence[TaskVector], items: Sequence[Item], records: Sequence[Sequence[MixedRecord]],
        writers: Sequence[MixedWriter], spill: Spill, price: Price,
    ) -> None:  # fmt: skip
        self._base, self._tasks, self._items, self._writers = base, tasks, items, writers
        self._spill, self._price = spill, price
        self._named = [{record.info.name: record for record in some} for some in records]
        self.errors, self.predicted = [0.0] * len(tasks), [0.0] * len(tasks)
        self.digests: list[dict[str, bytes]] = [{} for _ in tasks]

    def buffers(self) -> None:
        return None

    def apply(self, tile: Tile, buffers: None) -> _Made:
        item = self._items[tile.tensor]
        parts, predicted = represent(item, self._spill, self._price)
        pair, fine = item.pair, self._tasks[item.task].fine
        dtype = pair.fine.dtype
        mine, theirs = TensorDigest(dtype, pair.fine.shape), TensorDigest(pair.base.dtype, pair.base.shape)
        error = 0.0
        for start in range(0, pair.fine.entries, _PIECE):
            raw = bytearray(dtype.nbytes(min(_PIECE, pair.fine.entries - start)))
            fine.read_into(pair.fine.name, dtype.nbytes(start), memoryview(raw))
            if (n := min(_PIECE, pair.entries - start)) > 0:
                room = bytearray(pair.base.dtype.nbytes(n))
                self._base.read_into(pair.base.name, pair.base.dtype.nbytes(start), memoryview(room))
                theirs.add(leaves(memoryview(room), pair.base.dtype))
                cast = cast_bits(CPU, np.frombuffer(room, BITS[pair.base.dtype.bits]), pair.base.dtype, dtype)
                bits = add_difference(cast, dtype, difference(parts, start, start + n))
                wanted = np.frombuffer(raw, BITS[dtype.bits])[:n]
                missed = CPU.widen(bits, dtype, np.empty(n)) - CPU.widen(wanted, dtype, np.empty(n))
                error += float(np.square(missed).sum())
                raw[: dtype.nbytes(n)] = bits.data.cast("B")
            mine.add(leaves(memoryview(raw), dtype))
        return _Made(parts, predicted, error, theirs.digest(), mine.digest())

    def commit(self, tile: Tile, result: _Made) -> None:
        item = self._items[tile.tensor]
        self._base.agree({item.pair.base.name: result.base_digest})
        record = self._named[item.task][item.name]
        self._writers[item.task].add(record, result.parts)
        record.base_digest = result.base_digest[:SHORT]
        self.digests[item.task][item.name] = result.digest
        self.errors[item.task] += result.error
        self.predicted[item.task] += result.predicted

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


def store_rest(fine: Checkpoint, record: MixedRecord, use: Callable[[memoryview], None]) -> bytes:
    """Copy the part of a tensor that is stored whole into the artifact. Returns its digest, 32 bytes."""
    first = 0 if record.mode == Mode.WHOLE else record.base_entries
    return fine.digest(record.info.name, use, first, whole_shape(record))
