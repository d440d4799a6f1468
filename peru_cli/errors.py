"""What can go wrong, as a user should read it: what, where, and what to do next; and the exit codes."""

from __future__ import annotations

import errno

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_INTERRUPTED = 130


class PeruError(Exception):
    """A failure that the user can act on: a message, and a hint about what to do next."""

    exit_code = EXIT_FAILED
    passes = False  # whether the same command may well succeed later: then what was done is kept for it

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {self.hint}"


class UsageError(PeruError):
    """The command line asks for something that cannot be: found before any tensor is read."""

    exit_code = EXIT_USAGE


class BadFile(PeruError):
    """A file is not what it claims to be (truncated, altered, hostile, of an unknown format)."""


class Mismatch(PeruError):
    """Files that are each sound do not belong together (wrong base, other shapes)."""


class GateMissed(PeruError):
    """What came out is outside the bounds that the command line set."""

    exit_code = EXIT_GATE


class ReportLost(PeruError):
    """Standard output did not take the report of a command whose work is done. `message` says why."""


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
    """The user's reading of an operating-system error (which file, what to do)."""
    where = f"{error.filename}: " if error.filename else ""
    return PeruError(f"{where}{error.strerror or error}", _OS_HINTS.get(error.errno or 0))
