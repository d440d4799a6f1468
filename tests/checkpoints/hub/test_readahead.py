"""Reading ahead: each announced byte is requested once, in whatever order it is read."""

from __future__ import annotations

import threading

import pytest

from peru_cli.checkpoints.local import readahead
from tests.checkpoints.hub.test_stream import times_asked


class Counted:
    """A file that logs what is read of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.log, self.lock = content, [], threading.Lock()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        with self.lock:
            self.log.append((offset, offset + len(buffer)))
        buffer[:] = self.content[offset : offset + len(buffer)]


def test_no_order_of_reading_blocks_and_each_byte_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """More is announced than may be held, and it is read backwards, by several threads, with unannounced parts."""
    monkeypatch.setattr(readahead, "PIECE", 64)
    monkeypatch.setattr(readahead, "HELD", 256)
    content = bytes(i * 7 % 251 for i in range(10_000))
    file, ahead = Counted(content), readahead.ReadAhead()
    ahead.expect([(file, 0, 10), (file, 5000, 5100)], keep=True)
    for begin, end in ((0, 10), (5000, 5100)):
        assert take(ahead, file, begin, end) == content[begin:end]
    ahead.expect([(file, begin, begin + 50) for begin in range(0, 9000, 50)])
    wrong = []

    def read(order: list[int]) -> None:
        wrong.extend(begin for begin in order if take(ahead, file, begin, begin + 50) != content[begin : begin + 50])

    starts = list(range(0, 10_000, 50))[::-1]
    threads = [threading.Thread(target=read, args=(starts[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not wrong
    assert times_asked(file.log, 10_000) == (1, 1)


def take(ahead: readahead.ReadAhead, file: Counted, begin: int, end: int) -> bytes:
    buffer = bytearray(end - begin)
    ahead.read_into(file, begin, memoryview(buffer))
    return bytes(buffer)
