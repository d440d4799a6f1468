"""A sparse delta on its base: base + kept entries -> the fine-tune's bits."""

from __future__ import annotations

import numpy as np

from peru_cli.artifacts.index import TensorRecord
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.finetunes.decode import kept_bits
from peru_cli.finetunes.fine_tune import OneTask, Positions, Witness
from peru_cli.kernels.deltas import put
from peru_cli.methods.compact.delta import Bits


class DeltaOnBase(OneTask):
    """The fine-tune given by a sparse delta and its base."""

    def __init__(self, artifact: SparseDelta, label: str, base: Checkpoint) -> None:
        super().__init__(artifact, label, base, "sparse delta")
        self.delta = artifact

    def change(self, record: TensorRecord, start: int, bits: Bits, witness: Witness | None) -> Positions:
        found = kept_bits(self.delta, record, start, start + len(bits), bits.take)
        if found is None:
            return np.empty(0, np.int64)
        where, after = found
        differs = after != bits.take(where)
        put(bits, where, after)
        if witness is not None:
            witness.saw_kept(record.info.name, len(where))
        return where if differs.all() else where[differs]
