"""Consensus merging: keep the entries of the summed task vector that several tasks use.

    m_t = [|tau_t| > lambda |tau_MT - tau_t|],  tau_MT = sum_t w_t tau_t;   theta_0 + scale * [sum_t m_t >= k] tau_MT

Source: Wang et al., Localizing Task Information (TALL-masks, 2024), https://arxiv.org/abs/2405.07813, equations 4 and 6.
Weighted task vectors w_t tau_t take the place of tau_t throughout.
"""

from __future__ import annotations

import torch

from peru_cli.methods.rules import Rule, Tile, onto_base
from peru_cli.streaming.device import greater, not_negative


class Consensus(Rule):
    """See the module."""

    holds_all = True

    def merge(self, tile: Tile) -> torch.Tensor:
        n, share = tile.n, self.parameters.number("mask-lambda")
        total, uses = tile.room("merged", n).zero_(), tile.room("uses", n).zero_()
        vectors = []
        for number, weight in enumerate(self.parameters.weights):
            vector = tile.inputs(number)
            vectors.append(vector if weight == 1.0 else vector.mul_(weight))
            total.add_(vector)
        rest, flags = tile.room("rest", n), tile.room("flags", n)
        for vector in vectors:
            torch.sub(total, vector, out=rest).abs_().mul_(share)
            uses.add_(flags.copy_(greater(vector.abs_(), rest)))
        total.mul_(flags.copy_(not_negative(uses.sub_(self.parameters.number("min-tasks")))))
        return onto_base(tile, total, self.parameters.number("scale"))
