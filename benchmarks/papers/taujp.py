"""Plain, linearised and regularised fine-tunes, and what becomes of them in sums: the tau-Jp paper's tables 1 to 3.

    python benchmarks/papers/taujp.py images --data ../shared/data --out results.json [--seeds 0 1 2] [--steps 150]
    python benchmarks/papers/taujp.py text --data ../shared/data --out results.json --cache FOLDER

`images` are the tasks of `peru demo` on its base, with heads that are fitted first and then frozen, as CLIP's in the paper. `text` is
MiniLM-L6 on four tasks of finetunes.py, whose heads are trained; FOLDER is for its base and the parts of its data. For each seed and kind
one model a task is trained, measured and dropped; what results.json has is not made again. The regulariser sees an eighth of a batch of
each task. Linearised models are merged and measured as linear models, as in the papers. Choices (the scale) use held-out training
examples, figures the test parts."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional
from transformers.utils import logging

from peru_cli.inference.taujp import features
from peru_cli.training import OtherTasks, TauJp, linearize

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "models")]
KINDS = ("plain", "cyclic", "linear", "linear-cyclic", "strict")
SCALES = (0.3, 0.5, 0.7, 1.0, 1.25)
NEGATED = (0.0, 0.5, 1.0, 1.5)
KEPT = 0.95  # share of the base's accuracy on the control task that negation must leave
Vector = dict[str, Tensor]
Batch = tuple[dict[str, Tensor], Tensor]  # inputs, labels


class Images:
    """The demo's vision transformer (510,192 parameters) on four sets of images."""

    rate, batch = 0.02, 32

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        import demo_family
        from transformers import ViTForImageClassification

        from peru_cli import demo

        self.demo, self.seed, self.options = demo_family, seed, options
        self.tasks = {name: demo_family.load_task(name, options.data) for name in options.tasks or demo_family.TASKS}
        self._load = lambda labels: ViTForImageClassification.from_pretrained(demo.BASE, num_labels=labels, dtype=torch.float32).eval()

    def classifier(self, task: str) -> Any:
        """The base with a frozen head."""
        model = self._load(len(self.tasks[task].classes))
        model.classifier = self.demo.fit_head(model.vit, self.tasks[task])
        return model

    def stream(self, task: str, size: int) -> Iterator[Batch]:
        """Endless random batches, augmented as in the demo's own training."""
        rng, found = torch.Generator().manual_seed(self.seed), self.tasks[task]
        while True:
            pick = torch.randint(len(found.train_x), (size,), generator=rng)
            views = self.demo.augment(found.train_x[pick], rng, turn=10, scale=0.12, shift=0.08, tone=0.1, noise=0)
            yield {"pixel_values": views}, found.train_y[pick]

    def part(self, task: str, part: str) -> list[Batch]:
        """The first held-out or test images."""
        found, count = self.tasks[task], self.options.examples[part]
        x, y = (
            (found.held_x, found.held_y) if part == "dev" else (self.demo.pixel_values(found.test_x), torch.from_numpy(found.test_y).long())
        )
        return [({"pixel_values": a}, b) for a, b in zip(x[:count].split(100), y[:count].split(100), strict=True)]

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The demo's."""
        return torch.optim.SGD(parameters, lr=self.options.rate, momentum=0.9)


class Text:
    """MiniLM-L6 (22.7M parameters) on short texts of at most 24 tokens; word embeddings stay frozen."""

    rate, batch = 2e-4, 16

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        import finetunes

        finetunes.SEED = seed
        self.cache, self.options = finetunes.Cache(options.cache.resolve()), options
        self.cache.tokenizer.model_max_length = 24
        names = options.tasks or ("sst2", "clinc_domains", "banking77", "snips")
        self.tasks = {name: self.cache.task(options.data / "text" / name) for name in names}

    def classifier(self, task: str) -> Any:
        """The base with a head that is fitted to its features, and trained with the rest."""
        model = self.cache.classifier(self.tasks[task])
        model.bert.embeddings.word_embeddings.requires_grad_(False)
        return model

    def stream(self, task: str, size: int) -> Iterator[Batch]:
        """Endless batches of like length."""
        return self.cache.batches(self.tasks[task], size)

    def part(self, task: str, part: str) -> list[Batch]:
        """The first examples of a part, of like length together."""
        found = self.tasks[task]
        count = min(self.options.examples[part], len(found.parts[part]))
        order = sorted(range(count), key=lambda i: len(found.tokens[part][i]["input_ids"]))
        return [self.cache.batch(found, part, order[i : i + 50]) for i in range(0, count, 50)]

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """transformers' default, without weight decay."""
        return torch.optim.AdamW(parameters, lr=self.options.rate, weight_decay=0.0)


