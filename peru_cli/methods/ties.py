"""TIES: trim each task vector to its largest entries, elect a sign, merge the entries that agree with it.

Source: Yadav et al., TIES-Merging (2023), https://arxiv.org/abs/2306.01708, section 4 and algorithm 1. Three
programs bear this name and differ; each `--variant` equals one of them:

    authors   weights, if any, belong to the task vectors; sign of the sum, where that is 0 the sign that most
              entries were given; mean (or sum) over agreeing non-zero entries; trimmed over the whole vector
    mergekit  weights before the election; a sum of 0 elects +; divided by the agreeing entries' weights (or a
              plain sum); trimmed in each tensor
    peft      weights after the election, which sees plain task vectors; a sum of 0 elects +; mean over
              agreeing entries; trimmed in each tensor

The authors' program keeps one entry too many, and every equal of the threshold; here a trim keeps exactly
floor(keep * n) entries, equals in canonical order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peru_cli.methods.rules import Parameters, Rule, Tile, onto_base
from peru_cli.streaming.device import not_negative


def elected_signs(total: torch.Tensor, majority: int | None, out: torch.Tensor) -> torch.Tensor:
    """+1 or -1 for each entry: the sign of its sum over tasks; (n,) -> (n,).

    Args:
        majority: what a sum of 0 elects: None for +1, else the sign of the whole vector's sign sum, in
            which 0 elects the negative entries (as the authors' program has it).
    """
    if majority is None or majority > 0:
        out.copy_(not_negative(total))  # -0.0 counts as 0, a sum of 0 elects +
    else:
        out.copy_(not_negative(torch.neg(total, out=out)))
        torch.sub(1.0, out, out=out)
    return out.mul_(2.0).sub_(1.0)


def disjoint_merge(
    entries: Sequence[torch.Tensor], weights: Sequence[float], signs: torch.Tensor, mean: bool, divide_by: Sequence[float], tile: Tile
) -> torch.Tensor:
    """Sum or mean over tasks of weight * entry where the entry's sign is the elected one; (n,).

    Args:
        entries: trimmed task vectors, one (n,) a task; overwritten.
        weights: factor of each task's entries, applied after the agreement is settled.
        mean: divide by the sum of `divide_by` over the tasks that agree (by 1 where that is 0).
    """
    total, divisor = tile.room("merged", tile.n), tile.room("divisor", tile.n)
    total.zero_()
    divisor.zero_()
    for entry, weight, share in zip(entries, weights, divide_by, strict=True):
        agreeing = torch.clamp(entry.mul_(signs), min=0.0, out=entry)  # |entry| where it agrees, else 0
        total.add_(agreeing if weight == 1.0 else torch.mul(agreeing, weight, out=tile.room("scaled", tile.n)))
        if mean:
            ones = torch.sign(agreeing, out=agreeing)
            divisor.add_(ones if share == 1.0 else ones.mul_(share))
    if mean:
        if all(share == 1.0 for share in divide_by):
            divisor.clamp_(min=1.0)
        else:
            divisor.masked_fill_(divisor.abs() < 1e-8, 1.0)
        total.div_(divisor)
    return total.mul_(signs)


class Ties(Rule):
    """See the module."""

    holds_all = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._variant = parameters.text("variant")
        self.trims = (parameters.share("keep"),)
        self.scope = parameters.text("scope")
        self.wants_signs = self._variant == "authors" and len(parameters.tasks) > 1

    def _trimmed(self, tile: Tile) -> list[torch.Tensor]:
        entries = []
        for number, weight in enumerate(self.parameters.weights):
            entry = tile.inputs(number)
            entry.mul_(tile.kept(number, 0))
            entries.append(entry if self._variant == "peft" or weight == 1.0 else entry.mul_(weight))
        return entries

    def _total(self, entries: Sequence[torch.Tensor], tile: Tile) -> torch.Tensor:
        total = tile.room("merged", tile.n).copy_(entries[0])
        for entry in entries[1:]:
            total.add_(entry)
        return total

    def elect(self, tile: Tile) -> int:
        total = self._total(self._trimmed(tile), tile)
        return int(torch.sign(total, out=total).sum(dtype=torch.float64))

    def merge(self, tile: Tile) -> torch.Tensor:
        entries = self._trimmed(tile)
        majority = tile.majority if self._variant == "authors" else None
        signs = elected_signs(self._total(entries, tile), majority, tile.room("signs", tile.n))
        plain = [1.0] * tile.tasks
        after = self.parameters.weights if self._variant == "peft" else plain
        shares = self.parameters.weights if self._variant == "mergekit" else plain
        vector = disjoint_merge(entries, after, signs, self.parameters.text("reduce") == "mean", shares, tile)
        return onto_base(tile, vector, self.parameters.number("scale"))
