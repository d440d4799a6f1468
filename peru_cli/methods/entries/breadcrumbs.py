"""Model breadcrumbs: drop the largest entries (outliers) and the smallest ones of each task vector, add the rest.

Source: Davari and Belilovsky, Model Breadcrumbs (2024), https://arxiv.org/abs/2312.06795, section 3. The paper and mergekit
mask each layer (`--scope tensor`). The default here is the whole vector (`global`), as for TIES.

Of n entries, the floor(gamma * n) largest are dropped and the next floor(keep * n) are kept. Ties are broken in canonical
order. If keep + gamma exceeds 1, fewer of the largest are dropped, as in mergekit."""

from __future__ import annotations

from peru_cli.methods.entries.ties import elect_and_merge
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Kept, Result, Rule, RuleInput, onto_base, sum_of_parts


class Breadcrumbs(Rule):
    """See the module."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        tasks = range(len(parameters.tasks))
        kept = [parameters.share("keep", task) for task in tasks]
        outliers = [min(parameters.share("gamma", task), 1 - kept[task]) for task in tasks]
        large = [keep + out for keep, out in zip(kept, outliers, strict=True)]
        self.trims = (large, outliers) if any(outliers) else (large,)
        self._kept = kept
        self.scope = parameters.text("scope")
        self.entrywise = self.scope == "global"

    def keeps(self, trim: int, task: int, n: int, slot: int) -> int:
        kept, outliers = (self.parameters.count(share, n) for share in (self._kept[task], self.parameters.share("gamma", task)))
        return min(kept + outliers, n) if trim == 0 else min(outliers, n - kept)

    def _stays(self, tile: RuleInput, number: int) -> Kept:
        """Which entries of a task's vector are kept."""
        large = tile.kept(number, 0)
        if len(self.trims) == 1:
            return large
        outliers = tile.kept(number, 1)  # the first trim selects the largest among the large
        if large.flags is None and outliers.flags is None:
            return Kept(large.low, outliers.low - 1)
        some, most = tile.flags(number, large), tile.flags(number, outliers)
        if most is None:
            return Kept(0, -1)
        return Kept(flags=tile.xp.equal(most, False) if some is None else tile.xp.not_equal(some, most))

    def merge(self, tile: RuleInput) -> Result:
        weights = self.parameters.weights
        vector = sum_of_parts((number, tile.flags(number, self._stays(tile, number)), weights[number], 1.0) for number in range(tile.tasks))
        return onto_base(vector, self.parameters.number("scale"))


class BreadcrumbsTies(Breadcrumbs):
    """Elects among the kept entries as TIES does: weights before the election, a sum of 0 elects + (mergekit's `breadcrumbs_ties`)."""

    holds_all = True

    def merge(self, tile: RuleInput) -> Result:
        stays, weights = [self._stays(tile, number) for number in range(tile.tasks)], self.parameters.weights
        shares = weights if self.parameters.text("reduce") == "mean" else None
        vector = elect_and_merge(stays, [(weight, 1.0) for weight in weights], [1.0] * tile.tasks, shares)
        return onto_base(vector, self.parameters.number("scale"))
