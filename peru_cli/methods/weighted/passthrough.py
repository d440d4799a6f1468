"""One model, its weights times a factor: how recipes copy layers (frankenmerges).

Source: mergekit 0.1.5 (`passthrough`): scale * theta.
"""

from __future__ import annotations

from peru_cli.methods.rules import Rule, RuleInput, scaled
from peru_cli.streaming.arrays import Array


class Passthrough(Rule):
    """See the module."""

    on_vectors = False

    def merge(self, tile: RuleInput) -> Array:
        return scaled(tile.inputs(0), self.parameters.number("scale"), tile)
