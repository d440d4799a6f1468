"""`--executor ray` on a real cluster of two nodes on loopback: the same bytes, kills in the middle, and what it costs.

    python benchmarks/speed/cluster.py FOLDER --base BASE FINE [FINE ...] [--only bytes merges packs kills times] [--times prune ties ...]

Needs peru-cli[ray]. Every node is a raylet of its own with one processor and one thread. Workers have the priority of everything else:
Ray gives them the lowest by default, and then they get little of a machine that is busy. FOLDER takes the outputs. Processes are ended by
their ids: other clusters on this machine are left alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
PORT = 6401
TICKS = os.sysconf("SC_CLK_TCK")
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
ENV.pop("PYTHONDONTWRITEBYTECODE", None)  # installed modules are compiled
ENV["PYTHONPYCACHEPREFIX"] = str(Path(tempfile.gettempdir()) / "peru-bytecode")
ENV["RAY_worker_niceness"] = str(os.nice(0))
CLUSTER = ["--executor", "ray", "--ray-address", f"127.0.0.1:{PORT}"]


@dataclass
class Process:
    """A line of /proc: parent, title, and seconds of the processor."""

    parent: int
    title: str
    seconds: float


def processes() -> dict[int, Process]:
    """All processes by id."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                stat = (path / "stat").read_text().rpartition(")")[2].split()
                title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            found[int(path.name)] = Process(int(stat[1]), title, (int(stat[11]) + int(stat[12])) / TICKS)
    return found


def below(root: int) -> dict[int, Process]:
    """A process and all that it started, by id."""
    every, wanted = processes(), {root}
    while more := {number for number, p in every.items() if p.parent in wanted} - wanted:
        wanted |= more
    return {number: every[number] for number in wanted if number in every}


class Node:
    """One node of the cluster."""

    def __init__(self, processors: int, head: bool = False) -> None:
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"] if head else [f"--address=127.0.0.1:{PORT}"]
        command = [*RAY, "start", *where, f"--num-cpus={processors}", "--object-store-memory=1000000000", "--block"]
        self.process = subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        """All of it at once, as if its power failed."""
        for number in below(self.process.pid):
            with_signal(number, signal.SIGKILL)
        self.process.wait()


def with_signal(number: int, signum: int) -> None:
    """Send a signal to a process that may be gone."""
    try:
        os.kill(number, signum)
    except ProcessLookupError:
        return


def wait_for(processors: int) -> None:
    """Wait until the cluster offers so many processors."""
    code = f"import ray; ray.init('127.0.0.1:{PORT}', logging_level=50); print(int(ray.cluster_resources().get('CPU', 0)))"
    for _ in range(30):
        done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
        if done.stdout.split()[-1:] == [str(processors)]:
            return
        time.sleep(1)
    raise SystemExit(f"no cluster with {processors} processors: {done.stdout}{done.stderr[-500:]}")


@contextmanager
def nodes(*processors: int) -> Iterator[list[Node]]:
    """A cluster; the first node is its head."""
    started: list[Node] = []
    try:
        for number, each in enumerate(processors):
            started.append(Node(each, head=not number))
            wait_for(sum(processors[: number + 1]))
        yield started
    finally:
        for node in reversed(started):
            node.kill()


