"""Outputs that appear whole or not at all.

Everything is written to `.NAME.peru-partial` beside the target, synced, and renamed. An exception removes it. A kill leaves it
behind under a name that nobody mistakes for the output. The next run of the same command starts over, or continues if there is
a journal (journal.py). A lock keeps two processes from writing the same target."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from peru_cli.checkpoints.local import inputs
from peru_cli.console import console
from peru_cli.errors import PeruError, UsageError

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None  # type: ignore[assignment]

PATCH_MARKER = ".peru-patch"  # in a folder with a checkpoint that is half patched (patch.py)
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # errors of file systems without locks (Lustre, some NFS)


class BeingWritten(PeruError):
    """Another process is writing the same output."""


def check_target(target: Path, force: bool, new_folder: bool = False) -> None:
    """Refuse, before any work, a target that exists or cannot be written.

    With `new_folder`, its folder need not exist yet: it will be created."""
    if target.exists() and not force:
        raise UsageError(f"{target} exists already", "choose another -o, or --force to replace it")
    parent = target.absolute().parent
    if new_folder and not parent.exists():
        target, parent = parent, parent.parent
    if not parent.is_dir():
        raise UsageError(f"{parent}: no such folder, so {target.name} cannot be written there")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{parent} is not writable", "choose another -o")


def check_room(target: Path, nbytes: int, elsewhere: str = "write to another disk with -o") -> None:
    """Refuse, before any work, a disk that cannot hold `nbytes` more bytes. `elsewhere` says how to use another one."""
    free = shutil.disk_usage(next(folder for folder in target.absolute().parents if folder.is_dir())).free
    if free < nbytes:
        raise PeruError(
            f"{target} needs {nbytes:,} bytes, but the disk has only {free:,} free",
            f"free some space, or {elsewhere}",
        )


def partial_path(target: Path) -> Path:
    """The path of the unfinished output."""
    return target.absolute().parent / f".{target.name}.peru-partial"


def _open_locked(path: Path, target: Path) -> int:
    """Open or create the file at `path` exclusively. BeingWritten if another process has it.

    From now on an interrupted command reports this file, until it is gone.
    Another process may have renamed or removed it between our opening and our locking. Then we hold the lock
    of a file that is no longer at `path` (it may be the finished target), and open again.
    """
    console.unfinished.append(path)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if fcntl is None:
                return fd
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return fd
        except BlockingIOError as error:
            os.close(fd)
            _gone(path)
            raise BeingWritten(f"{target} is being written by another peru", "wait for it, or choose another -o") from error
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in NO_LOCKS:
                return fd
            os.close(fd)
            raise
        os.close(fd)


@contextlib.contextmanager
def only_writer(folder: Path, make: bool = False) -> Iterator[None]:
    """Hold a folder of files that belong together; BeingWritten if another process holds it. Where there are no locks, nothing is held.

    With `make`, a missing folder is made. It goes again if the command fails and leaves nothing in it."""
    made = make and not folder.exists()
    if made:
        folder.mkdir(exist_ok=True)
    with _held(folder):
        try:
            yield
        except BaseException:
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BeingWritten(f"{folder} is being written by another peru", "wait for it, then run the command again") from error
        except OSError as error:
            if error.errno not in NO_LOCKS | {errno.EBADF}:  # NFS locks only what is open for writing, which a folder cannot be
                raise
        yield
    finally:
        os.close(fd)


def _gone(path: Path) -> None:
    """Nothing of ours lies there any more."""
    with contextlib.suppress(ValueError):
        console.unfinished.remove(path)


def sync_folder(folder: Path) -> None:
    """Make a rename durable (if folders can be synced)."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def may_go_on(exc: tuple[object, ...]) -> bool:
    """Whether a context ends by Ctrl-C, a request to terminate, or a temporary problem: then the next run can use what was done."""
    return len(exc) > 1 and (isinstance(exc[1], KeyboardInterrupt) or (isinstance(exc[1], PeruError) and exc[1].passes))


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux renameat2). False if that is not possible."""
    at_fdcwd, rename_exchange = -100, 2
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0)


class PartialFile:
    """A file that appears under its name when committed. A context manager: leaving it uncommitted removes it."""

    def __init__(self, target: Path, sync: bool, resume: bool = False) -> None:
        """With `resume`, data of an earlier run is not emptied, and an interrupt (`may_go_on`) keeps it unless it is empty."""
        self.target, self._sync, self._resume = target, sync, resume
        self.path = partial_path(target)
        self.fd = _open_locked(self.path, target)
        self._open = True
        if not resume:
            self.empty()

    def empty(self) -> None:
        """Drop data of an earlier run."""
        if os.fstat(self.fd).st_size:  # ext4 allocates a file that was truncated, even from nothing, in close(): a third of unpack's time
            os.ftruncate(self.fd, 0)

    def sync(self) -> None:
        """Wait until all data is on disk."""
        os.fsync(self.fd)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at a byte offset. Thread-safe."""
        view = memoryview(data)
        while len(view):
            try:
                written = os.pwrite(self.fd, view, offset)
            except OSError as error:  # it names no file
                raise OSError(error.errno, error.strerror, str(self.target)) from error
            if written == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.target))
            view, offset = view[written:], offset + written

    def read_at(self, offset: int, nbytes: int) -> bytes:
        """Read what was written at a byte offset. Thread-safe."""
        data = b""
        while len(data) < nbytes:
            if not (more := os.pread(self.fd, nbytes - len(data), offset + len(data))):
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self.path))
            data += more
        return data

    def commit(self) -> None:
        """Sync and rename into place, if no input has changed."""
        inputs.check()
        if self._sync:
            os.fsync(self.fd)
        os.replace(self.path, self.target)
        _gone(self.path)
        inputs.wrote(self.target)
        self._close()
        if self._sync:
            sync_folder(self.path.parent)

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self.fd)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._open:
            if not (self._resume and may_go_on(exc) and os.fstat(self.fd).st_size):
                with contextlib.suppress(OSError):
                    os.unlink(self.path)
                    _gone(self.path)
            self._close()


