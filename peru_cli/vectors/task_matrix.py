"""The task vector of one weight as a matrix read in panels: the fine-tune minus the base cast to its dtype.

Of a bundle of weights of one shape, the matrix has their rows one below another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from peru_cli.checkpoints.bundle import cut
from peru_cli.checkpoints.pairing import Pair
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.methods.compact.delta import cast_bits
from peru_cli.methods.compact.lowrank import Matrix
from peru_cli.streaming.aligned import read_entries
from peru_cli.streaming.arrays import CPU, Host

_PANEL = 1 << 19  # entries of a row panel
_COLUMN_PANEL = 1 << 24  # entries of a column panel: its rows are read one by one, so they should be long
_TILE = 1 << 16  # entries subtracted at once, to stay in the CPU's cache


@dataclass
class TaskMatrix(Matrix):
    """Rows and columns as stored, from entry `start` of the tensor on. Panels are float32, or float64 if either tensor is."""

    fine: Checkpoint
    base: Checkpoint
    pair: Pair
    rows: int
    columns: int
    start: int
    device: torch.device
    _whole: torch.Tensor | None = None  # the only panel of a small matrix: it is read several times

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the panels."""
        return torch.float64 if "F64" in (self.pair.fine.dtype.name, self.pair.base.dtype.name) else torch.float32

    def row_panels(self) -> Iterator[tuple[int, torch.Tensor]]:
        if 0 < self.rows * self.columns <= _PANEL:
            yield 0, self._only_panel()
            return
        height = max(1, _PANEL // self.columns)
        room = torch.empty(min(height, self.rows) * self.columns, dtype=self.dtype)
        for first in range(0, self.rows, height):
            n = min(height, self.rows - first) * self.columns
            self._fill(first * self.columns, room[:n].numpy())
            yield first, room[:n].view(-1, self.columns).to(self.device)

    def _only_panel(self) -> torch.Tensor:
        if self._whole is None:
            panel = torch.empty(self.rows, self.columns, dtype=self.dtype)
            self._fill(0, panel.view(-1).numpy())
            self._whole = panel.to(self.device)
        return self._whole

    def column_panels(self) -> Iterator[tuple[int, torch.Tensor]]:
        if 0 < self.rows * self.columns <= _PANEL:
            yield 0, self._only_panel()
            return
        width = max(1, min(self.columns, _COLUMN_PANEL // self.rows))
        for first in range(0, self.columns, width):
            panel = torch.empty(self.rows, min(width, self.columns - first), dtype=self.dtype)
            if width == self.columns:
                self._fill(0, panel.view(-1).numpy())
            else:
                for row in range(self.rows):
                    self._fill(row * self.columns + first, panel[row].numpy())
            yield first, panel.to(self.device)

    def _fill(self, start: int, out: Host) -> None:
        """Write fine - base for `len(out)` entries from entry `start` of the matrix on."""
        fine, base = self.pair.fine, self.pair.base
        room = np.empty(min(_TILE, len(out)), out.dtype)
        for at in range(0, len(out), _TILE):
            part, entry = out[at : at + _TILE], self.start + start + at
            minuend = CPU.widen(read_entries(self.fine, fine, entry, len(part)), fine.dtype, part)
            cast = cast_bits(CPU, read_entries(self.base, base, entry, len(part)), base.dtype, fine.dtype)
            subtrahend = CPU.widen(cast, fine.dtype, room[: len(part)])
            np.subtract(minuend, subtrahend, out=part)
            # a sum reveals NaN and infinity faster than a search
            if not np.isfinite(part.sum()) and not np.isfinite(part).all():
                first = int(np.flatnonzero(~np.isfinite(part))[0])
                (mine, wrong_entry, _), (theirs, _, _) = (next(cut(info, entry + first, entry + first + 1)) for info in (fine, base))
                if np.isfinite(subtrahend[first]):
                    wrong = f"{self.fine.label}: {mine.name} differs from the base by NaN or infinity"
                else:
                    wrong = f"{self.base.label}: {theirs.name} is NaN or infinite"
                raise BadFile(f"{wrong} at entry {wrong_entry}", f"--per-task '^{re.escape(mine.name)}$' keeps it whole")
