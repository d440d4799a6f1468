"""Commands in their own processes, which can be killed and interrupted."""

from __future__ import annotations

import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from outputs import Command

from peru_cli import cli
from tests.support.forkserver import reload_constants

_SLOW = 600  # seconds that a command may take


def apart(work: Callable[[], None]) -> None:
    """Do something in a forked process, so that its threads and limits affect nobody else."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a part of the campaign failed")


class Run:
    """A command in a forked process, ready to start once this is created."""

    def __init__(self, command: Command, errors: Path, env: dict[str, str] | None = None) -> None:
        ready, told = os.pipe()
        self._errors = errors
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ready)
            self._become([str(part) for part in command], told, env)
        os.close(told)
        select.select([ready], [], [], _SLOW)
        os.close(ready)

    def _become(self, command: list[str], told: int, env: dict[str, str] | None) -> NoReturn:
        code = 99
        try:
            fd = os.open(self._errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            if env:
                os.environ.update(env)
                reload_constants()
            signal.signal(signal.SIGINT, cli._terminate)  # as `cli.run` does first of all
            os.close(told)
            code = cli.run(command)
        finally:
            os._exit(code)

    def wait(self, seconds: float = _SLOW) -> int | None:
        """The exit code, negative for a signal. None if it is still running after this many seconds."""
        end, pidfd = time.monotonic() + seconds, os.pidfd_open(self.pid)
        try:
            if not select.select([pidfd], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
        finally:
            os.close(pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """Its output."""
        return self._errors.read_text("utf-8", "replace")
