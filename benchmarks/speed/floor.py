"""How close commands come to their floor, and how far peers are: all ratios in one run.

    python benchmarks/models/make_pair.py /tmp/family --layers 3 --fine-tunes 3
    python benchmarks/speed/floor.py /tmp/family [--mergekit /tmp/venv/bin/mergekit-pytorch] [--runs 3]

The floor of a command reads its inputs once and writes as many bytes as come out, with as many threads as CPUs and no arithmetic.
Every command is a process of its own, start-up included; figures are the least of all runs, memory is the largest resident set. The
files are read once beforehand, so that the page cache is warm, and nothing is synced, as mergekit does not. Processor seconds count
both threads; on a machine that does other work they say more than seconds.

The script that prune is compared with loads both models, subtracts, and finds the threshold with kthvalue (benchmarks/speed/foundation.py).
mergekit (0.1.5, in a virtual environment of its own, with torch 2.13.0) runs once for each method that it has.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from foundation import OBVIOUS
from measured import PERU, Cost, best

from peru_cli.checkpoints.local.files import RandomAccessFile, read_header

TASKS = ("fine1", "fine2", "fine3")
FLOOR = """
import os, sys, threading
out, size, *names = sys.argv[1:]
size, threads, step = int(size), len(os.sched_getaffinity(0)), 1 << 18
files = [(os.open(name, os.O_RDONLY), os.path.getsize(name)) for name in names]
target = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
os.ftruncate(target, size)
def work(number):
    room = bytearray(step)
    for at in range(number * step, max(size, *(length for _, length in files)), threads * step):
        for file, length in files:
            if at < length:
                os.preadv(file, [memoryview(room)[: length - at]], at)
        if at < size:
            os.pwrite(target, memoryview(room)[: size - at], at)
running = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
[thread.start() for thread in running]
[thread.join() for thread in running]
"""
# name, options of `peru merge`, mergekit's method and settings, most times the floor, least times as fast as mergekit
MERGES = [
    ("linear", ["linear"], ("linear", {}), 2, None),
    ("task-arithmetic", ["task-arithmetic"], ("task_arithmetic", {"lambda": 0.3}), 2, None),
    ("ties, per tensor", ["ties", "--variant", "mergekit"], ("ties", {"density": 0.2}), 5, 25),
    ("ties", ["ties"], None, 5, None),
    ("dare", ["dare"], ("dare_linear", {"density": 0.5}), 4, None),
    ("breadcrumbs", ["breadcrumbs"], ("breadcrumbs", {"density": 0.9, "gamma": 0.01}), 6, None),
    ("consensus", ["consensus"], None, 6, None),
]  # fmt: skip


def slightly_changed(base: Path, out: Path) -> Path:
    """A fine-tune of which one entry in a hundred differs, in its last bit: what lossless pruning is measured on."""
    if not out.exists():
        shutil.copyfile(base, out)
        file = RandomAccessFile(base)
        begin = read_header(file).data_offset
        file.close()
        bits = np.memmap(out, np.uint16, "r+", begin)
        bits[np.random.default_rng(0).integers(0, len(bits), len(bits) // 100)] ^= 1
        bits.flush()
    return out


def least(command: Sequence[object], clear: Path, runs: int) -> Cost:
    """The least cost of several runs. What they write is removed; a command that fails ends the benchmark."""
    cost = best(command, runs)
    if cost.code:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {cost.code}")
    if clear.is_dir():
        shutil.rmtree(clear)
    return cost


def main() -> None:
    """Run all and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=Path)
    parser.add_argument("--mergekit", type=Path, metavar="PROGRAM", help="mergekit-pytorch; without it peers are left out")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    family, runs = arguments.family, arguments.runs
    base, models = family / "base.safetensors", [family / f"{task}.safetensors" for task in TASKS]
    near, out = slightly_changed(base, family / "near.safetensors"), family / "out.safetensors"
    for path in (base, *models, near):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    parameters = base.stat().st_size / 2

    def floor(inputs: Sequence[Path], nbytes: int) -> Cost:
        return least([sys.executable, "-c", FLOOR, out, nbytes, *inputs], out, runs)

    def row(name: str, cost: Cost, under: Cost | None, limit: str, peer: str = "") -> None:
        times = f"{cost.wall / under.wall:.1f}" if under is not None else ""
        each = f"{cost.wall / parameters * 1e9:.1f} | {cost.cpu / parameters * 1e9:.1f}"
        print(f"| {name} | {cost.wall:.2f} | {cost.cpu:.2f} | {cost.peak_mb} | {each} | {times} | {limit} | {peer} |", flush=True)

    print(f"{parameters:,.0f} bf16 parameters, {os.cpu_count()} CPUs, least of {runs}\n")
    print("| command | s | CPU s | peak MB | ns a parameter | CPU ns | times the floor | aim | peer |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |")
    size = base.stat().st_size
    three, four = floor(models, size), floor([base, *models], size)
    row("floor: three models", three, three, "")
    row("floor: base and three models", four, four, "")
    for name, options, theirs, most, ahead in MERGES:
        command = [*PERU, "merge", *(f"{p.stem}={p}" for p in models), "--base", base, "-o", out, "--no-sync", "--force", "-m", *options]
        ours, peer = least(command, out, runs), ""
        if arguments.mergekit is not None and theirs is not None:
            method, settings = theirs
            config = {"merge_method": method, "parameters": settings, "dtype": "bfloat16"} | (
                {} if method == "linear" else {"base_model": str(base)}
            )
            config["models"] = [{"model": str(p), "parameters": {"weight": 1.0}} for p in models]
            (family / "config.yml").write_text(json.dumps(config))
            cost = least([arguments.mergekit, family / "config.yml", family / "theirs"], family / "theirs", 1)
            peer = f"mergekit {cost.wall:.1f} s, {cost.wall / ours.wall:.1f} times as long, {cost.peak_mb} MB"
            peer += f" (aim {ahead})" if ahead is not None else ""
        row(f"`merge` {name}", ours, three if name == "linear" else four, f"{most} times the floor", peer)
    pair = floor([base, models[0]], 1 << 20)
    row("floor: base and one model", pair, pair, "")
    script = least([sys.executable, "-c", OBVIOUS, base, models[0], out], family / "script", 1)
    prune = [*PERU, "prune", "--base", base, "--no-sync", "--force", "-o", out]
    kept = least([*prune, models[0], "--keep", "10%"], out, runs)
    times = f"script {script.wall:.1f} s, {script.wall / kept.wall:.1f} times as long, {script.peak_mb} MB (aim 10)"
    row("`prune --keep 10%`", kept, pair, "4 ns a parameter", times)
    row("`inspect` of that artifact", least([*PERU, "inspect", out], family / "none", runs), None, "")
    row("`prune --lossless`, 1% changed", least([*prune, near, "--lossless"], out, runs), pair, "3 ns a parameter")


if __name__ == "__main__":
    main()
