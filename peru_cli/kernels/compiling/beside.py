"""A process beside this one compiles loops (server.py): numba stays out of this process, and several loops are made at once.

It is asked for loops by name, a line each, stores object files as usual (objects.py), reports each line that it has done, and goes on
after this process ends, so that the next one finds them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_PROGRAM = "import gc; gc.disable(); from peru_cli.kernels.compiling.server import serve; serve()"  # it lives for seconds


class Beside:
    """The process, from the first question on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._asked: dict[str, threading.Event] = {}  # by line; set once there is nothing to wait for
        self._works = bool(sys.executable) and not getattr(sys, "frozen", False)  # in a frozen program it is that program

    def begin(self) -> None:
        """Start it, if it can be started here."""
        with self._lock:
            self._start()

    def ask(self, lines: Sequence[str]) -> None:
        """Have loops compiled, in this order, unless that was asked for before."""
        with self._lock:
            new = [line for line in lines if line not in self._asked]
            if new and (questions := self._start()) is not None:
                self._asked |= {line: threading.Event() for line in new}
                try:
                    questions.write("".join(line + "\n" for line in new).encode())
                    questions.flush()
                except OSError:  # it has ended
                    self._give_up()

    def is_done(self, line: str) -> bool:
        """Whether there is nothing to wait for: reported, never asked for, or the process has ended."""
        event = self._asked.get(line)
        return event is None or event.is_set()

    def wait(self, line: str) -> None:
        """Wait until `is_done`."""
        if (event := self._asked.get(line)) is not None:
            event.wait()

    def _start(self) -> IO[bytes] | None:
        """Where the process takes questions, which begins now if it has not. None if it has ended, or none can be started here."""
        if self._works and self._process is None:
            package = str(Path(__file__).parents[3])
            path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _PROGRAM],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
                )  # fmt: skip
            except OSError:
                self._give_up()
                return None
            threading.Thread(target=self._listen, args=[self._process.stdout], name="compiled loops", daemon=True).start()
        return self._process.stdin if self._works and self._process is not None else None

    def _listen(self, reports: IO[bytes]) -> None:
        for line in reports:
            if (event := self._asked.get(line.decode().rstrip("\n"))) is not None:
                event.set()
        with self._lock:
            self._give_up()

    def _give_up(self) -> None:
        self._works = False
        for event in self._asked.values():
            event.set()
