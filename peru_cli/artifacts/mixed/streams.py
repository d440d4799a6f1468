"""Streams of integers in blocks: written tensor by tensor, read from anywhere. Every byte is checked before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.codecs import decode, encode
from peru_cli.artifacts.mixed.index import KINDS, IntegerBlock, IntegerStream, MixedIndex
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.places import Place
from peru_cli.errors import BadFile

_CACHED_BLOCKS = 48  # decoded blocks cached: a tensor's factors lie in several streams
Integers = np.ndarray[Any, np.dtype[Any]]


class IntegerWriter:
    """Takes integers stream by stream and cuts them into blocks. Call it in canonical order, from one thread at a time."""

    def __init__(self, append: Callable[[bytes], None]) -> None:
        """`append` takes the bytes of the blocks in order."""
        self._append = append
        self._streams: dict[int, IntegerStream] = {}
        self._waiting: dict[int, list[Integers]] = {}
        self._order: list[int] = []

    def put(self, number: int, integers: Integers) -> None:
        """Append integers of the stream's type to it; any shape, row-major."""
        if not integers.size:
            return
        stream = self._streams.setdefault(number, IntegerStream(number))
        waiting = self._waiting.setdefault(number, [])
        waiting.append(integers.astype(KINDS[number], copy=False).reshape(-1))
        stream.count += integers.size
        if sum(len(part) for part in waiting) >= stream.block:
            joined = np.concatenate(waiting)
            cut = len(joined) - len(joined) % stream.block
            for start in range(0, cut, stream.block):
                self._write(stream, joined[start : start + stream.block])
            self._waiting[number] = [joined[cut:].copy()] if cut < len(joined) else []

    def _write(self, stream: IntegerStream, integers: Integers) -> None:
        data = encode(np.ascontiguousarray(integers), stream.codec)
        stream.blocks.append(IntegerBlock(len(data), short_digest(data)))
        self._order.append(stream.number)
        self._append(data)

    def finish(self) -> tuple[list[IntegerStream], list[int]]:
        """Write the remaining blocks. Returns the streams, ascending, and the stream of each block."""
        for number in sorted(self._waiting):
            if self._waiting[number]:
                self._write(self._streams[number], np.concatenate(self._waiting[number]))
        streams = [self._streams[number] for number in sorted(self._streams)]
        places = {stream.number: place for place, stream in enumerate(streams)}
        return streams, [places[number] for number in self._order]


class IntegerReader:
    """Any range of integers of any stream. Thread-safe."""

    def __init__(self, path: Place, index: MixedIndex, read: Callable[[int, int], bytes]) -> None:
        """`read` returns bytes of the role `blocks`."""
        self._path, self._read = path, read
        self._streams = {stream.number: stream for stream in index.streams}
        self._at: dict[int, list[int]] = {stream.number: [] for stream in index.streams}
        following = [iter(stream.blocks) for stream in index.streams]
        self.nbytes = 0  # of all blocks
        for place in index.order:
            self._at[index.streams[place].number].append(self.nbytes)
            self.nbytes += next(following[place]).nbytes
        self._cache: BlockCache[Integers] = BlockCache(_CACHED_BLOCKS)

    def get(self, number: int, start: int, count: int) -> Integers:
        """Read `count` integers of a stream, from `start` on. BadFile beyond its end or if a block was altered."""
        kind = KINDS[number]
        if not count:
            return np.empty(0, kind)
        stream = self._streams.get(number)
        if stream is None or start + count > stream.count:
            raise BadFile(f"{self._path}: its stream {number} ends before the integers of its tensors")
        first, last = start // stream.block, (start + count - 1) // stream.block
        parts = [self._cache.get((number, i), lambda i=i: self._decode(stream, i)) for i in range(first, last + 1)]  # type: ignore[misc]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        at = start - first * stream.block
        return joined[at : at + count]

    def _decode(self, stream: IntegerStream, i: int) -> Integers:
        block = stream.blocks[i]
        data = self._read(self._at[stream.number][i], block.nbytes)
        if short_digest(data) != block.digest:
            where = f"byte {self._at[stream.number][i]} of them"
            raise BadFile(f"{self._path}: a block of integers was altered ({where})", "fetch or make it again")
        count = min(stream.count - i * stream.block, stream.block)
        try:
            return decode(data, stream.codec, KINDS[stream.number], count)
        except BadFile as error:
            raise BadFile(f"{self._path}: {error.message}", error.hint) from error
