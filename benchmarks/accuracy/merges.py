"""Which merge should one take? Accuracy of every method without data on MiniLM fine-tunes and on the demo's image models.

    python benchmarks/accuracy/merges.py CACHE [--family text image] [--methods ...] [--examples 400] [--dev 100] [--json FILE]

CACHE is what benchmarks/papers/finetunes.py made. Each method is merged by the real command with its defaults, and judged on the first
--examples test examples of every task, under the heads of the fine-tunes. Where a method has a --scale, the best one is then looked for
on development examples, from the default up and down by factors of 1.4 as long as it gains: a merge is base + scale x vector, so one merge
serves all scales, unless a pass follows it (--then): then each scale is merged. Of the demo's images every other one is for development.
Normalised is the mean over tasks of accuracy / the fine-tune's, in %, with its 95% bootstrap interval; "behind the best" compares with the
best merge on the same examples, in pairs. Two packs, which are told the task, stand among the merges.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "budget"))
from judge import Judge, Tensors

from peru_cli import cli, demo
from peru_cli.inference.metrics import Array, compare_right, mean_normalised
from peru_cli.methods.table import METHODS

STEP = 1.4  # of the scale
MOST_STEPS = 8
VARIANTS: dict[str, list[list[str]]] = {  # besides the defaults
    "task-arithmetic": [["--scale", "1", "--then", "svc"], ["--then", "lines"]],
    "ties": [["--variant", "mergekit"], ["--then", "svc"], ["--then", "lines"]],
    "wudi": [["--ridge", "0.1"]],
    "tsv-m": [["--plain", "embed"], ["--then", "svc"], ["--then", "lines"]],
    "iso-c": [["--plain", "embed"], ["--then", "lines"]],
}
PACKS = (["--method", "emr"], ["--method", "tall-masks"])  # one file that knows the task: what merging could keep at most
Right = dict[str, Array]  # of each task, which examples were right


@dataclass
class Family:
    """Fine-tunes of one base with examples: `right(part, tensors)` under every task's head, `fine(part)` of the fine-tunes themselves."""

    name: str
    base: Path
    tasks: Mapping[str, Path]
    base_tensors: Tensors
    right: Callable[[str, Tensors], Right]
    fine: Callable[[str], Right]


def text_family(cache: Path, examples: int, dev: int) -> Family:
    """Eight tasks of short texts, in bfloat16."""
    tasks = {path.name: path for path in sorted((cache / "full-bf16").iterdir())}
    judges = {"test": Judge(cache, cache / "outputs", examples), "dev": Judge(cache, cache / "outputs", dev, "dev")}

    def right(part: str, tensors: Tensors) -> Right:
        return {task: judges[part].outputs(task, tensors).argmax(-1) == judges[part].texts(task).labels for task in tasks}

    def fine(part: str) -> Right:
        return {task: judges[part].reference(task).argmax(-1) == judges[part].texts(task).labels for task in tasks}

    return Family("text", cache / "base-bf16", tasks, judges["test"].base, right, fine)