class Unlabelled:
    """Inputs of a task that OtherTasks may begin anew."""

    def __init__(self, begin: Callable[[], Iterator[Batch]]) -> None:
        self.begin = begin

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (inputs for inputs, _ in self.begin())


class Bench:
    """Trains the tasks of a family, and measures sums of their task vectors."""

    def __init__(self, family: Images | Text, options: argparse.Namespace, seed: int) -> None:
        self.family, self.options, self.seed, self.names = family, options, seed, list(family.tasks)
        self.model = family.classifier(self.names[0]).eval().requires_grad_(False)
        self.model.set_attn_implementation("eager")  # for the products
        self.origin = dict(self.model.named_parameters())
        self.labels = {(t, part): torch.cat([y for _, y in family.part(t, part)]) for t in self.names for part in ("dev", "test")}

    def train(self, task: str, kind: str) -> tuple[Vector, nn.Module, float]:
        """One fine-tune: its task vector, head and CPU seconds a step."""
        model, steps = self.family.classifier(task), self.options.steps
        if kind.startswith("linear"):
            linearize(model)
        tau_jp = TauJp(model, self.model.base_model)
        size = max(1, self.options.batch // 8)
        others = {t: Unlabelled(lambda t=t: self.family.stream(t, size)) for t in self.names if t != task}
        turns = OtherTasks(others, "strict" if kind == "strict" else "cyclic")
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.family.optimizer(parameters)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.options.rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
        model.train()
        torch.manual_seed(self.seed)
        begin = time.process_time()
        for inputs, labels in islice(self.family.stream(task, self.options.batch), steps):
            functional.cross_entropy(model(**inputs).logits, labels).backward()
            if "strict" in kind or "cyclic" in kind:
                (self.options.strength * tau_jp.penalty(joined(turns.next()))).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        seconds = (time.process_time() - begin) / steps
        inner = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith(model.base_model_prefix)}
        return {n: p.detach() - self.origin[n] for n, p in model.named_parameters() if n in inner}, model.eval().classifier, seconds

    def moved(self, task: str, part: str, taus: Mapping[str, Vector]) -> tuple[Tensor, Vector]:
        """Features at the base, and the first-order change by each vector; (examples, width) each."""
        values: list[Tensor] = []
        changes: dict[str, list[Tensor]] = {name: [] for name in taus}
        with torch.no_grad():
            for inputs, _ in self.family.part(task, part):
                for name, tau in taus.items():
                    start = {n: self.origin[n] for n in tau}
                    value, change = jvp(lambda p, x=inputs: features(self.model, {**self.origin, **p}, x), (start,), (tau,))
                    changes[name].append(change)
                values.append(value)
        return torch.cat(values), {name: torch.cat(found) for name, found in changes.items()}

    def at(self, task: str, part: str, taus: Mapping[str, Vector], scales: Mapping[str, float]) -> Tensor:
        """Features of the usual model at theta_0 + sum of scale * tau."""
        weights = dict(self.origin)
        for name, scale in scales.items():
            weights |= {n: weights[n] + scale * t for n, t in taus[name].items()}
        with torch.no_grad():
            return torch.cat([features(self.model, weights, inputs) for inputs, _ in self.family.part(task, part)])

    def measure(self, kind: str) -> dict[str, Any]:
        """Train a kind on every task; the figures of the papers' tables."""
        taus, heads, seconds = {}, {}, {}
        for task in self.names:
            taus[task], heads[task], seconds[task] = self.train(task, kind)
            print(f"  {kind} {task}: {seconds[task]:.3f} s a step", file=sys.stderr, flush=True)
        names, is_linear = self.names, kind.startswith("linear")
        moved = {(t, part): self.moved(t, part, taus) for t in names for part in (("dev", "test") if is_linear else ("dev",))}

        def accuracy(task: str, part: str, scales: Mapping[str, float]) -> float:
            if is_linear:
                value, changes = moved[task, part]
                found = value + sum((s * changes[name] for name, s in scales.items()), torch.zeros_like(value))
            else:
                found = self.at(task, part, taus, scales)
            with torch.no_grad():
                right = heads[task](found).argmax(-1) == self.labels[task, part]
            return round(100 * right.double().mean().item(), 2)

        alone = {part: {t: accuracy(t, part, {t: 1.0}) for t in names} for part in ("dev", "test")}

        def merged(part: str, scale: float) -> dict[str, float]:
            return {t: accuracy(t, part, dict.fromkeys(names, scale)) for t in names}

        def normalised(part: str, found: Mapping[str, float]) -> float:
            return 100 * sum(found[t] / alone[part][t] for t in names) / len(names)

        on_dev = {scale: merged("dev", scale) for scale in SCALES}
        best = max(SCALES, key=lambda scale: normalised("dev", on_dev[scale]))
        one = merged("test", 1.0)
        tuned = one if best == 1.0 else merged("test", best)
        return {
            "tau_jp": {i: {j: moved[j, "dev"][1][i].norm(dim=-1).mean().item() for j in names} for i in names},
            "base": {t: accuracy(t, "test", {}) for t in names},
            "alone": alone["test"],
            "one": one | {"normalised": normalised("test", one)},
            "tuned": tuned | {"normalised": normalised("test", tuned), "scale": best},
            "negation": {t: self.negation(t, names[(at + 1) % len(names)], accuracy) for at, t in enumerate(names)},
            "norms": {i: sum(t.double().square().sum().item() for t in taus[i].values()) ** 0.5 for i in names},
            "seconds": seconds,
        }

    def negation(self, target: str, control: str, accuracy: Callable[[str, str, Mapping[str, float]], float]) -> dict[str, Any]:
        """The scale that forgets most and keeps 95% of the control task, chosen on dev, at most 1.5; accuracies on test."""
        found = {s: [accuracy(task, "dev", {target: -s}) for task in (target, control)] for s in NEGATED}
        best = min((s for s in NEGATED if found[s][1] >= KEPT * found[0.0][1]), key=lambda s: found[s][0])
        return {"control": control, "scale": best, "accuracy": [accuracy(task, "test", {target: -best}) for task in (target, control)]}


