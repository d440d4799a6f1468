"""Commands that are killed, interrupted, or run on a disk that fills: the old state or the new one, and the same bytes next time."""

from __future__ import annotations

import os
import random
import select
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from blake3 import blake3
from outputs import Command, family, makers, unpacking

from peru_cli import cli

BIG = (50, 1000, 2000)  # layers, rows and columns: 200 MB in bfloat16
MIDDLING = (8, 300, 300)
_SLOW = 600  # seconds that a command may take


def apart(work: Callable[[], None]) -> None:
    """Do something in a forked process, so that neither its threads nor its limits are anybody else's."""
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
    """A command in a forked process, which is about to begin once this is made."""

    def __init__(self, command: Command, errors: Path, folder: Path | None = None) -> None:
        ready, told = os.pipe()
        self._errors = errors
        self.pid = os.fork()
        if self.pid == 0:
            os.close(ready)
            self._become([str(part) for part in command], told, folder)
        os.close(told)
        select.select([ready], [], [], _SLOW)
        os.close(ready)

    def _become(self, command: list[str], told: int, folder: Path | None) -> NoReturn:
        code = 99
        try:
            fd = os.open(self._errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            signal.signal(signal.SIGINT, cli._terminate)  # as `cli.run` does first of all
            os.close(told)
            code = cli.run(command)
        finally:
            os._exit(code)

    def wait(self, seconds: float = _SLOW) -> int | None:
        """The exit code, negative for a signal; None if it goes on after so many seconds."""
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
        """What it printed."""
        return self._errors.read_text("utf-8", "replace")


def digest(path: Path) -> str | None:
    """Of a file, or of a folder's files and names; None if there is nothing."""
    if not path.exists():
        return None
    total = blake3()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        total.update(str(file.relative_to(path)).encode() + b"\0")
        total.update_mmap(str(file)) if file.stat().st_size else None
    return total.hexdigest()


class Case:
    """A command that writes one output into a folder of its own."""

    def __init__(self, name: str, command: Command, target: Path) -> None:
        self.name, self.command, self.target = name, command, target
        self.reference: str | None = None
        self.seconds = 0.0

    @property
    def place(self) -> Path:
        """Where the output goes."""
        return self.target.parent

    def start(self) -> Run:
        """Begin it."""
        return Run(self.command, self.place.parent / "said")

    def measure(self) -> None:
        """Run it once, undisturbed."""
        began = time.monotonic()
        run = self.start()
        code = run.wait()
        assert code == 0, f"{self.name}: exit {code}: {run.said}"
        self.seconds, self.reference = time.monotonic() - began, digest(self.target)
        self.clear()

    def clear(self) -> None:
        """Nothing was ever done."""
        shutil.rmtree(self.place)
        self.place.mkdir()

    def others(self) -> list[str]:
        """What lies beside the output."""
        return sorted(path.name for path in self.place.iterdir() if path != self.target)

    def state(self, old: str | None = None) -> str:
        """What is there: the old state, the new one, or what must not be."""
        strangers = [name for name in self.others() if not (name.startswith(".") and ".peru-" in name)]
        found = digest(self.target)
        if strangers:
            return f"LEFT {strangers}"
        return "complete" if found == self.reference else "as before" if found == old else "OTHER BYTES"


@contextmanager
def cases(size: tuple[int, int, int]) -> Iterator[list[Case]]:
    """Every writing command on a family of models of such a size, in memory."""
    with tempfile.TemporaryDirectory(prefix="peru-trust-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        tasks = family(folder, *size)
        made, found = folder / "made", []
        made.mkdir()
        for output, command in makers(folder, tasks, made).items():
            place = folder / f"case-{output}"
            place.mkdir()
            found.append(Case(str(command[0]) + " " + output, [*command[:-1], place / output], place / output))
        for source in ("sparse.safetensors", "masks.safetensors", "adapter"):
            if not (made / source).exists():
                run = Run(makers(folder, tasks, made)[source], folder / "said")
                assert run.wait() == 0, run.said
            place = folder / f"case-unpack-{source}"
            place.mkdir()
            target = place / "restored"
            found.append(Case(f"unpack {source}", unpacking(folder, made, source, target), target))
        yield found


def kills(record: Any, total: int) -> None:
    """Kill commands at 200 MB, spread over how long each takes; then see what is there, and type it again."""
    with cases(BIG) as found:
        each = -(-total // len(found))
        for case in found:
            key = f"kills at 200 MB: {case.name}: 0"
            if key in record.counts:
                continue
            case.measure()
            counts, noise = Counter[str](), random.Random(case.name)
            for number in range(each):
                if number % 3 == 0:  # the two that follow are killed while they go on with what was left
                    case.clear()
                run = case.start()
                code = run.wait(case.seconds * (number + noise.random()) / each)
                if code is None:
                    run.send(signal.SIGKILL)
                    code = run.wait()
                counts["killed" if code == -signal.SIGKILL else "done before" if code == 0 else f"EXIT {code}"] += 1
                counts[f"then {case.state()}"] += 1
                if number % 3 == 2 or number == each - 1:
                    run = case.start() if not case.target.exists() else None
                    code = run.wait() if run is not None else 0
                    same = code == 0 and digest(case.target) == case.reference and not case.others()
                    counts["finished later, same bytes" if same else f"LATER EXIT {code}, {case.state().upper()}, {case.others()}"] += 1
                elif case.target.exists():
                    case.clear()
            record.add(key, dict(counts))
            case.clear()


def interrupts(record: Any, moments: int) -> None:
    """Press Ctrl-C at so many moments of each command."""
    with cases(MIDDLING) as found:
        for case in found:
            key = f"interrupts: {case.name}: 0"
            if key in record.counts:
                continue
            case.measure()
            counts = Counter[str]()
            for number in range(moments):
                case.clear()
                run = case.start()
                code = run.wait(case.seconds * (number + 0.5) / moments)
                if code is None:
                    run.send(signal.SIGINT)
                    code = run.wait()
                counts[_interrupted(case, run, code)] += 1
                if case.target.exists() or (number % 5 and not case.others()):
                    continue
                code = case.start().wait()
                same = code == 0 and digest(case.target) == case.reference and not case.others()
                counts["then finished, same bytes" if same else f"LATER EXIT {code}, {case.state().upper()}, {case.others()}"] += 1
            record.add(key, dict(counts))


def _interrupted(case: Case, run: Run, code: int | None) -> str:
    """What came out of one Ctrl-C."""
    state, left = case.state(), case.others()
    if code == 0 and state == "complete":
        return "done before"
    if code != 130 or "Traceback" in run.said or "interrupted" not in run.said:
        return f"EXIT {code}, {run.said[-200:].upper()}"
    if state == "complete":
        return "130, complete"
    if state != "as before":
        return state
    if left and "the same command again" not in run.said:
        return f"LEFT {left} WITHOUT A WORD"
    return "130, to go on with" if left else "130, as before"


def disks(record: Any, _: int) -> None:
    """Run every command on a disk that fills at a tenth, a half or nine tenths of what it writes; the check beforehand is switched off."""
    from peru_cli.checkpoints.local import atomic, writer

    def unchecked(*given: object, **named: object) -> None:
        pass

    atomic.check_room = writer.check_room = unchecked
    with cases(MIDDLING) as found:
        for case in found:
            key = f"disks: {case.name}: 0"
            if key in record.counts:
                continue
            run = case.start()
            assert run.wait() == 0, run.said
            size = sum(file.stat().st_size for file in [case.target, *case.target.rglob("*")] if file.is_file())
            case.clear()
            counts = Counter[str]()
            for share in (0.1, 0.3, 0.5, 0.7, 0.9):
                options = ["mount", "-t", "tmpfs", "-o", f"size={max(4096, int(size * share) // 4096 * 4096)}", "tmpfs", str(case.place)]
                if subprocess.run(options, capture_output=True).returncode:
                    print("no small file system can be mounted here")
                    return
                try:
                    counts[_filled(case)] += 1
                finally:
                    subprocess.run(["umount", str(case.place)], check=True)
            record.add(key, dict(counts))


def _filled(case: Case) -> str:
    """What came out of a full disk."""
    case.place.joinpath("old").write_bytes(b"")
    run = case.start()
    code = run.wait()
    left = [path.name for path in case.place.iterdir() if path.name != "old"]
    if code != 1:
        return f"EXIT {code}, LEFT {left}"
    if left:
        return f"LEFT {left}"
    return "refused, nothing left" if "the disk is full" in run.said and "Traceback" not in run.said else run.said[-200:].upper()