def prune(models: Sequence[str], base: str, out: Path, *options: str) -> subprocess.Popen[str]:
    """Start a prune."""
    command = [sys.executable, "-m", "peru_cli", "prune", *models, "-b", base, "-o", f"{out}/", "--base-id", "x/y", "--no-sync", "-q"]
    return subprocess.Popen([*command, *options], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def merge(models: Sequence[str], base: str, out: Path, *options: str) -> subprocess.Popen[str]:
    """Start a merge."""
    given = [f"{chr(ord('a') + number)}={model}" for number, model in enumerate(models)]
    command = [sys.executable, "-m", "peru_cli", "merge", *given, "-b", base, "-o", f"{out}/", "--base-id", "x/y", "--no-sync", "-q"]
    return subprocess.Popen([*command, *options], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def pack(models: Sequence[str], base: str, out: Path, *options: str) -> subprocess.Popen[str]:
    """Start a pack."""
    out.mkdir(parents=True)
    given = [f"{chr(ord('a') + number)}={model}" for number, model in enumerate(models)]
    command = [
        sys.executable,
        "-m",
        "peru_cli",
        "shuffle-pack",
        *given,
        "-b",
        base,
        "-o",
        f"{out / 'pack.safetensors'}",
        "--base-id",
        "x/y",
    ]
    return subprocess.Popen([*command, "--no-sync", "-q", *options], env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


TIMED: dict[str, tuple[Callable[..., subprocess.Popen[str]], int, list[str]]] = {  # the command, the fewest fine-tunes, options
    "prune": (prune, 1, ["--keep", "10%"]),
    "lossless": (prune, 1, ["--lossless"]),
    "task-arithmetic": (merge, 2, ["--method", "task-arithmetic", "--scale", "0.3"]),
    "ties": (merge, 2, ["--method", "ties", "--keep", "20%"]),
    "pack": (pack, 2, []),
}


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones, too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@dataclass
class Checked:
    """Runs commands into new folders and compares what they write."""

    folder: Path
    base: str
    command: Callable[..., subprocess.Popen[str]] = prune
    known: dict[tuple[str, ...], dict[str, bytes]] = field(default_factory=dict)

    def here(self, models: Sequence[str], options: Sequence[str]) -> dict[str, bytes]:
        """What one machine writes."""
        key = (*models, *options)
        if key not in self.known:
            out = self.folder / f"here-{self.command.__name__}{len(self.known)}"
            process = self.command(models, self.base, out, *options, "--threads", "1")
            _, err = process.communicate()
            assert process.returncode == 0, err
            self.known[key] = contents(out)
        return self.known[key]

    def say(self, name: str, models: Sequence[str], options: Sequence[str], out: Path, process: subprocess.Popen[str]) -> None:
        """Wait for a prune on the cluster and say whether it wrote the same."""
        _, err = process.communicate()
        same = process.returncode == 0 and contents(out) == self.here(models, options)
        print(f"{name:<52} {'same bytes' if same else f'FAILED with {process.returncode}: {err[-300:]}'}", flush=True)


def check_bytes(checked: Checked, models: Sequence[str]) -> None:
    """Every way to choose entries, and several tasks."""
    for name, given, options in [
        ("--keep 10%", models[:1], ["--keep", "10%"]),
        ("--keep 10% --scope tensor", models[:1], ["--keep", "10%", "--scope", "tensor"]),
        ("--lossless", models[:1], ["--lossless"]),
        (f"--keep 10%, {len(models)} fine-tunes", models, ["--keep", "10%"]),
    ]:
        out = checked.folder / f"there-{name}"
        checked.say(name, given, options, out, prune(given, checked.base, out, *options, *CLUSTER))


def check_merges(folder: Path, base: str, models: Sequence[str], two: list[Node]) -> None:
    """Methods that work tile by tile; a worker is killed in the middle of each."""
    checked = Checked(folder, base, merge)
    for options in (
        ["linear"],
        ["task-arithmetic", "--scale", "0.3"],
        ["ties", "--keep", "20%"],
        ["dare", "--keep", "30%"],
        ["model-stock"],
    ):
        out = checked.folder / f"merged-{options[0]}"
        whole = sum(map(len, checked.here(models, ["--method", *options]).values()))
        process = merge(models, base, out, "--method", *options, *CLUSTER)
        in_the_middle(process, folder, int(0.3 * whole))
        workers = [n for node in two for n, p in below(node.process.pid).items() if p.title.startswith("ray::Worker")]
        for number in workers[:1]:
            with_signal(number, signal.SIGKILL)
        checked.say(f"merge {options[0]}, {len(workers[:1])} worker killed", models, ["--method", *options], out, process)


def check_packs(folder: Path, base: str, models: Sequence[str], two: list[Node]) -> None:
    """Superposed packs; a worker is killed while the sums are written."""
    checked = Checked(folder, base, pack)
    for options in (["--scale", "auto"], ["--decorrelate", "shift", "--no-signs"]):
        out = checked.folder / f"packed-{options[1]}"
        whole = sum(map(len, checked.here(models, options).values()))
        process = pack(models, base, out, *options, *CLUSTER)
        in_the_middle(process, out, int(0.3 * whole))
        workers = [n for node in two for n, p in below(node.process.pid).items() if p.title.startswith("ray::Worker")]
        for number in workers[:1]:
            with_signal(number, signal.SIGKILL)
        checked.say(f"pack {' '.join(options)}, {len(workers[:1])} worker killed", models, options, out, process)


def in_the_middle(process: subprocess.Popen[str], out: Path, bytes_written: int) -> None:
    """Wait until a command has written some of its result."""
    while process.poll() is None:
        partial = [path for found in out.glob(".*.peru-partial") for path in (found, *found.rglob("*"))]
        if sum(path.stat().st_blocks * 512 for path in partial) >= bytes_written:  # a merge's files have their final size at once
            return
        time.sleep(0.02)


def check_kills(checked: Checked, models: Sequence[str], two: list[Node]) -> None:
    """Workers and a node killed in the middle; Ctrl-C, and the same command again."""
    options = ["--keep", "10%"]
    total = sum(map(len, checked.here(models, options).values()))
    out = checked.folder / "workers"
    process, killed = prune(models, checked.base, out, *options, *CLUSTER), 0
    for share in (0.1, 0.3, 0.5, 0.7):
        in_the_middle(process, out, int(share * total))
        workers = [n for node in two for n, p in below(node.process.pid).items() if p.title.startswith("ray::Worker")]
        for number in workers[:1]:
            with_signal(number, signal.SIGKILL)
            killed += 1
    checked.say(f"{killed} workers killed", models, options, out, process)

    out = checked.folder / "node"
    process = prune(models, checked.base, out, *options, *CLUSTER)
    in_the_middle(process, out, int(0.4 * total))
    alive = process.poll() is None
    two[1].kill()
    checked.say("a node killed" if alive else "TOO LATE to kill a node", models, options, out, process)
    two[1] = Node(1)
    wait_for(2)

    out = checked.folder / "interrupted"
    process = prune(models, checked.base, out, *options, *CLUSTER)
    in_the_middle(process, out, int(0.4 * total))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    print(f"{'Ctrl-C':<52} exit code {process.returncode}: {err.splitlines()[0] if err else ''}", flush=True)
    checked.say("the same command again", models, options, out, prune(models, checked.base, out, *options, *CLUSTER))


class Meter(threading.Thread):
    """Adds up the processor time of a cluster's processes while a command runs."""

    def __init__(self, roots: Sequence[int]) -> None:
        super().__init__(daemon=True)
        self._roots, self._ended = roots, threading.Event()
        self._before = self._now()
        self.seen: dict[int, tuple[str, float]] = {}

    def _now(self) -> dict[int, Process]:
        return {number: p for root in self._roots for number, p in below(root).items()}

    def run(self) -> None:
        """Look every tenth of a second: a process that has ended tells nothing."""
        while not self._ended.wait(0.1):
            for number, p in self._now().items():
                before = self._before[number].seconds if number in self._before else 0.0
                kind = "workers" if p.title.startswith("ray::") else "Ray itself"
                was = self.seen.get(number, ("", 0.0))[0]
                self.seen[number] = ("workers" if was == "workers" else kind, p.seconds - before)

    def stop(self) -> dict[str, float]:
        """Seconds of the workers and of Ray's own processes."""
        self._ended.set()
        self.join()
        return {kind: sum(s for k, s in self.seen.values() if k == kind) for kind in ("workers", "Ray itself")}


@dataclass
class Timed:
    """A command on a cluster: seconds by the clock, and of the processor for peru itself and for the cluster's processes."""

    seconds: float
    driver: float
    used: dict[str, float]

    def __str__(self) -> str:
        total = self.driver + sum(self.used.values())
        return (
            f"{self.seconds:.1f} s; processor: workers {self.used['workers']:.1f} s, peru itself {self.driver:.1f} s, "
            f"Ray's own {self.used['Ray itself']:.1f} s, together {total / self.seconds:.2f} processors; load {os.getloadavg()[0]:.1f}"
        )


def measure(checked: Checked, models: Sequence[str], options: Sequence[str], started: Sequence[Node]) -> Timed:
    """One command on a cluster."""
    out = checked.folder / f"timed-{time.monotonic_ns()}"
    meter = Meter([node.process.pid for node in started])
    meter.start()
    before, begun = os.times(), time.monotonic()
    process = checked.command(models, checked.base, out, *options, *CLUSTER)
    _, err = process.communicate()
    seconds, after = time.monotonic() - begun, os.times()
    used = meter.stop()
    assert process.returncode == 0, err
    assert contents(out) == checked.here(models, options)
    shutil.rmtree(out)
    return Timed(seconds, after.children_user + after.children_system - before.children_user - before.children_system, used)


def check_times(folder: Path, base: str, models: Sequence[str], names: Sequence[str], rounds: int) -> None:
    """One worker and two, in turns, the best of some rounds. What more fine-tunes cost is the work without the start of programs."""
    best: dict[tuple[str, int, int], Timed] = {}
    checked = {name: Checked(folder / name, base, TIMED[name][0]) for name in names}
    for name in names:
        (folder / name).mkdir(exist_ok=True)
    for _ in range(rounds):
        for processors in ((0, 1), (0, 1, 1)):
            with nodes(*processors) as started:
                for name in names:
                    _, fewest, options = TIMED[name]
                    for given in (models[:fewest], models):
                        timed = measure(checked[name], given, options, started)
                        print(f"{name}, {sum(processors)} workers, {len(given)} fine-tunes: {timed}", flush=True)
                        key = name, sum(processors), len(given)
                        best[key] = min(timed, best.get(key, timed), key=lambda timed: timed.seconds)
    for name in names:
        fewest, every = TIMED[name][1], len(models)
        whole = [best[name, n, every].seconds for n in (1, 2)]
        one, two = (best[name, n, every].seconds - best[name, n, fewest].seconds for n in (1, 2))
        print(f"{name}, {every} fine-tunes, best: {whole[0]:.1f} s with one worker, {whole[1]:.1f} s with two")
        print(f"{name}, {every - fewest} more, best: {one:.1f} s with one worker, {two:.1f} s with two, {one / two:.2f} times as fast")


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("fine", nargs="+")
    parser.add_argument("--base", required=True)
    parser.add_argument("--only", nargs="+", default=["bytes", "merges", "packs", "kills", "times"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", nargs="+", choices=TIMED, default=["prune"], help="what is timed")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would what they start
    given.folder.mkdir(parents=True, exist_ok=True)
    checked = Checked(given.folder, given.base)
    if {"bytes", "merges", "packs", "kills"} & set(given.only):
        with nodes(1, 1) as two:
            if "bytes" in given.only:
                check_bytes(checked, given.fine)
            if "merges" in given.only:
                check_merges(given.folder, given.base, given.fine, two)
            if "packs" in given.only:
                check_packs(given.folder, given.base, given.fine, two)
            if "kills" in given.only:
                check_kills(checked, given.fine, two)
    if "times" in given.only:
        check_times(given.folder, given.base, given.fine, given.times, given.rounds)


if __name__ == "__main__":
    main()
