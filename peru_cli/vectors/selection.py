"""The pass that writes sparse deltas: select entries, digest base and result, fill and encode blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

from peru_cli.artifacts.index import EXACT, Stream
from peru_cli.artifacts.sparse_delta import BlockWriter, Entries, FilledBlock
from peru_cli.checkpoints.bundle import members
from peru_cli.checkpoints.digests import Digests
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.methods.compact.magnitude import Threshold
from peru_cli.streaming.aligned import read_bits
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.engine import Reads
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.candidates import Candidates, Chosen, Rule, find_candidates, leaves_of
from peru_cli.vectors.family import Buffers, Family
from peru_cli.vectors.orders import Encoded, Encoding, Selecting, Taken, kept_by_tensor, stream_of


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
    result: Digests = field(default_factory=lambda: Digests(lambda name: None))
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

    @cached_property
    def exact(self) -> frozenset[str]:
        """Names of the dtypes whose differences are stored exactly."""
        return frozenset(stream.dtype.name for stream in self.streams if stream.values == EXACT)

    def rule(self, tile: Tile) -> Rule:
        """What apply needs to know of a tile's threshold."""
        number = self.threshold_number(tile)
        scale = self.scales[tile.tensor] if self.scales else None
        return Rule(self.thresholds[number], self.quotas[number], self.exact, self.octaves, scale)

    def threshold_number(self, tile: Tile) -> int:
        """The index of a tile's threshold."""
        return tile.tensor if len(self.thresholds) > 1 else 0

    def stream_number(self, dtype: Dtype) -> int:
        """The index of a dtype's stream."""
        return stream_of(self.streams, dtype)


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
        self._ahead: list[Ahead] = []  # by task, if workers compute
        self._lossless = False  # on the CPU: then a pass changes no tile, and tensors in memory are not copied
        self.follow = False  # of a lossless pass: turn the base's tensors in memory into those of the only task
        self.base_digests = Digests(family.base.tensors.get)
        for task, pairs, sink in zip(family.tasks, family.pairs, sinks, strict=True):
            sink.result = Digests(task.fine.tensors.get)
            lengths = [0] * len(sink.streams)
            for slot in family.slots:
                if (pair := pairs.get(slot.name)) is not None:
                    number = sink.stream_number(pair.fine.dtype)
                    sink.offsets[slot.name] = lengths[number]
                    lengths[number] += pair.entries
                    sink.kept |= dict.fromkeys((info.name for info in members(pair.fine)), 0)

    def base_digest(self, name: str) -> bytes:
        """The digest of a base tensor at the end, 32 bytes. With one task it is then forgotten."""
        return self.base_digests.take(name) if len(self._sinks) == 1 else self.base_digests.digest(name)

    @property
    def slots(self) -> list[str]:
        """The names of the family's slots."""
        return [slot.name for slot in self._family.slots]

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
        aligned = self._family.each(slot, tile, base_bits, buffers, range(len(self._sinks)), self._lossless)
        result = [find_candidates(self._family, a, self._sinks[a.task].rule(tile), buffers) for a in aligned]
        # After the comparison, which brings the tile into the cache faster than a digest does, since it waits for memory less.
        if len(raw) and members(slot)[0].name not in self.base_digests.found:
            leaves = list(leaves_of(slot, tile.start, raw))
            for name, start, found in leaves:
                self.base_digests.add_at(name, start, found)
            for c in result:
                if c.aligned.base is base_bits and not len(c.positions) and not len(c.aligned.grown):  # the result is the base's tile
                    c.leaves = [found for _, _, found in leaves]
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
        if not len(chosen.positions):
            self._count(tile, chosen, {})
            return []
        self._count(tile, chosen, dict(kept_by_tensor(pair.fine, chosen)))
        entries = Entries(chosen.positions, chosen.values, chosen.apart, sink.offsets[pair.base.name] + tile.start)
        return sink.writer.add(sink.stream_number(pair.fine.dtype), entries)

    def _count(self, tile: Tile, chosen: Chosen, kept: Mapping[str, int]) -> None:
        """Add up what is told of a tile; `kept` by the fine-tune's tensor."""
        sink = self._sinks[chosen.task]
        sink.quotas[sink.threshold_number(tile)] -= chosen.equals
        for energy, missed in zip(chosen.energy.tolist(), chosen.missed.tolist(), strict=True):
            sink.energy += energy
            sink.missed += missed
        sink.not_finite += chosen.not_finite
        sink.largest_error = max(sink.largest_error, chosen.largest_error)
        for name, entries in kept.items():
            sink.kept[name] += entries

    def finish(self, tile: Tile, committed: list[tuple[Candidates, list[FilledBlock]]], buffers: Buffers) -> None:
        for c, blocks in committed:
            sink = self._sinks[c.aligned.task]
            for name, start, found in c.rebuilt(tile.start):
                sink.result.add_at(name, start, found)
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
        self._ahead = self._ahead or [Ahead(sink) for sink in self._sinks]
        return Selecting([ahead.expected(tiles) for ahead in self._ahead], [sink.streams for sink in self._sinks])

    def take(self, tiles: Sequence[Tile], reply: list[list[Taken]]) -> Encoding:
        """Settle what is kept of a worker's tiles, and where in the streams that is."""
        rules, before = [ahead.rule(tiles[0]) for ahead in self._ahead], [list(ahead.kept) for ahead in self._ahead]
        again = [ahead.take(tiles[0], taken) for ahead, taken in zip(self._ahead, reply, strict=True)]
        tensors = {tile.tensor: self._family.slots[tile.tensor].name for tile in tiles}
        offsets = [{t: sink.offsets[name] for t, name in tensors.items() if name in sink.offsets} for sink in self._sinks]
        return Encoding(rules, any(again), [sink.streams for sink in self._sinks], before, offsets)

    def done(self, tiles: Sequence[Tile], reply: Encoded) -> None:
        """Commit a worker's tiles."""
        for name, start, found in reply.base:
            self.base_digests.add_at(name, start, found)
        for share in reply.shares:
            self._count(tiles[0], share.chosen, share.kept)
            for name, start, found in share.digests:
                self._sinks[share.chosen.task].result.add_at(name, start, found)
        for sink, parts in zip(self._sinks, reply.parts, strict=True):
            for number, part in parts.items():
                for block in sink.writer.splice(number, part):
                    sink.writer.write(block)
        if self.watcher is not None:
            self.watcher.reached(tiles[-1])  # what a tile in the middle has kept is not here
            for tile in tiles:
                self.watcher.finished(tile)


