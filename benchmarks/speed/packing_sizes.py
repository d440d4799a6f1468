"""Size and peak memory of packs by the number of tasks, on synthetic fine-tunes with independent task vectors.

    python benchmarks/speed/packing_sizes.py SCRATCH [--tasks 2 8 20]

7.3M float32 parameters in the shapes of a small encoder, with normal differences. Prints bits a parameter, the increase over the
previous number of tasks, the increase in a sum's entropy by sqrt(T), retrieval errors, and each process's peak memory."""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 256, 1024, 8, 4000
# Runs the command and reports only its child's peak memory: this process is small, so a fork of it is too.
MEASURE = """
import os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(child.pid, 0)
print(usage.ru_maxrss * 1024)
sys.exit(status != 0)
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensor shapes by name."""
    table: dict[str, tuple[int, ...]] = {"embeddings.weight": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        prefix = f"encoder.layer.{i}."
        table |= {f"{prefix}{name}.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        table |= {
            f"{prefix}up.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}down.weight": (HIDDEN, INTERMEDIATE),
            f"{prefix}ln.weight": (HIDDEN,),
        }
    return table


def main() -> None:
    """Make the family, pack it, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--tasks", nargs="+", type=int, default=[2, 8, 20])
    arguments = parser.parse_args()
    folder = arguments.scratch
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes().items()}
    save_file(base, folder / "base.safetensors")
    for task in range(max(arguments.tasks)):
        rng = np.random.default_rng(task + 1)
        fine = {name: array + rng.normal(0, 0.002, array.shape).astype(np.float32) for name, array in base.items()}
        save_file(fine, folder / f"t{task:02d}.safetensors")
    print("| tasks | bytes | bits/param | more | sqrt(T) in entropy | error | sqrt(T - 1) | peak MB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    before: tuple[int, float] | None = None
    for tasks in arguments.tasks:
        models = [str(folder / f"t{task:02d}.safetensors") for task in range(tasks)]
        command = [sys.executable, "-m", "peru_cli", "shuffle-pack", *models, "-b", str(folder / "base.safetensors")]
        command += ["-o", str(folder / "pack.safetensors"), "-f", "--no-sync", "-q", "--json"]
        said = subprocess.run([sys.executable, "-c", MEASURE, *command], check=True, stdout=subprocess.PIPE, text=True).stdout
        text, peak = said.strip().rsplit("\n", 1)
        report = json.loads(text)
        bits, error = report["bits_per_parameter"], sum(task["error"] for task in report["packed"]) / tasks
        more = ["", ""] if before is None else [f"{bits - before[1]:.3f}", f"{math.log2(tasks / before[0]) / 2:.3f}"]
        cells = [str(tasks), f"{report['file_bytes']:,}", f"{bits:.3f}", *more, f"{error:.3f}", f"{math.sqrt(tasks - 1):.3f}"]
        print(f"| {' | '.join([*cells, f'{int(peak) / 1e6:.0f}'])} |", flush=True)
        before = tasks, bits


if __name__ == "__main__":
    main()
