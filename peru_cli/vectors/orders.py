"""What workers of a cluster do for the pass that writes sparse deltas: select entries, then encode the blocks that they fill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from peru_cli.artifacts.index import Stream
from peru_cli.artifacts.sparse_delta import Entries, Part, encode_part
from peru_cli.checkpoints.bundle import Bundle
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.streaming.aligned import read_bits
from peru_cli.streaming.engine import expect
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.candidates import Chosen, Leaves, Rule, find_candidates, leaves_of
from peru_cli.vectors.family import Family, Station


def kept_by_tensor(fine: TensorInfo, chosen: Chosen) -> list[tuple[str, int]]:
    """How many entries of each tensor of the fine-tune a tile keeps."""
    if not isinstance(fine, Bundle):
        return [(fine.name, len(chosen.positions))]
    upto = np.searchsorted(chosen.positions, fine.ends).tolist()
    return [(info.name, after - before) for info, before, after in zip(fine.members, [0, *upto], upto, strict=False)]


def stream_of(streams: Sequence[Stream], dtype: Dtype) -> int:
    """The index of a dtype's stream."""
    return next(i for i, stream in enumerate(streams) if stream.dtype.name == dtype.name)


class Taken(NamedTuple):
    """How much one task keeps of some tiles in a row, all of one stream."""

    stream: int
    kept: int
    equals: int  # how many of them equal the threshold


@dataclass
class Picked:
    """What one task keeps of a tile, and digests of what is rebuilt from that."""

    chosen: Chosen
    digests: Leaves


@dataclass
class Selected:
    """What a tile keeps: the base's digests, and the tasks' entries."""

    base: Leaves
    tasks: list[Picked]


@dataclass(frozen=True)
class Selecting:
    """The first order: select by these rules, one for each task. Their quotas are those of the first tile.

    The reply is how much each task keeps of the tiles; the entries stay at the station."""

    rules: list[Rule]
    streams: list[list[Stream]]  # of each task

    def compute(self, station: Station, tiles: Sequence[Tile]) -> list[list[Taken]]:
        """How much each task keeps of these tiles, in order."""
        station.held[_place(tiles)] = selected = self.select(station, tiles)
        found: list[list[Taken]] = [[] for _ in self.rules]
        for tile, here in zip(tiles, selected, strict=True):
            for picked in here.tasks:
                chosen, mine = picked.chosen, found[picked.chosen.task]
                fine = station.family.pairs[chosen.task][station.family.slots[tile.tensor].name].fine
                stream = stream_of(self.streams[chosen.task], fine.dtype)
                if mine and mine[-1].stream == stream:
                    mine[-1] = Taken(stream, mine[-1].kept + len(chosen.positions), mine[-1].equals + chosen.equals)
                else:
                    mine.append(Taken(stream, len(chosen.positions), chosen.equals))
        return found

    def select(self, station: Station, tiles: Sequence[Tile]) -> list[Selected]:
        """What is kept of these tiles."""
        family = station.family
        expect(family.reads(family.slots, range(len(family.tasks))), tiles)
        found, rules = list[Selected](), list(self.rules)
        for tile in tiles:
            found.append(_select(station, tile, rules))
            for picked in found[-1].tasks:
                number = picked.chosen.task
                rules[number] = replace(rules[number], quota=rules[number].quota - picked.chosen.equals)
        return found


def _place(tiles: Sequence[Tile]) -> tuple[int, int]:
    return tiles[0].tensor, tiles[0].start


def _select(station: Station, tile: Tile, rules: Sequence[Rule]) -> Selected:
    family, buffers = station.family, station.buffers
    slot = family.slots[tile.tensor]
    raw, base_bits = read_bits(family.base, slot, tile, buffers.base)
    found = Selected(list(leaves_of(slot, tile.start, raw)) if len(raw) else [], [])
    for aligned in family.each(slot, tile, base_bits, buffers, range(len(rules))):
        rule = rules[aligned.task]
        candidates = find_candidates(family, aligned, rule, buffers)
        chosen = candidates.choose(rule.threshold, rule.quota, family.tasks[aligned.task])
        digests = list(candidates.rebuilt(tile.start))
        chosen.positions = chosen.positions.astype(np.int32 if tile.stop - tile.start <= 1 << 31 else np.int64)  # half to hold and send
        found.tasks.append(Picked(chosen, digests))
    return found


