"""SMILE and WEMoE on fine-tunes of one base, mixed inputs: who answers, how often right, bytes, and time an input.

    python benchmarks/accuracy/routing.py FOLDER|demo [--examples 100] [--steps 100] [--only wemoe]

FOLDER has base/, one fine-tune in each folder of full/, and data/TASK.test.jsonl. WEMoE's routers are trained on data/TASK.dev.jsonl
without labels. `demo` is the family of `peru demo`: the first images are the test, the next ones train routers. WEMoE without training is
task arithmetic, with the same differences. One process, one thread. Latency is the processor time of one input at a time (batch 1), the
median over 20 inputs: the routed model, and one fine-tune alone."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peru_cli import demo
from peru_cli.artifacts.packs.routed import open_routed
from peru_cli.checkpoints.resolve import open_model
from peru_cli.evaluate.routed import evaluate_routed
from peru_cli.evaluate.run import Comparison, evaluate
from peru_cli.inference.data import Examples
from peru_cli.inference.eval_model import Base
from peru_cli.inference.prepare import Settings, prepare
from peru_cli.inference.reading import read_examples
from peru_cli.inference.routed import subject_of
from peru_cli.live.applied import as_saved
from peru_cli.live.routed import install
from peru_cli.methods.compact.routed import of_method
from peru_cli.pack.routed.plan import Given
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import StreamSettings


def choices(steps: int, rate: float, bits: float, data: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Each row: a name, a method, and its options."""
    trained = {"--steps": steps, "--learning-rate": rate, "--data": data, "--bits": bits}
    return [
        ("smile, rank 16, router of 4", "smile", {"--rank": 16, "--gate-rank": 4}),
        ("smile, rank 16, router of 16", "smile", {"--rank": 16, "--gate-rank": 16}),
        ("task arithmetic (wemoe, not trained)", "wemoe", {"--steps": 0, "--bits": bits}),
        ("wemoe, routers of 1 layer", "wemoe", {**trained, "--router-layers": 1}),
        ("wemoe, routers of 2 layers", "wemoe", trained),
    ]


def latency(model: Any, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Median milliseconds of processor time for one input."""
    times = []
    with torch.inference_mode():
        for one in inputs:
            begin = time.process_time()
            model(**one)
            times.append(1000 * (time.process_time() - begin))
    return statistics.median(times)


def time_both(target: Path, base: str, data: dict[str, Examples]) -> tuple[float, float]:
    """Milliseconds of one input: of a task's model without anything installed, and of the routed model."""
    with open_routed(target) as routed, Base(base) as opened:
        task, examples = next(iter(data.items()))
        of_base = {name: file.read_bytes() for name, file in opened.checkpoint.side_files.items()}
        loaded = prepare(subject_of(routed, routed.tasks[task], opened, base), examples, [of_base]).build(Settings(threads=1))
        inputs = [loaded.inputs.make(np.array([number])) for number in range(20)]
        before = latency(loaded.model, inputs)
        with install(loaded.model, as_saved(loaded.model), routed):
            return before, latency(loaded.model, inputs)


def family(given: argparse.Namespace, scratch: Path) -> tuple[str, dict[str, str], dict[str, Examples], list[str]]:
    """Base, fine-tunes, test examples, and what --data gets."""
    if given.folder == "demo":
        found: dict[str, Examples] = {}
        for task in demo.tasks():
            images = np.load(demo.images(task))
            np.savez(scratch / f"{task}.npz", x=images["x"][given.examples : given.examples + given.unlabelled])
            found[task] = read_examples(str(demo.images(task)), given.examples)
        return str(demo.BASE), {t: str(demo.fine_tune(t)) for t in found}, found, [f"{task}={scratch / task}.npz" for task in found]
    folder = Path(given.folder)
    tasks = {path.name: str(path) for path in sorted((folder / given.full).iterdir()) if path.is_dir()}
    found = {task: read_examples(str(folder / "data" / f"{task}.test.jsonl"), given.examples) for task in tasks}
    return str(folder / given.base), tasks, found, [f"{task}={folder / 'data' / task}.dev.jsonl" for task in tasks]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--base", default="base-bf16")
    parser.add_argument("--full", default="full-bf16")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--unlabelled", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--bits", type=float, default=0.3)
    parser.add_argument("--only", default="", help="rows whose names have this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings, how = Settings(threads=1), StreamSettings(CPU, 1, 1 << 19)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base, tasks, data, unlabelled = family(given, scratch)
        compared = [Comparison(task, tasks[task], data[task]) for task in tasks]
        alone = evaluate(compared, None, settings, None, lambda n: None, lambda text: None)
        each = {score.task: round(100 * score.metrics["accuracy"].value, 1) for score in alone}
        mean = round(statistics.mean(each.values()), 1)
        print(json.dumps({"row": "one model a task", "accuracy": mean, "bytes": sum(s.nbytes for s in alone), "tasks": each}), flush=True)
        for row, method, options in choices(given.steps, given.rate, given.bits, unlabelled):
            if given.only not in row:
                continue
            chosen = of_method(method, "pack").Chosen(Given({"--max-samples": given.unlabelled, **options}))
            plan = chosen.plan(open_model(base), [(task, open_model(path)) for task, path in tasks.items()])
            target, begin = scratch / "routed.safetensors", time.process_time()
            made = chosen.make(plan, target, how, False, lambda text: None)
            told = {"row": row, "bytes": made.file_bytes, "seconds": round(time.process_time() - begin, 1)}
            scores = evaluate_routed(str(target), target, base, data, settings, None, lambda n: None, lambda text: None)
            names = ("accuracy", "given", "routed")
            told |= {name: round(100 * statistics.mean(s.metrics[name].value for s in scores), 1) for name in names}
            table = {s.task: [round(100 * s.metrics[name].value, 1) for name in names] for s in scores}
            before, after = time_both(target, base, data)
            print(json.dumps({**told, "ms alone": round(before, 1), "ms routed": round(after, 1), "tasks": table}))
            print(json.dumps({s.task: {k: round(100 * v) for k, v in s.shares.items() if v >= 0.03} for s in scores}), flush=True)
            target.unlink()


if __name__ == "__main__":
    main()
