"""Accuracy of image classifiers, run through transformers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

BATCH = 250


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers: it loads local folders only here."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def accuracy(model: Path, images: Path) -> float:
    """Share of test images that a classifier gets right, between 0 and 1.

    Args:
        model: a folder that transformers loads; it computes in float32 whatever its weights.
        images: an .npz with uint8 `x` (n, height, width) and labels `y` (n,).
    """
    from transformers import AutoModelForImageClassification

    classifier = AutoModelForImageClassification.from_pretrained(model, dtype=torch.float32, local_files_only=True).eval()
    with np.load(images) as data:
        pixels = torch.from_numpy(data["x"]).unsqueeze(1).float() / 127.5 - 1.0  # (n, 1, height, width)
        labels = torch.from_numpy(data["y"].astype(np.int64))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(labels), BATCH):
            predicted = classifier(pixel_values=pixels[start : start + BATCH]).logits.argmax(-1)
            right += int((predicted == labels[start : start + BATCH]).sum())
    return right / len(labels)
