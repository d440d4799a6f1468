"""Whether `peru prune` keeps its word: the error that it foresaw against the measured one, and bytes against the limit.

    python benchmarks/budget/promise.py CACHE [--tasks sst2 ...] [--bits 0.02 ...]

CACHE is what benchmarks/papers/finetunes.py made. For each task and budget: the squared error of the file as predicted while the multiplier
was searched over the one that was measured while writing, and the bytes that --bits counts over those that it allows; then the same
errors summed by kind of tensor. Prints two tables.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from peru_cli.checkpoints.resolve import open_model
from peru_cli.finetunes.open import open_fine_tune
from peru_cli.prune import run as plan
from peru_cli.prune.mixed import run as job
from peru_cli.prune.mixed.goal import Goal
from peru_cli.prune.mixed.write import Final
from peru_cli.vectors.settings import streaming

KINDS = {"word_embeddings": "word embeddings", "pooler": "pooler", "query": "queries and keys", "key": "queries and keys"}
Sums = dict[tuple[str, str], list[float]]  # predicted and measured squared errors, by bits and kind


class Watched(Final):
    """The pass that writes; it notes what each tensor was foreseen to miss, and what it misses."""

    seen: list[tuple[str, float, float]]

    def commit(self, tile: Any, result: Any) -> None:
        item = self._items[tile.tensor]
        kind = next((kind for part, kind in KINDS.items() if f"{part}." in item.name), "other matrices")
        Watched.seen.append((kind if item.columns else "vectors, small tensors", result.predicted, result.error))
        super().commit(tile, result)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="by default all that CACHE/full has")
    parser.add_argument("--bits", nargs="+", default=["0.02", "0.06", "0.3", "1.5"])
    arguments = parser.parse_args()
    tasks = arguments.tasks or sorted(path.stem for path in (arguments.cache / "full").glob("*.done"))
    job.Final = Watched  # type: ignore[misc]
    sums: Sums = defaultdict(lambda: [0.0, 0.0])
    print("| task | bits/param asked for | of the bytes allowed | predicted / measured squared error |\n| --- | ---: | ---: | ---: |")
    for task in tasks:
        for bits in arguments.bits:
            allowed, result = prune(arguments.cache, task, bits)
            for kind, predicted, measured in Watched.seen:
                sums[bits, kind][0] += predicted
                sums[bits, kind][1] += measured
            print(
                f"| {task} | {bits} | {100 * result.delta_bytes / allowed:.2f}% | {result.predicted_error / result.error:.4f} |", flush=True
            )
    kinds = sorted({kind for _, kind in sums})
    print(f"\n| predicted / measured | {' | '.join(arguments.bits)} |\n| --- |{' ---: |' * len(arguments.bits)}")
    for kind in kinds:
        print(f"| {kind} | {' | '.join(ratio(*sums[bits, kind]) for bits in arguments.bits)} |")


def prune(cache: Path, task: str, bits: str) -> tuple[int, job.MixedResult]:
    """Bytes allowed without head and side files, and what came out."""
    base = open_model(str(cache / "base-bf16"))
    fine = open_fine_tune(str(cache / "full-bf16" / task), base, task)
    Watched.seen = []
    with tempfile.TemporaryDirectory() as scratch, streaming("cpu", 1, None, lambda entries: None) as how:
        planned = plan.plan_prune(base, [(task, fine, Path(scratch) / "a.safetensors")], plan.PruneOptions(None), False)
        result = job.prune_mixed(base, planned, Goal("bits", float(bits)), None, how, False)[0]
    return math.floor(float(bits) * result.entries / 8), result


def ratio(predicted: float, measured: float) -> str:
    """Of two sums, where there is anything to compare."""
    return f"{predicted / measured:.4f}" if measured else "nothing missed"


if __name__ == "__main__":
    main()
