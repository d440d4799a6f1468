"""Print the papers' tables as reproduced here: MiniLM-L6 on short-text tasks, with bytes and normalised accuracy.

    python benchmarks/papers/tables.py CACHE [--tables full lora ...] [--tasks sst2 agnews ...] [--examples 1000] [--plots FOLDER]

CACHE is made by finetunes.py. Every model is made by the real commands in their own processes. Accuracies are in % on the
first --examples of each test set; scales are chosen on 200 examples per task of the development parts. "MB" is what the tasks
take together besides the base: weights, artifacts, adapters and heads. A complete table is kept in CACHE/tables.json
and printed from there; remove its entry to make it again."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

DENSITIES = ("1%", "5%", "10%")
RANKS = (4, 8, 12)
SCALES = (0.2, 0.3, 0.5, 0.7, 1.0)
PACK_SCALES = (0.3, 0.5, 0.7, 1.0)
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6)  # of TALL-masks, the paper's
DEV_EXAMPLES = 200

Tensors = dict[str, torch.Tensor]
Row = tuple[str, int | None, dict[str, float]]  # name, bytes besides the base, accuracy of each task


@dataclass
class Examples:
    """A part of a task, tokenised, sorted by length."""

    tokens: list[dict[str, list[int]]]
    labels: torch.Tensor


class Bench:
    """The cache, a scratch folder, and the requested options."""

    prefix = "bert."  # of a classifier's names, in front of the bare encoder's

    def __init__(self, cache: Path, scratch: Path, tasks: Sequence[str], examples: int) -> None:
        self.cache, self.scratch, self.tasks, self.examples = cache, scratch, tuple(tasks), examples
        self.base = cache / "base"
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self._parts: dict[tuple[str, str], Examples] = {}
        self._models: dict[str, Any] = {}
        self._chosen = cache / "scales.json"  # the best scales, so that no table searches again
        self._scales: dict[str, float] = json.loads(self._chosen.read_text()) if self._chosen.exists() else {}
        self.best = {task: self.accuracy(task, self.full(task)) for task in self.tasks}

    def full(self, task: str) -> Path:
        """The folder of a fine-tune."""
        return self.cache / "full" / task

    def examples_of(self, task: str, part: str) -> Examples:
        """The first examples of a part."""
        if (task, part) not in self._parts:
            lines = (self.cache / "data" / f"{task}.{part}.jsonl").read_text("utf-8").splitlines()
            found = [json.loads(line) for line in lines[: self.examples if part == "test" else DEV_EXAMPLES]]
            tokens = [dict(self.tokenizer(e["text"], e.get("text_pair"), truncation=True)) for e in found]
            order = sorted(range(len(found)), key=lambda i: len(tokens[i]["input_ids"]))
            self._parts[task, part] = Examples([tokens[i] for i in order], torch.tensor([found[i]["label"] for i in order]))
        return self._parts[task, part]

    def accuracy(self, task: str, model: Path | Tensors, part: str = "test") -> float:
        """Percent right of a folder, or of a classifier's tensors."""
        tensors = load_file(model / "model.safetensors") if isinstance(model, Path) else model
        if task not in self._models:
            self._models[task] = AutoModelForSequenceClassification.from_pretrained(self.full(task)).eval()
        classifier, examples, right = self._models[task], self.examples_of(task, part), 0
        classifier.load_state_dict({name: tensor.float() for name, tensor in tensors.items() if "position_ids" not in name})
        with torch.inference_mode():
            for at in range(0, len(examples.tokens), 100):
                inputs = self.tokenizer.pad(examples.tokens[at : at + 100], return_tensors="pt")
                right += int((classifier(**inputs).logits.argmax(-1) == examples.labels[at : at + 100]).sum())
        return round(100 * right / len(examples.tokens), 2)

    def peru(self, *arguments: object) -> None:
        """Run a command. Fails loudly."""
        subprocess.run([sys.executable, "-m", "peru_cli", *map(str, arguments), "--quiet", "--no-sync", "--force"], check=True, stdout=2)

    def models(self, kind: str = "full") -> list[str]:
        """The fine-tunes as arguments, with their base."""
        return [*(f"{task}={self.cache / kind / task}" for task in self.tasks), "--base", str(self.base)]

    def under_head(self, encoder: Path, head: Path) -> Tensors:
        """A classifier from a merged encoder and a task's head."""
        merged = load_file(encoder / "model.safetensors")
        return load_file(head) | {name if name.startswith(self.prefix) else self.prefix + name: t for name, t in merged.items()}

    def merged(self, folder: Path, part: str = "test") -> dict[str, float]:
        """Accuracy of a merge under each task's head."""
        return {t: self.accuracy(t, self.under_head(folder, folder / "heads" / f"{t}.safetensors"), part) for t in self.tasks}

    def unpacked(self, artifacts: Path, base: Path, name: Callable[[str], str] = "{}.safetensors".format) -> dict[str, float]:
        """Accuracy of rebuilt artifacts or adapters."""
        found = {}
        for task in self.tasks:
            self.peru("unpack", artifacts / name(task), "--base", base, "-o", self.scratch / "restored")
            found[task] = self.accuracy(task, self.scratch / "restored")
        return found

    def merge(self, name: str, *options: object, kind: str = "full") -> Path:
        """A merge of the fine-tunes."""
        folder = self.scratch / name
        self.peru("merge", *self.models(kind), "-o", folder, *options)
        return folder

    def best_scale(self, name: str, *options: object, kind: str = "full") -> tuple[Path, float]:
        """The merge with the scale of the highest mean normalised accuracy on the development parts."""
        key = " ".join([kind, *self.tasks, *map(str, options)])
        if key not in self._scales:
            best = {task: self.accuracy(task, self.full(task), "dev") for task in self.tasks}
            scores = {}
            for scale in SCALES:
                found = self.merged(self.merge(name, *options, "--scale", scale, kind=kind), "dev")
                scores[scale] = sum(found[task] / best[task] for task in self.tasks)
            self._scales[key] = max(scores, key=lambda s: scores[s])
            self._chosen.write_text(json.dumps(self._scales, indent=1) + "\n")
        return self.merge(name, *options, "--scale", self._scales[key], kind=kind), self._scales[key]


