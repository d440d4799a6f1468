"""Write artifacts of kind `sparse-delta`: one fine-tune as base plus kept entries.

Blocks are filled in canonical order, encoded by the thread that filled them, and written in order again. The bytes depend
on nothing but the entries."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from peru_cli.artifacts.codecs import encode
from peru_cli.artifacts.container import FORMAT, ContainerWriter
from peru_cli.artifacts.index import EXACT, NOT_ROUNDED, STORED, Block, Index, SideFile, Stream, TensorRecord, encode_index
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.local.atomic import PartialFile
from peru_cli.errors import BadFile
from peru_cli.kernels.deltas import gaps

KIND = "sparse-delta"

# Metadata of this kind without the container's digest, and the form of each value (docs/format.md, "Metadata").
_COUNT = "0|[1-9][0-9]{0,18}"
_DECIMAL = r"inf|(0|[1-9][0-9]*)(\.[0-9]+)?(e[+-][0-9]+)?"
METADATA = {
    "peru.format": "1",
    "peru.kind": "sparse-delta",
    "peru.task": r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}",
    "peru.prefix": r"([+-].+)?",
    "peru.density": r"lossless|1|[1-9][0-9]*/[1-9][0-9]*",
    "peru.entries": _COUNT,
    "peru.kept": _COUNT,
    "peru.changed": _COUNT,
    "peru.result": "[0-9a-f]{64}",
    "peru.base": "(?s:.+)",
    "peru.base.files": "[0-9a-f]{64}(,[0-9a-f]{64})*",
    "peru.scope": "global|tensor|sign",
    "peru.threshold": _DECIMAL,
    "peru.largest_error": _DECIMAL,
}
OPTIONAL = {"peru.base", "peru.base.files", "peru.scope", "peru.threshold", "peru.largest_error"}
Array = np.ndarray[Any, np.dtype[Any]]


def check_metadata(metadata: Mapping[str, str]) -> None:
    """Reject metadata that is invalid for this kind. Unknown keys are ignored."""
    for key, form in METADATA.items():
        if key not in metadata and key not in OPTIONAL:
            raise BadFile(f"its metadata lacks {key!r}")
        if key in metadata and not re.fullmatch(form, metadata[key]):
            raise BadFile(f"its metadata has {key!r} as {metadata[key][:80]!r}")


def short_digest(data: bytes | memoryview) -> bytes:
    """The digest of blocks and side files that the index stores."""
    return blake3(data).digest()[:SHORT]


@dataclass
class Entries:
    """Kept entries in ascending order: positions (k,), values (k,), exact differences of those stored apart.

    Positions count from `shift` in the stream; `stream_positions` from its beginning. `scale` goes with values of kind SIGN."""

    positions: Array
    values: Array
    apart: Array
    shift: int = 0
    scale: float = 0.0

    @property
    def stream_positions(self) -> Array:
        """int64 (k,)."""
        return np.add(self.positions, self.shift, dtype=np.int64) if self.shift else self.positions.astype(np.int64, copy=False)


@dataclass
class FilledBlock:
    """A block's entries, ready to encode; `ticket` is its place in the file."""

    ticket: int
    stream: int
    origin: int
    parts: list[Entries]


@dataclass
class News:
    """How a stream has changed since the last call: its entries outside of blocks, `all` of them or only the new ones.

    `origin` is where the next block's gaps count from, `kept` the number of entries in the stream."""

    all: bool
    origin: int = 0
    kept: int = 0
    entries: list[Entries] = field(default_factory=list)


