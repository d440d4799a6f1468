"""Inputs must be regular files and must not change while a command reads them; otherwise it fails.

Every file that peru opens is recorded with its size, modification time and inode, small files with their bytes. The engine
compares at the end of each pass, and so does everything that renames an output into place (atomic.py): an input overwritten
meanwhile would give weights of neither the old file nor the new one. Digests (sealed.py) are compared too."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from blake3 import blake3

from peru_cli.checkpoints.header import Header, TensorInfo
from peru_cli.errors import BadFile

_SMALL = 1 << 16  # files up to this many bytes are compared by content: a coarse clock can miss a change


class Changed(BadFile):
    """An input has changed since the command began."""


class Unfinished(Protocol):
    """An input that is not known to be sound before all of it has been read."""

    def finish(self) -> None:
        """Read what is left, and compare."""
        ...


class Readable(Protocol):
    """A file, here or on the Hub."""

    def read_bytes(self) -> bytes:
        """All of it."""
        ...


class Watch:
    """The inputs of one command, and its finished outputs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[tuple[int, ...], bytes | None]] = {}
        self._unfinished: list[Unfinished] = []
        self.written: list[Path] = []
        self.headers: dict[str, Header] = {}  # of safetensors files read so far, by absolute path
        self.known: Mapping[str, TensorInfo] = {}  # tensors of the input that has most: others often have the same

    def remember(self, tensors: Mapping[str, TensorInfo]) -> None:
        """Keep an input's tensors, so that what others have in common with them is kept once."""
        with self._lock:
            if len(tensors) > len(self.known):
                self.known = tensors

    def see(self, path: Path, fd: int, small: bool = True) -> None:
        """Record an open file. Changed if it was recorded before and differs now."""
        state = _state(os.fstat(fd))
        digest = blake3(os.pread(fd, _SMALL, 0)).digest() if small and state[2] <= _SMALL and hasattr(os, "pread") else None
        with self._lock:
            before = self._seen.setdefault(os.path.abspath(path), (state, digest))
        if before[0] != state:
            raise _changed(path)

    def expect(self, unfinished: Unfinished) -> None:
        """Also check this before anything is renamed into place."""
        with self._lock:
            self._unfinished.append(unfinished)

    @property
    def has_digests(self) -> bool:
        """Whether some input carries digests that are compared while it is read."""
        return bool(self._unfinished)

    def unchanged(self) -> None:
        """Compare sizes, modification times and inodes, at the end of a pass."""
        for path, (state, _) in list(self._seen.items()):
            _compare(path, state)

    def check(self) -> None:
        """Compare everything, before an output is renamed into place and before a report."""
        self.unchanged()
        for unfinished in list(self._unfinished):
            unfinished.finish()
        for path, (state, digest) in list(self._seen.items()):
            if digest is not None:
                try:
                    same = blake3(Path(path).read_bytes()).digest() == digest
                except OSError:
                    same = False
                if not same:
                    raise _changed(path)
            _compare(path, state)

    def forget(self, target: Path) -> None:
        """Stop watching a path and everything below it: from now on we change it ourselves."""
        root = os.path.abspath(target)
        with self._lock:
            for path in [path for path in self._seen if path == root or path.startswith(root + os.sep)]:
                del self._seen[path]
                self.headers.pop(path, None)

    def wrote(self, target: Path) -> None:
        """An output is in place."""
        self.forget(target)
        if not any(part.startswith(".") and part.endswith(".peru-partial") for part in target.parts):
            self.written.append(target)


_current: ContextVar[Watch | None] = ContextVar("inputs", default=None)


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch what is opened inside: one command, or one call of the library."""
    watch = Watch()
    token = _current.set(watch)
    try:
        yield watch
    finally:
        _current.reset(token)


def current() -> Watch | None:
    """The watch of the running command. None outside of one."""
    return _current.get()


def remember(tensors: Mapping[str, TensorInfo]) -> None:
    """Keep an input's tensors, so that what others have in common with them is kept once."""
    if (watch := _current.get()) is not None:
        watch.remember(tensors)


def unchanged() -> None:
    """Compare with what was recorded at opening, at the end of a pass. Changed names the file."""
    if (watch := _current.get()) is not None:
        watch.unchanged()


def check() -> None:
    """Compare everything, before an output is renamed into place or a report is printed. Changed or BadFile names the file."""
    if (watch := _current.get()) is not None:
        watch.check()


def forget(target: Path) -> None:
    """Stop watching a file that others may replace, or that is ours."""
    if (watch := _current.get()) is not None:
        watch.forget(target)


def wrote(target: Path, unfinished: Path | None = None) -> None:
    """An output is in place; `unfinished` is where it was before."""
    if (watch := _current.get()) is not None:
        watch.wrote(target)
        if unfinished is not None:
            watch.forget(unfinished)


def open_regular(path: Path, small: bool = True) -> int:
    """Open and record a file for reading. Returns its descriptor. BadFile unless it is a regular file: a pipe could block forever."""
    refuse_special(path)
    # If a pipe has taken its place meanwhile, opening does not wait either.
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _special(path)
        if (watch := _current.get()) is not None:
            watch.see(path, fd, small)
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_special(path: Path) -> None:
    """BadFile for a pipe, device, socket or folder in place of a file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise _special(path)


def note(place: Readable, small: bool = True) -> None:
    """Record a file that other code will read."""
    if isinstance(place, Path) and _current.get() is not None:
        os.close(open_regular(place, small))


def read_small(place: Readable) -> bytes:
    """All bytes of a small file, recorded if it is local."""
    if not isinstance(place, Path):
        return place.read_bytes()
    with os.fdopen(open_regular(place), "rb") as file:
        return file.read()


def _state(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _compare(path: str, state: tuple[int, ...]) -> None:
    try:
        now = _state(os.stat(path))
    except OSError as error:
        raise Changed(f"{path} disappeared while it was being read ({error.strerror}): nothing was written", _HINT) from error
    if now != state:
        raise _changed(path)


_HINT = "run the command again when nothing changes its inputs any more"


def _changed(path: str | Path) -> Changed:
    return Changed(f"{path} was changed while it was being read: nothing was written", _HINT)


def _special(path: Path) -> BadFile:
    mode = os.stat(path).st_mode
    kinds = {
        stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket",
    }  # fmt: skip
    return BadFile(f"{path}: not a regular file, but {kinds.get(stat.S_IFMT(mode), 'something else')}", "put the file itself there")
