"""Measure `peru merge` against mergekit and against the floor, as ratios taken in one run.

    python benchmarks/make_pair.py /tmp/family --layers 22 --fine-tunes 3
    python benchmarks/merge.py /tmp/family [--venv /tmp/peru-mergekit] [--runs 3] [--no-mergekit]

Every command is a process of its own; times are medians of wall seconds, memory the largest resident set. The files
are read once beforehand, so that the page cache is warm; nothing is synced, as mergekit does not. The floor of a
method reads its inputs once and writes the output, with as many threads as CPUs and no arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mergekit_environment import install

TASKS = ("fine1", "fine2", "fine3")
# name, peru's options, mergekit's method and settings, whether the base is read, required ratios: mergekit / ours, ours / floor
CASES = [
    ("linear", ["linear"], ("linear", {}), False, 3.0, 1.5),
    ("task-arithmetic", ["task-arithmetic"], ("task_arithmetic", {"lambda": 0.3}), True, 3.0, 1.5),
    ("ties, per tensor", ["ties", "--variant", "mergekit"], ("ties", {"density": 0.2}), True, 15.0, None),
    ("ties, global", ["ties"], None, True, None, None),
    ("dare", ["dare"], None, True, None, None),
]

FLOOR = """
import os, sys, threading
out, *names = sys.argv[1:]
threads = len(os.sched_getaffinity(0))
files = [os.open(name, os.O_RDONLY) for name in names]
size = os.fstat(files[0]).st_size
target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
os.ftruncate(target, size)
step = 1 << 18
def work(number):
    room = bytearray(step)
    for at in range(number * step, size, threads * step):
        view = memoryview(room)[: min(step, size - at)]
        for file in files:
            os.preadv(file, [view], at)
        os.pwrite(target, view, at)
running = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
[thread.start() for thread in running]
[thread.join() for thread in running]
"""


def measure(command: list[str], clear: Path) -> tuple[float, int]:
    """Wall seconds and peak resident bytes of a command; what it writes is removed first. Fails loudly if it fails."""
    if clear.is_dir():
        shutil.rmtree(clear)
    clear.unlink(missing_ok=True)
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        message = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}\n{message[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def median(command: list[str], clear: Path, runs: int) -> tuple[float, int]:
    """Median seconds and largest memory of several runs."""
    results = [measure(command, clear) for _ in range(runs)]
    return statistics.median(seconds for seconds, _ in results), max(memory for _, memory in results)


def main() -> None:
    """Run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--venv", type=Path, default=Path(tempfile.gettempdir()) / "peru-mergekit")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-mergekit", action="store_true")
    arguments = parser.parse_args()
    program = None if arguments.no_mergekit else install(arguments.venv)
    base, models = arguments.family / "base.safetensors", [arguments.family / f"{task}.safetensors" for task in TASKS]
    for path in (base, *models):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    out = arguments.family / "out"
    floors = {}
    for reads_base in (False, True):
        names = [*([base] if reads_base else []), *models]
        command = [sys.executable, "-c", FLOOR, str(out), *map(str, names)]
        floors[reads_base] = median(command, out, arguments.runs)[0]
    start, _ = median([sys.executable, "-c", "import peru_cli.merge.output"], out, arguments.runs)
    print(f"floor {floors[False]:.2f} s for three models, {floors[True]:.2f} s with the base; starting takes {start:.2f} s")
    print(f"{'method':18}{'peru s':>9}{'MB':>7}{'x floor':>9}{'limit':>7}{'mergekit s':>12}{'MB':>8}{'x faster':>10}{'least':>7}")
    times = {}
    for name, options, theirs, reads_base, least, limit in CASES:
        command = [sys.executable, "-m", "peru_cli", "merge", *(f"{p.stem}={p}" for p in models), "--base", str(base)]
        ours, memory = median([*command, "-o", str(out), "--no-sync", "-q", "--method", *options], out, arguments.runs)
        times[name] = ours
        line = f"{name:18}{ours:9.2f}{memory / 1e6:7.0f}{ours / floors[reads_base]:9.2f}{limit if limit else '':>7}"
        if program is not None and theirs is not None:
            method, settings = theirs
            weighted = [{"model": str(p), "parameters": {"weight": 1.0}} for p in models]
            config = {"merge_method": method, "models": weighted, "parameters": settings, "dtype": "bfloat16"}
            if method != "linear":
                config["base_model"] = str(base)
            (arguments.family / "config.yml").write_text(json.dumps(config))
            run = [str(program), str(arguments.family / "config.yml"), str(out)]
            seconds, peak = median(run, out, 1)
            line += f"{seconds:12.1f}{peak / 1e6:8.0f}{seconds / ours:10.1f}{least if least else '':>7}"
        print(line, flush=True)
    print(f"ties, global / ties, per tensor: {times['ties, global'] / times['ties, per tensor']:.2f} (limit 2)")
    if out.is_dir():
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
