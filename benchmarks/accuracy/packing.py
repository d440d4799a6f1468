"""Packs of real fine-tunes: accuracy of every variant at its best scale, bytes, and time of retrieval.

    python benchmarks/papers/finetunes.py --out CACHE --data ../shared/data/text --only full --tasks sst2 clinc_domains hate_davidson
    python benchmarks/accuracy/packing.py CACHE --tasks sst2 clinc_domains hate_davidson [--examples 500]

CACHE holds base/, full/TASK/ and data/TASK.{dev,test}.jsonl. Each variant is packed once with `peru shuffle-pack` (TALL-masks with
thresholds by reconstruction error at scale 1); the scale, which changes no sum, is chosen on dev and reported on test. Tasks are
swapped in memory (`peru_cli.apply`). Accuracy is normalised by the fine-tune's own on the same examples. PERU-FFT is
`peru merge --compress` at about a pack's bytes. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import peru_cli

PERU = [sys.executable, "-m", "peru_cli"]
BATCH = 50
VARIANTS = {
    "task arithmetic": ["--decorrelate", "none", "--no-signs"],
    "TA + Shuffle": ["--no-signs"],
    "TA + Shift": ["--no-signs", "--decorrelate", "shift"],
    "STA": ["--decorrelate", "none"],
    "STA + Shuffle": [],
    "STA + Shuffle, skip 2": ["--skip", "2"],
    "STA + Shuffle, skip 3": ["--skip", "3"],
    "STA + Shuffle, skip 4": ["--skip", "4"],
    "STA + Shuffle, all tensors": ["--target", "."],
    "TALL-masks": ["--method", "tall-masks"],
    "magnitude masks 10%": ["--method", "magnitude-masks"],
}


class Tasks:
    """Models of all tasks with the base's encoder, and batches of their examples."""

    def __init__(self, cache: Path, names: list[str], most: int) -> None:
        self.cache, self.names = cache, names
        tokenizer = AutoTokenizer.from_pretrained(cache / "base")
        self.base = load_file(cache / "base" / "model.safetensors")
        self.models, self.batches, self.own = {}, {}, {}
        for name in names:
            self.models[name] = AutoModelForSequenceClassification.from_pretrained(cache / "full" / name, dtype=torch.float32).eval()
            for part in ("dev", "test"):
                lines = (cache / "data" / f"{name}.{part}.jsonl").read_text("utf-8").splitlines()[:most]
                examples = sorted(map(json.loads, lines), key=lambda e: len(e["text"]))
                self.batches[name, part] = [
                    (
                        tokenizer([e["text"] for e in some], truncation=True, padding=True, return_tensors="pt"),
                        torch.tensor([e["label"] for e in some]),
                    )
                    for some in (examples[i : i + BATCH] for i in range(0, len(examples), BATCH))
                ]
                self.own[name, part] = self.accuracy(name, part)
            encoder = self.models[name].bert
            encoder.load_state_dict({n: self.base.get(n, t) for n, t in encoder.state_dict().items()})

    def accuracy(self, name: str, part: str, model: Any = None) -> float:
        """Share of right answers of a model, by default the task's in its current state."""
        right = total = 0
        with torch.inference_mode():
            for inputs, labels in self.batches[name, part]:
                right += int(((model or self.models[name])(**inputs).logits.argmax(-1) == labels).sum())
                total += len(labels)
        return right / total

    def mean(self, pack: Any, part: str) -> float:
        """Mean normalised accuracy of a pack's tasks."""
        shares = []
        for name in self.names:
            with peru_cli.apply(self.models[name], pack, task=name, verify=False):
                shares.append(self.accuracy(name, part) / self.own[name, part])
        return sum(shares) / len(shares)