def size(folder: Path) -> int:
    """Bytes of all tensors' files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def merges(bench: Bench, kind: str = "full") -> Iterator[tuple[str, Path]]:
    """The merging methods, each with its best scale."""
    yield "average (soup)", bench.merge("linear", "--method", "task-arithmetic", "--scale", 1 / len(bench.tasks), kind=kind)
    for name, options in (
        ("Task-Arithmetic", ["--method", "task-arithmetic"]),
        ("TIES 20%", ["--method", "ties", "--keep", "20%"]),
        ("DARE 10%", ["--method", "dare", "--keep", "10%", "--seed", 0]),
        ("DARE-TIES 20%", ["--method", "dare-ties", "--keep", "20%", "--seed", 0]),
        ("Breadcrumbs", ["--method", "breadcrumbs"]),
        ("Consensus", ["--method", "consensus"]),
    ):
        folder, scale = bench.best_scale(str(options[1]), *options, kind=kind)
        yield f"{name}, scale {scale:g}", folder


def reference(bench: Bench) -> Iterator[Row]:
    """The rows that every table is compared with."""
    yield "base, each task's head", None, {task: _with_base(bench, task) for task in bench.tasks}
    yield "fine-tunes", sum(size(bench.full(task)) for task in bench.tasks), bench.best


def _with_base(bench: Bench, task: str) -> float:
    tensors = load_file(bench.full(task) / "model.safetensors")
    base = load_file(bench.base / "model.safetensors")
    return bench.accuracy(task, {name: base.get(name.removeprefix(bench.prefix), tensor) for name, tensor in tensors.items()})


def pruned(bench: Bench, density: str, base: Path | None = None, name: str = "pruned") -> tuple[int, dict[str, float]]:
    """Post-Pruning at a density: bytes and accuracies. Differences are from `base` if it is given."""
    folder = bench.scratch / name
    shutil.rmtree(folder, ignore_errors=True)  # the bytes of other tasks would count
    models = bench.models()[:-1]
    bench.peru("prune", *models, base or bench.base, "-o", f"{folder}/", "--keep", density)
    return size(folder), bench.unpacked(folder, base or bench.base)


def table_full(bench: Bench) -> Iterator[Row]:
    """PERU tables 1, 2 and 4, full fine-tuning: merges, Post-Pruning, PERU-FFT, and one multi-task model."""
    yield from reference(bench)
    multitask = bench.cache / "multitask"
    if (bench.cache / "multitask.done").exists():
        found = {task: bench.accuracy(task, multitask / task) for task in bench.tasks}
        yield "multi-task training", size(multitask / "encoder"), found
    arithmetic = None
    for name, folder in merges(bench):
        yield name, size(folder), bench.merged(folder)
        arithmetic = folder if name.startswith("Task-Arithmetic") else arithmetic
    assert arithmetic is not None
    for density in DENSITIES:
        yield (f"Post-Pruning {density}", *pruned(bench, density))
    for density in DENSITIES:
        nbytes, found = pruned(bench, density, arithmetic, "fft")
        yield f"PERU-FFT {density}", nbytes + (arithmetic / "model.safetensors").stat().st_size, found


def table_fft(bench: Bench) -> Iterator[Row]:
    """PERU table 5: PERU-FFT on each merge."""
    for name, folder in merges(bench):
        yield name, size(folder), bench.merged(folder)
        nbytes, found = pruned(bench, "5%", folder, "fft")
        yield "  PERU-FFT 5% on it", nbytes + (folder / "model.safetensors").stat().st_size, found


def table_lora(bench: Bench) -> Iterator[Row]:
    """PERU tables 3 and 4, LoRA fine-tuning: merges of the products, and PERU-LoRA at several ranks."""
    yield "base, each task's head", None, {task: _with_base(bench, task) for task in bench.tasks}
    adapters = bench.cache / "lora"
    yield "LoRA fine-tunes, rank 16", size(adapters), bench.unpacked(adapters, bench.base, str)
    for name, options in (("Task-Arithmetic", ["task-arithmetic"]), ("TIES 20%", ["ties", "--keep", "20%"])):
        folder, scale = bench.best_scale(f"lora-{options[0]}", "--method", *options, kind="lora")
        yield f"{name}, scale {scale:g}", size(folder), bench.merged(folder)
    for rank in RANKS:
        folder = bench.scratch / f"rank-{rank}"
        bench.peru("svd-lora", *bench.models("lora")[:-2], "-o", f"{folder}/", "--rank", rank)
        yield f"PERU-LoRA, rank {rank}", size(folder), bench.unpacked(folder, bench.base, str)


def table_tasks(bench: Bench) -> Iterator[Row]:
    """PERU table 7: fewer tasks."""
    for count in range(2, len(bench.tasks) + 1, 2):
        few = copy.copy(bench)
        few.tasks = bench.tasks[:count]
        folder, scale = few.best_scale("few", "--method", "task-arithmetic")
        yield f"{count} tasks: Task-Arithmetic, scale {scale:g}", size(folder), few.merged(folder)
        yield (f"{count} tasks: Post-Pruning 5%", *pruned(few, "5%"))
        nbytes, found = pruned(few, "5%", folder, "fft")
        yield f"{count} tasks: PERU-FFT 5%", nbytes + (folder / "model.safetensors").stat().st_size, found


def table_weights(bench: Bench) -> Iterator[Row]:
    """PERU table 10: pruning weights (differences from zero) or task vectors."""
    zeros = bench.scratch / "zeros"
    shutil.copytree(bench.base, zeros)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(bench.base / "model.safetensors").items()}
    save_file(tensors, zeros / "model.safetensors", metadata={"format": "pt"})
    for density in (*DENSITIES, "50%"):
        yield (f"pruning weights {density}", *pruned(bench, density, zeros, "weights"))
        yield (f"pruning task vectors {density}", *pruned(bench, density))


def table_curves(bench: Bench) -> Iterator[Row]:
    """PERU figures 6 and 7: accuracy against the density and the rank."""
    arithmetic, _ = bench.best_scale("curve", "--method", "task-arithmetic")
    for density in ("0.5%", "1%", "2%", "5%", "10%", "20%", "40%"):
        yield (f"Post-Pruning {density}", *pruned(bench, density))
        nbytes, found = pruned(bench, density, arithmetic, "fft")
        yield f"PERU-FFT {density}", nbytes + (arithmetic / "model.safetensors").stat().st_size, found
    if not all((bench.cache / "lora" / f"{task}.done").exists() for task in bench.tasks):
        return
    for rank in (1, 2, 4, 8, 12, 16):
        folder = bench.scratch / f"rank-{rank}"
        bench.peru("svd-lora", *bench.models("lora")[:-2], "-o", f"{folder}/", "--rank", rank)
        yield f"PERU-LoRA, rank {rank}", size(folder), bench.unpacked(folder, bench.base, str)


def table_packing(bench: Bench) -> Iterator[Row]:
    """The packing paper's table: superposed task vectors and masks on their sum, with the sizes of whole packs."""
    yield from reference(bench)
    seed = ["--seed", 7]
    for name, options in (
        ("TA", [*seed, "--decorrelate", "none", "--no-signs"]),
        ("TA + Shift", [*seed, "--decorrelate", "shift", "--no-signs"]),
        ("TA + Shuffle", [*seed, "--decorrelate", "shuffle", "--no-signs"]),
        ("STA", [*seed, "--decorrelate", "none"]),
        ("STA + Shift", [*seed, "--decorrelate", "shift"]),
        ("STA + Shuffle", [*seed, "--decorrelate", "shuffle"]),
        ("STA + Shuffle, every 2nd block", [*seed, "--decorrelate", "shuffle", "--skip", 2]),
        ("magnitude masks 10%", ["--method", "magnitude-masks", "--keep", "10%"]),
    ):
        found = {scale: _packed(bench, scale, options, "dev") for scale in PACK_SCALES}
        best = {task: bench.accuracy(task, bench.full(task), "dev") for task in bench.tasks}
        scale = max(found, key=lambda s: sum(found[s][1][task] / best[task] for task in bench.tasks))
        yield (f"{name}, scale {scale:g}", *_packed(bench, scale, options, "test"))
    tall = ["--method", "tall-masks"]
    yield ("TALL-masks, thresholds by reconstruction error", *_packed(bench, 1, tall, "test"))
    dev = {threshold: _packed(bench, 1, [*tall, "--threshold", threshold], "dev")[1] for threshold in THRESHOLDS}
    for task in bench.tasks:
        tall += ["--threshold", f"{task}={max(THRESHOLDS, key=lambda threshold: dev[threshold][task])}"]
    yield ("TALL-masks, thresholds by accuracy on dev", *_packed(bench, 1, tall, "test"))


