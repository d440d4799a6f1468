"""Plain, linearised and regularised fine-tunes of MiniLM-L6, and what becomes of them in sums: the tau-Jp paper's tables 1 to 3.

    python benchmarks/papers/taujp.py CACHE --data ../shared/data/text --out results.json [--seeds 0 1 2] [--steps 100]

CACHE is a folder for the base and the parts of the data; give it one of its own, because the parts depend on the seed. For each seed
and kind one model a task is trained, measured and dropped; what results.json has is not made again. A head starts as in finetunes.py:
fitted to the frozen base's features. The regulariser sees an eighth of a batch of each task.
Linearised models are merged and measured as linear models, as in the papers. Choices (the scale) use the development parts, figures
the test parts."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent))
import finetunes
from finetunes import Cache, Task

from peru_cli.training import OtherTasks, TauJp, linearize

TASKS = ("sst2", "clinc_domains", "banking77", "snips")
KINDS = ("plain", "cyclic", "linear", "linear-cyclic", "strict")
SCALES = (0.3, 0.5, 0.7, 1.0, 1.25)
NEGATED = (0.0, 0.5, 1.0, 1.5)
KEPT = 0.95  # share of the base's accuracy on the control task that negation must leave
Vector = dict[str, Tensor]


class Streams:
    """Endless batches by seed; a loader that OtherTasks may begin anew."""

    def __init__(self, cache: Cache, task: Task, size: int) -> None:
        self.cache, self.task, self.size = cache, task, size

    def __iter__(self) -> Any:
        return (inputs for inputs, _ in self.cache.batches(self.task, self.size))


class Bench:
    """Tasks, heads and the base; trains, and measures sums of task vectors."""

    def __init__(self, cache: Cache, tasks: Sequence[Task], options: argparse.Namespace) -> None:
        self.cache, self.tasks, self.options = cache, tasks, options
        self.base = cache.classifier(tasks[0]).bert.eval().requires_grad_(False)
        self.base.set_attn_implementation("eager")  # for the products
        self.theta_0 = {name: p.detach().clone() for name, p in self.base.named_parameters()}

    def train(self, task: Task, kind: str) -> tuple[Vector, nn.Module, float]:
        """One fine-tune: its task vector, head and CPU seconds a step."""
        model = self.cache.classifier(task)
        model.bert.embeddings.word_embeddings.requires_grad_(self.options.embeddings)
        if kind.startswith("linear"):
            linearize(model)
        tau_jp = TauJp(model, self.base)
        others = {t.name: Streams(self.cache, t, max(1, self.options.batch // 8)) for t in self.tasks if t is not task}
        turns = OtherTasks(others, "strict" if kind == "strict" else "cyclic")
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.options.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.options.rate, total_steps=self.options.steps, pct_start=0.1, cycle_momentum=False
        )
        model.train()
        torch.manual_seed(finetunes.SEED)
        begin = time.process_time()
        for inputs, labels in islice(self.cache.batches(task, self.options.batch), self.options.steps):
            functional.cross_entropy(model(**inputs).logits, labels).backward()
            if "strict" in kind or "cyclic" in kind:
                (self.options.strength * tau_jp.penalty(turns.next())).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds = (time.process_time() - begin) / self.options.steps
        return {n: p.detach() - self.theta_0[n] for n, p in model.bert.named_parameters()}, model.classifier, seconds

    def batches(self, task: Task, part: str) -> list[tuple[dict[str, Tensor], Tensor]]:
        """The first examples of a part, of like length together."""
        count = min(self.options.examples[part], len(task.parts[part]))
        order = sorted(range(count), key=lambda i: len(task.tokens[part][i]["input_ids"]))
        return [self.cache.batch(task, part, order[i : i + 50]) for i in range(0, count, 50)]

    def moved(self, task: Task, part: str, taus: Mapping[str, Vector]) -> tuple[Tensor, Vector]:
        """Features at the base, and the first-order change by each vector; (examples, width) each."""
        values, changes = [], {name: [] for name in taus}
        with torch.no_grad():
            for inputs, _ in self.batches(task, part):

                def features(parameters: Vector, inputs: dict[str, Tensor] = inputs) -> Tensor:
                    return functional_call(self.base, parameters, (), inputs).pooler_output

                for name, tau in taus.items():
                    value, change = jvp(features, (self.theta_0,), (tau,))
                    changes[name].append(change)
                values.append(value)
        return torch.cat(values), {name: torch.cat(found) for name, found in changes.items()}

    def features(self, task: Task, part: str, taus: Mapping[str, Vector], scales: Mapping[str, float]) -> Tensor:
        """Features of the usual model at theta_0 + sum of scale * tau."""
        weights = {n: t + sum(s * taus[name][n] for name, s in scales.items()) for n, t in self.theta_0.items()}
        with torch.no_grad():
            return torch.cat([functional_call(self.base, weights, (), inputs).pooler_output for inputs, _ in self.batches(task, part)])

    def measure(self, kind: str) -> dict[str, Any]:
        """Train a kind on every task; the figures of the papers' tables."""
        taus, heads, seconds = {}, {}, {}
        for task in self.tasks:
            taus[task.name], heads[task.name], seconds[task.name] = self.train(task, kind)
            print(f"  {kind} {task.name}: {seconds[task.name]:.3f} s a step", file=sys.stderr, flush=True)
        names, is_linear = list(taus), kind.startswith("linear")
        parts = ("dev", "test") if is_linear else ("dev",)
        moved = {(t.name, part): self.moved(t, part, taus) for t in self.tasks for part in parts}
        labels = {(t.name, part): torch.cat([y for _, y in self.batches(t, part)]) for t in self.tasks for part in ("dev", "test")}

        def accuracy(task: Task, part: str, scales: Mapping[str, float]) -> float:
            if is_linear:
                value, changes = moved[task.name, part]
                found = value + sum((s * changes[name] for name, s in scales.items()), torch.zeros_like(value))
            else:
                found = self.features(task, part, taus, scales)
            with torch.no_grad():
                right = heads[task.name](found).argmax(-1) == labels[task.name, part]
            return round(100 * right.double().mean().item(), 2)

        alone = {part: {t.name: accuracy(t, part, {t.name: 1.0}) for t in self.tasks} for part in ("dev", "test")}

        def merged(part: str, scale: float) -> dict[str, float]:
            return {t.name: accuracy(t, part, dict.fromkeys(names, scale)) for t in self.tasks}

        def normalised(part: str, found: Mapping[str, float]) -> float:
            return 100 * sum(found[t] / alone[part][t] for t in names) / len(names)

        on_dev = {scale: merged("dev", scale) for scale in SCALES}
        best = max(SCALES, key=lambda scale: normalised("dev", on_dev[scale]))
        one, tuned = merged("test", 1.0), merged("test", best)
        return {
            "tau_jp": {i: {j: moved[j, "dev"][1][i].norm(dim=-1).mean().item() for j in names} for i in names},
            "base": {t.name: accuracy(t, "test", {}) for t in self.tasks},
            "alone": alone["test"],
            "one": one | {"normalised": normalised("test", one)},
            "tuned": tuned | {"normalised": normalised("test", tuned), "scale": best},
            "negation": {t.name: self.negation(t, self.tasks[(at + 1) % len(names)], accuracy) for at, t in enumerate(self.tasks)},
            "norms": {i: sum(t.double().square().sum().item() for t in taus[i].values()) ** 0.5 for i in names},
            "seconds": seconds,
        }

    def negation(self, target: Task, control: Task, accuracy: Any) -> dict[str, Any]:
        """The scale that forgets most and keeps 95% of the control task, chosen on dev, at most 1.5; accuracies on test."""
        found = {s: [accuracy(task, "dev", {target.name: -s}) for task in (target, control)] for s in NEGATED}
        best = min((s for s in NEGATED if found[s][1] >= KEPT * found[0.0][1]), key=lambda s: found[s][0])
        scales = {target.name: -best}
        return {"control": control.name, "scale": best, "accuracy": [accuracy(task, "test", scales) for task in (target, control)]}


