"""Open files that any thread can read at any offset, and read headers of safetensors files."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from peru_cli.checkpoints.checks import impostors
from peru_cli.checkpoints.header import Header, TensorInfo, header_length, parse_header
from peru_cli.checkpoints.hub.names import RemoteFile
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.places import Place, on_disk
from peru_cli.errors import BadFile

_HAS_PREADV = hasattr(os, "preadv")


class RandomAccess(Protocol):
    """An open file that any thread can read at any offset."""

    size: int
    header: Header | None

    @property
    def path(self) -> Place | RemoteFile:
        """The file, for messages."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`. BadFile if the file ends first."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


class RandomAccessFile:
    """A file read at any offset by any thread: with `preadv`, or else through one locked handle."""

    def __init__(self, path: Place) -> None:
        self.path = path
        self._file = os.fdopen(inputs.open_regular(on_disk(path)), "rb", buffering=0)
        self._lock = threading.Lock()
        self.header: Header | None = None  # set once it has been read
        self.size = os.fstat(self._file.fileno()).st_size
        if hasattr(os, "posix_fadvise"):
            # From a cold disk this is 1.6 times as fast as requesting each tile ahead of time.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`. BadFile if the file ends first."""
        done = 0
        while done < len(buffer):
            got = self._read_some(offset + done, buffer[done:])
            if got == 0:
                raise BadFile(f"{self.path}: the file ends at byte {offset + done}: it shrank while being read")
            done += got

    def _read_some(self, offset: int, buffer: memoryview) -> int:
        if _HAS_PREADV:
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0

    def close(self) -> None:
        """Close the handle."""
        self._file.close()


class BytesFile:
    """A file's bytes in memory."""

    def __init__(self, data: bytes | memoryview, path: Place | None = None) -> None:
        """`path` is where they came from, for messages."""
        self.path: Place = path if path is not None else Path("artifact in memory")
        self._data = memoryview(data)
        self.size = len(self._data)
        self.header: Header | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `offset`; BadFile if the bytes end first."""
        if offset + len(buffer) > self.size:
            raise BadFile(f"{self.path}: it ends at byte {self.size}")
        buffer[:] = self._data[offset : offset + len(buffer)]

    def close(self) -> None:
        """Let go of the bytes."""
        self._data = memoryview(b"")


def open_random(place: Place) -> RandomAccess:
    """Open a file for reading at any offset. A file on the Hub is read by ranges if the command asks for it."""
    return RandomAccessFile(place) if isinstance(place, Path) or not place.streams else place.ranges()


def read_header(file: RandomAccess) -> Header:
    """Read and check the header of an open safetensors file, once per command. BadFile names the file."""
    if file.header is None:
        watch = inputs.current()
        known = watch.headers if watch is not None and isinstance(file, RandomAccessFile) else {}
        path = os.path.abspath(str(file.path))
        if path not in known:
            known[path] = _read_header(file, watch.known if watch is not None else {})
            inputs.remember(known[path].tensors)
        file.header = known[path]
    return file.header


def _read_header(file: RandomAccess, known: Mapping[str, TensorInfo]) -> Header:
    try:
        prefix = bytearray(min(8, file.size))
        file.read_into(0, memoryview(prefix))
        text = bytearray(header_length(bytes(prefix), file.size))
        file.read_into(8, memoryview(text))
        return parse_header(text, file.size, known)
    except BadFile as error:
        refuse_impostor(file)
        raise BadFile(f"{file.path}: {error.message}", error.hint) from error


def refuse_impostor(file: RandomAccess) -> None:
    """Raise BadFile if a file's first bytes show that it is not the kind of file that its name says."""
    head = bytearray(min(impostors.HEAD, file.size))
    if head:
        file.read_into(0, memoryview(head))
    if (found := impostors.describe(bytes(head), file.path.name)) is not None:
        raise BadFile(f"{file.path}: {found[0]}", found[1])