class MemoryFile(PartialFile):
    """The same for what is to stay in memory: nothing appears under any name. `data` is what was committed."""

    def __init__(self) -> None:
        self.target = self.path = Path("memory")
        self.data = b""
        self._file = open(os.memfd_create("peru"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()  # noqa: SIM115
        self.fd = self._file.fileno()

    def commit(self) -> None:
        inputs.check()
        self.data = self.read_at(0, os.fstat(self.fd).st_size)

    def __exit__(self, *exc: object) -> None:
        self._file.close()


class PartialDirectory:
    """A folder that appears under its name when committed, all at once."""

    def __init__(self, target: Path, sync: bool, resume: bool = False) -> None:
        """With `resume`, data of an earlier run stays, and an interrupt keeps it unless all of its files are empty."""
        self.target, self._sync, self._resume = target, sync, resume
        self.path = partial_path(target)
        self._lock_fd: int | None = _open_locked(self.path.with_name(self.path.name + ".lock"), target)
        console.unfinished.append(self.path)
        try:
            if self.path.exists() and not resume:
                shutil.rmtree(self.path)
            self.path.mkdir(exist_ok=resume)
        except BaseException:
            self._release()
            raise

    def commit(self) -> None:
        """Sync every file and rename the folder into place, if no input has changed. An existing folder is replaced in one step."""
        inputs.check()
        if self._sync:
            for path in sorted(self.path.rglob("*")):
                if path.is_file():
                    fd = os.open(path, os.O_RDONLY)
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
            sync_folder(self.path)
        if not self.target.exists():
            os.rename(self.path, self.target)
        elif _exchange(self.path, self.target):
            remove(self.path)
        else:  # no atomic exchange here: between two renames the old state has a temporary name
            aside = self.path.with_name(f".{self.target.name}.peru-replaced")
            os.rename(self.target, aside)
            os.rename(self.path, self.target)
            remove(aside)
        _gone(self.path)
        inputs.wrote(self.target, self.path)
        if self._sync:
            sync_folder(self.path.parent)
        self._release()

    def _release(self) -> None:
        if self._lock_fd is not None:
            lock = self.path.with_name(self.path.name + ".lock")
            try:
                with contextlib.suppress(OSError):
                    os.unlink(lock)
                    _gone(lock)
            finally:
                os.close(self._lock_fd)
                self._lock_fd = None

    def __enter__(self) -> PartialDirectory:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._lock_fd is not None:
            found = any(path.is_file() and path.stat().st_size for path in self.path.rglob("*"))
            if not (self._resume and may_go_on(exc) and found):
                inputs.forget(self.path)  # what was read back of it
                shutil.rmtree(self.path, ignore_errors=True)
                if not self.path.exists():
                    _gone(self.path)
            self._release()


@contextlib.contextmanager
def folder_of(outputs: Path, several: bool) -> Iterator[None]:
    """Make the folder that several outputs go to, if there is none. It goes again if the command fails and leaves nothing in it."""
    made = several and not outputs.exists()
    try:
        if made:
            outputs.mkdir()
        yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):
                outputs.rmdir()
        raise


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
