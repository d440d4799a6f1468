"""DARE: drop entries of the task vectors at random, rescale the rest by 1 / density, then add or elect.

Source: Yu et al., Language Models are Super Mario (2024), https://arxiv.org/abs/2311.03099, section 3.1.

Entry i of a tensor stays if word(i) < floor(density * 2^32), word as methods/philox.py has it: every machine
drops the same entries for the same seed, task name and tensor name.

`dare` adds what stays (task arithmetic). `dare-ties` elects signs as TIES does, weights before the election, a
sum of 0 elects +, and sums what agrees (`--reduce mean` divides by the agreeing weights), as mergekit has it.
"""

from __future__ import annotations

from fractions import Fraction

import torch

from peru_cli.methods.philox import stream_key, words
from peru_cli.methods.rules import Parameters, Rule, Tile, onto_base
from peru_cli.methods.ties import disjoint_merge, elected_signs
from peru_cli.streaming.device import as_ones


def survivors(seed: int, task: str, tensor: str, start: int, n: int, density: Fraction, device: torch.device) -> torch.Tensor:
    """1 where an entry stays, else 0; uint8 (n,)."""
    limit = int(density * 2**32)
    stays = words(stream_key(seed, task, tensor), start, n) < limit if limit < 2**32 else None
    return torch.ones(n, dtype=torch.uint8, device=device) if stays is None else as_ones(stays, device)


class Dare(Rule):
    """See the module."""

    holds_all = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._density = parameters.share("keep")
        self._rescale = float(1 / self._density)

    def _dropped(self, tile: Tile, number: int) -> torch.Tensor:
        """What stays of a task's vector, rescaled and weighted; (n,)."""
        entry = tile.inputs(number)
        seed, task = int(self.parameters.number("seed")), self.parameters.tasks[number]
        stays = survivors(seed, task, tile.name, tile.start, tile.n, self._density, entry.device)
        entry.mul_(tile.room("kept", tile.n).copy_(stays)).mul_(self._rescale)
        weight = self.parameters.weights[number]
        return entry if weight == 1.0 else entry.mul_(weight)

    def merge(self, tile: Tile) -> torch.Tensor:
        vector = tile.room("merged", tile.n).copy_(self._dropped(tile, 0))
        for number in range(1, tile.tasks):
            vector.add_(self._dropped(tile, number))
        return onto_base(tile, vector, self.parameters.number("scale"))


class DareTies(Dare):
    """See the module."""

    def merge(self, tile: Tile) -> torch.Tensor:
        entries = [self._dropped(tile, number) for number in range(tile.tasks)]
        total = tile.room("merged", tile.n).copy_(entries[0])
        for entry in entries[1:]:
            total.add_(entry)
        signs = elected_signs(total, None, tile.room("signs", tile.n))
        mean = self.parameters.text("reduce") == "mean"
        vector = disjoint_merge(entries, [1.0] * tile.tasks, signs, mean, self.parameters.weights, tile)
        return onto_base(tile, vector, self.parameters.number("scale"))
