"""The journal of `peru prune`: the writer's state after each finished tensor, from which a killed run continues."""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from peru_cli.artifacts.codecs import PCO, decode, encode
from peru_cli.artifacts.index import Block, Stream
from peru_cli.artifacts.sparse_delta import Entries, News
from peru_cli.checkpoints.bundle import members
from peru_cli.checkpoints.local.journal import Journal
from peru_cli.methods.compact.magnitude import Threshold
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import Family
from peru_cli.vectors.selection import Select, Sink
from peru_cli.vectors.threshold_journal import Pace

_SLOTS = "slots before "
_MOST = 1 << 13  # tensors in a note, of which it holds digests as text
_FIELDS = [each.name for each in fields(Block) if each.name != "digest"]  # which is the last


@dataclass
class _Mark:
    """One task's state when a slot's last tile was committed; `blocks` counts the full ones."""

    threshold: Threshold
    changed: int
    quota: int
    not_finite: int
    largest_error: float
    energy: float
    missed: float
    blocks: int
    news: list[News]


def written_blocks(journal: Journal, number: int) -> list[Block]:
    """Blocks that a journal says a task has written, in file order."""
    return [
        _block(block)
        for key, value in journal.notes.items()
        if key.startswith(_SLOTS)
        for block in value["tasks"][number][7]
    ]  # fmt: skip


def _noted_block(block: Block) -> list[Any]:
    return [*(getattr(block, name) for name in _FIELDS), block.digest.hex()]  # as `astuple`, which copies every value


def _block(noted: Any) -> Block:
    return Block(*(*noted[:-1], bytes.fromhex(noted[-1])))


class PruneLog:
    """Records the pass over all slots, in order. A note covers the slots since the last note."""

    def __init__(self, journal: Journal, family: Family, select: Select, sinks: list[Sink]) -> None:
        self._journal, self._family, self._select, self._sinks = journal, family, select, sinks
        self._pace = Pace(family.ranged)
        self._lock = threading.Lock()
        self._left = list(family.entries)  # entries of each unfinished slot
        self._marks: dict[int, list[_Mark]] = {}  # by slot
        self._noted = self._finished = 0  # slots
        self._unnoted = 0  # tensors since the last mark
        self._blocks = [0 for _ in sinks]

    def restore(self, per_slot: bool) -> int:
        """Take over what an earlier run recorded. `per_slot` says that each slot has its own threshold. Returns the first slot
        that is left."""
        for key, value in self._journal.notes.items():
            if not key.startswith(_SLOTS):
                continue
            stop = int(key.removeprefix(_SLOTS))
            names = self._names(self._noted, stop)
            self._select.base_digests.found |= {name: bytes.fromhex(digest) for name, digest in zip(names, value["base"], strict=True)}
            for number, noted in enumerate(value["tasks"]):
                self._restore(number, names, noted, stop - self._noted if per_slot else 0)
            self._noted = stop
        self._left[: self._noted] = [0] * self._noted
        self._finished = self._noted
        return self._noted

    def _names(self, first: int, stop: int) -> list[str]:
        """Base tensors of some slots."""
        return [info.name for slot in self._family.slots[first:stop] for info in members(slot)]

    def _restore(self, number: int, names: list[str], noted: Any, slots: int) -> None:
        sink, pairs = self._sinks[number], self._family.tasks[number].pairs
        (key, equals), sink.changed, quota, sink.not_finite, sink.largest_error, sink.energy, sink.missed, blocks, news, tensors = noted
        threshold = Threshold(key, equals)
        if slots:  # each has its threshold
            sink.thresholds += [threshold] * slots
            sink.quotas += [0] * slots
        else:
            sink.thresholds, sink.quotas = [threshold], [quota]
        mine = [pairs[name].fine.name for name in names if name in pairs]
        for name, (digest, kept) in zip(mine, tensors, strict=True):
            sink.result.found[name], sink.kept[name] = bytes.fromhex(digest), kept
        decoded = [_block(block) for block in blocks]
        self._blocks[number] += len(decoded)
        sink.writer.go_on(decoded, [_decode(stream, each) for stream, each in zip(sink.streams, news, strict=True)])

    # -- on the way ---------------------------------------------------------------------------------------

    def reached(self, tile: Tile) -> None:
        """Remember the state after a slot's last tile."""
        if tile.stop < self._family.entries[tile.tensor]:
            return
        self._unnoted += len(members(self._family.slots[tile.tensor]))
        if self._pace.due() or self._unnoted >= _MOST:
            self._unnoted = 0
            self._marks[tile.tensor] = [self._mark(sink) for sink in self._sinks]

    @staticmethod
    def _mark(sink: Sink) -> _Mark:
        blocks, news = sink.writer.news()
        return _Mark(
            sink.thresholds[-1], sink.changed, sink.quotas[-1], sink.not_finite, sink.largest_error, sink.energy, sink.missed, blocks, news
        )  # fmt: skip

    def finished(self, tile: Tile) -> None:
        """Record slots that are finished together with all before them."""
        with self._lock:
            self._left[tile.tensor] -= tile.stop - tile.start
            while self._finished < len(self._left) and not self._left[self._finished]:
                slot = self._finished
                self._finished += 1
                if slot in self._marks:
                    self._note(self._marks.pop(slot))

    def _note(self, marks: list[_Mark]) -> None:
        names = self._names(self._noted, self._finished)
        base = [self._select.base_digests.digest(name).hex() for name in names]
        tasks = [self._noted_of(number, names, mark) for number, mark in enumerate(marks)]
        self._noted = self._finished
        self._journal.note(f"{_SLOTS}{self._noted}", {"base": base, "tasks": tasks})

    def _noted_of(self, number: int, names: list[str], mark: _Mark) -> Any:
        sink, pairs = self._sinks[number], self._family.tasks[number].pairs
        mine = [pairs[name].fine.name for name in names if name in pairs]
        blocks = sink.writer.blocks[self._blocks[number] : mark.blocks]
        self._blocks[number] = mark.blocks
        return [
            [mark.threshold.key, mark.threshold.equals], mark.changed, mark.quota, mark.not_finite, mark.largest_error,
            mark.energy, mark.missed,
            [_noted_block(block) for block in blocks], [_encode(news) for news in mark.news],
            [[sink.result.digest(name).hex(), sink.kept[name]] for name in mine],
        ]  # fmt: skip


def _encode(news: News) -> Any:
    """A stream's news as JSON: flags and numbers, the number of entries, and their positions (as gaps), values and exact differences."""
    found = [news.all, news.origin, news.kept]
    count = sum(len(e.positions) for e in news.entries)
    if not count:
        return [*found, 0]
    positions, values, apart = (
        np.concatenate(parts) for parts in zip(*((e.stream_positions, e.values, e.apart) for e in news.entries), strict=True)
    )
    gaps = np.diff(positions, prepend=0).astype(np.uint64)
    data = encode(gaps, PCO), encode(np.ascontiguousarray(values), PCO), apart.astype(apart.dtype.newbyteorder("<")).tobytes()
    return [*found, count, *(base64.b64encode(part).decode("ascii") for part in data)]


def _decode(stream: Stream, noted: Any) -> News:
    every, origin, kept, count, *data = noted
    news = News(every, origin, kept)
    if count:
        gaps, values, apart = map(base64.b64decode, data)
        width = stream.dtype.bits // 8
        news.entries.append(
            Entries(
                np.cumsum(decode(gaps, PCO, "uint64", count).astype(np.int64)),
                decode(values, PCO, stream.value_type, count),
                np.frombuffer(apart, f"<i{width}").astype(f"i{width}"),
            )
        )
    return news
