"""What `peru eval` adds to the forward passes: a pack's tasks, each compared with its fine-tune, in one process.

    python benchmarks/papers/finetunes.py --out CACHE --data ../shared/data/text --only full
    python benchmarks/speed/eval.py CACHE [--tasks sst2 clinc_domains] [--examples 1000] [--runs 3]

CACHE holds base/, full/TASK/ and data/TASK.test.jsonl. The tasks are packed with `peru shuffle-pack`. The forward passes are
timed inside `evaluate`, so both figures come from the same moments of the machine. "all" starts before headers are read and data
tokenised, and ends with the metrics. Start-up and imports (the whole command minus that) are listed beside it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peru_cli.evaluate import run as job
from peru_cli.evaluate.plan import Comparison
from peru_cli.inference.prepare import Settings
from peru_cli.inference.reading import read_examples

PERU = [sys.executable, "-m", "peru_cli"]


class Timed:
    """Seconds that a function took, over all calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        begin = time.perf_counter()
        try:
            return self.function(*arguments)
        finally:
            self.seconds += time.perf_counter() - begin


def run(cache: Path, pack: Path, tasks: list[str], most: int, against: bool) -> tuple[float, float]:
    """Seconds of one evaluation, and of the forward passes in it."""
    forward = Timed(job.class_logits)
    job.class_logits = forward  # type: ignore[assignment]
    try:
        begin = time.perf_counter()
        comparisons = [
            Comparison(
                task, str(pack), read_examples(str(cache / "data" / f"{task}.test.jsonl"), most),
                str(cache / "full" / task) if against else None,
            )
            for task in tasks
        ]  # fmt: skip
        job.evaluate(comparisons, str(cache / "base"), Settings(), None, lambda n: None, lambda task: None)
        return time.perf_counter() - begin, forward.seconds
    finally:
        job.class_logits = forward.function


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="by default all that CACHE/full has")
    parser.add_argument("--examples", type=int, default=1000, help="of each test set, at most")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    cache = arguments.cache.resolve()
    tasks = arguments.tasks or sorted(path.stem for path in (cache / "full").glob("*.done"))
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "pack.safetensors"
        models = [f"{task}={cache / 'full' / task}" for task in tasks]
        subprocess.run([*PERU, "shuffle-pack", *models, "--base", cache / "base", "-o", pack, "--quiet"], check=True, stdout=2)
        print("| | all, s | forward passes, s | ratio |\n| --- | ---: | ---: | ---: |")
        for name, against in (("the pack alone", False), ("against the fine-tunes", True)):
            run(cache, pack, tasks[:1], 50, against)  # imports on first use
            for _ in range(arguments.runs):
                whole, forward = run(cache, pack, tasks, arguments.examples, against)
                print(f"| {name}, {len(tasks)} tasks | {whole:.2f} | {forward:.2f} | {whole / forward:.3f} |", flush=True)
        data = [word for task in tasks for word in ("--data", f"{task}={cache / 'data' / f'{task}.test.jsonl'}")]
        begin = time.perf_counter()
        limit = ["--max-samples", str(arguments.examples), "--quiet"]
        subprocess.run([*PERU, "eval", pack, "--base", cache / "base", *data, *limit], check=True, stdout=subprocess.DEVNULL)
        print(f"\nthe whole command, the pack alone: {time.perf_counter() - begin:.2f} s")


if __name__ == "__main__":
    main()
