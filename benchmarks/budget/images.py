"""How good compressed fine-tunes of the demo's vision transformer are: accuracy, and KL to the fine-tune, on the shipped test images.

The same as judge.py, for the four image tasks that peru ships. No training and no choice has seen these images.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from judge import Judge, Tensors, load_tensors
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

from peru_cli import demo
from peru_cli.inference.metrics import Array

BATCH = 250  # images


class ImageJudge(Judge):
    """Tensors have one or two dimensions here, as matrices are counted in."""

    heads = ("--per-task", "classifier")  # all tasks have ten classes: nothing but the name says that heads differ

    def __init__(self, store: Path, examples: int | None) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.store, self.examples, self.part = store, examples, "test"
        self.base_folder = demo.BASE
        self.base = self.tensors(demo.BASE)
        self.parameters = sum(tensor.numel() for tensor in self.base.values())
        self._config = ViTConfig.from_pretrained(demo.fine_tune(demo.tasks()[0]))

    def folder(self, task: str) -> Path:
        return demo.fine_tune(task)

    def tensors(self, folder: Path) -> Tensors:
        return {name: flat(tensor) for name, tensor in load_tensors(folder, demo.PREFIX).items()}

    def labels(self, task: str) -> Array:
        with np.load(demo.images(task)) as file:
            return file["y"][: self.examples]  # type: ignore[no-any-return]

    def outputs(self, task: str, tensors: Mapping[str, torch.Tensor]) -> Array:
        """Logits under the task's head, float32 (examples, classes). Pixels are scaled as the fine-tunes' preprocessors say."""
        with np.load(demo.images(task)) as file:
            pixels = torch.from_numpy(file["x"][: self.examples])[:, None].float() / 127.5 - 1
        whole = load_file(demo.fine_tune(task) / "model.safetensors")
        state = {name: tensors.get(name.removeprefix(demo.PREFIX), tensor).to(torch.bfloat16).float() for name, tensor in whole.items()}
        state = {name: tensor.view(whole[name].shape) for name, tensor in state.items()}
        model = ViTForImageClassification.from_pretrained(None, config=self._config, state_dict=state, dtype=torch.float32).eval()
        with torch.inference_mode():
            return torch.cat([model(batch).logits for batch in pixels.split(BATCH)]).numpy()


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """(1, 1, n) -> (n,), (1, m, n) -> (m, n), a convolution's (m, ...) -> (m, the rest)."""
    while tensor.dim() > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor.flatten(1) if tensor.dim() > 2 else tensor