@dataclass
class Share:
    """What is told of one task's part of some tiles: their entries are elsewhere."""

    chosen: Chosen  # without entries; energy and missed by chunk, in order
    kept: dict[str, int] = field(default_factory=dict)  # by the fine-tune's tensor
    digests: Leaves = field(default_factory=list)


@dataclass
class Encoded:
    """The reply to the second order."""

    base: Leaves
    shares: list[Share]  # of tasks that have any of these tiles
    parts: list[dict[int, Part]]  # by task and stream


@dataclass(frozen=True)
class Encoding:
    """The second order: encode the entries. Should they not be here any more, or not be right, they are selected by these rules."""

    rules: list[Rule]
    again: bool  # whether the rules have changed
    streams: list[list[Stream]]  # of each task
    before: list[list[int]]  # entries in each of them before these tiles
    offsets: list[dict[int, int]]  # of each task, the stream position of a slot's first entry

    def compute(self, station: Station, tiles: Sequence[Tile]) -> Encoded:
        """Encoded blocks, and what is told of the tiles."""
        held = station.held.pop(_place(tiles), None)
        selected = held if held is not None and not self.again else Selecting(self.rules, self.streams).select(station, tiles)
        reply = Encoded(_joined(leaf for here in selected for leaf in here.base), [], [])
        for task, (streams, before) in enumerate(zip(self.streams, self.before, strict=True)):
            mine = [
                (tile, picked) for tile, here in zip(tiles, selected, strict=True) for picked in here.tasks if picked.chosen.task == task
            ]
            if mine:
                reply.shares.append(_share(station.family, mine))
            entries = self._entries(station.family, task, mine)
            reply.parts.append({number: encode_part(number, streams[number], found, before[number]) for number, found in entries.items()})
        return reply

    def _entries(self, family: Family, task: int, mine: Sequence[tuple[Tile, Picked]]) -> dict[int, list[Entries]]:
        """A task's entries by stream."""
        found: dict[int, list[Entries]] = {}
        for tile, picked in mine:
            chosen = picked.chosen
            if len(chosen.positions):
                fine = family.pairs[task][family.slots[tile.tensor].name].fine
                shift = self.offsets[task][tile.tensor] + tile.start
                stream = found.setdefault(stream_of(self.streams[task], fine.dtype), [])
                stream.append(Entries(chosen.positions, chosen.values, chosen.apart, shift))
        return found


def _share(family: Family, mine: Sequence[tuple[Tile, Picked]]) -> Share:
    """What is told of one task's tiles."""
    every = [picked.chosen for _, picked in mine]
    energy, missed = (np.concatenate(arrays) for arrays in zip(*((c.energy, c.missed) for c in every), strict=True))
    none, task = every[0].positions[:0], every[0].task
    errors, infinite = max(c.largest_error for c in every), sum(c.not_finite for c in every)
    share = Share(Chosen(task, sum(c.equals for c in every), none, none, none, energy, missed, infinite, errors))
    for tile, picked in mine:
        for name, entries in kept_by_tensor(family.pairs[task][family.slots[tile.tensor].name].fine, picked.chosen):
            share.kept[name] = share.kept.get(name, 0) + entries
    share.digests = _joined(leaf for _, picked in mine for leaf in picked.digests)
    return share


def _joined(found: Iterable[tuple[str, int, bytes]]) -> Leaves:
    """Digests of tiles that follow each other, put together."""
    runs: list[tuple[str, int, list[bytes]]] = []
    for name, start, digests in found:
        if runs and runs[-1][0] == name:
            runs[-1][2].append(digests)
        else:
            runs.append((name, start, [digests]))
    return [(name, start, b"".join(digests)) for name, start, digests in runs]
