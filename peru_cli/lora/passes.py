"""What all passes over low-rank targets share. A target is a module of an adapter or a weight of a full fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.lora.writer import as_bytes, round_to
from peru_cli.errors import BadFile
from peru_cli.lora.ranks import ModuleReport
from peru_cli.methods.compact.stacks import Round
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings


class TargetPass:
    """One tile for each group of targets, on one device."""

    def __init__(self, how: StreamSettings, entries: Sequence[int], groups: Sequence[Sequence[int]] | None = None) -> None:
        """`entries`: of each target. `groups`: numbers of targets that share a tile; without it, each has its own."""
        self.device, self._entries = torch.device(how.xp.name), entries
        self.groups = groups if groups is not None else [[number] for number in range(len(entries))]

    def tiles(self) -> list[Tile]:
        """One tile for each group, as long as the number of its entries."""
        return [Tile(i, i, 0, sum(self._entries[number] for number in group)) for i, group in enumerate(self.groups)]

    def buffers(self) -> None:
        return None

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


class FactorPass(TargetPass):
    """The last pass: writes the factors of every target and measures their error."""

    def __init__(
        self,
        how: StreamSettings,
        entries: Sequence[int],
        ranks: Sequence[int],
        stored: Sequence[int],
        writer: CheckpointWriter,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`ranks` are those of the contents, `stored` those of the tensors, which are filled with zeros."""
        super().__init__(how, entries, groups)
        self._ranks, self._stored, self._writer = ranks, stored, writer
        self._reports: dict[int, ModuleReport] = {}

    def padded(self, left: torch.Tensor, right: torch.Tensor, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors (..., rows, r) and (..., r, columns) with zeros up to the stored rank, on the CPU."""
        missing = stored - left.shape[-1]
        return torch.nn.functional.pad(left, (0, missing)).cpu(), torch.nn.functional.pad(right, (0, 0, 0, missing)).cpu()

    def write(
        self, names: Sequence[tuple[str, str]], factors: tuple[torch.Tensor, torch.Tensor], dtype: Dtype, targets: Sequence[str]
    ) -> None:
        """Write the factors of n targets in a dtype. BadFile, which names the target, if a value does not fit it.

        Args:
            names: of A and B of each target.
            factors: all A and all B, each (n, ...)."""
        rounded = each_named(partial(round_to, dtype=dtype), targets)
        pieces = [_pieces(as_bytes(rounded(factor)), len(targets)) for factor in factors]
        self._writer.write_whole([part for pair in zip(*pieces, strict=True) for part in pair], [name for pair in names for name in pair])

    def commit(self, tile: Tile, result: list[ModuleReport]) -> None:
        self._reports.update(zip(self.groups[tile.tensor], result, strict=True))

    @property
    def reports(self) -> list[ModuleReport]:
        """What became of each target, in order; after the run."""
        return [self._reports[number] for number in range(len(self._entries))]


def _pieces(data: memoryview, n: int) -> list[memoryview]:
    """Bytes cut into n pieces of one length."""
    size = len(data) // n
    return [data[i * size : (i + 1) * size] for i in range(n)]


def each_named(rounded: Callable[..., torch.Tensor], targets: Sequence[str]) -> Round:
    """`rounded(tensor, what=name)` for a stack of matrices of several targets, as many of each: what it refuses is named."""

    def of(stack: torch.Tensor) -> torch.Tensor:
        try:
            return rounded(stack, what=targets[0])
        except BadFile:
            for target, part in zip(targets, stack.chunk(len(targets)), strict=True):
                rounded(part, what=target)
            raise

    return of