def table_interference(bench: Bench) -> Iterator[Row]:
    """tau-Jp paper: how far the other tasks' vectors move a task's features, and how good the sum of all vectors is."""
    yield from reference(bench)
    for kind in ("full", "regularised"):
        if not all((bench.cache / kind / f"{task}.done").exists() for task in bench.tasks):
            continue
        if kind != "full":
            folders = {task: bench.cache / kind / task for task in bench.tasks}
            found = {task: bench.accuracy(task, folder) for task, folder in folders.items()}
            yield f"{kind} fine-tunes", sum(size(folder) for folder in folders.values()), found
        effect = _mean_tau_jp(bench, kind)
        for scale in SCALES:
            folder = bench.merge("sum", "--method", "task-arithmetic", "--scale", scale, kind=kind)
            yield f"{kind}, tau-Jp {effect:.3g}: Task-Arithmetic, scale {scale:g}", size(folder), bench.merged(folder)


def _mean_tau_jp(bench: Bench, kind: str) -> float:
    """Mean over all pairs of different tasks, on development inputs."""
    data = [word for task in bench.tasks for word in ("--data", f"{task}={bench.cache / 'data' / f'{task}.dev.jsonl'}")]
    command = ["eval", *bench.models(kind), "--tau-jp", *data, "--max-samples", str(DEV_EXAMPLES), "--json", "--quiet"]
    done = subprocess.run([sys.executable, "-m", "peru_cli", *command], check=True, stdout=subprocess.PIPE)
    matrix = json.loads(done.stdout)["tau_jp"]
    others = [matrix[i][j] for i in matrix for j in matrix if i != j]
    return float(sum(others) / len(others))


