"""One model, its weights times a factor: how recipes copy layers (frankenmerges).

Source: mergekit 0.1.5 (`passthrough`): scale * theta.
"""

from __future__ import annotations

from peru_cli.methods.rules import Result, Rule, RuleInput, weighted_sum


class Passthrough(Rule):
    """See the module."""

    on_vectors = False

    def merge(self, tile: RuleInput) -> Result:
        return weighted_sum([self.parameters.number("scale")])
