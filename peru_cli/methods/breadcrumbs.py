"""Model breadcrumbs: drop the largest entries (outliers) and the smallest ones of each task vector, add the rest.

Source: Davari and Belilovsky, Model Breadcrumbs (2024), https://arxiv.org/abs/2312.06795, section 3. The paper masks
in each layer (`--scope tensor`, what mergekit does); `global`, the default here as for TIES, over the whole vector.

Of n entries the floor(gamma * n) largest go, and the floor(keep * n) next ones stay, equals in canonical
order. If keep + gamma exceeds 1, fewer of the largest go, as in mergekit.
"""

from __future__ import annotations

import torch

from peru_cli.methods.rules import Parameters, Rule, Tile, onto_base, scaled


class Breadcrumbs(Rule):
    """See the module."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        keep, outliers = parameters.share("keep"), parameters.share("gamma")
        outliers = min(outliers, 1 - keep)
        self.trims = (keep + outliers, outliers) if outliers else (keep,)
        self.scope = parameters.text("scope")

    def merge(self, tile: Tile) -> torch.Tensor:
        vector = tile.room("merged", tile.n)
        for number, weight in enumerate(self.parameters.weights):
            entry = tile.inputs(number)
            large = tile.room("large", tile.n).copy_(tile.kept(number, 0))
            if len(self.trims) > 1:
                large.sub_(tile.kept(number, 1))  # the largest are among the large
            part = scaled(entry.mul_(large), weight, tile)
            vector.copy_(part) if number == 0 else vector.add_(part)
        return onto_base(tile, vector, self.parameters.number("scale"))
