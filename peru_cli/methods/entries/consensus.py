"""Consensus merging: keep the entries of the summed task vector that several tasks use.

    m_t = [|tau_t| > lambda |tau_MT - tau_t|],  tau_MT = sum_t w_t tau_t;   theta_0 + scale * [sum_t m_t >= k] tau_MT

Source: Wang et al., Localizing Task Information (TALL-masks, 2024), https://arxiv.org/abs/2405.07813, equations 4 and 6.
Weighted task vectors w_t tau_t take the place of tau_t throughout.
"""

from __future__ import annotations

from peru_cli.methods.rules import Result, Rule, RuleInput, add_up, masked, onto_base, scaled


class Consensus(Rule):
    """See the module."""

    holds_all = entrywise = True

    def merge(self, tile: RuleInput) -> Result:
        xp, n, share = tile.xp, tile.n, self.parameters.number("mask-lambda")
        vectors = [scaled(tile.inputs(number), weight, tile) for number, weight in enumerate(self.parameters.weights)]
        total = add_up(tile, vectors)  # a sum of two or more, so it has its own memory
        uses, rest = xp.fill(tile.room("uses", n), 0.0), tile.room("rest", n)
        for vector in vectors:
            xp.multiply(xp.absolute(xp.subtract(total, vector, out=rest), out=rest), share, out=rest)
            xp.add(uses, xp.greater(xp.absolute(vector, out=vector), rest), out=uses)
        enough = xp.greater_equal(uses, self.parameters.number("min-tasks"))
        return onto_base(masked(total, enough, tile), self.parameters.number("scale"))