class _Filler:
    """Cuts one stream into blocks."""

    def __init__(self, number: int, stream: Stream) -> None:
        self.number, self.stream = number, stream
        self._waiting: list[Entries] = []
        self._size = 0
        self._origin = 0
        self._news = News(all=False)

    def add(self, entries: Entries) -> list[list[Entries]]:
        self._waiting.append(entries)
        self._news.entries.append(entries)
        self._size += len(entries.positions)
        self.stream.kept += len(entries.positions)
        if self._size < self.stream.block_entries:
            return []
        return self._cut(self.stream.block_entries)

    def rest(self) -> list[list[Entries]]:
        return self._cut(self._size) if self._size else []

    def _cut(self, size: int) -> list[list[Entries]]:
        full: list[list[Entries]] = []
        block: list[Entries] = []
        room = size
        for entries in self._waiting:
            at = 0
            while len(entries.positions) - at >= room:
                block.append(self.part(entries, at, at + room))
                full.append(block)
                at, block, room = at + room, [], size
            if at < len(entries.positions):
                block.append(self.part(entries, at, len(entries.positions)))
                room -= len(entries.positions) - at
        self._waiting, self._size = (
            [replace(e, positions=e.positions.copy(), values=e.values.copy(), apart=e.apart.copy()) for e in block],
            size - room,
        )
        self._news = News(all=True, entries=list(self._waiting))
        return full

    def part(self, entries: Entries, start: int, stop: int) -> Entries:
        before, mine = (self.count_apart(entries.values[a:b]) for a, b in ((0, start), (start, stop)))
        return Entries(entries.positions[start:stop], entries.values[start:stop], entries.apart[before : before + mine], entries.shift)

    def news(self) -> News:
        news, self._news = self._news, News(all=False)
        news.origin, news.kept = self._origin, self.stream.kept
        return news

    def go_on(self, news: News) -> None:
        self._waiting = ([] if news.all else self._waiting) + news.entries
        self._size = sum(len(e.positions) for e in self._waiting)
        self._origin, self.stream.kept = news.origin, news.kept

    def skip(self, entries: int, origin: int) -> None:
        """Blocks with so many entries were encoded elsewhere; the next entry is not before `origin`. Nothing waits."""
        self.stream.kept += entries
        self._origin, self._news = origin, News(all=True)

    def left(self) -> tuple[list[Entries], int]:
        """Entries that fill no block, and where its gaps would count from."""
        return self._waiting, self._origin

    def count_apart(self, values: Array) -> int:
        return 0 if self.stream.values == EXACT else int(np.count_nonzero(values == NOT_ROUNDED))

    def take_origin(self, last: Entries) -> int:
        origin, self._origin = self._origin, int(last.positions[-1]) + last.shift + 1
        return origin


def encode_block(stream: Stream, filled: FilledBlock) -> tuple[Block, bytes]:
    """Encode a block of a stream: its line in the index, and its bytes."""
    between, wide = _gaps(filled)
    positions = encode(between, stream.positions_codec)
    values = encode(np.ascontiguousarray(_joined([part.values for part in filled.parts])), stream.values_codec)
    apart = _joined([part.apart for part in filled.parts])
    data = positions + values + apart.astype(apart.dtype.newbyteorder("<"), copy=False).tobytes()
    return Block(filled.stream, filled.origin, len(between), wide, len(positions), len(values), len(apart), short_digest(data)), data


@dataclass
class Part:
    """A part of a stream of which another machine has encoded all full blocks.

    `head` completes the block that has begun before, `tail` begins the next one. `origin` is where that counts its gaps from."""

    head: list[Entries]
    blocks: list[tuple[Block, bytes]]
    tail: list[Entries]
    origin: int = 0


def encode_part(number: int, stream: Stream, entries: list[Entries], before: int) -> Part:
    """Encode the full blocks of consecutive entries of a stream. `before` is the number of entries that precede them."""
    filler = _Filler(number, replace(stream, kept=0))
    # A block that begins here, but not first of all, counts from the one before, which is not known here: it is left to `head`.
    room = stream.block_entries - before % stream.block_entries if before else 0
    part, rest = Part([], [], []), list[Entries]()
    for each in entries:
        n = len(each.positions)
        if n <= room:
            part.head.append(each)
        elif room:
            part.head.append(filler.part(each, 0, room))
            rest.append(filler.part(each, room, n))
        else:
            rest.append(each)
        room = max(room - n, 0)
    if part.head:
        filler.take_origin(part.head[-1])
    for each in rest:
        for full in filler.add(each):
            part.blocks.append(encode_block(stream, FilledBlock(0, number, filler.take_origin(full[-1]), full)))
    part.tail, part.origin = filler.left()
    return part


def _gaps(filled: FilledBlock) -> tuple[Array, bool]:
    """The gaps before a block's entries, uint32, or uint64 (the flag) if one of them needs it; (k,)."""
    out = np.empty(sum(len(part.positions) for part in filled.parts), np.uint32)
    at, before, largest = 0, filled.origin - 1, 0
    for part in filled.parts:
        largest = max(largest, gaps(part.positions, part.shift - before - 1, out[at:]))
        at, before = at + len(part.positions), int(part.positions[-1]) + part.shift
    if largest < 1 << 32:
        return out, False
    positions = _joined([part.stream_positions for part in filled.parts])
    return (np.diff(positions, prepend=filled.origin - 1) - 1).astype(np.uint64), True


def _joined(parts: list[Array]) -> Array:
    return np.concatenate(parts) if len(parts) > 1 else parts[0]