def _packed(bench: Bench, scale: float, options: Sequence[object], part: str) -> tuple[int, dict[str, float]]:
    """A pack's bytes, and the accuracy of each retrieved task."""
    pack, found = bench.scratch / "pack.safetensors", {}
    bench.peru("shuffle-pack", *bench.models(), "-o", pack, "--scale", scale, *options)
    for task in bench.tasks:
        bench.peru("unpack", pack, "--task", task, "--base", bench.base, "-o", bench.scratch / "restored")
        found[task] = bench.accuracy(task, bench.scratch / "restored", part)
    return pack.stat().st_size, found


TABLES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "full": table_full,
    "fft": table_fft,
    "lora": table_lora,
    "tasks": table_tasks,
    "weights": table_weights,
    "packing": table_packing,
    "interference": table_interference,
    "curves": table_curves,
}


def markdown(rows: Sequence[Row], tasks: Sequence[str], best: dict[str, float]) -> Iterator[str]:
    """A table of rows."""
    yield f"| method | MB | {' | '.join(tasks)} | mean | normalised |"
    yield f"| --- | ---: | {'---: | ' * len(tasks)}---: | ---: |"
    for name, nbytes, found in rows:
        mean = sum(found.values()) / len(found)
        normalised = 100 * sum(found[task] / best[task] for task in found) / len(found)
        cells = [f"{found[task]:.1f}" if task in found else "" for task in tasks]
        yield f"| {name} | {'' if nbytes is None else f'{nbytes / 1e6:.2f}'} | {' | '.join(cells)} | {mean:.2f} | {normalised:.2f} |"


