"""`peru unpack`: give a fine-tune back from base and artifact, in tiles, checked against both digests."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from peru_cli.artifacts.index import COPY, STORED, WHOLE, TensorRecord
from peru_cli.artifacts.reader import SparseDelta, check_base_header, refuse_base
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.dtypes import BY_TORCH_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.finetunes.decode import decode_bits
from peru_cli.methods.delta import Bits, cast_bits
from peru_cli.streaming.aligned import TileBuffer, clip
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.digests import SHORT, TensorDigest, checkpoint_digest, leaves
from peru_cli.streaming.engine import Reads, run
from peru_cli.streaming.tiles import Tile, TilePlan
from peru_cli.vectors.family import StreamSettings

_FEW = 3  # tensors of a wrong base that are read before giving up


def output_tensors(artifact: SparseDelta, dtype: Dtype | None) -> list[TensorInfo]:
    """What unpacking writes; `dtype` replaces that of floating tensors."""
    return [TensorInfo(t.name, dtype if dtype is not None and t.dtype.compressible else t.dtype, t.shape) for t in artifact.tensors()]


def check_base(artifact: SparseDelta, base: Checkpoint) -> None:
    """Refuse, from headers alone, a base that cannot be the artifact's."""
    problems = []
    for record in artifact.index.tensors:
        if record.mode != WHOLE:
            found = check_base_header(artifact, record, base.tensors.get(artifact.base_name(record)), base.label)
            if found is not None:
                problems.append(found)
    refuse_base(problems, artifact, base.label)


def side_files(artifact: SparseDelta, base: Checkpoint) -> tuple[dict[str, bytes], list[str]]:
    """Side files of the fine-tune, and the names of those that the base should have and has not."""
    contents, missing = {}, []
    for file in artifact.index.files:
        if file.origin == STORED:
            contents[file.name] = artifact.side_file(file)
            continue
        path = base.side_files.get(file.name)
        content = path.read_bytes() if path is not None else None
        if content is None or short_digest(content) != file.digest:
            missing.append(file.name)
        else:
            contents[file.name] = content
    return contents, missing


def config_with_dtype(content: bytes, dtype: Dtype) -> bytes:
    """A config.json that names `dtype` wherever it names a float type: transformers loads in what the config says."""
    try:
        config = json.loads(content)
    except ValueError:
        return content
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode() if _set_dtype(config, dtype) else content


def _set_dtype(config: Any, dtype: Dtype) -> bool:
    """Set the keys `dtype` and `torch_dtype` of a table and those inside it; whether anything changed."""
    changed = False
    for key, value in config.items() if isinstance(config, dict) else ():
        named = BY_TORCH_NAME.get(value) if key in ("dtype", "torch_dtype") and isinstance(value, str) else None
        if named is not None and named.compressible and named is not dtype:
            config[key] = dtype.torch_name
            changed = True
        changed |= _set_dtype(value, dtype)
    return changed


