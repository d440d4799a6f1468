"""The journal of an unfinished output, from which a killed run continues.

A text file beside the unfinished data: the first line is the key (a digest of all that decides the result), every
further line one JSON value. `["done", TENSOR, NOTE]`: all bytes of a tensor are written. `["note", WHAT, VALUE]`: what a pass found out.
A line counts once its newline is there. What a process has written outlives the process, not the machine: `["boot", ID]` says which
boot wrote the lines after it, `["synced"]` that everything before it is on the disk. After another boot only that counts.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peru_cli.checkpoints.local.atomic import PartialFile
from peru_cli.checkpoints.local.sealed import DIGESTS, blanked
from peru_cli.console import console

_SYNC_SECONDS = 5.0  # at most this much work is done again after a power failure


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return None


class Journal:
    """`done` maps tensors that an earlier run wrote to what it noted of them; `notes` are its other findings, in their order."""

    def __init__(
        self, path: Path, key: str, files: Sequence[PartialFile], sync: bool, fits: Callable[[Journal], bool] = lambda journal: True
    ) -> None:
        """Read what is there, and start afresh if that is of another key, or `fits` finds that the files are not what it tells of."""
        self._path, self._files, self._sync = path, files, sync
        self._lock = threading.Lock()
        self._synced_at = time.monotonic()
        self.done: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        if not (self._read(json.dumps([key]).encode()) and fits(self)):
            self.done, self.notes = {}, {}
            for file in files:
                file.empty()
            path.write_bytes(json.dumps([key]).encode() + b"\n")
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._append(["boot", _boot()])

    def _read(self, first: bytes) -> bool:
        try:
            lines = self._path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is torn, or nothing
        except FileNotFoundError:
            return False
        if not lines or lines[0] != first:
            return False
        values, synced, boot = [], 0, None
        for line in lines[1:]:
            try:
                values.append(json.loads(line))
            except ValueError:
                break
            if values[-1][0] == "synced":
                synced = len(values)
            elif values[-1][0] == "boot":
                boot = values[-1][1]
        trusted = len(values) if boot is not None and boot == _boot() else synced
        os.truncate(self._path, sum(len(line) + 1 for line in lines[: 1 + trusted]))
        for value in values[:trusted]:
            if value[0] in ("done", "note"):
                (self.done if value[0] == "done" else self.notes)[value[1]] = value[2]
        return True

    def note(self, what: str, value: Any) -> None:
        """Record what was found out. From any thread."""
        self._record(["note", what, value])

    def claim(self, tensor: str, note: Any) -> None:
        """Record that all bytes of a tensor are written. From any thread."""
        self._record(["done", tensor, note])

    def _record(self, line: list[Any]) -> None:
        with self._lock:
            self._append(line)
            if time.monotonic() - self._synced_at >= _SYNC_SECONDS:
                self._flush()

    def flush(self) -> None:
        """Make sure that what was recorded outlives the machine, unless the user waived that."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        self._synced_at = time.monotonic()
        if self._sync:
            for file in self._files:
                file.sync()
            os.fsync(self._fd)
            self._append(["synced"])

    def _append(self, line: list[Any]) -> None:
        os.write(self._fd, json.dumps(line).encode() + b"\n")

    def close(self) -> None:
        """Leave it for the next run."""
        if self._fd >= 0:
            console.unfinished.append(self._path)
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """The output is finished, or given up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._path.unlink(missing_ok=True)


def notes_at(path: Path, key: str | None = None) -> dict[str, Any]:
    """The notes of the journal that is there, of this key or of any; only a hint if somebody is writing it."""
    try:
        first, *values = (json.loads(line) for line in path.read_bytes().split(b"\n")[:-1])
    except (OSError, ValueError):
        return {}
    if key is not None and first != [key]:
        return {}
    return {value[1]: value[2] for value in values if value[0] == "note"}


def fits(file: PartialFile, header: bytes, size: int) -> bool:
    """Whether a file has this size, and begins so, digests that were filled in at the end aside."""
    found = os.pread(file.fd, len(header), 0)
    return os.fstat(file.fd).st_size == size and header in (found, blanked(found) if DIGESTS.encode() in found else b"")
