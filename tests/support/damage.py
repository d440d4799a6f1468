"""Damage to data and to runs: altered bytes, and processes that kill themselves at a chosen moment."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

from peru_cli import cli
from peru_cli.checkpoints.local import atomic, journal


def damaged(data: bytes, noise: random.Random, mutations: int) -> bytes:
    """Bytes changed, removed, inserted or cut off, this many times."""
    changed = bytearray(data)
    for _ in range(mutations):
        at, kind = noise.randrange(len(changed) + 1), noise.randrange(4)
        if kind == 0:
            changed[at : at + 1] = bytes([noise.randrange(256)])
        elif kind == 1:
            del changed[at : at + noise.randrange(1, 9)]
        elif kind == 2:
            changed[at:at] = noise.choice([b"\0", b"\xff" * 9, b"\x80\0", b"\xff" * 200, bytes(16)])
        else:
            del changed[at:]
    return bytes(changed)


def run_and_kill(event: int, command: list[str], line: str | None = None) -> int:
    """Run in a forked process that kills itself at its n-th event (a write, a journal line, a rename, a removal), or its n-th such line."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = event

    def count(function):
        def counted(*args, **kwargs):
            nonlocal left
            left -= line is None or line in str(args[1:])
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return counted

    atomic.PartialFile.write_at = count(atomic.PartialFile.write_at)
    journal.Journal._append = count(journal.Journal._append)
    journal.Journal.remove = count(journal.Journal.remove)
    os.replace, os.rename = count(os.replace), count(os.rename)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = cli.run(command)
    os._exit(code)


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their relative paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
