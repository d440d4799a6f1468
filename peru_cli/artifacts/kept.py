"""Read the kept entries of any tensor of a sparse delta, block by block. Every byte is checked before it is used."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.codecs import decode
from peru_cli.artifacts.index import EXACT, NOT_ROUNDED, SIGN, Block, Mode, Stream, TensorRecord
from peru_cli.artifacts.sparse_delta import Array, Entries, short_digest
from peru_cli.checkpoints.places import Place
from peru_cli.errors import BadFile

Ints = np.ndarray[Any, np.dtype[np.int64]]
_CACHED_BLOCKS = 8  # decoded blocks kept: a block spans several tiles, and threads work on neighbouring ones


@dataclass(frozen=True)
class _Place:
    """Where a block's bytes begin in the role `blocks`."""

    block: Block
    offset: int


class _StreamReader:
    def __init__(self, stream: Stream, places: list[_Place], length: int) -> None:
        self.stream, self.places, self.length = stream, places, length
        self.origins = [place.block.origin for place in places]


def _no_entries() -> Entries:
    return Entries(np.empty(0, np.int64), np.empty(0, np.int16), np.empty(0, np.int16))


class KeptEntries:
    """The streams of one fine-tune. Thread-safe."""

    def __init__(
        self, path: Place, tensors: Sequence[TensorRecord], streams: Sequence[Stream], blocks: Sequence[Block],
        read: Callable[[int, int], bytes],
    ) -> None:  # fmt: skip
        """`read` returns bytes of the blocks from an offset on; offset 0 is the first block."""
        self._path, self._read = path, read
        self._numbers = {stream.dtype.name: number for number, stream in enumerate(streams)}
        lengths = [0] * len(streams)
        self._first: dict[str, int] = {}
        for record in tensors:
            if record.mode == Mode.DELTA and record.info.dtype.name in self._numbers:
                number = self._numbers[record.info.dtype.name]
                self._first[record.info.name] = lengths[number]
                lengths[number] += record.base_entries
        places: list[list[_Place]] = [[] for _ in streams]
        self.nbytes = 0  # of all blocks
        for block in blocks:
            places[block.stream].append(_Place(block, self.nbytes))
            self.nbytes += block.nbytes(streams[block.stream].dtype)
        self._streams = [_StreamReader(*three) for three in zip(streams, places, lengths, strict=True)]
        self._scales: dict[str, float] = {}
        for stream in streams:
            signed = [record.info.name for record in tensors if record.kept and record.info.dtype is stream.dtype]
            self._scales |= zip(signed, stream.scales, strict=True) if stream.values == SIGN else ()
        self._cache: BlockCache[Entries] = BlockCache(_CACHED_BLOCKS)

    def entries(self, record: TensorRecord, start: int, stop: int) -> tuple[Stream | None, Entries]:
        """Kept entries of a tensor from entry `start` to `stop`; positions count from `start`."""
        stop = min(stop, record.base_entries)
        if record.mode != Mode.DELTA or not record.kept or start >= stop:
            return None, _no_entries()
        number, at = self._numbers[record.info.dtype.name], self._first[record.info.name]
        return self._streams[number].stream, self._between(number, at + start, at + stop, self._scales.get(record.info.name, 0.0))

    def together(self, records: Sequence[TensorRecord], begins: Ints) -> tuple[Stream | None, Entries, Ints] | None:
        """Kept entries of several whole tensors of one dtype that lie one after another in memory, each from an entry on; begins (t,).

        Returns entries whose positions count in that memory, and how many of them each tensor has, (t,). None if they must be taken
        tensor by tensor: in another order than the stream's, with rows that the base lacks, or with a scale for each tensor."""
        of = [i for i, record in enumerate(records) if record.mode == Mode.DELTA]
        counts = np.zeros(len(records), np.int64)
        number = self._numbers.get(records[0].info.dtype.name)
        if not of or number is None:
            return None, _no_entries(), counts
        stream = self._streams[number].stream
        firsts = np.array([self._first[records[i].info.name] for i in of])
        if stream.values == SIGN or any(records[i].base_rows for i in of) or (firsts[1:] <= firsts[:-1]).any():
            return None
        found = self._between(number, int(firsts[0]), int(firsts[-1]) + records[of[-1]].base_entries)
        firsts -= firsts[0]
        which = np.searchsorted(firsts, found.positions, "right") - 1
        counts[of] = np.bincount(which, minlength=len(of))
        return stream, Entries(found.positions + (begins[of] - firsts)[which], found.values, found.apart), counts

    def _between(self, number: int, low: int, high: int, scale: float = 0.0) -> Entries:
        """Entries of a stream from `low` to `high`; positions count from `low`."""
        reader = self._streams[number]
        first = max(bisect_right(reader.origins, low) - 1, 0)
        last = bisect_left(reader.origins, high)
        found = [self._clip(self._decoded(number, i), reader.stream, low, high, scale) for i in range(first, last)]
        if len(found) == 1:
            return found[0]
        positions, values, apart = (np.concatenate(parts) for parts in zip(*((e.positions, e.values, e.apart) for e in found), strict=True))
        return Entries(positions, values, apart, scale=scale)

    @staticmethod
    def _clip(entries: Entries, stream: Stream, low: int, high: int, scale: float) -> Entries:
        a, b = entries.positions.searchsorted((low, high))
        apart = entries.apart
        if stream.values != EXACT and len(apart):
            before = int(np.count_nonzero(entries.values[:a] == NOT_ROUNDED))
            apart = apart[before : before + int(np.count_nonzero(entries.values[a:b] == NOT_ROUNDED))]
        return Entries(entries.positions[a:b] - low, entries.values[a:b], apart, scale=scale)

    def _decoded(self, number: int, i: int) -> Entries:
        return self._cache.get((number, i), lambda: self._decode(self._streams[number], i))

    def _decode(self, reader: _StreamReader, i: int) -> Entries:
        place, stream = reader.places[i], reader.stream
        block = place.block
        data = self._read(place.offset, block.nbytes(stream.dtype))
        if short_digest(data) != block.digest:
            raise BadFile(f"{self._path}: a block of kept entries was altered (byte {place.offset} of them)", "fetch or make it again")
        cut = block.positions_bytes + block.values_bytes
        try:
            gaps = decode(data[: block.positions_bytes], stream.positions_codec, "uint64" if block.wide_gaps else "uint32", block.count)
            values = decode(data[block.positions_bytes : cut], stream.values_codec, stream.value_type, block.count)
        except BadFile as error:
            raise BadFile(f"{self._path}: {error.message}", error.hint) from error
        apart = np.frombuffer(data[cut:], dtype=f"<i{stream.dtype.bits // 8}").astype(f"i{stream.dtype.bits // 8}")
        positions = np.cumsum(gaps, dtype=np.int64)
        positions += np.arange(block.origin, block.origin + block.count)
        end = reader.origins[i + 1] if i + 1 < len(reader.origins) else reader.length
        if int(gaps.max()) > reader.length or positions[-1] >= end or int(positions.min()) < block.origin:
            raise BadFile(f"{self._path}: a block's positions leave its stream")
        if stream.values != EXACT and np.count_nonzero(values == NOT_ROUNDED) != block.apart:
            raise BadFile(f"{self._path}: a block lacks values that it stores apart")
        if stream.values == SIGN and np.count_nonzero((values == 0) | (values == -1)) + block.apart != block.count:
            raise BadFile(f"{self._path}: a block of signs has other values")
        return Entries(positions, values, apart)

    def values_of(self, number: int) -> Iterator[Array]:
        """Decoded values of a stream, block by block. Entries stored apart appear as markers."""
        for i in range(len(self._streams[number].places)):
            yield self._decode(self._streams[number], i).values
