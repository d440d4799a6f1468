"""Tiles: contiguous runs of one tensor, small enough for the CPU cache, planned without listing them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, overload

from peru_cli.checkpoints.digests import CHUNK as CHUNK
from peru_cli.errors import UsageError

DEFAULT_TILE = 1 << 19  # entries; smaller tiles fit caches better, but two threads then wait for each other at every operation


class Tile(NamedTuple):
    """Entries `start` to `stop` of the tensor with index `tensor`; `number` counts tiles in canonical order."""

    number: int
    tensor: int
    start: int
    stop: int

    @property
    def runs(self) -> Sequence[tuple[int, int]]:
        """Its single run; a strip has several."""
        return ((self.start, self.stop),)


class Strip(NamedTuple):
    """Several runs of one tensor, `stop` entries in total. The engine treats it like a tile."""

    number: int
    tensor: int
    start: int
    stop: int
    runs: Sequence[tuple[int, int]]

    @classmethod
    def of(cls, number: int, tensor: int, runs: Sequence[tuple[int, int]]) -> Strip:
        """A strip of these runs, each given by start and stop."""
        return cls(number, tensor, 0, sum(stop - start for start, stop in runs), runs)


class TilePlan(Sequence[Tile]):
    """The tiles of tensors of given sizes, in canonical order, as a sequence that does not store them."""

    def __init__(self, entries: Sequence[int], tile_entries: int = DEFAULT_TILE) -> None:
        if tile_entries < CHUNK or tile_entries % CHUNK:
            raise UsageError(f"a tile of {tile_entries} entries is not a multiple of {CHUNK}")
        self._entries, self._tile = entries, tile_entries
        self._first = [0, *accumulate(-(-n // tile_entries) for n in entries)]

    def __len__(self) -> int:
        return self._first[-1]

    @overload
    def __getitem__(self, index: int) -> Tile: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tile]: ...
    def __getitem__(self, index: int | slice) -> Tile | Sequence[Tile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        tensor = bisect_right(self._first, index) - 1
        start = (index - self._first[tensor]) * self._tile
        return Tile(index, tensor, start, min(start + self._tile, self._entries[tensor]))
