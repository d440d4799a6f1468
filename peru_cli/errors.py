"""Errors as a user should read them (what, where, what to do next), and exit codes."""

from __future__ import annotations

import errno

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_INTERRUPTED = 130


class PeruError(Exception):
    """A failure that the user can act on: a message, and a hint about what to do next."""

    exit_code = EXIT_FAILED
    passes = False  # whether the same command may succeed later: then its partial work is kept

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class UsageError(PeruError):
    """The command line asks for something impossible. Found before any tensor is read."""

    exit_code = EXIT_USAGE


class BadFile(PeruError):
    """A file is not what it claims to be (truncated, altered, hostile, of an unknown format)."""


class Mismatch(PeruError):
    """Files that are each sound do not belong together (wrong base, other shapes)."""


class GateMissed(PeruError):
    """The result is outside the bounds that the command line set."""

    exit_code = EXIT_GATE


class ReportLost(PeruError):
    """Standard output did not accept the report of a command that has finished its work. `message` says why."""


_OS_HINTS = {
    errno.ENOSPC: "the disk is full: free some space, or write to another disk with -o; nothing unfinished was left behind",
    errno.EDQUOT: "the disk quota is used up; nothing unfinished was left behind",
    errno.EACCES: "permission denied: check who owns the folder",
    errno.EPERM: "not permitted: check who owns the folder",
    errno.EROFS: "the file system is read-only: choose another place with -o",
    errno.ENOENT: "no such file or folder",
    errno.EIO: "the disk reported an input/output error: check it before anything else",
}


def from_os_error(error: OSError) -> PeruError:
    """Explain an operating-system error to the user: which file, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    return PeruError(f"{where}{error.strerror or error}", _OS_HINTS.get(error.errno or 0))
