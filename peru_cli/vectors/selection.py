"""The pass that writes sparse deltas: select entries, digest base and result, fill and encode blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from peru_cli.artifacts.index import EXACT, Stream
from peru_cli.artifacts.sparse_delta import BlockWriter, Entries, FilledBlock, encode_block
from peru_cli.checkpoints.bundle import Bundle, members
from peru_cli.checkpoints.digests import KnownDigest, TensorDigest
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.methods.compact.magnitude import Threshold
from peru_cli.streaming.aligned import read_bits
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.engine import Reads, expect
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.candidates import Candidates, Chosen, Leaves, Rule, find_candidates, leaves_of
from peru_cli.vectors.family import Buffers, Family, Station


@dataclass
class Sink:
    """Where one task's kept entries go, with running counts."""

    writer: BlockWriter
    streams: list[Stream]
    octaves: bool = False  # of rounded values, keep only sign and octave above the threshold
    thresholds: list[Threshold] = field(default_factory=list)  # one for each slot, or one for all
    quotas: list[int] = field(default_factory=list)  # equals that may still be taken, by threshold
    foreseen: dict[tuple[int, int], int] | None = None  # equals of the last threshold in each tile, by slot and first entry
    scales: list[float] = field(default_factory=list)  # of signs, one for each slot, if values are stored as signs
    kept: dict[str, int] = field(default_factory=dict)  # by the fine-tune's tensor name
    result: dict[str, TensorDigest] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)  # stream position of a base tensor's first entry
    changed: int = 0  # entries, if thresholds were searched for
    not_finite: int = 0  # kept entries whose difference is NaN or infinite
    largest_error: float = 0.0  # largest rounding error
    energy: float = 0.0  # squared norm of the task vector's finite entries; 0 if nothing is lost
    missed: float = 0.0  # squared norm of the rebuilt fine-tune minus the original, over the same entries

    @property
    def relative_error(self) -> float:
        """Norm of what is lost over the norm of the task vector, to four digits: the same for all tiles, threads and devices."""
        return float(f"{math.sqrt(self.missed / self.energy):.4g}") if self.missed else 0.0

    def add_threshold(self, threshold: Threshold, foreseen: dict[tuple[int, int], int] | None = None) -> None:
        """Add the threshold of the next slot, or of all slots."""
        self.thresholds.append(threshold)
        self.quotas.append(threshold.equals or 0)
        self.foreseen = foreseen

    def rule(self, tile: Tile) -> Rule:
        """What apply needs to know of a tile's threshold."""
        number = self.threshold_number(tile)
        exact = frozenset(stream.dtype.name for stream in self.streams if stream.values == EXACT)
        scale = self.scales[tile.tensor] if self.scales else None
        return Rule(self.thresholds[number], self.quotas[number], exact, self.octaves, scale)

    def threshold_number(self, tile: Tile) -> int:
        """The index of a tile's threshold."""
        return tile.tensor if len(self.thresholds) > 1 else 0

    def stream_number(self, dtype: Dtype) -> int:
        """The index of a dtype's stream."""
        return next(i for i, stream in enumerate(self.streams) if stream.dtype is dtype)


class Watcher(Protocol):
    """Is told of the pass's progress."""

    def reached(self, tile: Tile) -> None:
        """A tile was committed. Called in canonical order."""
        ...

    def finished(self, tile: Tile) -> None:
        """Everything that follows from a tile is done. Called from any thread."""
        ...


