"""A sparse delta on its base: base + kept entries -> the fine-tune's bits."""

from __future__ import annotations

import numpy as np

from peru_cli.artifacts.index import DELTA, WHOLE, TensorRecord
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.digests import leaves
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.finetunes.decode import kept_bits
from peru_cli.finetunes.fine_tune import OneTask, Origin, Witness
from peru_cli.methods.delta import cast_bits
from peru_cli.streaming.aligned import clip
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.tiles import Tile


def origins_of_delta(artifact: SparseDelta) -> dict[str, Origin]:
    """What each tensor is made of, by the fine-tune's names in canonical order."""
    return {record.info.name: _origin(artifact, record) for record in artifact.index.tensors}


def _origin(artifact: SparseDelta, record: TensorRecord) -> Origin:
    if record.mode == WHOLE:
        return Origin(record.info)
    assert record.base_dtype is not None
    base = TensorInfo(artifact.base_name(record), record.base_dtype, record.base_shape)
    same = record.info.dtype is record.base_dtype and not record.base_rows
    changes = not same or (record.mode == DELTA and bool(record.kept))
    return Origin(record.info, base, record.base_digest, changes, record.kept)


class DeltaOnBase(OneTask):
    """The fine-tune that a sparse delta makes of its base."""

    def __init__(self, artifact: SparseDelta, label: str, base: Checkpoint) -> None:
        super().__init__(artifact, label, base, "sparse delta")
        self.delta = artifact
        self.origins = origins_of_delta(artifact)

    def verify_stored(self) -> None:
        for record in self.delta.index.tensors:
            self.delta.verify_whole(record)

    def read_watched(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> None:
        record = self.delta.records[name]
        dtype = record.info.dtype
        start, n = (at * 8 // dtype.bits for at in (offset, len(buffer)))
        from_base = clip(Tile(0, 0, start, start + n), record.base_entries)
        ours = buffer[: dtype.nbytes(from_base)]
        if from_base < n:
            self.delta.read_whole(record, offset + len(ours), buffer[len(ours) :])
        if from_base:
            self._read_base(record, start, ours, witness)
            if record.mode == DELTA:
                bits = np.frombuffer(ours, BITS[dtype.bits])
                if (found := kept_bits(self.delta, record, start, start + from_base, bits.take)) is not None:
                    bits[found[0]] = found[1]
                    if witness is not None:
                        witness.saw_kept(name, len(found[0]))
        if witness is not None:
            witness.saw("result", name, start, leaves(buffer, dtype))

    def _read_base(self, record: TensorRecord, start: int, out: memoryview, witness: Witness | None) -> None:
        """The base's entries from `start` on in the fine-tune's dtype."""
        origin, dtype = self.origins[record.info.name], record.info.dtype
        assert origin.base is not None
        had = origin.base.dtype
        raw = out if had is dtype else self.room(had.nbytes(len(out) * 8 // dtype.bits))
        self.base.read_into(origin.base.name, had.nbytes(start), raw)
        if witness is not None:
            witness.saw("base", record.info.name, start, leaves(raw, had))
        if had is not dtype:
            np.copyto(np.frombuffer(out, BITS[dtype.bits]), cast_bits(CPU, np.frombuffer(raw, BITS[had.bits]), had, dtype))