def image_family(examples: int, dev: int) -> Family:
    """The demo's four tasks: a small ViT, computed in float32 (bfloat16 takes processors seven times as long)."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    data = Path(demo.__file__).parent / "data"
    tasks = {path.name: path for path in sorted((data / "fine-tunes").iterdir())}
    own = {task: load_file(path / "model.safetensors") for task, path in tasks.items()}
    base = load_file(data / "base" / "model.safetensors")
    parts = {}
    for task in tasks:
        with np.load(data / "images" / f"{task}.npz") as file:
            pixels, labels = file["x"], file["y"]
        values = (torch.from_numpy(pixels).float() / 255 - 0.5) / 0.5
        values = values.reshape(len(labels), 1, *pixels.shape[1:3])
        parts[task] = {"dev": (values[1::2][:dev], labels[1::2][:dev]), "test": (values[::2][:examples], labels[::2][:examples])}

    configs = {task: ViTConfig.from_pretrained(path) for task, path in tasks.items()}

    def judged(part: str, given: Mapping[str, Tensors]) -> Right:
        found = {}
        for task, config in configs.items():
            model = ViTForImageClassification.from_pretrained(None, config=config, state_dict=given[task], dtype=torch.float32).eval()
            images, labels = parts[task][part]
            with torch.inference_mode():
                found[task] = torch.cat([model(some).logits.argmax(-1) for some in images.split(100)]).numpy() == labels
        return found

    def right(part: str, tensors: Tensors) -> Right:
        return judged(part, {task: own[task] | {f"vit.{name}": tensor for name, tensor in tensors.items()} for task in tasks})

    return Family("image", data / "base", tasks, {n: t.float() for n, t in base.items()}, right, lambda part: judged(part, own))


def merged(family: Family, words: Sequence[str]) -> Tensors:
    """The merge's tensors in float32, heads left out, under the base's names."""
    with tempfile.TemporaryDirectory(prefix="peru-merges-") as folder:
        out = Path(folder) / "m"
        command = ["merge", *(f"{task}={path}" for task, path in family.tasks.items()), "-o", str(out), *words, "--per-task", "classifier"]
        command += ["--base", str(family.base), "--dtype", "fp32", "--no-sync", "--quiet"]
        if code := cli.run(command):
            raise SystemExit(f"peru {' '.join(command)}: exit {code}")
        tensors = load_file(out / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}


def packed(family: Family, words: Sequence[str]) -> dict[str, Tensors]:
    """What a pack gives back for each task, in float32, under the base's names."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="peru-merges-") as folder:
        pack, base = f"{folder}/pack.safetensors", ["--base", str(family.base), "--no-sync", "--quiet"]
        tasks = [f"{task}={path}" for task, path in family.tasks.items()]
        commands = [["shuffle-pack", *tasks, "-o", pack, *words, "--per-task", ".*classifier.*", *base]]
        commands += [["unpack", pack, "--task", task, "-o", f"{folder}/{task}", *base] for task in family.tasks]
        for command in commands:
            if code := cli.run(command):
                raise SystemExit(f"peru {' '.join(command)}: exit {code}")
        for task in family.tasks:
            tensors = load_file(f"{folder}/{task}/model.safetensors")
            prefix = min((name.removesuffix(b) for b in family.base_tensors for name in tensors if name.endswith(b)), key=len)
            found[task] = {b: tensors[prefix + b].float() for b in family.base_tensors if prefix + b in tensors}
    return found


def score(right: Right, fine: Right) -> float:
    """Normalised accuracy."""
    return float(np.mean([right[task].mean() / fine[task].mean() for task in fine]))


def best_scale(family: Family, at_scale: Callable[[float], Tensors], default: float) -> float:
    """The scale with the best normalised accuracy on the development examples."""
    fine = family.fine("dev")
    known: dict[int, float] = {}

    def at(step: int) -> float:
        if step not in known:
            known[step] = score(family.right("dev", at_scale(default * STEP**step)), fine)
        return known[step]

    best = 0
    for direction in (1, -1):
        while abs(best) < MOST_STEPS and at(best + direction) > at(best):
            best += direction
        if best:
            break
    return default * STEP**best


def scaled(family: Family, vector: Tensors, scale: float) -> Tensors:
    """The base and so much of a vector."""
    return {name: family.base_tensors[name] + scale * change for name, change in vector.items()}


def _merged_at(family: Family, words: Sequence[str], scale: float) -> Tensors:
    """The merge at a scale."""
    return merged(family, [*words, "--scale", f"{scale:.9g}"])


def methods(names: Sequence[str] | None, tasks: int) -> list[tuple[str, list[str]]]:
    """Every method that needs no data and takes so many models, with its variants."""
    found = []
    for method in METHODS.values():
        if method.statistics is None and (method.tasks[1] is None or method.tasks[1] >= tasks) and (not names or method.name in names):
            found += [(method.name, words) for words in ([], *VARIANTS.get(method.name, []))]
    return found


