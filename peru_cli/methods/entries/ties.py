"""TIES: trim each task vector to its largest entries, elect a sign, merge the entries that agree with it.

Source: Yadav et al., TIES-Merging (2023), https://arxiv.org/abs/2306.01708, section 4 and algorithm 1. Three
programs use this name and differ; each `--variant` equals one of them:

    authors   weights, if any, belong to the task vectors; sign of the sum, and if that is 0 the sign that most
              entries were given; mean (or sum) over agreeing non-zero entries; trimmed over the whole vector
    mergekit  weights before the election; a sum of 0 elects +; divided by the agreeing entries' weights (or a
              plain sum); trimmed in each tensor
    peft      weights after the election, which sees plain task vectors; a sum of 0 elects +; mean over
              agreeing entries; trimmed in each tensor

The authors' program keeps one entry too many, and every equal of the threshold. Here a trim keeps exactly
floor(keep * n) entries, ties in canonical order."""

from __future__ import annotations

from collections.abc import Sequence

from peru_cli.kernels.compiling.build import Kernel
from peru_cli.kernels.merging.elections import elects
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Election, Kept, Result, Rule, RuleInput, onto_base


def elect_and_merge(
    kept: Sequence[Kept],
    before: Sequence[tuple[float, float]],
    after: Sequence[float],
    shares: Sequence[float] | None,
    majority: int | None = None,
) -> Result:
    """TIES' election and disjoint merge (methods/rules.py has what is given).

    Args:
        majority: the sign that a sum of 0 elects: None for +1, otherwise the sign of the whole vector's sign sum (0
            elects the negative entries, as in the authors' program)."""
    return Result(election=Election(kept, before, after, shares, majority is not None and majority <= 0))


class Ties(Rule):
    """See the module."""

    holds_all = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._variant = parameters.text("variant")
        self.trims = ([parameters.share("keep", task) for task in range(len(parameters.tasks))],)
        self.scope = parameters.text("scope")
        self.entrywise = self.scope == "global"
        self.wants_signs = self._variant == "authors" and len(parameters.tasks) > 1

    def keeps(self, trim: int, task: int, n: int, slot: int) -> int:
        kept = super().keeps(trim, task, n, slot)
        return max(kept, 1) if self._variant == "mergekit" and self.trims[0][task] else kept

    def loops(self, dtype: str) -> Sequence[Kernel]:
        return elects(dtype, self.wants_signs)

    def _votes(self, tile: RuleInput) -> tuple[list[Kept], list[tuple[float, float]]]:
        """The kept entries of each task's vector, and its weight before the election."""
        weights = [1.0] * tile.tasks if self._variant == "peft" else self.parameters.weights
        return [tile.kept(number, 0) for number in range(tile.tasks)], [(weight, 1.0) for weight in weights]

    def elect(self, tile: RuleInput) -> int:
        return tile.elected(*self._votes(tile))

    def merge(self, tile: RuleInput) -> Result:
        plain = [1.0] * tile.tasks
        after = self.parameters.weights if self._variant == "peft" else plain
        shares = self.parameters.weights if self._variant == "mergekit" else plain
        mean = self.parameters.text("reduce") == "mean"
        majority = tile.majority if self._variant == "authors" else None
        vector = elect_and_merge(*self._votes(tile), after, shares if mean else None, majority)
        return onto_base(vector, self.parameters.number("scale"))
