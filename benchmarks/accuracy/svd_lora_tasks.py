"""Accuracy of real adapters at lower ranks: PERU-LoRA, the naive way of the paper's table 6, and full fine-tunes as adapters.

    python benchmarks/papers/finetunes.py --out CACHE --data ../shared/data/text --only full lora --tasks sst2 clinc_domains
    python benchmarks/accuracy/svd_lora_tasks.py CACHE [--tasks sst2 clinc_domains] [--ranks 4 8 16]

CACHE holds base/, lora/TASK/ (PEFT adapters of MiniLM-L6, rank 16), full/TASK/ and data/TASK.test.jsonl. Everything is
resized or extracted with `peru svd-lora`, loaded by PEFT and classified with its own head. The naive way approximates A and B
each by its own singular value decomposition and multiplies the results (PERU paper, section 4.4). Prints two tables.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

PERU = [sys.executable, "-m", "peru_cli"]
BATCH = 100


def accuracy(cache: Path, task: str, adapter: Path) -> float:
    """Percent right on the test part of a task, for the base with an adapter loaded by PEFT."""
    with open(cache / "data" / f"{task}.test.jsonl", encoding="utf-8") as lines:
        examples = [json.loads(line) for line in lines]
    head = load_file(adapter / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    base = AutoModelForSequenceClassification.from_pretrained(cache / "base", num_labels=head.shape[0], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(cache / "base")
    right = 0
    order = sorted(examples, key=lambda e: len(e["text"]))
    with torch.inference_mode():
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            pairs = [e["text_pair"] for e in batch] if "text_pair" in batch[0] else None
            inputs = tokenizer([e["text"] for e in batch], pairs, truncation=True, padding=True, return_tensors="pt")
            right += int((model(**inputs).logits.argmax(-1) == torch.tensor([e["label"] for e in batch])).sum())
    return 100 * right / len(examples)


def naive(source: Path, out: Path, rank: int) -> float:
    """Write Approx(A) Approx(B) as an adapter with the same configuration. Returns its relative error over all modules."""
    shutil.copytree(source, out)
    tensors = load_file(source / "adapter_model.safetensors")
    squared = missed = 0.0
    for name in [n for n in tensors if n.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        before = tensors[other].double() @ tensors[name].double()
        for factor in (name, other):
            u, s, vt = torch.linalg.svd(tensors[factor].double(), full_matrices=False)
            tensors[factor] = ((u[:, :rank] * s[:rank]) @ vt[:rank]).float().contiguous()
        squared += float(before.square().sum())
        missed += float((before - tensors[other].double() @ tensors[name].double()).square().sum())
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    return (missed / squared) ** 0.5


def svd_lora(out: Path, rank: int, *arguments: object) -> dict[str, object]:
    """Run the command. Returns its report."""
    command = [*PERU, "svd-lora", *map(str, arguments), "-o", str(out), "--rank", str(rank), "--json", "-q", "--no-sync"]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)[0])


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "clinc_domains"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16])
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cache = arguments.cache
    with tempfile.TemporaryDirectory(prefix="peru-svd-lora-tasks-") as name:
        scratch = Path(name)
        print("| task | rank | adapter, bytes | error of A B | accuracy | error of Approx(A) Approx(B) | accuracy |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
        for task in arguments.tasks:
            source = cache / "lora" / task
            size = (source / "adapter_model.safetensors").stat().st_size
            rank = json.loads((source / "adapter_config.json").read_text())["r"]
            print(f"| {task} | {rank}, as trained | {size:,} | 0 | {accuracy(cache, task, source):.2f} | | |", flush=True)
            for rank in arguments.ranks:
                small, poor = scratch / f"{task}-{rank}", scratch / f"{task}-{rank}-naive"
                report = svd_lora(small, rank, source)
                error = naive(source, poor, rank)
                found = accuracy(cache, task, small), accuracy(cache, task, poor)
                print(
                    f"| {task} | {rank} | {report['file_bytes']:,} | {report['relative_error']:.4f} | {found[0]:.2f} "
                    f"| {error:.4f} | {found[1]:.2f} |",
                    flush=True,
                )
        print("\n| full fine-tune | rank | factors, bytes | whole modules, bytes | error | accuracy |")
        print("| --- | --- | ---: | ---: | ---: | ---: |")
        for task in arguments.tasks:
            trained = json.loads((cache / "full" / f"{task}.done").read_text())["test"]
            print(f"| {task} | full | | | 0 | {trained:.2f} |", flush=True)
            for rank in arguments.ranks:
                out = scratch / f"{task}-full-{rank}"
                report = svd_lora(out, rank, cache / "full" / task, "--base", cache / "base")
                factors = sum(module["bytes"] for module in report["modules"])
                print(
                    f"| {task} | {rank} | {factors:,} | {report['kept_bytes']:,} | {report['relative_error']:.4f} "
                    f"| {accuracy(cache, task, out):.2f} |",
                    flush=True,
                )
                if report["delta_tensors"]:
                    print(f"not in the adapter: {report['delta_tensors']}")


if __name__ == "__main__":
    main()
