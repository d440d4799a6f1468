"""What one run of a command costs, and a table of several."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PERU = [sys.executable, "-m", "peru_cli"]
# A process counts its parent's memory at the moment of its start as its own peak. So the parent is a small one.
_SMALL = """
import os, sys, time
log, *words = sys.argv[1:]
files = [(os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), (os.POSIX_SPAWN_DUP2, 1, 2)]
started = time.time()
child = os.posix_spawn(words[0], words, os.environ, file_actions=files)
_, status, used = os.wait4(child, 0)
print(time.time() - started, used.ru_utime + used.ru_stime, used.ru_maxrss, os.waitstatus_to_exitcode(status))
"""


@dataclass
class Cost:
    """Seconds by the clock and of the processor, the largest resident memory in MB, and the exit code."""

    wall: float
    cpu: float
    peak_mb: int
    code: int


@cache
def _as_installed() -> dict[str, str]:
    """An environment in which modules are compiled beforehand, as pip does it: otherwise each run would compile peru's own, 0.3 s."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "peru-bytecode")
    subprocess.run([*PERU, "--help"], env=environment, stdout=subprocess.DEVNULL, check=True)
    package = Path(__file__).resolve().parents[2] / "peru_cli"
    subprocess.run([sys.executable, "-m", "compileall", "-q", package], env=environment, check=True)
    return environment


def measure(command: Sequence[object], log: Path = Path(os.devnull)) -> Cost:
    """Run a program in a process of its own; what it says goes to `log`."""
    given = subprocess.run(
        [sys.executable, "-S", "-c", _SMALL, *map(str, [log, *command])],
        env=_as_installed(), stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    wall, cpu, peak, code = given.stdout.split()
    return Cost(float(wall), float(cpu), int(peak) // 1024, int(code))


def table(commands: Mapping[str, Sequence[object]]) -> None:
    """Run peru's commands one after another and print a row of each."""
    print(f"| {'command':<24} | seconds | processor | peak MB |\n| --- | ---: | ---: | ---: |")
    for name, command in commands.items():
        cost = measure([*PERU, *command])
        failed = f" failed with exit code {cost.code}" if cost.code else ""
        print(f"| {name:<24} | {cost.wall:7.1f} | {cost.cpu:9.1f} | {cost.peak_mb:7} |{failed}", flush=True)


def best(command: Sequence[object], times: int) -> Cost:
    """The least of several runs, each figure by itself; the first exit code that is not 0."""
    costs = [measure(command) for _ in range(times)]
    return Cost(
        min(c.wall for c in costs), min(c.cpu for c in costs), min(c.peak_mb for c in costs), next((c.code for c in costs if c.code), 0)
    )