def markdown(results: Mapping[str, Any], seeds: Sequence[int]) -> str:
    """The tables of all seeds that are there: means over tasks, and over seeds with their range where there are several."""

    def cell(values: Sequence[float], digits: int = 1) -> str:
        mean = f"{sum(values) / len(values):.{digits}f}"
        return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    def mean(found: Mapping[str, float], names: Sequence[str]) -> float:
        return sum(found[t] for t in names) / len(names)

    lines = [
        "| training | own tau-Jp | others' | alone | sum at 1.0 | normalised | tuned to | sum | normalised | target | control | s/step |",
        "| --- |" + " ---: |" * 11,
    ]
    for kind in KINDS:
        runs = [results[f"{kind} {seed}"] for seed in seeds if f"{kind} {seed}" in results]
        if not runs:
            continue
        names = list(runs[0]["alone"])
        jp = [run["tau_jp"] for run in runs]
        columns = [
            cell([sum(m[i][i] for i in names) / len(names) for m in jp], 3),
            cell([sum(m[i][j] for i in names for j in names if i != j) / len(names) / (len(names) - 1) for m in jp], 3),
            cell([mean(run["alone"], names) for run in runs]),
            cell([mean(run["one"], names) for run in runs]),
            cell([run["one"]["normalised"] for run in runs]),
            "/".join(f"{run['tuned']['scale']:g}" for run in runs),
            cell([mean(run["tuned"], names) for run in runs]),
            cell([run["tuned"]["normalised"] for run in runs]),
            *(cell([sum(n["accuracy"][at] for n in run["negation"].values()) / len(names) for run in runs]) for at in (0, 1)),
            cell([sum(run["seconds"].values()) / len(names) for run in runs], 2),
        ]
        lines.append(f"| {kind} | {' | '.join(columns)} |")
    for key, run in results.items():
        names = list(run["alone"])
        rows = [f"| {i} | {' | '.join(format(run['tau_jp'][i][j], '.3f') for j in names)} |" for i in names]
        lines += ["", f"{key}: tau-Jp", "", f"| vector of | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names), *rows, ""]
        lines += [f"{row}: {json.dumps(run[row])}" for row in ("base", "alone", "one", "tuned", "negation", "norms", "seconds")]
    return "\n".join(lines)


def main() -> None:
    """Make what is missing, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of the tasks, as ../shared/data/text")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="results; what it has is not made again")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--steps", type=int, default=100, help="of each training; by default 100")
    parser.add_argument("--batch", type=int, default=16, help="examples a step; by default 16")
    parser.add_argument("--length", type=int, default=24, help="tokens of an example at most; by default 24")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate; by default 2e-4")
    parser.add_argument("--embeddings", action="store_true", help="train the word embeddings, half of the parameters, too")
    parser.add_argument("--strength", type=float, default=0.1, help="of the regulariser; by default 0.1")
    parser.add_argument("--examples", nargs=2, type=int, default=(100, 300), metavar=("DEV", "TEST"), help="of a task; 100 and 300")
    options = parser.parse_args()
    options.examples = dict(zip(("dev", "test"), options.examples, strict=True))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "linearize: attention is eager")
    cache = Cache(options.cache.resolve())
    cache.tokenizer.model_max_length = options.length
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in options.seeds:
        finetunes.SEED = seed
        bench = Bench(cache, [cache.task(options.data / name) for name in options.tasks], options)
        for kind in options.kinds:
            if f"{kind} {seed}" not in results:
                results[f"{kind} {seed}"] = bench.measure(kind)
                options.out.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{kind} {seed} done", file=sys.stderr, flush=True)
    print(markdown(results, options.seeds))


if __name__ == "__main__":
    main()
