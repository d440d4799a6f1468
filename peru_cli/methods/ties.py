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

from collections.abc import Iterator, Sequence

from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule, RuleInput, add_up, masked, onto_base, scaled
from peru_cli.streaming.arrays import Array


def elected_signs(total: Array, majority: int | None, tile: RuleInput) -> Array:
    """+1 or -1 for each entry: the sign of its sum over tasks; (n,) -> (n,).

    Args:
        majority: what a sum of 0 elects: None for +1, else the sign of the whole vector's sign sum, in
            which 0 elects the negative entries (as the authors' program has it).
    """
    xp, signs = tile.xp, tile.room("signs", tile.n)
    positive = (xp.greater_equal if majority is None or majority > 0 else xp.greater)(total, 0)
    return xp.subtract(xp.multiply(xp.copy(positive, signs), 2.0, out=signs), 1.0, out=signs)


def disjoint_merge(
    entries: Sequence[Array], weights: Sequence[float], signs: Array, mean: bool, divide_by: Sequence[float], tile: RuleInput
) -> Array:
    """Sum or mean over tasks of weight * entry where the entry's sign is the elected one; (n,).

    Args:
        entries: trimmed task vectors, one (n,) a task; overwritten.
        weights: factor of each task's entries, applied after the agreement is settled.
        mean: divide by the sum of `divide_by` over the tasks that agree (by 1 where that is 0).
    """
    xp = tile.xp
    agree: list[Array] = []  # bools, by task

    def agreeing() -> Iterator[Array]:
        for entry, weight in zip(entries, weights, strict=True):
            xp.clip(xp.multiply(entry, signs, out=entry), 0.0, None, out=entry)  # |entry| where it agrees, else 0
            if mean:
                agree.append(xp.greater(entry, 0))
            yield scaled(entry, weight, tile)

    total = add_up(tile, agreeing())
    if mean:
        xp.divide(total, _divisor(agree, divide_by, tile), out=total)
    return xp.multiply(total, signs, out=total)


def _divisor(agree: Sequence[Array], divide_by: Sequence[float], tile: RuleInput) -> Array:
    """Sum of `divide_by` over the tasks that agree, 1 where that is 0; (n,)."""
    xp, divisor = tile.xp, tile.room("divisor", tile.n)
    if all(share == 1.0 for share in divide_by) and len(agree) < 256:  # counted in bytes, which is four times as fast
        count = xp.view(agree[0], "u1")
        for flags in agree[1:]:
            xp.add(count, xp.view(flags, "u1"), out=count)
        return xp.copy(xp.clip(count, 1, None, out=count), divisor)
    xp.fill(divisor, 0.0)
    for flags, share in zip(agree, divide_by, strict=True):
        xp.add(divisor, scaled(xp.copy(flags, tile.room("ones", tile.n)), share, tile), out=divisor)
    xp.fill(divisor, 1.0, where=xp.less(xp.absolute(divisor, out=tile.room("ones", tile.n)), 1e-8))
    return divisor


class Ties(Rule):
    """See the module."""

    holds_all = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._variant = parameters.text("variant")
        self.trims = ([parameters.share("keep", task) for task in range(len(parameters.tasks))],)
        self.scope = parameters.text("scope")
        self.wants_signs = self._variant == "authors" and len(parameters.tasks) > 1

    def keeps(self, trim: int, task: int, n: int, slot: int) -> int:
        kept = super().keeps(trim, task, n, slot)
        return max(kept, 1) if self._variant == "mergekit" and self.trims[0][task] else kept

    def _trimmed(self, tile: RuleInput) -> list[Array]:
        plain = self._variant == "peft"
        entries = [masked(tile.inputs(number), tile.kept(number, 0), tile) for number in range(tile.tasks)]
        return [entry if plain else scaled(entry, w, tile) for entry, w in zip(entries, self.parameters.weights, strict=True)]

    def elect(self, tile: RuleInput) -> int:
        total = add_up(tile, self._trimmed(tile))
        return tile.xp.count(tile.xp.greater(total, 0)) - tile.xp.count(tile.xp.less(total, 0))

    def merge(self, tile: RuleInput) -> Array:
        entries = self._trimmed(tile)
        majority = tile.majority if self._variant == "authors" else None
        signs = elected_signs(add_up(tile, entries), majority, tile)
        plain = [1.0] * tile.tasks
        after = self.parameters.weights if self._variant == "peft" else plain
        shares = self.parameters.weights if self._variant == "mergekit" else plain
        vector = disjoint_merge(entries, after, signs, self.parameters.text("reduce") == "mean", shares, tile)
        return onto_base(tile, vector, self.parameters.number("scale"))
