"""Compiled loops as files in the user's cache folder, so that each processor compiles them only once.

A file holds the SHA-256 of the rest, then an object file. Damaged, foreign or unreadable files are compiled again. If a file
cannot be written, the loop stays in memory. Files appear whole, so several processes can share the folder."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

SYMBOL = "peru_kernel"  # the function in an object file
_DIGEST = hashlib.sha256().digest_size


@cache
def sources() -> bytes:
    """A digest of the sources of all loops and of what compiles them: the files of `kernels`."""
    total, folder = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        total.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.digest()


def _folder() -> Path:
    """NUMBA_CACHE_DIR, or a folder in the user's cache."""
    if given := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(given) / "peru"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "peru" / "kernels"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "peru" / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peru" / "kernels"


def path_of(name: str, *what: str) -> Path | None:
    """The path of a loop's object file, which depends on the sources and on `what`. `*` is a pattern. None without a home folder."""
    digest = hashlib.sha256(sources() + "\0".join(what).encode()).hexdigest()[:24]
    try:
        return _folder() / f"{name}-{digest}.o"
    except (RuntimeError, OSError):  # no home folder
        return None


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written the file: its code will run."""
    if not hasattr(os, "getuid"):
        return True
    return all(found.st_uid == os.getuid() and not found.st_mode & 0o022 for found in (path.stat(), path.parent.stat()))


def load(path: Path | None) -> bytes | None:
    """An object file. None if there is none that can be trusted."""
    with suppress(OSError):
        if path is not None and _is_ours(path):
            data = path.read_bytes()
            if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
                return data[_DIGEST:]
    return None


def can_store(path: Path | None) -> bool:
    """Whether an object file could be stored there."""
    with suppress(OSError):
        if path is not None:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            return os.access(path.parent, os.W_OK)
    return False


def store(path: Path | None, data: bytes) -> None:
    """Store an object file for later, if possible."""
    if path is None:
        return
    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(name, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(name)
            raise