def peru(*arguments: object) -> Any:
    """Run a command. Returns its report."""
    done = subprocess.run([*PERU, *map(str, arguments), "--json", "-q", "--no-sync"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def best_scale(tasks: Tasks, pack: Any, scales: Iterable[float]) -> float:
    """The scale with the best accuracy on dev; ties: the smallest."""
    found = {}
    for scale in scales:
        pack.scale = scale
        found[scale] = tasks.mean(pack, "dev")
    return max(found, key=lambda scale: (found[scale], -scale))


def main() -> None:
    """Print the table, then times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "clinc_domains", "hate_davidson"])
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--scales", nargs="+", type=float, default=[0.3, 0.5, 0.7, 1.0])
    parser.add_argument("--compress", default="15%", help="PERU-FFT's density")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cache, names = arguments.cache, arguments.tasks
    tasks = Tasks(cache, names, arguments.examples)
    models = [f"{name}={cache / 'full' / name}" for name in names]
    size = sum((cache / "full" / name / "model.safetensors").stat().st_size for name in names)
    own = sum(tasks.own[name, "test"] for name in names) / len(names)
    print("| method | bytes | bits/param | error | scale (dev) | accuracy, normalised, test |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| fine-tunes | {size:,} | {32 * len(names)} | 0 | | 100 ({100 * own:.2f} absolute) |", flush=True)
    with tempfile.TemporaryDirectory(prefix="peru-packing-") as folder:
        scratch = Path(folder)
        for variant, options in VARIANTS.items():
            path = scratch / "pack.safetensors"
            seed = [] if "--method" in options else ["--seed", 7]
            report = peru("shuffle-pack", *models, "-b", cache / "base", "-o", path, "-f", "--per-task", "^classifier", *seed, *options)
            with peru_cli.open_artifact(path) as pack:
                pack.load()
                scale = pack.scale = best_scale(tasks, pack, arguments.scales)
                found = tasks.mean(pack, "test")
            error = sum(task["error"] for task in report["packed"]) / len(names)
            bits = report["bits_per_parameter"] + sum(task.get("mask_bits_per_parameter", 0) for task in report["packed"])
            cells = [
                variant,
                f"{report['file_bytes']:,}",
                f"{bits:.2f}",
                f"{error:.2f}",
                f"{scale:g}",
                f"{100 * found:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
        fft(tasks, scratch, models, arguments.compress)
        times(tasks, scratch, models)


def fft(tasks: Tasks, scratch: Path, models: list[str], density: str) -> None:
    """PERU-FFT: deltas of a merge, whose own bytes are the base's."""
    out = scratch / "fft"
    base = tasks.cache / "base"
    peru("merge", *models, "-b", base, "-o", out, "--method", "task-arithmetic", "--per-task", "^classifier", "--compress", density)
    shares, size = [], 0
    for name in tasks.names:
        artifact, back = out / f"{name}.safetensors", scratch / name
        size += artifact.stat().st_size
        peru("unpack", artifact, "-b", out / "merged", "-o", back)
        model = AutoModelForSequenceClassification.from_pretrained(back, dtype=torch.float32).eval()
        shares.append(tasks.accuracy(name, "test", model) / tasks.own[name, "test"])
    parameters = sum(tensor.numel() for tensor in tasks.base.values())
    mean = sum(shares) / len(shares)
    print(f"| PERU-FFT {density} (and the merge) | {size:,} | {8 * size / parameters:.2f} | | 0.3 | {100 * mean:.2f} |", flush=True)


def times(tasks: Tasks, scratch: Path, models: list[str]) -> None:
    """Seconds of packing, of loading and of a swap in memory."""
    path, base = scratch / "pack.safetensors", tasks.cache / "base"
    started = time.perf_counter()
    peru("shuffle-pack", *models, "-b", base, "-o", path, "-f", "--per-task", "^classifier")
    print(f"\npacking {len(models)} tasks, the process and all: {time.perf_counter() - started:.1f} s")
    parameters = sum(tensor.numel() for tensor in tasks.base.values())
    with peru_cli.open_artifact(path) as pack:
        started = time.perf_counter()
        pack.load()
        print(f"loading the pack: {time.perf_counter() - started:.2f} s")
        applied = peru_cli.apply(dict(tasks.base), pack, task=tasks.names[0])
        spent = []
        for turn in range(12):
            started = time.perf_counter()
            applied.switch(tasks.names[(turn + 1) % len(tasks.names)])
            spent.append(time.perf_counter() - started)
    best, middle = min(spent), sorted(spent)[6]
    each = 1e9 * best / parameters
    print(f"a swap of {parameters:,} parameters: {1000 * best:.0f} ms ({each:.2f} ns a parameter), median {1000 * middle:.0f} ms")


if __name__ == "__main__":
    main()
