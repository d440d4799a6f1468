"""Merge fine-tunes of MiniLM with and without data, choosing on dev and measuring on test; prints a table for docs/results.md.

    python benchmarks/papers/data_merges.py CACHE [--tasks sst2 clinc_domains hate_davidson] [--steps 500]

CACHE is what finetunes.py made. Statistics are of the dev examples, without their labels; what is searched is chosen on
them with labels. Accuracies are on the test sets.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from peru_cli.checkpoints.local.checkpoint import open_directory
from peru_cli.console import console
from peru_cli.inference.models import pick_device
from peru_cli.inference.reading import read_examples
from peru_cli.inference.task_models import Running
from peru_cli.merge.data.collect import Builder
from peru_cli.merge.data.statistics import Progress
from peru_cli.merge.plan import Options, plan_merge
from peru_cli.merge.search.asked import NORMALISED
from peru_cli.merge.search.memory import merged_weights
from peru_cli.merge.search.objective import Judge
from peru_cli.methods.parameters import Parameters, Value
from peru_cli.methods.table import effective_values, find_method
from peru_cli.vectors.settings import streaming

GRID = [i / 10 for i in range(11)]


def main() -> None:
    """Run all methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "clinc_domains", "hate_davidson"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--test-samples", type=int, help="the first so many test examples only")
    parser.add_argument("--quick", action="store_true", help="nothing is searched, and regmean looks at 200 examples a task")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="part of a row's name, as fisher or sampled; by default all")
    parser.add_argument(
        "--samples", type=int, help="examples a task that statistics look at; by default all, and 200 of RegMean with --quick"
    )
    arguments = parser.parse_args()
    names = tuple(arguments.tasks)
    base = open_directory(arguments.cache / "base", "base")
    fine = [(task, open_directory(arguments.cache / "full" / task, task)) for task in names]
    parts = {}
    for part, most in (("dev", None), ("test", arguments.test_samples)):
        found = {task: read_examples(str(arguments.cache / "data" / f"{task}.{part}.jsonl"), most) for task in names}
        parts[part] = Running(found, pick_device("auto"), 16 if part == "dev" else 64)
    cases: list[tuple[str, dict[str, Value], str | None, list[Value]]] = [
        ("linear", {}, None, []),
        ("task-arithmetic", {}, "scale", list(GRID)),
        ("ties", {}, "scale", [i / 5 for i in range(1, 11)]),
        ("fisher", {}, None, []),
        ("fisher", {"floor": 1e-12}, None, []),
        ("fisher", {"floor": 1e-12, "normalize": True}, None, []),
        ("fisher", {"floor": 1e-12, "expectation": "sampled"}, None, []),
        ("regmean", {}, "alpha", [0.1, 0.5, 0.9, 1.0]),
        ("adamerging", {"scope": "global", "steps": arguments.steps}, None, []),
        ("adamerging", {"steps": arguments.steps}, None, []),
    ]
    if arguments.quick:
        cases = [(name, given | ({"max-samples": 200} if name == "regmean" else {}), None, []) for name, given, _, _ in cases]
    if arguments.samples is not None:
        cases = [
            (name, given | ({"max-samples": arguments.samples} if name in ("fisher", "regmean") else {}), *more)
            for name, given, *more in cases
        ]
    if arguments.methods is not None:
        cases = [case for case in cases if any(wanted in f"{case[0]} {_shown(case[1])}" for wanted in arguments.methods)]
    print("| method | chosen |", " | ".join(names), "| mean | normalised | seconds |")
    print("| --- | --- |" + " ---: |" * (len(names) + 3))
    with tempfile.TemporaryDirectory() as folder, console.progress(0, "") as bar, streaming("auto", None, None, bar.advance) as how:
        judge = None
        for name, given, searched, points in cases:
            method, start = find_method(name), time.perf_counter()
            values = effective_values(method, given)
            weights = (1.0,) * len(names)
            plan = plan_merge(base, fine, method.build(Parameters(names, weights, values)).on_vectors, Options())
            builder = Builder(plan, method, parts["dev"], Path(folder), Progress(lambda text: None, bar.expect, bar.advance))
            tried = []
            if searched:
                dev = Judge(plan, parts["dev"], NORMALISED)
                for value in points:
                    rule = builder.build(Parameters(names, weights, values | {searched: value}))
                    tried.append(dev.measure(merged_weights(plan, rule, how, dev.device)).total)
                values = values | {searched: points[tried.index(max(tried))]}
            rule = builder.build(Parameters(names, weights, values))
            seconds = time.perf_counter() - start
            judge = judge or Judge(plan, parts["test"], NORMALISED)  # plans differ in nothing that it looks at
            score = judge.measure(merged_weights(plan, rule, how, judge.device))
            chosen = f"{searched} {values[searched]:g}" if searched else ""
            cells = [f"{100 * a:.2f}" for a in (*score.figures.values(), sum(score.figures.values()) / len(names), score.total)]
            print(f"| {name} {_shown(given)} | {chosen} | {' | '.join(cells)} | {seconds:.0f} |", flush=True)
        assert judge is not None
        cells = [f"{100 * a:.2f}" for a in (*judge.fine.values(), sum(judge.fine.values()) / len(names), 1.0)]
        print(f"| fine-tunes | | {' | '.join(cells)} | |")


def _shown(given: dict[str, Value]) -> str:
    return ", ".join(f"{k} {v}" for k, v in given.items())


if __name__ == "__main__":
    main()
