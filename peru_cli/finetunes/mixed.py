"""A mixed artifact on its base: base + sums of products + plain differences -> the fine-tune's bits."""

from __future__ import annotations

import numpy as np

from peru_cli.artifacts.mixed.index import MixedRecord
from peru_cli.artifacts.mixed.reader import Mixed
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.finetunes.fine_tune import OneTask, Witness
from peru_cli.methods.compact.delta import Bits
from peru_cli.methods.mixed.sums import add_difference


class MixedOnBase(OneTask):
    """The fine-tune given by a mixed artifact and its base."""

    def __init__(self, artifact: Mixed, label: str, base: Checkpoint) -> None:
        super().__init__(artifact, label, base, "mixed")
        self.mixed = artifact

    def change(self, record: MixedRecord, start: int, bits: Bits, witness: Witness | None) -> None:
        stop = start + len(bits)
        difference, ulps = self.mixed.difference(record, start, stop), self.mixed.ulps(record, start, stop)
        np.copyto(bits, add_difference(bits, record.info.dtype, difference, ulps))
