"""What the first use of each command costs on a machine: seconds with no compiled loops stored, beside the next start.

    python benchmarks/speed/first_use.py [--millions 48]

A base and two bf16 fine-tunes of it, synthetic. Each command runs with an empty cache of loops and then twice with what that run
stored; the lesser time counts. The first run's processor seconds are its own: those of the process beside it, which compiles, are not
among them."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measured import PERU, best, measure

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo, build_header


def write_models(folder: Path, entries: int) -> None:
    """A base and fine-tunes `a`, `b` (half of the weights change) and `few` (1%), in 8 matrices."""
    noise = np.random.default_rng(0)
    rows = entries // 8 // 1024
    infos = [TensorInfo(f"layers.{i}.weight", BY_NAME["BF16"], (rows, 1024), 2048 * rows * i) for i in range(8)]
    header = build_header(infos, {})
    files = {name: folder / name / "model.safetensors" for name in ("base", "a", "b", "few")}
    for path in files.values():
        path.parent.mkdir()
        path.write_bytes(header)
    for _ in infos:
        base = (noise.standard_normal(rows * 1024, np.float32) * 0.02).view(np.uint32) >> 16
        for name, share in {"base": 0, "a": 0.5, "b": 0.5, "few": 0.01}.items():
            moved = (noise.random(len(base), np.float32) < share) * np.minimum(noise.exponential(4, len(base)), 60).astype(np.uint32)
            with files[name].open("ab") as file:
                file.write((base + moved).astype(np.uint16).tobytes())


def settle(cache: Path) -> None:
    """Wait until no process compiles loops any more: none has come for ten seconds."""
    number, since = -1, time.monotonic()
    while time.monotonic() - since < 10:
        if number != (number := len(list(cache.glob("peru/*.o")))):
            since = time.monotonic()
        time.sleep(0.5)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--millions", type=float, default=48, help="parameters of a model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, int(options.millions * 1e6))
        base, a, b, few, out, cache = (folder / each for each in ("base", "a", "b", "few", "out", "cache"))
        os.environ["NUMBA_CACHE_DIR"] = str(cache)
        kept = folder / "kept.safetensors"
        common = ["--force", "--quiet", "--no-sync"]
        merge = ["merge", a, b, "-b", base, "-o", out, *common, "-m"]
        commands = {
            "prune --keep 10%": ["prune", a, "-b", base, "-o", kept, "--keep", "10%", *common],
            "prune --lossless, 1% changed": ["prune", few, "-b", base, "-o", folder / "l.safetensors", "--lossless", *common],
            "unpack": ["unpack", kept, "-b", base, "-o", out, *common],
            "inspect of an artifact": ["inspect", kept],
            "merge -m linear": [*merge, "linear"],
            "merge -m task-arithmetic": [*merge, "task-arithmetic"],
            "merge -m ties": [*merge, "ties"],
            "merge -m dare": [*merge, "dare"],
            "merge -m della": [*merge, "della"],
        }
        print("| command | first s | next s | more | first CPU s | next CPU s | loops | MB more |\n|" + " --- |" + 7 * " ---: |")
        for name, words in commands.items():
            shutil.rmtree(cache, ignore_errors=True)
            log = folder / "log"
            first = measure([*PERU, *words], log)
            settle(cache)
            later = best([*PERU, *words], 2)
            if first.code or later.code:
                raise SystemExit(f"{name} failed:\n{log.read_text()}")
            loops = len(list(cache.glob("peru/*")))
            print(
                f"| `{name}` | {first.wall:.2f} | {later.wall:.2f} | {first.wall - later.wall:.2f} | {first.cpu:.2f} | {later.cpu:.2f} "
                f"| {loops} | {first.peak_mb - later.peak_mb} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
