"""What workers of a cluster do for the passes of a pack: inner products, and sums in encoded blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from peru_cli.artifacts.packs.pack import Sums
from peru_cli.artifacts.packs.superposed import BLOCK_ENTRIES
from peru_cli.artifacts.packs.writer import encode_sums
from peru_cli.streaming.tiles import Tile

Table = np.ndarray[Any, np.dtype[np.float64]]
Leaves = tuple[str, int, bytes]  # tensor, first entry, digests of the chunks from there on


class Step(Protocol):
    """A pass as a worker runs it. If `noted` is a table, digests of what is read and made are put there, by what they are of."""

    noted: dict[object, list[Leaves]] | None

    def apply(self, tile: Tile, room: Any) -> Any:
        """Read the tile and compute."""
        ...


class PackStation(Protocol):
    """Where tiles are computed: the passes of one plan, and one thread's buffers."""

    room: Any

    def gather(self) -> Any:
        """The pass that measures."""
        ...

    def superpose(self, tasks: Sequence[str], exponents: Sequence[int]) -> Step:
        """The pass that adds up these tasks in these steps, one for each tensor with sums."""
        ...


@dataclass(frozen=True)
class Measuring:
    """Inner products of the task vectors. The reply has those of each tile."""

    def compute(self, station: PackStation, tiles: Sequence[Tile]) -> list[list[Table]]:
        """For each tile, a table for each piece."""
        step = station.gather()
        return [step.apply(tile, station.room) for tile in tiles]


@dataclass
class Part:
    """A run of the stream of sums. `head` completes the block that has begun before it, `tail` begins the next one; (n,) each."""

    head: Sums
    blocks: list[bytes]
    tail: Sums


@dataclass
class Superposed:
    """What comes of some tiles: sums, and what is told of each tile. `noted` are digests by what they are of."""

    part: Part
    tables: list[list[Table]] = field(default_factory=list)
    rounding: list[Table] = field(default_factory=list)
    noted: dict[object, list[Leaves]] = field(default_factory=dict)


@dataclass(frozen=True)
class Superposing:
    """Add up these tasks, and encode the blocks that are full. `first` is the place of the tiles' first entry in the stream of sums."""

    tasks: tuple[str, ...]
    exponents: tuple[int, ...]
    first: int

    def compute(self, station: PackStation, tiles: Sequence[Tile]) -> Superposed:
        """Sums, measurements and digests."""
        step = station.superpose(self.tasks, self.exponents)
        noted: dict[object, list[Leaves]] = {}
        step.noted = noted
        added = [step.apply(tile, station.room) for tile in tiles]
        part = cut(np.concatenate([each.sums for each in added]), -self.first % BLOCK_ENTRIES)
        return Superposed(part, [each.tables for each in added], [each.rounding for each in added], noted)


def cut(sums: Sums, head: int) -> Part:
    """Encode the blocks after `head` sums."""
    full = (len(sums) - head) // BLOCK_ENTRIES if len(sums) > head else 0
    end = min(head, len(sums)) + full * BLOCK_ENTRIES
    blocks = [encode_sums(sums[at : at + BLOCK_ENTRIES]) for at in range(min(head, len(sums)), end, BLOCK_ENTRIES)]
    return Part(sums[:head], blocks, sums[end:])
