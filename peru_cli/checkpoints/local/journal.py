"""The journal of an unfinished output, from which a killed run continues.

A text file beside the unfinished data. The first line is the key (a digest of everything that determines the result) and the
number of this format, every further line one JSON value. `["done", TENSOR, NOTE]`: all bytes of a tensor are written. `["note",
WHAT, VALUE]`: a result of a pass. Each line ends in a tab and 16 digits of BLAKE3 of the previous line's digits and its own
value: lines count up to the first one that is torn or altered. Written data survives the process, but not the machine:
`["boot", ID]` says which boot wrote the following lines, `["synced"]` that everything before it is on disk. After another boot
only that counts."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from peru_cli.checkpoints.local.atomic import PartialFile
from peru_cli.checkpoints.local.sealed import DIGESTS, blanked
from peru_cli.console import console

FORMAT = 2  # raise it when lines get another meaning: then what an older peru left is not read
_SYNC_SECONDS = 5.0  # the most work repeated after a power failure


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return None


class Journal:
    """`done` maps tensors that an earlier run wrote to their notes. `notes` are its other results, in order."""

    def __init__(
        self, path: Path, key: str, files: Sequence[PartialFile], sync: bool, fits: Callable[[Journal], bool] = lambda journal: True
    ) -> None:
        """Read the existing journal. Start over if its key differs, or `fits` finds that the files do not match it."""
        self._path, self._files, self._sync = path, files, sync
        self._lock = threading.Lock()
        self._synced_at = time.monotonic()
        self.done: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self._seal = b""
        afresh = not (self._read(key) and fits(self))
        if afresh:
            self.done, self.notes, self._seal = {}, {}, b""
            for file in files:
                file.empty()
        console.unfinished.append(path)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | (os.O_TRUNC if afresh else 0), 0o666)
            self._append(*([[key, FORMAT]] if afresh else []), ["boot", _boot()])
        except BaseException:
            if afresh:
                path.unlink(missing_ok=True)
            raise

    def _read(self, key: str) -> bool:
        lines = _lines(self._path)
        if not lines or lines[0].value != [key, FORMAT]:
            if lines and lines[0].value[1:] != [FORMAT]:
                console.note(f"another version of peru left unfinished files in {self._path.absolute().parent}: starting over")
            return False
        synced, boot = 0, None
        for number, line in enumerate(lines):
            if line.value[0] == "synced":
                synced = number
            elif line.value[0] == "boot":
                boot = line.value[1]
        trusted = lines if boot is not None and boot == _boot() else lines[: synced + 1]
        os.truncate(self._path, trusted[-1].end)
        self._seal = trusted[-1].seal
        for line in trusted:
            if line.value[0] in ("done", "note"):
                (self.done if line.value[0] == "done" else self.notes)[line.value[1]] = line.value[2]
        return True

    def note(self, what: str, value: Any) -> None:
        """Record a result. From any thread."""
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
        """Make the records survive a crash of the machine, unless the user waived that."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        self._synced_at = time.monotonic()
        if self._sync:
            for file in self._files:
                file.sync()
            os.fsync(self._fd)
            self._append(["synced"])

    def _append(self, *lines: list[Any]) -> None:
        told = b""
        for line in lines:
            text = json.dumps(line).encode()
            self._seal = _seal(self._seal, text)
            told += text + b"\t" + self._seal + b"\n"
        os.write(self._fd, told)

    def close(self) -> None:
        """Keep it for the next run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """The output is finished, or given up."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._path.unlink(missing_ok=True)


def notes_at(path: Path, key: str | None = None) -> dict[str, Any]:
    """The notes of an existing journal, of this key or of any. Only a hint while another process writes it."""
    values = [line.value for line in _lines(path)]
    if not values or values[0][1:] != [FORMAT] or (key is not None and values[0] != [key, FORMAT]):
        return {}
    return {value[1]: value[2] for value in values if value[0] == "note"}


@dataclass
class _Line:
    """A complete line: its value, its seal, and the byte offset of its end."""

    value: Any
    seal: bytes
    end: int


def _seal(before: bytes, text: bytes) -> bytes:
    """16 hexadecimal digits of a line and all before it."""
    return blake3(before + text).hexdigest(8).encode()


def _lines(path: Path) -> list[_Line]:
    """The lines of a journal up to the first that is torn or altered. Empty without a journal."""
    found: list[_Line] = []
    seal, end = b"", 0
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for line in path.read_bytes().split(b"\n")[:-1]:  # anything after the last newline is torn
            text, _, told = line.rpartition(b"\t")
            seal, end = _seal(seal, text), end + len(line) + 1
            if told != seal:
                break
            found.append(_Line(json.loads(text), seal, end))
    return found


def fits(file: PartialFile, header: bytes, size: int) -> bool:
    """Whether a file has this size and this beginning, ignoring digests that are filled in at the end."""
    found = os.pread(file.fd, len(header), 0)
    return os.fstat(file.fd).st_size == size and header in (found, blanked(found) if DIGESTS.encode() in found else b"")