class Select:
    """One pass over the base and all tasks. `sinks` is parallel to the family's tasks."""

    def __init__(self, family: Family, sinks: list[Sink]) -> None:
        self._family, self._sinks = family, sinks
        self.watcher: Watcher | None = None
        self._room: Buffers | None = None  # for tiles that are computed again
        self._filled: dict[int, list[tuple[Sink, int]]] = {}  # by tile: tickets of blocks that workers encode
        self._ordered: list[int] = []  # by task: equals in tiles that workers have, if they are foreseen
        self._lossless = False  # on the CPU: then a pass changes no tile, and tensors in memory are not copied
        self.follow = False  # of a lossless pass: turn the base's tensors in memory into those of the only task
        self.base_digests = {info.name: TensorDigest(info.dtype, info.shape) for slot in family.slots for info in members(slot)}
        for pairs, sink in zip(family.pairs, sinks, strict=True):
            lengths = [0] * len(sink.streams)
            for slot in family.slots:
                if (pair := pairs.get(slot.name)) is not None:
                    number = sink.stream_number(pair.fine.dtype)
                    sink.offsets[slot.name] = lengths[number]
                    lengths[number] += pair.entries
                    for info in members(pair.fine):
                        sink.kept[info.name] = 0
                        sink.result[info.name] = TensorDigest(info.dtype, info.shape)

    def buffers(self) -> Buffers:
        exact = all(stream.values == EXACT for sink in self._sinks for stream in sink.streams)
        all_kept = all(threshold.keeps_all for sink in self._sinks for threshold in sink.thresholds)
        self._lossless = exact and all_kept and self._family.how.xp is CPU
        return self._family.buffers()

    def reads(self) -> Reads:
        return self._family.reads(self._family.slots, range(len(self._family.tasks)))

    def apply(self, tile: Tile, buffers: Buffers) -> list[Candidates]:
        slot = self._family.slots[tile.tensor]
        raw, base_bits = read_bits(self._family.base, slot, tile, buffers.base, self._lossless)
        if len(raw) and not isinstance(self.base_digests[members(slot)[0].name], KnownDigest):
            for name, start, found in leaves_of(slot, tile.start, raw):
                self.base_digests[name].add_at(start, found)
        aligned = self._family.each(slot, tile, base_bits, buffers, range(len(self._sinks)), self._lossless)
        result = [find_candidates(self._family, a, self._sinks[a.task].rule(tile), buffers) for a in aligned]
        for c in result if self.follow else ():
            if c.aligned.base is base_bits:
                CPU.put(base_bits, c.positions, c.bits)
        return result

    def commit(self, tile: Tile, result: list[Candidates]) -> list[tuple[Candidates, list[FilledBlock]]]:
        committed = [(c, self._take(tile, self._choose(tile, c))) for c in result]
        if self.watcher is not None:
            self.watcher.reached(tile)
        return committed

    def _choose(self, tile: Tile, c: Candidates) -> Chosen:
        """Settle which equals stay, now that all earlier tiles are committed."""
        rule = self._sinks[c.aligned.task].rule(tile)
        return c.choose(rule.threshold, rule.quota, self._family.tasks[c.aligned.task])

    def _take(self, tile: Tile, chosen: Chosen) -> list[FilledBlock]:
        sink, pair = self._sinks[chosen.task], self._family.pairs[chosen.task][self._family.slots[tile.tensor].name]
        sink.quotas[sink.threshold_number(tile)] -= chosen.equals
        for energy, missed in zip(chosen.energy.tolist(), chosen.missed.tolist(), strict=True):
            sink.energy += energy
            sink.missed += missed
        if not len(chosen.positions):
            return []
        sink.not_finite += chosen.not_finite
        sink.largest_error = max(sink.largest_error, chosen.largest_error)
        if isinstance(pair.fine, Bundle):
            upto = np.searchsorted(chosen.positions, pair.fine.ends).tolist()
            for info, before, after in zip(pair.fine.members, [0, *upto], upto, strict=False):
                sink.kept[info.name] = after - before
        else:
            sink.kept[pair.fine.name] += len(chosen.positions)
        entries = Entries(chosen.positions, chosen.values, chosen.apart, sink.offsets[pair.base.name] + tile.start)
        return sink.writer.add(sink.stream_number(pair.fine.dtype), entries)

    def finish(self, tile: Tile, committed: list[tuple[Candidates, list[FilledBlock]]], buffers: Buffers) -> None:
        for c, blocks in committed:
            sink = self._sinks[c.aligned.task]
            for name, start, found in c.rebuilt(tile.start):
                sink.result[name].add_at(start, found)
            for block in blocks:
                sink.writer.write(block)
        if self.watcher is not None:
            self.watcher.finished(tile)

    # -- on other machines (streaming/cluster.py) -----------------------------------------------------------

    @property
    def inputs(self) -> int:
        """Models that each tile is read from."""
        return 1 + len(self._sinks)

    def order(self, tiles: Sequence[Tile]) -> Selecting:
        """What a worker needs to know of these tiles, which share their threshold."""
        rules = [sink.rule(tiles[0]) for sink in self._sinks]
        self._ordered = self._ordered or [0] * len(rules)
        for number, sink in enumerate(self._sinks):
            if sink.foreseen is not None:
                rules[number] = replace(rules[number], quota=max(0, rules[number].quota - self._ordered[number]))
                self._ordered[number] += sum(sink.foreseen.get((tile.tensor, tile.start), 0) for tile in tiles)
        return Selecting(rules)

    def take(self, tile: Tile, reply: Selected) -> list[Callable[[], Any]]:
        """Commit a worker's tile. Returns the blocks to encode, as calls."""
        for name, start, found in reply.base:
            self.base_digests[name].add_at(start, found)
        filled: list[tuple[Sink, FilledBlock]] = []
        for chosen, digests, counted_on in reply.tasks:
            sink = self._sinks[chosen.task]
            if sink.foreseen is not None:
                self._ordered[chosen.task] -= sink.foreseen.get((tile.tensor, tile.start), 0)
            quota = sink.quotas[sink.threshold_number(tile)]
            if chosen.equals > quota or (counted_on < quota and chosen.equals == counted_on):
                # Tiles that were in work at the same time have taken equals that this one counted on, or left more than it knew.
                chosen, digests, _ = self._again(tile, chosen.task)
            for name, start, found in digests:
                sink.result[name].add_at(start, found)
            filled += [(sink, block) for block in self._take(tile, chosen)]
        self._filled[tile.number] = [(sink, block.ticket) for sink, block in filled]
        if self.watcher is not None:
            self.watcher.reached(tile)
        return [partial(encode_block, sink.streams[block.stream], block) for sink, block in filled]

    def _again(self, tile: Tile, task: int) -> tuple[Chosen, Leaves, int]:
        """One task's part of a tile, computed here: at most once for each tile in work when a threshold's quota is used up, if it was not
        foreseen in which tile that is."""
        self._room = self._room or self.buffers()
        [found] = Selecting([sink.rule(tile) for sink in self._sinks]).tile(Station(self._family, self._room), tile, [task]).tasks
        return found

    def done(self, tile: Tile, made: Sequence[Any]) -> None:
        """Write a tile's encoded blocks."""
        for (sink, ticket), (block, data) in zip(self._filled.pop(tile.number), made, strict=True):
            sink.writer.put(ticket, block, data)
        if self.watcher is not None:
            self.watcher.finished(tile)


