"""Routed experts (SMILE) on fine-tunes of one base, mixed inputs: who answers, how often right, bytes, and time an input.

    python benchmarks/accuracy/routing.py FOLDER [--examples 100]

FOLDER has base/, one fine-tune in each folder of full/, and data/TASK.test.jsonl. One process, one thread. Latency is the processor time of
one input at a time (batch 1), the median over 40 inputs: the routed model, and one fine-tune alone."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from peru_cli.artifacts.packs.routed import Routed
from peru_cli.checkpoints.resolve import open_model
from peru_cli.evaluate.routed import evaluate_routed
from peru_cli.evaluate.run import Comparison, evaluate
from peru_cli.inference.prepare import Settings
from peru_cli.inference.reading import read_examples
from peru_cli.live.routed import install
from peru_cli.pack.routed.run import RoutedOptions, make_routed, plan_routed
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import StreamSettings

CHOICES = [(16, 4), (16, 16)]  # rank, directions of the router


def latency(model: object, inputs: list[dict[str, torch.Tensor]]) -> float:
    """Median milliseconds of processor time for one input."""
    times = []
    with torch.inference_mode():
        for one in inputs:
            begin = time.process_time()
            model(**one)  # type: ignore[operator]
            times.append(1000 * (time.process_time() - begin))
    return statistics.median(times)


def main() -> None:
    """See the module."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default="base-bf16")
    parser.add_argument("--full", default="full-bf16")
    parser.add_argument("--examples", type=int, default=100)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = str(given.folder / given.base)
    tasks = {path.name: str(path) for path in sorted((given.folder / given.full).iterdir())}
    data = {task: read_examples(str(given.folder / "data" / f"{task}.test.jsonl"), given.examples) for task in tasks}
    settings, how = Settings(threads=1), StreamSettings(CPU, 1, 1 << 19)
    alone = evaluate([Comparison(task, tasks[task], data[task]) for task in tasks], None, settings, None, lambda n: None, lambda text: None)
    print("one model a task", [round(100 * s.metrics["accuracy"].value, 1) for s in alone], sum(s.nbytes for s in alone))
    tokenizer = AutoTokenizer.from_pretrained(next(iter(tasks.values())))
    inputs = [dict(tokenizer(text, truncation=True, return_tensors="pt")) for task in tasks for text in (data[task].texts or [])[:5]]
    with tempfile.TemporaryDirectory() as folder:
        for rank, gate in CHOICES:
            opened = open_model(base)
            plan = plan_routed(opened, [(task, open_model(path)) for task, path in tasks.items()], RoutedOptions(rank, gate))
            target = Path(folder) / f"{rank}-{gate}.safetensors"
            begin = time.process_time()
            made = make_routed(plan, target, how, sync=False)
            seconds = time.process_time() - begin
            scores = evaluate_routed(str(target), target, base, data, settings, None, lambda n: None, lambda text: None)
            names = ("accuracy", "given", "routed")
            means = {name: round(100 * statistics.mean(s.metrics[name].value for s in scores), 1) for name in names}
            table = {s.task: [round(100 * s.metrics[name].value, 1) for name in names] for s in scores}
            print(json.dumps({"rank": rank, "gate": gate, "bytes": made.file_bytes, "seconds": round(seconds, 1), **means, "tasks": table}))
            print(json.dumps({s.task: {k: round(100 * v) for k, v in s.shares.items() if v >= 0.03} for s in scores}), flush=True)
            model = AutoModelForSequenceClassification.from_pretrained(next(iter(tasks.values())), dtype=torch.float32).eval()
            before = latency(model, inputs)
            with Routed(target) as routed, install(model, model.state_dict(keep_vars=True), routed):
                print(f"ms an input: {before:.1f} alone, {latency(model, inputs):.1f} routed", flush=True)


if __name__ == "__main__":
    main()
