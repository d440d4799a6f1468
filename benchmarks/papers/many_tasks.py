"""Merges and sparse differences of up to twelve tasks (PERU, table 7, for more tasks than the texts are).

    python benchmarks/papers/many_tasks.py CACHE --data ../shared/data [--images 500]

Six sets of small images, each cut into two tasks of half of its classes, on the demo's base (510,192 parameters; its training saw three of
the sets). Heads are fitted first and then frozen, as in the demo. Fine-tunes are made into CACHE once; table 7's rows are tables.py's."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.utils import logging

from peru_cli import demo

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1] / "models")]
import demo_family  # noqa: E402  # after the path to it
import tables  # noqa: E402

SETS = ("fashion_mnist", "notmnist", "sign_digits", "digits", "mnist", "gtsrb")
TASKS = tuple(f"{name}_{half}" for half in (1, 2) for name in SETS)
STEPS, HEAD_IMAGES = 200, 200


def half(task: demo_family.Task, second: bool) -> demo_family.Task:
    """The first or second half of a set's classes, as a task of its own."""
    middle = (len(task.classes) + 1) // 2
    classes = task.classes[middle:] if second else task.classes[:middle]
    first = middle if second else 0

    def part(x: Any, y: Any) -> tuple[Any, Any]:
        keep = (y >= first) & (y < first + len(classes))
        return x[keep], y[keep] - first

    train, held, test = part(task.train_x, task.train_y), part(task.held_x, task.held_y), part(task.test_x, task.test_y)
    return replace(
        task, classes=classes, train_x=train[0], train_y=train[1], held_x=held[0], held_y=held[1], test_x=test[0], test_y=test[1]
    )


class Images(tables.Bench):
    """The commands of tables.py on image tasks."""

    prefix = demo.PREFIX

    def __init__(self, cache: Path, scratch: Path, data: Path, images: int) -> None:
        self.cache, self.scratch, self.examples, self.base = cache, scratch, images, demo.BASE
        self.parts = {}
        for name in SETS:
            whole = demo_family.load_task(name, data)
            self.parts |= {f"{name}_1": half(whole, False), f"{name}_2": half(whole, True)}
        self._chosen = cache / "scales.json"
        self._scales = json.loads(self._chosen.read_text()) if self._chosen.exists() else {}
        for seed, task in enumerate(TASKS):
            if not (self.full(task) / "model.safetensors").exists():
                self.train(task, seed)
        self.tasks = TASKS
        self.best = {task: self.accuracy(task, self.full(task)) for task in TASKS}

    def train(self, task: str, seed: int) -> None:
        """Make a fine-tune of the demo's base."""
        encoder = ViTModel.from_pretrained(self.base, add_pooling_layer=False, dtype=torch.float32).eval()
        head = demo_family.fit_head(encoder, self.parts[task])
        demo_family.fine_tune(encoder, head, self.parts[task], seed)
        demo_family.save_fine_tune(encoder, head, self.parts[task], self.full(task))

    def accuracy(self, task: str, model: Path | tables.Tensors, part: str = "test") -> float:
        """Percent right of a folder, or of a classifier's tensors."""
        tensors = load_file(model / "model.safetensors") if isinstance(model, Path) else model
        found = self.parts[task]
        x, y = (found.held_x, found.held_y) if part == "dev" else (demo_family.pixel_values(found.test_x), torch.from_numpy(found.test_y))
        limit = tables.DEV_EXAMPLES if part == "dev" else self.examples
        config = ViTConfig.from_pretrained(self.full(task))
        state = {name: tensor.float() for name, tensor in tensors.items()}  # under the names of files, which transformers converts
        classifier = ViTForImageClassification.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
        with torch.inference_mode():
            right = [classifier(a).logits.argmax(-1) == b for a, b in zip(x[:limit].split(100), y[:limit].split(100), strict=True)]
        return round(100 * torch.cat(right).double().mean().item(), 2)


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="with image/, as ../shared/data")
    parser.add_argument("--images", type=int, default=500, help="of each task's test images, at most; by default 500")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    demo_family.FINETUNE_STEPS, demo_family.HEAD_IMAGES = STEPS, HEAD_IMAGES
    options.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Images(options.cache.resolve(), Path(scratch), options.data, options.images)
        rows = [*tables.reference(bench), *tables.table_tasks(bench)]
        print("\n".join(tables.markdown(rows, TASKS, bench.best)))
        sizes = {task: min(options.images, len(bench.parts[task].test_y)) for task in TASKS}
        print(f"\ntest images: {np.sum(list(sizes.values()))}, {sizes}")


if __name__ == "__main__":
    main()
