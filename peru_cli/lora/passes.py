"""What all passes over low-rank targets share. A target is a module of an adapter or a weight of a full fine-tune."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.lora.writer import as_bytes, round_to
from peru_cli.lora.ranks import ModuleReport
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings


class TargetPass:
    """One tile for each target, on one device."""

    def __init__(self, how: StreamSettings, entries: Sequence[int]) -> None:
        """`entries`: of each target."""
        self.device, self._entries = torch.device(how.xp.name), entries

    def tiles(self) -> list[Tile]:
        """One tile for each target, as long as the number of its entries."""
        return [Tile(i, i, 0, n) for i, n in enumerate(self._entries)]

    def buffers(self) -> None:
        return None

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


class FactorPass(TargetPass):
    """The last pass: writes the factors of every target and measures their error."""

    def __init__(
        self, how: StreamSettings, entries: Sequence[int], ranks: Sequence[int], stored: Sequence[int], writer: CheckpointWriter
    ) -> None:
        """`ranks` are those of the contents, `stored` those of the tensors, which are filled with zeros."""
        super().__init__(how, entries)
        self._ranks, self._stored, self._writer = ranks, stored, writer
        self.reports: list[ModuleReport] = []

    def padded(self, left: torch.Tensor, right: torch.Tensor, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (rows, r) and (r, columns) with zeros up to the stored rank, on the CPU."""
        missing = stored - left.shape[1]
        return torch.nn.functional.pad(left, (0, missing)).cpu(), torch.nn.functional.pad(right, (0, 0, 0, missing)).cpu()

    def write(self, names: Sequence[str], factors: Sequence[torch.Tensor], dtype: Dtype, what: str) -> None:
        """Write a target's factors in a dtype. BadFile if a value does not fit it."""
        for name, factor in zip(names, factors, strict=True):
            self._writer.write(name, 0, as_bytes(round_to(factor, dtype, what)))

    def commit(self, tile: Tile, result: ModuleReport) -> None:
        self.reports.append(result)