class Ahead:
    """What one task will have kept once the tiles that workers have are committed."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._quotas: dict[int, int] = {}  # by threshold, equals that may still be taken
        self._expected: dict[int, int] = {}  # the same after all tiles that were given out, if it is foreseen what they take
        self.kept = [stream.kept for stream in sink.streams]

    def rule(self, tile: Tile) -> Rule:
        """The rule of a tile whose turn it is."""
        rule = self._sink.rule(tile)
        return replace(rule, quota=self._quotas.setdefault(self._sink.threshold_number(tile), rule.quota))

    def expected(self, tiles: Sequence[Tile]) -> Rule:
        """The rule of tiles that are given out now, as far as it is known."""
        rule, foreseen = self.rule(tiles[0]), self._sink.foreseen
        if foreseen is None:
            return rule
        number = self._sink.threshold_number(tiles[0])
        quota = self._expected.get(number, rule.quota)
        self._expected[number] = max(0, quota - sum(foreseen.get((tile.tensor, tile.start), 0) for tile in tiles))
        return replace(rule, quota=quota)

    def take(self, tile: Tile, taken: Sequence[Taken]) -> bool:
        """Settle how much is kept of a batch that begins with this tile. Returns whether it was selected by too large a quota."""
        quota = self.rule(tile).quota
        surplus = False
        for stream, kept, equals in taken:
            too_many = max(0, equals - quota)
            quota -= equals - too_many
            self.kept[stream] += kept - too_many
            surplus |= too_many > 0
        self._quotas[self._sink.threshold_number(tile)] = quota
        return surplus
