"""Tiny classifiers, sentences for each, and the command that merges them with these."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import transformers as tr
from safetensors.torch import load_file

from tests.support import models

TASKS = ("a", "b")


def gpt2() -> tr.GPT2ForSequenceClassification:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
    return tr.GPT2ForSequenceClassification(tr.GPT2Config(vocab_size=len(models.WORDS), num_labels=3, pad_token_id=0, **sizes))


def write_rows(path: Path, count: int, seed: int, labels: bool = True) -> Path:
    rows = [{"text": text, **({"label": i % 3} if labels else {})} for i, text in enumerate(models.sentences(count, seed))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_family(folder: Path, make: object = models.bert, count: int = 12) -> Path:
    """A bare encoder as base, two classifiers made from it, and sentences for each."""
    torch.manual_seed(0)
    model = models.enlarge(make(), 6.0)  # type: ignore[operator]
    getattr(model, model.base_model_prefix).save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for number, task in enumerate(TASKS):
        model.load_state_dict(start)
        noise = torch.Generator().manual_seed(number + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
        model.save_pretrained(folder / task)
        write_rows(folder / f"{task}.jsonl", count, number)
    for name in ("base", *TASKS):
        models.tokenizer().save_pretrained(folder / name)
    return folder


def command(family: Path, method: str, *options: object, base: bool = True, data: bool = True) -> list[object]:
    at = ["--base", family / "base"] if base else ["--per-task", "classifier"]
    given = [word for task in TASKS for word in ("--data", f"{task}={family / task}.jsonl")] if data else []
    return ["merge", *(f"{task}={family / task}" for task in TASKS), *at, *given, "-m", method, "--no-sync", "--device", "cpu", *options]


def merged(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in load_file(out / "model.safetensors").items()}


def fine_tune(family: Path, task: str) -> torch.nn.Module:
    with open(os.devnull, "w"):
        return tr.AutoModelForSequenceClassification.from_pretrained(family / task, attn_implementation="eager").eval()


def sentences(family: Path, task: str) -> list[str]:
    return [json.loads(line)["text"] for line in (family / f"{task}.jsonl").read_text().splitlines()]


def tokens(family: Path, texts: list[str]) -> dict[str, torch.Tensor]:
    return dict(tr.AutoTokenizer.from_pretrained(family / "base")(texts, padding=True, return_tensors="pt"))
