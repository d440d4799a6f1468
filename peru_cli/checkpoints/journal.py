"""What an unfinished output already holds, so that a killed run goes on where it was.

A text file beside the unfinished data: the first line is the key (a digest of all that decides the result), every
further line one JSON value: `["done", TENSOR, NOTE]` or `["decided", VALUE]`. A line counts once its newline is
there. A tensor is claimed after its bytes were written, and synced unless the user waived that; then the key
holds the machine's boot as well, since only a crash of the machine can lose written bytes.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peru_cli.checkpoints.atomic import PartialFile

_SYNC_SECONDS = 5.0  # at most this much work is done again after a power failure


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


class Journal:
    """`done` maps tensors that an earlier run wrote to what it noted of them; `decided` is its decision, or None."""

    def __init__(self, path: Path, key: str, files: Sequence[tuple[PartialFile, bytes, int]], sync: bool, fresh: bool = False) -> None:
        """Read what is there; a journal of another key, files (with header, size) of another layout, or `fresh` start afresh."""
        self._path, self._files, self._sync = path, [file for file, _, _ in files], sync
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._synced_at = time.monotonic()
        self.done: dict[str, Any] = {}
        self.decided: Any = None
        first = json.dumps([key, "" if sync else _boot()])
        lines = self._read(first) if not fresh and all(_fits(*file) for file in files) else None
        if lines is None:
            for file, _, _ in files:
                file.empty()
            path.write_bytes(first.encode() + b"\n")
        else:
            for line in lines:
                if line[0] == "done":
                    self.done[line[1]] = line[2]
                else:
                    self.decided = line[1]
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND)

    def _read(self, first: str) -> list[Any] | None:
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return None
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", "replace").splitlines()
        if not lines or lines[0] != first:
            return None
        os.truncate(self._path, len(whole))  # a torn last line
        return [json.loads(line) for line in lines[1:]]

    def decide(self, value: Any) -> None:
        """Record what the passes before the last one found out."""
        self._append([json.dumps(["decided", value]).encode() + b"\n"])

    def claim(self, tensor: str, note: Any) -> None:
        """Record that all bytes of a tensor are written. From any thread."""
        with self._lock:
            self._waiting.append(json.dumps(["done", tensor, note]).encode() + b"\n")
            if self._sync and time.monotonic() - self._synced_at < _SYNC_SECONDS:
                return
            self._flush()

    def flush(self) -> None:
        """Write down what waits for a sync."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if self._sync:
            for file in self._files:
                file.sync()
        self._append(self._waiting)
        self._waiting = []
        self._synced_at = time.monotonic()

    def _append(self, lines: list[bytes]) -> None:
        if lines:
            os.write(self._fd, b"".join(lines))

    def close(self) -> None:
        """Leave it for the next run."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """The output is finished, or given up."""
        if self._fd >= 0:
            self.close()
            self._path.unlink(missing_ok=True)


def _fits(file: PartialFile, header: bytes, size: int) -> bool:
    return os.fstat(file.fd).st_size == size and os.pread(file.fd, len(header), 0) == header
