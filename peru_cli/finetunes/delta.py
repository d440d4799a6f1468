"""A sparse delta on its base: base + kept entries -> the fine-tune's bits."""

from __future__ import annotations

import numpy as np

from peru_cli.artifacts.index import EXACT, TensorRecord
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.bundle import Bundle, bundle, pieces_of
from peru_cli.checkpoints.digests import leaves
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.finetunes.decode import decode_bits
from peru_cli.finetunes.fine_tune import OneTask, Positions, Witness
from peru_cli.kernels.deltas import add_ulps, put
from peru_cli.methods.compact.delta import Bits
from peru_cli.streaming.arrays import BITS


class DeltaOnBase(OneTask):
    """The fine-tune given by a sparse delta and its base."""

    def __init__(self, artifact: SparseDelta, label: str, base: Checkpoint) -> None:
        super().__init__(artifact, label, base, "sparse delta")
        self.delta = artifact

    def read_bundle_watched(self, info: Bundle, buffer: memoryview, witness: Witness | None) -> None:
        parts = list(pieces_of(info, 0, buffer))  # the tensors that have entries
        origins = [self.origins[member.name] for member, _, _ in parts]
        bases = [of.base for of in origins if of.base is not None and (of.base.dtype, of.base.shape) == (of.info.dtype, of.info.shape)]
        ends = np.cumsum([member.entries for member, _, _ in parts])
        records = [self.single.records[member.name] for member, _, _ in parts]
        found = self.delta.together(records, np.concatenate([[0], ends[:-1]])) if len(bases) == len(parts) else None
        if found is None:
            super().read_bundle_watched(info, buffer, witness)
            return
        stream, entries, counts = found
        below = bundle(bases)
        if isinstance(below, Bundle):
            self.base.read_bundle(below, 0, buffer)
        else:
            self.base.read_into(below.name, 0, buffer)
        if witness is not None:
            for member, _, piece in parts if witness.watches("base") else ():
                witness.saw("base", member.name, 0, leaves(piece, info.dtype))
        if stream is not None and len(entries.positions):
            bits = np.frombuffer(buffer, BITS[info.dtype.bits])
            put(bits, entries.positions, decode_bits(bits.take(entries.positions), entries, stream.values, info.dtype))
        if witness is not None:
            for (member, _, piece), count in zip(parts, counts.tolist(), strict=True):
                witness.saw("result", member.name, 0, leaves(piece, info.dtype))
                witness.saw_kept(member.name, count)

    def change(self, record: TensorRecord, start: int, bits: Bits, witness: Witness | None) -> Positions:
        stream, entries = self.delta.entries(record, start, start + len(bits))
        where = entries.positions
        if witness is not None:
            witness.saw_kept(record.info.name, len(where))
        if stream is None or not len(where):
            return np.empty(0, np.int64)
        moved: Positions
        if stream.values == EXACT and bits.itemsize > 1:
            moved = add_ulps(bits, where, entries.values.astype(bits.dtype, copy=False))
            return moved
        before = bits.take(where)
        after = decode_bits(before, entries, stream.values, record.info.dtype)
        put(bits, where, after)
        moved = where[after != before]
        return moved
