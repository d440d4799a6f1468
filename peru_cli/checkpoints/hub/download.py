"""Download weights into the shared cache in ranges: an interrupted download continues, and the digest is checked at the end.

huggingface_hub restarts an interrupted file and does not check the bytes it receives. A file in its cache under the name of a
finished one is taken as it is."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from peru_cli.checkpoints.hub.ranges import RangeFile
from peru_cli.checkpoints.local.atomic import NO_LOCKS, check_room
from peru_cli.checkpoints.local.readahead import PIECE, ReadAhead
from peru_cli.errors import BadFile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEAST = 1 << 20  # bytes; huggingface_hub downloads smaller files
_one_at_a_time = threading.Lock()  # each download has several connections


class NoLocks(Exception):
    """Files of the cache cannot be locked, so two processes could corrupt each other's. huggingface_hub has its own way."""


def fetch_blob(source: RangeFile, digest: str, blob: Path) -> None:
    """Download a file whose SHA-256 the Hub publishes to `blob`, continuing an earlier run.

    Raises what RangeFile raises, BadFile if the bytes do not match the digest, and NoLocks before anything is downloaded."""
    partial = blob.with_name(f"{blob.name}.peru-incomplete")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time:
        fd = _open_locked(partial)
        try:
            if blob.exists():  # downloaded by another peru meanwhile
                partial.unlink()
                return
            found = _fetch(source, fd, partial)
            if found != digest:
                partial.unlink()
                raise BadFile(
                    f"{source.path}: the Hub sends other bytes than it lists: their SHA-256 is {found[:16]}...", "run the command again"
                )
            os.replace(partial, blob)
        finally:
            os.close(fd)


def _fetch(source: RangeFile, fd: int, partial: Path) -> str:
    """Download what is missing. Returns the SHA-256 of the whole file."""
    size, total = source.size, hashlib.sha256()
    room = memoryview(bytearray(min(PIECE, max(size, 1))))
    at = 0
    while at < size and (got := os.preadv(fd, [room[: size - at]], at)):
        total.update(room[:got])
        at += got
    os.ftruncate(fd, at)
    check_room(partial, size - at, "set HF_HOME to a folder on another disk, or read with --stream")
    ahead = ReadAhead()
    ahead.expect([(source, at, size)])
    try:
        with tqdm(total=size, initial=at, unit="B", unit_scale=True, desc=source.path.name) as progress:  # type: ignore[no-untyped-call]
            while at < size:
                piece = room[: size - at]
                ahead.read_into(source, at, piece)
                total.update(piece)
                _write(fd, piece, at)
                at += len(piece)
                progress.update(len(piece))
    finally:
        ahead.forget()
    return total.hexdigest()


def _write(fd: int, data: memoryview, at: int) -> None:
    while len(data):
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written


def _open_locked(path: Path) -> int:
    """Open or create a file exclusively, waiting for another process that has it. NoLocks if locks do not work."""
    if fcntl is None:
        raise NoLocks
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:  # it was finished and renamed while this waited
            os.close(fd)
            continue
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                path.unlink(missing_ok=True)
                os.close(fd)
                raise NoLocks from error
            os.close(fd)
            raise
        os.close(fd)
