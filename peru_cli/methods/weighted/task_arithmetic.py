"""Task arithmetic: theta_0 + scale * sum_t w_t tau_t.

Source: Ilharco et al., Editing Models with Task Arithmetic (2023), https://arxiv.org/abs/2212.04089, section 2.
A negative scale is negation (forgetting), scale 1/T with unit weights a model soup around the base.
"""

from __future__ import annotations

from peru_cli.methods.rules import Result, Rule, RuleInput, onto_base, weighted_sum


class TaskArithmetic(Rule):
    """See the module."""

    entrywise = True

    def merge(self, tile: RuleInput) -> Result:
        return onto_base(weighted_sum(self.parameters.weights), self.parameters.number("scale"))