def joined(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Batches of one shape as one: the same mean, in one pass."""
    if len({tuple((k, x.shape) for k, x in batch.items()) for batch in batches}) > 1:
        return batches
    return [{k: torch.cat([batch[k] for batch in batches]) for k in batches[0]}]


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
    parser.add_argument("family", choices=("images", "text"))
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with image/ and text/, as ../shared/data")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json", help="results; what it has is not made again")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="of text: the base and the parts of the data")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="by default four")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--steps", type=int, default=150, help="of each training; by default 150")
    parser.add_argument("--batch", type=int, help="examples a step; by default 32 images or 16 texts")
    parser.add_argument("--rate", type=float, help="learning rate; by default 0.02 (SGD) for images, 2e-4 (AdamW) for text")
    parser.add_argument("--strength", type=float, default=0.1, help="of the regulariser; by default 0.1")
    parser.add_argument("--examples", nargs=2, type=int, default=(250, 450), metavar=("DEV", "TEST"), help="of a task; 250 and 450")
    options = parser.parse_args()
    if options.family == "text" and options.cache is None:
        parser.error("text needs --cache FOLDER")
    options.examples = dict(zip(("dev", "test"), options.examples, strict=True))
    family = Images if options.family == "images" else Text
    options.rate, options.batch = options.rate or family.rate, options.batch or family.batch
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "linearize: attention is eager")
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    for seed in options.seeds:
        missing = [kind for kind in options.kinds if f"{kind} {seed}" not in results]
        bench = Bench(family(options, seed), options, seed) if missing else None
        for kind in missing:
            assert bench is not None
            results[f"{kind} {seed}"] = bench.measure(kind)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{kind} {seed} done", file=sys.stderr, flush=True)
    print(markdown(results, options.seeds))


if __name__ == "__main__":
    main()
