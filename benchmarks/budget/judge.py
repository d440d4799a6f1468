"""How good compressed fine-tunes of MiniLM are: accuracy, and KL to the fine-tune, with intervals.

One encoder is loaded, weights are swapped in, heads are always the fine-tune's own. Texts are tokenised once and sorted by
length. The fine-tunes' own outputs are kept on disk.

Weights are rounded to bfloat16 first, the checkpoints' own type, whatever method they come from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from encoder import Encoder
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from peru_cli import cli
from peru_cli.inference.metrics import Array, Estimate, Z, compare_right, kl_divergence, mean_normalised

PREFIX = "bert."  # of a classifier's names, in front of the bare encoder's
HEAD = ("classifier.weight", "classifier.bias")
TOKENS = 1024  # of a batch: more does not stay in the cache

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Judged:
    """What came out on one task: each example right or wrong, the fine-tune's the same, KL to it in nats; all (examples,)."""

    right: Array
    reference: Array
    kl: Array


@dataclass
class Texts:
    """Test examples in order of length: batches of token ids, and labels."""

    order: list[int]
    batches: list[dict[str, torch.Tensor]]
    labels: Array


class Judge:
    """The cache that benchmarks/papers/finetunes.py made, a folder for outputs, and one encoder."""

    heads: tuple[str, ...] = ()  # options by which commands on several tasks know the tasks' heads

    def __init__(self, cache: Path, store: Path, examples: int | None, part: str = "test") -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.cache, self.store, self.examples, self.part = cache, store, examples, part
        self.base_folder = cache / "base-bf16"
        self.base = self.tensors(self.base_folder)
        self.parameters = sum(tensor.numel() for tensor in self.base.values())
        self._tokenizer = AutoTokenizer.from_pretrained(self.base_folder)
        self._texts: dict[str, Texts] = {}

    def fine_tune(self, task: str) -> Tensors:
        """The fine-tune's encoder, in float32, under the bare encoder's names."""
        return self.tensors(self.folder(task))

    def folder(self, task: str) -> Path:
        """The folder of a fine-tune."""
        return self.cache / "full-bf16" / task

    def given(self, task: str) -> Path:
        """What is compressed: the fine-tune's folder."""
        return self.folder(task)

    def tensors(self, folder: Path) -> Tensors:
        """The encoder in a folder, in float32, under the bare encoder's names."""
        return load_tensors(folder, PREFIX)

    def labels(self, task: str) -> Array:
        """Of the examples, in the order of the outputs; (examples,)."""
        return self.texts(task).labels

    def judge(self, task: str, tensors: Mapping[str, torch.Tensor]) -> Judged:
        """What an encoder's `tensors` are worth under the head of the task's fine-tune."""
        labels, reference, found = self.labels(task), self.reference(task), self.outputs(task, tensors)
        return Judged(found.argmax(-1) == labels, reference.argmax(-1) == labels, kl_divergence(reference, found))

    def reference(self, task: str) -> Array:
        """The fine-tune's logits, float32 (examples, classes), from disk if they are there."""
        path = self.store / f"{'' if self.part == 'test' else self.part + '-'}{task}-{self.examples or 'all'}.npy"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, self.outputs(task, self.fine_tune(task)))
        return np.load(path)  # type: ignore[no-any-return]

    def outputs(self, task: str, tensors: Mapping[str, torch.Tensor]) -> Array:
        """Logits under the task's head, float32 (examples, classes), in the order of length."""
        encoder = Encoder(tensors)
        with safe_open(self.folder(task) / "model.safetensors", "pt") as file:
            weight, bias = (file.get_tensor(name).float() for name in HEAD)
        with torch.inference_mode():
            pooled = torch.cat([encoder.pooled(batch["input_ids"], batch["attention_mask"]) for batch in self.texts(task).batches])
            return torch.nn.functional.linear(pooled, weight, bias).numpy()

    def outputs_of_transformers(self, task: str) -> Array:
        """The fine-tune's logits as transformers computes them in float32: what `reference` is checked against."""
        model = AutoModelForSequenceClassification.from_pretrained(self.folder(task), dtype=torch.float32).eval()
        with torch.inference_mode():
            return torch.cat([model(**batch).logits for batch in self.texts(task).batches]).numpy()

    def texts(self, task: str) -> Texts:
        """The first examples of the task's part."""
        if task not in self._texts:
            lines = (self.cache / "data" / f"{task}.{self.part}.jsonl").read_text("utf-8").splitlines()
            rows = [json.loads(line) for line in lines[: self.examples]]
            tokens = [dict(self._tokenizer(row["text"], row.get("text_pair"), truncation=True)) for row in rows]
            order = sorted(range(len(rows)), key=lambda i: len(tokens[i]["input_ids"]))
            batches = [dict(self._tokenizer.pad([tokens[i] for i in cut], return_tensors="pt")) for cut in cuts(tokens, order)]
            self._texts[task] = Texts(order, batches, np.array([rows[i]["label"] for i in order]))
        return self._texts[task]


class LoraJudge(Judge):
    """The same of adapters: what is judged is the model that one makes of the base, in bfloat16."""

    def folder(self, task: str) -> Path:
        """The adapter's model, made when it is first asked for."""
        folder = self.store / "models" / task
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            command = ["unpack", self.given(task), "--base", self.base_folder, "-o", folder, "--no-sync", "--quiet"]
            if cli.run([str(part) for part in command]):
                raise RuntimeError(f"{self.given(task)} cannot be unpacked")
        return folder

    def given(self, task: str) -> Path:
        """What is compressed: the adapter's folder."""
        return self.cache / "lora" / task


def cuts(tokens: list[dict[str, Any]], order: list[int]) -> Iterator[list[int]]:
    """Batches of about TOKENS tokens, padding included, out of examples sorted by length."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * len(tokens[index]["input_ids"]) > TOKENS:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def load_tensors(folder: Path, prefix: str) -> Tensors:
    """A checkpoint's floating tensors without its head, in float32, under the bare encoder's names."""
    tensors = load_file(folder / "model.safetensors")
    return {name.removeprefix(prefix): t.float() for name, t in tensors.items() if t.is_floating_point() and name not in HEAD}


def normalised(tasks: list[Judged]) -> Estimate:
    """Mean over tasks of accuracy / the fine-tune's accuracy, with its bootstrap interval."""
    return mean_normalised([compare_right(task.right, task.reference) for task in tasks])


def mean_kl(tasks: list[Judged]) -> Estimate:
    """Mean over tasks of the mean KL, nats, with the normal interval for these tasks and other examples."""
    mean = float(np.mean([task.kl.mean() for task in tasks]))
    variance = sum(task.kl.var(ddof=1) / len(task.kl) for task in tasks) / len(tasks) ** 2
    half = Z * float(np.sqrt(variance))
    return Estimate(mean, mean - half, mean + half)
