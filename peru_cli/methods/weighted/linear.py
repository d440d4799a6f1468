"""Weighted averages of whole weights: sum_t w_t theta_t, normally divided by sum_t w_t.

Source: Wortsman et al., Model soups (2022), https://arxiv.org/abs/2203.05482, section 2 (uniform soup).
With the base as one of the models it is WiSE-FT (https://arxiv.org/abs/2109.01903, equation 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peru_cli.errors import UsageError
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Result, Rule, RuleInput, times, weighted_sum


def share_of_sum(weights: Sequence[float]) -> float:
    """1 / sum of the weights, which normalises them. UsageError if they cancel out."""
    total = math.fsum(weights)
    if abs(total) < 1e-12:
        raise UsageError("the weights sum to 0, so they cannot be normalised", "add --no-normalize, or change --weight")
    return 1.0 / total


class Linear(Rule):
    """See the module."""

    on_vectors, entrywise = False, True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._factor = share_of_sum(parameters.weights) if parameters.values["normalize"] else 1.0

    def merge(self, tile: RuleInput) -> Result:
        return times(weighted_sum(self.parameters.weights), self._factor)
