"""The process that compiles loops beside another one (beside.py).

It imports numba once. Each loop is compiled in a fork of it, as many at a time as there are processors; where Python cannot fork, one
after the other."""

from __future__ import annotations

import os
import select
import sys
from collections import deque
from contextlib import suppress
from importlib import import_module

from peru_cli.kernels.compiling.build import Kernel

_NOT_USED = "scipy"  # numba looks whether its BLAS is there; importing it takes a third of the start


def serve() -> None:
    """The process: compile what is asked for on stdin, and report it on stdout."""
    sys.modules[_NOT_USED] = None  # type: ignore[assignment]
    from peru_cli.kernels.compiling import compile

    compile.warm_up()
    if not hasattr(os, "fork"):
        for line in sys.stdin:
            _make(line.rstrip("\n"))
            _report(line.rstrip("\n"))
        return
    waiting: deque[str] = deque()
    running: dict[int, str] = {}
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rest, more = b"", True
    while more or waiting or running:
        while waiting and len(running) < processors:
            line = waiting.popleft()
            running[_fork(line)] = line
        if more and select.select([0], [], [], 0.01 if running else None)[0]:
            data = os.read(0, 1 << 16)
            more = bool(data)
            *lines, rest = (rest + data).split(b"\n")
            waiting.extendleft(line.decode() for line in reversed(lines))  # what is asked for last is waited for
        for pid in list(running):
            if os.waitpid(pid, os.WNOHANG if more else 0)[0]:
                _report(running.pop(pid))


def _fork(line: str) -> int:
    """Compile one loop in a process of its own."""
    if not (pid := os.fork()):
        try:
            _make(line)
        finally:
            os._exit(0)  # nothing of the server's is closed twice; a loop that is not stored is noticed
    return pid


def _make(line: str) -> None:
    module, name, *variant = line.split(" ", 2)
    found = getattr(import_module(module), name)
    kernel = found[variant[0]] if variant else found
    assert isinstance(kernel, Kernel)
    kernel.make()


def _report(line: str) -> None:
    with suppress(OSError):  # nobody listens any more
        os.write(1, line.encode() + b"\n")
