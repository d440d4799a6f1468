"""Fetch ranges of remote files ahead of the reader: in reading order, several at once, with bounded memory.

A pass announces the ranges that it will read. Adjacent ranges are joined, long ones cut, and threads fetch them while the pass
computes. A fetched piece is dropped once it has been read. The reader itself fetches what was not announced or is needed early,
so no order of reading can block."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

CONNECTIONS = min(8, max(4, 2 * (os.cpu_count() or 1)))  # on few processors more threads only wait for each other
PIECE = 4 << 20  # bytes per request
HELD = 32 << 20  # bytes fetched ahead and not yet read, for each checkpoint
ECHOED = 8 << 20  # bytes that a thread has just read: those of a tile, with all its runs

Range = tuple["Ranged", int, int]  # file, first byte, end


class Ranged(Protocol):
    """A file that is read by ranges."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from an offset."""
        ...


@dataclass
class _Piece:
    file: Ranged
    begin: int
    end: int
    data: bytearray | None = None  # None before it is fetched and after it was read
    begun: bool = False
    ready: threading.Event = field(default_factory=threading.Event)
    keep: bool = False  # after it was read
    users: int = 0  # readers that copy from it
    error: BaseException | None = None
    left: int = field(init=False)  # bytes that nobody has read

    def __post_init__(self) -> None:
        self.left = self.end - self.begin


class _Map:
    """Pieces of each file by their start; they do not overlap."""

    def __init__(self, pieces: Iterable[_Piece]) -> None:
        self._pieces: dict[int, list[_Piece]] = {}
        for piece in pieces:
            self._pieces.setdefault(id(piece.file), []).append(piece)
        for several in self._pieces.values():
            several.sort(key=lambda piece: piece.begin)
        self._begins = {key: [piece.begin for piece in several] for key, several in self._pieces.items()}

    def at(self, file: Ranged, offset: int) -> tuple[_Piece | None, int | None]:
        """The piece that holds a byte; or None and the start of the next piece, if there is one."""
        several, begins = self._pieces.get(id(file), []), self._begins.get(id(file), [])
        i = bisect_right(begins, offset) - 1
        if i >= 0 and offset < several[i].end:
            return several[i], None
        return None, begins[i + 1] if i + 1 < len(begins) else None