class BlockWriter:
    """Encodes the streams of one fine-tune: `add` in canonical order, then `write` each returned block from any thread."""

    def __init__(self, streams: list[Stream], append: Callable[[bytes], None]) -> None:
        """`append` takes the bytes of the blocks in order."""
        self._append = append
        self._fillers = [_Filler(number, stream) for number, stream in enumerate(streams)]
        self._streams = streams
        self._blocks: list[Block] = []
        self._tickets = 0
        self._encoded: dict[int, tuple[Block, bytes]] = {}
        self._lock = threading.Lock()

    def add(self, stream: int, entries: Entries) -> list[FilledBlock]:
        """Append kept entries to a stream. Returns the blocks that are now full."""
        return self._tickets_for(self._fillers[stream], self._fillers[stream].add(entries))

    def rest(self) -> list[FilledBlock]:
        """The last, shorter block of each stream."""
        return [block for filler in self._fillers for block in self._tickets_for(filler, filler.rest())]

    def _tickets_for(self, filler: _Filler, full: list[list[Entries]]) -> list[FilledBlock]:
        blocks = []
        for parts in full:
            blocks.append(FilledBlock(self._tickets, filler.number, filler.take_origin(parts[-1]), parts))
            self._tickets += 1
        return blocks

    def splice(self, stream: int, part: Part) -> list[FilledBlock]:
        """Append a part of a stream. Returns the block that its head completes, if it does. Call it in canonical order, like `add`."""
        filler = self._fillers[stream]
        full = [block for entries in part.head for block in self.add(stream, entries)]
        if part.blocks or part.tail:
            filler.skip(sum(block.count for block, _ in part.blocks), part.origin)
        for block, data in part.blocks:
            self.put(self._tickets, block, data)
            self._tickets += 1
        for entries in part.tail:
            self.add(stream, entries)
        return full

    def write(self, filled: FilledBlock) -> None:
        """Encode a block and write it when its turn comes."""
        self.put(filled.ticket, *encode_block(self._streams[filled.stream], filled))

    def put(self, ticket: int, block: Block, data: bytes) -> None:
        """Write an encoded block when its turn comes."""
        with self._lock:
            self._encoded[ticket] = (block, data)
            while (ready := self._encoded.pop(len(self._blocks), None)) is not None:
                self._blocks.append(ready[0])
                self._append(ready[1])

    def news(self) -> tuple[int, list[News]]:
        """The number of full blocks, and how each stream has changed since the last call. Call it in canonical order, like `add`."""
        return self._tickets, [filler.news() for filler in self._fillers]

    def go_on(self, blocks: list[Block], news: list[News]) -> None:
        """Take over what an earlier run wrote and still held, one `news` after another."""
        self._blocks += blocks
        self._tickets = len(self._blocks)
        for filler, each in zip(self._fillers, news, strict=True):
            filler.go_on(each)

    def written(self) -> tuple[list[Stream], list[Block]]:
        """Call when all blocks are written: the streams that have entries, and their blocks."""
        assert not self._encoded, "a block was never written"
        used = [stream for stream in self._streams if stream.kept]
        numbers = {self._streams.index(stream): i for i, stream in enumerate(used)}
        for block in self._blocks:
            block.stream = numbers[block.stream]
        return used, self._blocks

    @property
    def blocks(self) -> list[Block]:
        """Blocks written so far, in file order."""
        return self._blocks


class SparseDeltaWriter(BlockWriter):
    """Writes one artifact: a BlockWriter with `finish`."""

    def __init__(
        self, target: Path, streams: list[Stream], largest_metadata: Mapping[str, str], sync: bool, resume: bool = False,
        file: PartialFile | None = None,
    ) -> None:  # fmt: skip
        self.container = ContainerWriter(target, largest_metadata, sync, resume, file)
        super().__init__(streams, partial(self.container.append, "blocks"))

    def go_on(self, blocks: list[Block], news: list[News]) -> None:
        super().go_on(blocks, news)
        self.container.skip("blocks", sum(block.nbytes(self._streams[block.stream].dtype) for block in blocks))

    def append_whole(self, data: memoryview) -> None:
        """Append bytes of tensors stored whole, in index order."""
        self.container.append("whole", data)

    def finish(self, metadata: Mapping[str, str], records: list[TensorRecord], files: list[tuple[SideFile, bytes]]) -> int:
        """`seal`, and rename the artifact into place. Returns its size in bytes."""
        size, _ = self.seal(metadata, records, files)
        self.container.commit()
        return size

    def seal(self, metadata: Mapping[str, str], records: list[TensorRecord], files: list[tuple[SideFile, bytes]]) -> tuple[int, str]:
        """Write side files, index and header. Returns the artifact's size in bytes and the digest in its header."""
        for file, content in files:
            if file.origin == STORED:
                self.container.append("files", content)
        index = Index(records, *self.written(), [file for file, _ in files])
        return self.container.seal({"peru.format": FORMAT, "peru.kind": KIND, **metadata}, encode_index(index))

    def __enter__(self) -> SparseDeltaWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.container.__exit__(*exc)
