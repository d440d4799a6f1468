"""The table of methods that keep several fine-tunes in one model, in which each input chooses. A new one is one entry here, and one
module of its name in each of the rooms that `PARTS` lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

# Its file format, what it does to a model in memory, and the command that makes it.
PARTS = {"artifact": "peru_cli.artifacts.packs", "live": "peru_cli.live", "pack": "peru_cli.pack.routed"}


@dataclass(frozen=True)
class Listed:
    """One line of the table. `options` are those of shuffle-pack that it has, besides what all methods have."""

    title: str
    paper: str
    options: tuple[str, ...]


ROUTED: Mapping[str, Listed] = {
    "smile": Listed(
        "low-rank experts of each task for every linear layer; no data", "https://arxiv.org/abs/2408.10174",
        ("--rank", "--gate-rank", "--top-k", "--target", "--exclude"),
    ),
    "wemoe": Listed(
        "task arithmetic, but MLPs add each task's difference as far as a trained router says", "https://arxiv.org/abs/2402.00433",
        ("--data", "--max-samples", "--steps", "--learning-rate", "--batch-size", "--router-layers", "--bits", "--scale", "--seed",
         "--target", "--exclude"),
    ),
}  # fmt: skip


def of_method(method: str, part: str) -> ModuleType:
    """A method's module in one of the rooms of `PARTS`."""
    return import_module(f"{PARTS[part]}.{method}")
