"""Compare ways to store fine-tunes at equal bytes: bits a parameter and task, normalised accuracy, KL, on MiniLM.

    python benchmarks/budget/compare.py CACHE --out DIR [--data ../shared/data/text] [--tasks sst2 ...] [--examples 400]
        [--only NAME ...] [--check]
    python benchmarks/budget/compare.py --images --out DIR
    python benchmarks/budget/compare.py CACHE --loras --out DIR

CACHE is what benchmarks/papers/finetunes.py made (`--only full`; `--only lora --rank 64` for `--loras`, which compresses adapters and
judges the models that they make of the base); `--images` takes the demo's vision transformers. DIR keeps what
was found, a file a method, task and number of examples: a run that was cut off goes on, and tasks that are trained later are
added. Prints one table and writes its rows to DIR/points.json, which picture.py draws. All methods see the same bfloat16
checkpoints, no data (but the rows that say so: 1,000 texts of the training part, from --data), and the same count: bytes of
all encoder parameters / their number. Heads are the fine-tune's own and are counted nowhere.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from images import ImageJudge
from judge import Judge, Judged, LoraJudge, mean_kl, normalised
from methods import BUDGETS, IMAGE_BUDGETS, LORA_BUDGETS, LORAS, OTHER, TUNED, Method, Shop, mixed

from peru_cli import demo
from peru_cli.inference.metrics import kl_divergence

Row = tuple[Method, float, list[Judged]]  # bytes of all tasks


def rows(judge: Judge, shop: Shop, tasks: list[str], methods: list[Method], folder: Path) -> Iterator[Row]:
    """Judge each method on each task, as far as that is not in `folder`."""
    for method in methods:
        total, found = 0.0, []
        for task in tasks:
            family = f"-of-{len(tasks)}" if method.family else ""
            path = folder / f"{method.key}{family}-{task}-{judge.examples or 'all'}.npz"
            if not path.exists():
                print(f"{method.name}: {task}", file=sys.stderr, flush=True)
                tensors, nbytes = method.make(shop, task)
                judged = judge.judge(task, tensors)
                np.savez(path, right=judged.right, reference=judged.reference, kl=judged.kl, nbytes=nbytes)
            with np.load(path) as stored:
                found.append(Judged(stored["right"], stored["reference"], stored["kl"]))
                total += float(stored["nbytes"])
        yield method, total, found


def check(judge: Judge, tasks: list[str]) -> None:
    """Print how far the lean forward pass is from transformers in float32."""
    for task in tasks:
        kl = kl_divergence(judge.outputs_of_transformers(task), judge.reference(task))
        print(f"{task}: KL of transformers in float32 and of what is used here {kl.mean():.1e}")


def main() -> None:
    """Judge what is not judged yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE", nargs="?")
    parser.add_argument("--images", action="store_true", help="the demo's image models in place of CACHE")
    parser.add_argument("--loras", action="store_true", help="CACHE's adapters in place of its full fine-tunes")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="TASK/train.jsonl.gz in it; without, rows with data are left out")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="by default all that CACHE/full has")
    parser.add_argument("--examples", type=int, help="of each test set, at most; by default all")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="methods whose names contain one of these")
    parser.add_argument("--check", action="store_true", help="compare the outputs with transformers' first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other cost more than they bring where others compute, too
    if (arguments.cache is None) is not arguments.images:
        parser.error("give CACHE, or --images in its place")
    store = arguments.out / "outputs"
    if arguments.images:
        judge, found = ImageJudge(store, arguments.examples), demo.tasks()
    else:
        kind = LoraJudge if arguments.loras else Judge
        judge = kind(arguments.cache.resolve(), store, arguments.examples)
        found = sorted(path.stem for path in (arguments.cache / ("lora" if arguments.loras else "full")).glob("*.done"))
    tasks = arguments.tasks or found
    if arguments.check:
        check(judge, tasks)
    ours = mixed(IMAGE_BUDGETS) if arguments.images else [*mixed(BUDGETS), *(TUNED if arguments.data is not None else [])]
    every = [*mixed(LORA_BUDGETS), *LORAS] if arguments.loras else [*ours, *OTHER]
    chosen = [m for m in every if not arguments.only or any(part in m.name for part in arguments.only)]
    points = []
    counts = [len(judge.reference(task)) for task in tasks]
    print(f"{len(tasks)} tasks ({', '.join(tasks)}), {sum(counts)} examples, {judge.parameters:,} parameters a task\n")
    print("| method | bits/param | bytes a task | normalised accuracy | mean KL |\n| --- | ---: | ---: | ---: | ---: |")
    shop = Shop(judge, tasks, arguments.out / "made", arguments.data)
    for method, nbytes, found in rows(judge, shop, tasks, chosen, arguments.out):
        bits, quality, kl = 8 * nbytes / len(tasks) / judge.parameters, normalised(found), mean_kl(found)
        print(
            f"| {method.name} | {bits:.3f} | {nbytes / len(tasks):,.0f} | {100 * quality.value:.2f} ({100 * quality.low:.2f} to "
            f"{100 * quality.high:.2f}) | {kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f}) |",
            flush=True,
        )
        points.append(
            {"method": method.name, "line": method.line, "bits": bits, "bytes": nbytes / len(tasks)}
            | {"normalised": [100 * quality.value, 100 * quality.low, 100 * quality.high], "kl": [kl.value, kl.low, kl.high]}
        )
    about = {"tasks": tasks, "examples": sum(counts), "parameters": judge.parameters, "points": points}
    (arguments.out / "points.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