class ReadAhead:
    """Reads of one checkpoint. Thread-safe; call `expect` and `forget` between passes only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)  # to fetch more; each piece wakes only its own readers
        self._pieces: list[_Piece] = []
        self._map = _Map(())
        self._kept: list[_Piece] = []
        self._kept_map = _Map(())
        self._free: list[bytearray] = []  # of PIECE bytes or less
        self._next = self._held = self._plan = 0

    def expect(self, ranges: Iterable[Range], keep: bool = False) -> None:
        """Start fetching what will be read, each range once. `keep` holds it for later passes, until `forget`."""
        with self._lock:
            self._plan += 1  # fetches of an earlier plan are dropped
            self._kept += [piece for piece in self._pieces if piece.keep and piece.ready.is_set() and piece.error is None]
            self._kept_map = _Map(self._kept)
            self._pieces = [piece for file, begin, end in _join(self._missing(ranges)) for piece in _cut(file, begin, end, keep)]
            self._map, self._next, self._held = _Map(self._pieces), 0, 0
            self._room.notify_all()
            for number in range(min(CONNECTIONS, len(self._pieces))):
                threading.Thread(target=self._work, args=(self._plan,), name=f"ranges-{number}", daemon=True).start()

    def forget(self) -> None:
        """Drop what was kept, and what was announced and not read."""
        self.expect(())
        with self._lock:
            self._kept, self._kept_map = [], _Map(())

    def _missing(self, ranges: Iterable[Range]) -> Iterable[Range]:
        """The parts of ranges that are not kept."""
        for file, begin, end in ranges:
            while begin < end:
                piece, following = self._kept_map.at(file, begin)
                stop = min(end, piece.end) if piece is not None else min(end, following or end)
                if piece is None:
                    yield file, begin, stop
                begin = stop

    def read_into(self, file: Ranged, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a file, using fetched data if there is any."""
        done = 0
        while done < len(buffer):
            rest = buffer[done:]
            piece, following = self._kept_map.at(file, offset + done)
            if piece is None:
                piece, next_expected = self._map.at(file, offset + done)
                following = min((n for n in (following, next_expected) if n is not None), default=None)
            if piece is not None and self._take(piece, offset + done, rest[: piece.end - offset - done]):
                done += min(len(rest), piece.end - offset - done)
                continue
            stop = piece.end if piece is not None else following
            part = rest if stop is None else rest[: stop - offset - done]
            file.read_into(offset + done, part)
            done += len(part)

    def _take(self, piece: _Piece, offset: int, buffer: memoryview) -> bool:
        """Copy from a piece, waiting for it or fetching it. False if it was read before."""
        with self._lock:
            mine = not piece.begun
            piece.begun = True
            if mine:
                self._held += piece.end - piece.begin
        if mine:
            self._fetch(piece)
        piece.ready.wait()
        with self._lock:
            if piece.error is not None:
                raise piece.error
            data = piece.data
            piece.users += 1
        if data is None:
            return False
        at = offset - piece.begin
        buffer[:] = memoryview(data)[at : at + len(buffer)]
        with self._lock:
            piece.left -= len(buffer)
            piece.users -= 1
            if piece.left <= 0 and not piece.keep and piece.data is not None:
                if not piece.users:  # a reader of more than was announced may still be copying
                    self._free.append(data)  # memory that many threads allocate and free is not returned to the system
                piece.data = None
                self._held -= piece.end - piece.begin
                self._room.notify()
        return True

    def _work(self, plan: int) -> None:
        while True:
            with self._lock:
                while True:
                    if plan != self._plan:
                        return
                    while self._next < len(self._pieces) and self._pieces[self._next].begun:
                        self._next += 1
                    if self._next == len(self._pieces):
                        return
                    piece = self._pieces[self._next]
                    size = piece.end - piece.begin
                    if piece.keep or not self._held or self._held + size <= HELD:
                        break
                    self._room.wait()
                piece.begun = True
                self._held += size
            self._fetch(piece)

    def _fetch(self, piece: _Piece) -> None:
        size = piece.end - piece.begin
        with self._lock:
            fits = [] if piece.keep else [i for i, room in enumerate(self._free) if len(room) >= size]
            data = self._free.pop(fits[-1]) if fits else None
        data = bytearray(size) if data is None else data
        try:
            piece.file.read_into(piece.begin, memoryview(data)[:size])
        except BaseException as error:
            piece.error = error
        piece.data = data
        piece.ready.set()


class Echo:
    """Reads ahead, and returns what a thread has just read a second time without fetching it again."""

    def __init__(self, ahead: ReadAhead) -> None:
        self.expect, self.forget = ahead.expect, ahead.forget
        self._ahead, self._local = ahead, threading.local()

    def read_into(self, file: Ranged, offset: int, buffer: memoryview) -> None:
        """Like ReadAhead.read_into."""
        recent: dict[tuple[int, int, int], bytes] = self._local.__dict__.setdefault("recent", {})
        key = (id(file), offset, len(buffer))
        if (same := recent.get(key)) is not None:
            buffer[:] = same
            return
        self._ahead.read_into(file, offset, buffer)
        recent[key] = bytes(buffer)
        while sum(map(len, recent.values())) > ECHOED and len(recent) > 1:
            del recent[next(iter(recent))]


def _join(ranges: Iterable[Range]) -> Iterable[Range]:
    """Join adjacent ranges."""
    current: Range | None = None
    for file, begin, end in ranges:
        if begin == end:
            continue
        if current is not None and current[0] is file and current[2] == begin:
            current = (file, current[1], end)
            continue
        if current is not None:
            yield current
        current = (file, begin, end)
    if current is not None:
        yield current


def _cut(file: Ranged, begin: int, end: int, keep: bool) -> Iterable[_Piece]:
    return (_Piece(file, at, min(at + PIECE, end), keep=keep) for at in range(begin, end, PIECE))