def plot(rows: Sequence[Row], best: dict[str, float], folder: Path) -> None:
    """Figures 6 and 7: mean normalised accuracy over the rank, and over the density."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, _, found in rows:
        kind, at = name.removesuffix("%").replace(", rank", "").rsplit(" ", 1)
        lines.setdefault(kind, []).append((float(at), 100 * sum(found[t] / best[t] for t in found) / len(found)))
    for figure, kinds, label in (("figure6", ["PERU-LoRA"], "rank"), ("figure7", ["Post-Pruning", "PERU-FFT"], "density, %")):
        if not set(kinds) <= set(lines):
            continue
        picture, axes = pyplot.subplots(figsize=(6, 4))
        for kind in kinds:
            axes.plot(*zip(*lines[kind], strict=True), marker="o", label=kind)
        axes.set_xlabel(label)
        axes.set_ylabel("normalised accuracy, %")
        axes.grid(alpha=0.3)
        axes.legend()
        picture.savefig(folder / f"{figure}.png", dpi=120, bbox_inches="tight")


def main() -> None:
    """Make what is missing, and print all that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="by default all that CACHE/full has")
    parser.add_argument("--examples", type=int, default=1000, help="of each test set, at most")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="where figures 6 and 7 go")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cache = arguments.cache.resolve()
    tasks = arguments.tasks or sorted(path.stem for path in (cache / "full").glob("*.done"))
    stored = cache / "tables.json"
    done = json.loads(stored.read_text()) if stored.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(cache, Path(scratch), tasks, arguments.examples)
        for name in arguments.tables:
            key = f"{name} {arguments.examples} {' '.join(tasks)}"
            if key not in done:
                rows = []
                for row in TABLES[name](bench):
                    rows.append(row)
                    print(list(markdown([row], tasks, bench.best))[-1], file=sys.stderr, flush=True)  # kept if it is cut off
                done[key] = rows
                stored.write_text(json.dumps(done, indent=1) + "\n")
            print(f"\n{(TABLES[name].__doc__ or '').strip()}\n")
            print("\n".join(markdown(done[key], tasks, bench.best)), flush=True)
            if name == "curves" and arguments.plots:
                plot(done[key], bench.best, arguments.plots)


if __name__ == "__main__":
    main()
