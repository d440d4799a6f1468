"""`peru unpack --task`: one task out of a pack, in tiles, checked against the digests of base and sums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.index import STORED
from peru_cli.artifacts.packs.masks import MaskPack, mask_digest, mask_leaves
from peru_cli.artifacts.packs.pack import Pack, Sums, sum_leaves, sums_digest
from peru_cli.artifacts.packs.superposed import WHOLE, PackedTensor, TaskRecord
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.finetunes.decode import decode_bits
from peru_cli.finetunes.pack_base import refuse_pack_base
from peru_cli.methods.delta import Bits, cast_bits, infinity, largest_magnitude
from peru_cli.methods.superpose import flip
from peru_cli.streaming.aligned import TileBuffer
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.digests import SHORT, TensorDigest, checkpoint_digest, leaves
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile, TilePlan
from peru_cli.vectors.copy import in_dtype
from peru_cli.vectors.family import StreamSettings

_FEW = 3  # tensors of a wrong base that are read before giving up
_ROWS = 64  # tensors' signs that are kept
Floats = np.ndarray[Any, np.dtype[Any]]


def float_kind(dtype: Dtype) -> str:
    """What is computed in for a dtype."""
    return "f8" if dtype.name == "F64" else "f4"


def scaled(sums: Sums, factor: float, out: Floats) -> Floats:
    """Sums as floats times a factor, in `out`; (n,)."""
    np.copyto(out, sums, casting="unsafe")
    out *= out.dtype.type(factor)
    return out


def plus_vector(base: Bits, base_dtype: Dtype, dtype: Dtype, vector: Floats) -> Bits | None:
    """Base (bits in its own dtype) plus a vector as bits of `dtype`, (n,); None if something does not fit. Overwrites the vector."""
    cast = cast_bits(CPU, base, base_dtype, dtype)
    np.add(CPU.widen(cast, dtype, np.empty(len(base), vector.dtype.str[1:])), vector, out=vector)
    bits: Bits = CPU.narrow(vector, dtype)
    return None if largest_magnitude(CPU, bits, dtype) >= infinity(dtype) else bits


class Retrieval:
    """One task of a pack: where its vectors lie and how they are turned back. Safe from many threads."""

    def __init__(self, pack: Pack, task: TaskRecord, scale: float | None = None) -> None:
        """`scale` replaces the pack's."""
        self.pack, self.task = pack, task
        self._scale = pack.scale if scale is None else scale
        self._arrangement = pack.arrangement
        self._places = {source: place for place, source in self._arrangement.sources(task.name, task.shift).items()}
        self._rows: BlockCache[Any] = BlockCache(_ROWS)
        self.corrections = pack.corrections(task)

    def place(self, record: PackedTensor) -> PackedTensor:
        """The tensor among whose sums a tensor's vector lies."""
        return self.pack.records[self._places.get(record.info.name, record.info.name)]

    def vector(self, record: PackedTensor, start: int, sums: Sums, out: Floats) -> Floats:
        """scale * tau^ from entry `start` on, out of the sums at its place; float32 or float64 (n,), in `out`."""
        place = self.place(record)
        if (mask := self.pack.mask(self.task.name, place, start, start + len(sums))) is not None:
            sums = sums * mask
        factor = self._scale * 2.0**place.exponent
        if place.is_target and self._arrangement.signs:
            # Signs and factor in one: (c m) S is c (m S) to the bit, and saves going through the entries once more.
            key = place.info.name, out.dtype.str
            row = self._rows.get(key, lambda: out.dtype.type(factor) * self._arrangement.row(self.task.name, place.info))
            np.copyto(out, sums, casting="unsafe")
            return flip(out, row, start)
        return scaled(sums, factor, out)

    def entries(self, record: PackedTensor, start: int, sums: Sums, base: Bits) -> Bits:
        """The task's entries as bits, given the base's; BadFile if one does not fit the dtype."""
        vector = self.vector(record, start, sums, np.empty(len(base), float_kind(record.info.dtype)))
        if record.mode == WHOLE:
            base = np.zeros_like(base)
        bits = plus_vector(base, record.base_dtype, record.info.dtype, vector)
        if bits is None:
            message = f"{self.pack.path}: {record.info.name!r} of {self.task.name} does not fit {record.info.dtype.name}"
            raise BadFile(message, "pack with a smaller --scale")
        return bits

    def corrected(self, record: PackedTensor) -> int:
        """How many entries of a tensor the task's residual corrects."""
        found = self.corrections.records.get(record.info.name) if self.corrections is not None else None
        return found.kept if found is not None else 0

    def correct(self, record: PackedTensor, start: int, bits: Bits) -> int:
        """Put the residual's entries into bits that come back from entry `start` on, in place; how many there are."""
        if self.corrections is None or not self.corrected(record):
            return 0
        delta = self.corrections.records[record.info.name]
        stream, entries = self.corrections.entries.entries(delta, start, start + len(bits))
        if stream is not None:
            bits[entries.positions] = decode_bits(bits.take(entries.positions), entries, stream.values, record.info.dtype)
        return len(entries.positions)

    def read(self, record: PackedTensor, start: int, stop: int, base: Checkpoint) -> Bits:
        """The task's entries of a floating tensor as bits, (stop - start,); nothing is checked against digests."""
        bits: Bits = np.empty(stop - start, BITS[record.base_dtype.bits])
        base.read_into(record.info.name, record.base_dtype.nbytes(start), bits.data.cast("B"))
        if record.is_sum:
            bits = self.entries(record, start, self.pack.sums(self.place(record), start, stop), bits)
        self.correct(record, start, bits)
        return bits

    def tensors(self, dtype: Dtype | None = None) -> list[TensorInfo]:
        """The fine-tune's tensors under its own names; `dtype` replaces that of floating ones."""
        packed = [TensorInfo(self.task.fine_name(r.info.name), r.info.dtype, r.info.shape) for r in self.pack.index.tensors]
        return [in_dtype(info, dtype) for info in [*packed, *(tensor.info for tensor in self.task.tensors)]]

    def side_files(self, base: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
        """Side files of the task, and the names of those that the base should have and has not."""
        contents, missing = {}, []
        for file in self.task.files:
            if file.origin == STORED:
                contents[file.name] = self.pack.side_file(file)
                continue
            path = base.side_files.get(file.name)
            content = path.read_bytes() if path is not None else None
            if content is None or short_digest(content) != file.digest:
                missing.append(file.name)
            else:
                contents[file.name] = content
        return contents, missing


class _Retrieve:
    """The pass: read the base's tile and the sums of its place, turn them back, digest both, write."""

    def __init__(
        self, retrieval: Retrieval, base: Checkpoint, order: Sequence[TensorInfo], writer: CheckpointWriter | None, how: StreamSettings
    ) -> None:
        self._retrieval, self._base, self._order, self._writer, self._how = retrieval, base, order, writer, how
        self._ordered = writer is not None and writer.ordered
        pack, task = retrieval.pack, retrieval.task
        self._records = {task.fine_name(r.info.name): r for r in pack.index.tensors}
        self._own = {tensor.info.name: tensor for tensor in task.tensors}
        self._base_digests = {r.info.name: TensorDigest(r.base_dtype, r.info.shape) for r in pack.index.tensors}
        self._sum_digests = {r.info.name: sums_digest(r.info) for r in pack.index.tensors if r.is_sum}
        self._mask_digests = {r.info.name: mask_digest(r.info) for r in pack.index.tensors if r.is_sum and isinstance(pack, MaskPack)}
        self._left = {info.name: info.entries for info in order}
        self._corrected = dict.fromkeys(self._base_digests, 0)
        self._lock = threading.Lock()
        self._wrong: list[str] = []

    def buffers(self) -> TileBuffer:
        widest = max((max(r.base_dtype.bits, r.info.dtype.bits) for r in self._records.values()), default=8)
        return TileBuffer(CPU, self._how.tile_entries, max([widest, *(t.info.dtype.bits for t in self._own.values())]) // 8)

    def apply(self, tile: Tile, buffer: TileBuffer) -> memoryview:
        wanted = self._order[tile.tensor]
        dtype, raw = self._entries(wanted.name, tile, buffer)
        if wanted.dtype is dtype:
            return raw
        cast: Bits = cast_bits(CPU, np.frombuffer(raw, BITS[dtype.bits]), dtype, wanted.dtype)
        return cast.data.cast("B")

    def _entries(self, name: str, tile: Tile, buffer: TileBuffer) -> tuple[Dtype, memoryview]:
        """The task's bytes of a tile, in its own dtype."""
        retrieval, n = self._retrieval, tile.stop - tile.start
        if name in self._own:
            dtype = self._own[name].info.dtype
            raw = buffer.view(dtype.nbytes(n))
            retrieval.pack.read_whole(retrieval.task, self._own[name], dtype.nbytes(tile.start), raw)
            return dtype, raw
        record = self._records[name]
        raw = buffer.view(record.base_dtype.nbytes(n))
        self._base.read_into(record.info.name, record.base_dtype.nbytes(tile.start), raw)
        self._base_digests[record.info.name].add_at(tile.start, leaves(raw, record.base_dtype))
        if record.is_sum:
            place = retrieval.place(record)
            sums = retrieval.pack.sums(place, tile.start, tile.stop)
            self._sum_digests[place.info.name].add_at(tile.start, sum_leaves(sums))
            if (mask := retrieval.pack.mask(retrieval.task.name, place, tile.start, tile.stop)) is not None:
                self._mask_digests[place.info.name].add_at(tile.start, mask_leaves(mask))
            bits = retrieval.entries(record, tile.start, sums, buffer.bits(len(raw), record.base_dtype.bits))
        elif retrieval.corrected(record):
            bits = buffer.bits(len(raw), record.base_dtype.bits)
        else:
            return record.info.dtype, raw
        if found := retrieval.correct(record, tile.start, bits):
            with self._lock:
                self._corrected[record.info.name] += found
        return record.info.dtype, bits.data.cast("B")

    def commit(self, tile: Tile, result: memoryview) -> memoryview:
        if self._ordered:
            self._write(tile, result)
        return result

    def finish(self, tile: Tile, committed: memoryview, buffers: TileBuffer) -> None:
        if not self._ordered:
            self._write(tile, committed)
        name = self._order[tile.tensor].name
        with self._lock:
            self._left[name] -= tile.stop - tile.start
            done = not self._left[name] and name in self._records
        if done and not self._is_base(self._records[name]):
            self._wrong.append(f"{self._records[name].info.name}: other contents in {self._base.label}")
            if len(self._wrong) >= _FEW:
                refuse_pack_base(self._wrong, self._retrieval.pack, self._base.label)

    def _is_base(self, record: PackedTensor) -> bool:
        return self._base_digests[record.info.name].digest()[:SHORT] == record.base_digest

    def _write(self, tile: Tile, data: memoryview) -> None:
        if self._writer is not None:
            info = self._order[tile.tensor]
            self._writer.write(info.name, info.dtype.nbytes(tile.start), data)

    def check(self) -> None:
        """All is read: what differs is an error."""
        pack = self._retrieval.pack
        empty = [r for r in self._records.values() if not r.info.entries and not self._is_base(r)]
        refuse_pack_base([*self._wrong, *(f"{r.info.name}: other contents" for r in empty)], pack, self._base.label)
        if checkpoint_digest({name: digest.digest() for name, digest in self._sum_digests.items()}).hex() != pack.metadata["peru.sums"]:
            raise BadFile(f"{pack.path}: its sums are not those that were packed", "please report this with the file's name")
        masks, name = {name: digest.digest() for name, digest in self._mask_digests.items()}, self._retrieval.task.name
        if isinstance(pack, MaskPack) and checkpoint_digest(masks) != pack.masks[name].digest:
            raise BadFile(f"{pack.path}: the mask of {name} is not the one that was written", "please report this with the file's name")
        for record in self._records.values():
            if (found := self._corrected[record.info.name]) != (kept := self._retrieval.corrected(record)):
                raise BadFile(f"{pack.path}: the residual of {record.info.name!r} has {found} entries, the index says {kept}")


def retrieve(
    retrieval: Retrieval, base: Checkpoint, order: Sequence[TensorInfo], writer: CheckpointWriter | None, how: StreamSettings
) -> None:
    """Stream a task into a writer (or nowhere, to verify), in the writer's order.

    Raises Mismatch for another base (naming the first tensors that differ), BadFile if the pack was altered. The caller
    commits the writer afterwards.
    """
    for tensor in retrieval.task.tensors:
        retrieval.pack.verify_whole(retrieval.task, tensor)
    step = _Retrieve(retrieval, base, order, writer, how)
    run(step, TilePlan([info.entries for info in order], how.tile_entries), how.threads, how.advance)
    step.check()


def retrieve_to(
    retrieval: Retrieval, base: Checkpoint, writer: CheckpointWriter, how: StreamSettings, note: Callable[[str], None] = lambda text: None
) -> None:
    """Unpack a task into a writer. Where bytes cannot be taken back (a pipe), everything is verified first."""
    if writer.ordered:
        note("verifying before anything is written")
        retrieve(retrieval, base, writer.order, None, how)
    with writer:
        note("unpacking")
        retrieve(retrieval, base, writer.order, writer, how)
        writer.commit()
