"""The demo family: a small vision transformer and four fine-tunes of it, with their test images.

data/ATTRIBUTION.md says where the images come from; benchmarks/models/demo_family.py made everything.
"""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
BASE = DATA / "base"
PREFIX = "vit."  # in front of the base's names in a classifier


def tasks() -> list[str]:
    """Names of the fine-tunes."""
    return sorted(folder.name for folder in (DATA / "fine-tunes").iterdir())


def fine_tune(task: str) -> Path:
    """Folder of a fine-tune."""
    return DATA / "fine-tunes" / task


def images(task: str) -> Path:
    """Test images of a task: uint8 `x` (n, 28, 28) and labels `y` (n,)."""
    return DATA / "images" / f"{task}.npz"