def measure(family: Family, names: Sequence[str] | None, kept: dict[str, Any], save: Callable[[], None], tuned: bool) -> None:
    """Fill `kept` with what is not there yet: of every row its accuracy by task, and which examples were right."""
    fine = family.fine("test")

    def note(label: str, right: Right, **more: object) -> None:
        kept[label] = {"right": {task: "".join("01"[int(r)] for r in flags) for task, flags in right.items()}} | more
        print(f"{family.name} {label}: {100 * score(right, fine):.2f}", file=sys.stderr, flush=True)
        save()

    if "fine-tunes" not in kept:
        note("fine-tunes", fine)
        note("base", family.right("test", family.base_tensors))
    for words in PACKS if not names else ():
        if (label := " ".join(["shuffle-pack", *words])) not in kept:
            note(label, {task: family.right("test", tensors)[task] for task, tensors in packed(family, words).items()})
    for name, words in methods(names, len(family.tasks)):
        label = " ".join([name, *words])
        if label in kept:
            continue
        start = time.monotonic()
        scale = METHODS[name].options.get("scale")
        default = float(scale.default) if scale is not None and scale.default is not None else 1.0
        result = merged(family, ["--method", name, *words])
        seconds = time.monotonic() - start
        typed = float(words[words.index("--scale") + 1]) if "--scale" in words else default
        note(label, family.right("test", result), seconds=seconds, scale=typed if scale is not None else None)
        if scale is not None and tuned:
            if "--scale" in words:
                continue  # a scale of its own is what the row is for
            if "--then" in words:
                at_scale = partial(_merged_at, family, ["--method", name, *words])
            else:
                vector = {n: (tensor - family.base_tensors[n]) / default for n, tensor in result.items() if n in family.base_tensors}
                at_scale = partial(scaled, family, vector)
            best = best_scale(family, at_scale, default)
            note(f"{label} (tuned)", family.right("test", at_scale(best) if best != default else result), scale=best)


def table(kept: Mapping[str, Any]) -> list[str]:
    """Rows in the order of what they are worth."""

    def flags(label: str) -> Right:
        return {task: np.array([c == "1" for c in text]) for task, text in kept[label]["right"].items()}

    fine = flags("fine-tunes")
    labels = sorted((label for label in kept if label != "fine-tunes"), key=lambda label: -score(flags(label), fine))
    best = flags(next(label for label in labels if not label.startswith("shuffle-pack")))
    tasks = sorted(fine)
    rows = [
        f"| method | scale | {' | '.join(tasks)} | normalised | behind the best |",
        f"| --- | ---: | {'---: | ' * len(tasks)}---: | ---: |",
    ]
    for label in ["fine-tunes", *labels]:
        own, scale = flags(label), kept[label].get("scale")
        estimate = mean_normalised([compare_right(own[task], fine[task]) for task in tasks])
        parts = [(best[task].astype(float) - own[task]) / fine[task].mean() for task in tasks]
        behind = 100 * float(np.mean([part.mean() for part in parts]))
        half = 196 * float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts))) / len(tasks)
        cells = " | ".join(f"{100 * own[task].mean():.1f}" for task in tasks)
        interval = f"{100 * estimate.value:.2f} ({100 * estimate.low:.2f} to {100 * estimate.high:.2f})"
        rows.append(f"| {label} | {'' if scale is None else f'{scale:.3g}'} | {cells} | {interval} | {behind:.2f} +- {half:.2f} |")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("--family", nargs="+", choices=("text", "image"), default=["text", "image"])
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="by default all that need no data")
    parser.add_argument("--examples", type=int, default=400, help="of each test set")
    parser.add_argument("--dev", type=int, default=100, help="development examples of each task; 0: scales as they are")
    parser.add_argument("--json", type=Path, help="keeps what was measured: a second run goes on from there")
    arguments = parser.parse_args()
    kept: dict[str, Any] = json.loads(arguments.json.read_text()) if arguments.json is not None and arguments.json.exists() else {}

    def save() -> None:
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(kept))

    for name in arguments.family:
        family = (
            image_family(arguments.examples, arguments.dev)
            if name == "image"
            else text_family(arguments.cache.resolve(), arguments.examples, arguments.dev)
        )
        own = kept.setdefault(name, {})
        measure(family, arguments.methods, own, save, arguments.dev > 0)
        print(f"\n{name}\n\n" + "\n".join(table(own)), flush=True)


if __name__ == "__main__":
    main()
