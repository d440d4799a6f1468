"""What commands cost on a checkpoint of many small tensors: 10^5 of 64 entries are 13 MB.

    python benchmarks/speed/many_tensors.py WORK [--tensors 100000] [--svd-lora]

Writes three such checkpoints into the folder WORK and prints a table: seconds, seconds of processor time, peak memory.
A tenth of the tensors should take a tenth of the time: `--tensors 10000` shows what does not grow with their number.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from measured import table

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo, build_header

SHAPE, ENTRIES, BYTES = (8, 8), 64, 128


def write(path: Path, tensors: int, change: float) -> Path:
    """A bf16 checkpoint of experts: normal weights, and normal changes of a size."""
    noise = np.random.default_rng(0)
    weights = noise.standard_normal(tensors * ENTRIES, np.float32) * 0.02
    weights += np.random.default_rng(int(change * 1e6)).standard_normal(tensors * ENTRIES, np.float32) * np.float32(change)
    names = [f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.w.weight" for i in range(tensors)]
    infos = [TensorInfo(name, BY_NAME["BF16"], SHAPE, i * BYTES) for i, name in enumerate(names)]
    path.write_bytes(build_header(infos, {}) + (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return path


def main() -> None:
    """Write, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--tensors", type=int, default=100_000)
    parser.add_argument("--svd-lora", action="store_true", help="also svd-lora, which takes minutes")
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    base, a, b = (
        write(work / f"{name}.safetensors", arguments.tensors, change) for name, change in (("base", 0), ("a", 1e-3), ("b", 2e-3))
    )
    options, delta = ["--base", base, "--no-sync", "--force", "-o"], work / "delta.safetensors"
    commands = {
        "inspect": ["inspect", a],
        "prune --keep 10%": ["prune", a, "--keep", "10%", *options, delta],
        "prune --lossless": ["prune", a, "--lossless", *options, work / "lossless.safetensors"],
        "inspect of the artifact": ["inspect", delta],
        "unpack": ["unpack", delta, *options, work / "back.safetensors"],
        "merge task-arithmetic": ["merge", a, b, "-m", "task-arithmetic", *options, work / "merged.safetensors"],
        "merge ties": ["merge", a, b, "-m", "ties", *options, work / "merged.safetensors"],
    }
    if arguments.svd_lora:
        commands["svd-lora --rank 2"] = ["svd-lora", a, "--rank", "2", *options, work / "adapter"]
    print(f"{arguments.tensors:,} tensors of {ENTRIES} entries\n")
    table(commands)


if __name__ == "__main__":
    main()
