"""A mixed artifact on its base: base + sums of products + plain differences -> the fine-tune's bits."""

from __future__ import annotations

import numpy as np

from peru_cli.artifacts.index import COPY, WHOLE
from peru_cli.artifacts.mixed.index import MixedRecord
from peru_cli.artifacts.mixed.reader import Mixed
from peru_cli.artifacts.reader import whole_shape
from peru_cli.checkpoints.digests import SHORT, TensorDigest, leaves
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.finetunes.fine_tune import OneTask, Origin, Witness
from peru_cli.methods.delta import cast_bits
from peru_cli.methods.mixed.sums import add_difference
from peru_cli.streaming.aligned import clip
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.tiles import CHUNK, Tile


def origins_of_mixed(artifact: Mixed) -> dict[str, Origin]:
    """What each tensor is made of, by the fine-tune's names in canonical order."""
    return {record.info.name: _origin(artifact, record) for record in artifact.index.tensors}


def _origin(artifact: Mixed, record: MixedRecord) -> Origin:
    if record.mode == WHOLE:
        return Origin(record.info)
    assert record.base_dtype is not None
    base = TensorInfo(artifact.base_name(record), record.base_dtype, record.base_shape)
    changes = bool(record.parts or record.base_rows) or record.info.dtype is not record.base_dtype
    return Origin(record.info, base, record.base_digest, changes)


class MixedOnBase(OneTask):
    """The fine-tune that a mixed artifact makes of its base."""

    def __init__(self, artifact: Mixed, label: str, base: Checkpoint) -> None:
        super().__init__(artifact, label, base, "mixed")
        self.mixed = artifact
        self.origins = origins_of_mixed(artifact)

    def verify_stored(self) -> None:
        for record in self.mixed.index.tensors:
            if record.mode == WHOLE or record.base_rows:
                self._verify_whole(record)

    def _verify_whole(self, record: MixedRecord) -> None:
        dtype, size = record.info.dtype, record.whole_bytes
        offset, digest = dtype.nbytes(record.base_entries), TensorDigest(dtype, whole_shape(record))
        step = dtype.nbytes(16 * CHUNK)
        for at in range(0, size, step):
            part = self.room(min(step, size - at))
            self.mixed.read_whole(record, offset + at, part)
            digest.add(leaves(part, dtype))
        if digest.digest()[:SHORT] != record.whole_digest:
            message = f"{self.mixed.path}: tensor {record.info.name!r}, stored whole, was altered"
            raise BadFile(message, "fetch or make it again")

    def read_watched(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> None:
        record = self.mixed.records[name]
        dtype = record.info.dtype
        start, n = (at * 8 // dtype.bits for at in (offset, len(buffer)))
        from_base = clip(Tile(0, 0, start, start + n), record.base_entries)
        ours = buffer[: dtype.nbytes(from_base)]
        if from_base < n:
            self.mixed.read_whole(record, offset + len(ours), buffer[len(ours) :])
        if from_base:
            self._read_based(record, start, from_base, ours, witness)
        if witness is not None:
            witness.saw("result", name, start, leaves(buffer, dtype))

    def _read_based(self, record: MixedRecord, start: int, n: int, out: memoryview, witness: Witness | None) -> None:
        """Entries from `start` on of what stands on the base."""
        base, dtype = self.origins[record.info.name].base, record.info.dtype
        assert base is not None
        raw = self.room(base.dtype.nbytes(n))
        self.base.read_into(base.name, base.dtype.nbytes(start), raw)
        if witness is not None:
            witness.saw("base", record.info.name, start, leaves(raw, base.dtype))
        if record.mode == COPY:
            out[:] = raw
            return
        bits = cast_bits(CPU, np.frombuffer(raw, BITS[base.dtype.bits]), base.dtype, dtype)
        difference, ulps = self.mixed.difference(record, start, start + n), self.mixed.ulps(record, start, start + n)
        np.copyto(np.frombuffer(out, BITS[dtype.bits]), add_difference(bits, dtype, difference, ulps))