@dataclass
class Selected:
    """A worker's reply for one tile: the base's digests; for each task what it keeps, and digests of what is rebuilt from that."""

    base: Leaves
    tasks: list[tuple[Chosen, Leaves, int]]  # and how many equals each might have kept


@dataclass(frozen=True)
class Selecting:
    """A worker's order: select by these rules, one for each task. Their quotas are those of the first tile."""

    rules: list[Rule]

    def compute(self, station: Station, tiles: Sequence[Tile]) -> list[Selected]:
        """Replies for some tiles."""
        family = station.family
        expect(family.reads(family.slots, range(len(family.tasks))), tiles)
        replies, rules = list[Selected](), list(self.rules)
        for tile in tiles:
            replies.append(Selecting(rules).tile(station, tile, range(len(family.tasks))))
            for chosen, _, quota in replies[-1].tasks:
                rules[chosen.task] = replace(rules[chosen.task], quota=quota - chosen.equals)
        return replies

    def tile(self, station: Station, tile: Tile, wanted: Sequence[int]) -> Selected:
        """The reply for one tile and some of the tasks."""
        family, buffers = station.family, station.buffers
        slot = family.slots[tile.tensor]
        raw, base_bits = read_bits(family.base, slot, tile, buffers.base)
        reply = Selected(list(leaves_of(slot, tile.start, raw)) if len(raw) else [], [])
        for aligned in family.each(slot, tile, base_bits, buffers, wanted):
            rule = self.rules[aligned.task]
            candidates = find_candidates(family, aligned, rule, buffers)
            chosen = candidates.choose(rule.threshold, rule.quota, family.tasks[aligned.task])
            digests = list(candidates.rebuilt(tile.start))
            chosen.positions = chosen.positions.astype(np.int32 if tile.stop - tile.start <= 1 << 31 else np.int64)  # half to send
            reply.tasks.append((chosen, digests, rule.quota))
        return reply