class _Unpack:
    """The pass: read the base's tile, put the kept entries in, digest both, write."""

    def __init__(
        self, artifact: SparseDelta, base: Checkpoint, order: Sequence[TensorInfo], writer: CheckpointWriter | None, how: StreamSettings
    ) -> None:
        self._artifact, self._base, self._order, self._writer, self._how = artifact, base, order, writer, how
        self._records = [artifact.records[info.name] for info in order]
        self._ordered = writer is not None and writer.ordered
        self.base_digests: dict[str, TensorDigest] = {}
        self.results: dict[str, TensorDigest] = {}
        self.bad: list[str] = []
        for record in self._records:
            self.results[record.info.name] = TensorDigest(record.info.dtype, record.info.shape)
            if record.mode != WHOLE:
                assert record.base_dtype is not None
                self.base_digests[record.info.name] = TensorDigest(record.base_dtype, record.base_shape)
        self._left = {r.info.name: r.info.entries for r in self._records}
        self._kept = dict.fromkeys(self._left, 0)
        self._widest = max((r.info.dtype.bits for r in self._records), default=8)
        self._widest = max([self._widest] + [r.base_dtype.bits for r in self._records if r.base_dtype is not None])

    def reads(self) -> Reads:
        names = [self._artifact.base_name(record) if record.mode != WHOLE else None for record in self._records]
        return [(self._base, lambda tensor: self._base.tensors[name] if (name := names[tensor]) is not None else None)]

    def buffers(self) -> tuple[TileBuffer, TileBuffer]:
        room = [TileBuffer(CPU, self._how.tile_entries, max(self._widest // 8, 1)) for _ in range(2)]
        return room[0], room[1]

    def apply(self, tile: Tile, buffers: tuple[TileBuffer, TileBuffer]) -> memoryview:
        record = self._records[tile.tensor]
        raw = self._result(record, tile, buffers)
        name, dtype = record.info.name, record.info.dtype
        self.results[name].add_at(tile.start, leaves(raw, dtype))
        wanted = self._order[tile.tensor].dtype
        if wanted is dtype:
            return raw
        return _bytes(cast_bits(CPU, np.frombuffer(raw, BITS[dtype.bits]), dtype, wanted))

    def _result(self, record: TensorRecord, tile: Tile, buffers: tuple[TileBuffer, TileBuffer]) -> memoryview:
        """The fine-tune's bytes of a tile."""
        dtype, total = record.info.dtype, tile.stop - tile.start
        from_base = clip(tile, record.base_entries)
        whole = memoryview(b"")
        if from_base < total:
            whole = buffers[1].view(dtype.nbytes(total - from_base))
            self._artifact.read_whole(record, dtype.nbytes(tile.start + from_base), whole)
            if not from_base:
                return whole
        assert record.base_dtype is not None
        raw = buffers[0].view(record.base_dtype.nbytes(from_base))
        self._base.read_into(self._artifact.base_name(record), record.base_dtype.nbytes(tile.start), raw)
        self.base_digests[record.info.name].add_at(tile.start, leaves(raw, record.base_dtype))
        if record.mode == COPY:
            return raw
        bits = cast_bits(CPU, buffers[0].bits(len(raw), record.base_dtype.bits), record.base_dtype, dtype)
        stream, entries = self._artifact.entries(record, tile.start, tile.start + from_base)
        if stream is not None and len(entries.positions):
            bits[entries.positions] = decode_bits(bits.take(entries.positions), entries, stream.values, dtype)
            self._count(record, len(entries.positions))
        raw = _bytes(bits)
        return memoryview(bytes(raw) + bytes(whole)) if len(whole) else raw

    def _count(self, record: TensorRecord, found: int) -> None:
        with self._artifact.lock:
            self._kept[record.info.name] += found

    def commit(self, tile: Tile, result: memoryview) -> memoryview:
        if self._ordered:
            self._write(tile, result)
        return result

    def finish(self, tile: Tile, committed: memoryview, buffers: tuple[TileBuffer, TileBuffer]) -> None:
        if not self._ordered:
            self._write(tile, committed)
        record = self._records[tile.tensor]
        name = record.info.name
        with self._artifact.lock:
            self._left[name] -= tile.stop - tile.start
            done = not self._left[name]
        if done:
            self._check(record)

    def _write(self, tile: Tile, data: memoryview) -> None:
        if self._writer is not None:
            info = self._order[tile.tensor]
            self._writer.write(info.name, info.dtype.nbytes(tile.start), data)

    def _check(self, record: TensorRecord) -> None:
        name = record.info.name
        if name in self.base_digests and self.base_digests[name].digest()[:SHORT] != record.base_digest:
            self.bad.append(f"{self._artifact.base_name(record)}: other contents in {self._base.label}")
            if len(self.bad) >= _FEW:
                refuse_base(self.bad, self._artifact, self._base.label, gave_up=True)
        elif self._kept[name] != record.kept:
            raise BadFile(f"{self._artifact.path}: tensor {name!r} has {self._kept[name]} kept entries, the index says {record.kept}")


def _bytes(bits: Bits) -> memoryview:
    return bits.data.cast("B") if len(bits) else memoryview(b"")


def reconstruct(
    artifact: SparseDelta, base: Checkpoint, order: Sequence[TensorInfo], writer: CheckpointWriter | None, how: StreamSettings
) -> None:
    """Stream the fine-tune into a writer (or nowhere, to verify), in the writer's order.

    Raises Mismatch for another base (naming the first tensors that differ), BadFile if the artifact was
    altered or the result is not what was pruned. The caller commits the writer afterwards.
    """
    for record in artifact.index.tensors:
        artifact.verify_whole(record)
    step = _Unpack(artifact, base, order, writer, how)
    run(step, TilePlan([info.entries for info in order], how.tile_entries), how.threads, how.advance)
    refuse_base(step.bad, artifact, base.label)
    digests = {name: digest.digest() for name, digest in step.results.items()}
    if checkpoint_digest(digests) != artifact.result_digest:
        raise BadFile(f"{artifact.path}: the result is not the checkpoint that was pruned", "please report this with both file names")


def unpack_to(
    artifact: SparseDelta, base: Checkpoint, writer: CheckpointWriter, how: StreamSettings, note: Callable[[str], None] = lambda text: None
) -> None:
    """Unpack into a writer. Where bytes cannot be taken back (a pipe), everything is verified first."""
    if writer.ordered:
        note("verifying before anything is written")
        reconstruct(artifact, base, writer.order, None, how)
    with writer:
        note("unpacking")
        reconstruct(artifact, base, writer.order, writer, how)
        writer.commit()
