"""Train difference: add what B learned from C to A, less where A has learned it already.

    A + 1.8 s (B - C) |B - A| / (|B - A| + |B - C|)

Image models are merged this way: B is a fine-tune of the base C, A another one. Source: hako-mikan, sd-webui-supermerger
("trainDifference"), https://github.com/hako-mikan/sd-webui-supermerger. The first model is A, the second B, the base C. The
factor 1.8 is its authors'. sd-mecha's method of the same name has another formula."""

from __future__ import annotations

from peru_cli.methods.rules import Result, Rule, RuleInput, onto_base

_FACTOR = 1.8
_LEAST = 1e-30  # of a divisor: 0 / 0 counts as 0


class TrainDifference(Rule):
    """See the module."""

    holds_all = True
    entrywise = True

    def merge(self, tile: RuleInput) -> Result:
        xp, a, b = tile.xp, tile.inputs(0), tile.inputs(1)
        apart = xp.subtract(b, a, out=tile.room("apart", tile.n))
        xp.absolute(apart, out=apart)
        divisor = xp.absolute(b, out=tile.room("divisor", tile.n))
        xp.add(divisor, apart, out=divisor)
        xp.divide(apart, xp.clip(divisor, _LEAST, None, out=divisor), out=apart)
        xp.multiply(apart, b, out=apart)
        xp.multiply(apart, _FACTOR * self.parameters.number("scale"), out=apart)
        return onto_base(xp.add(apart, a, out=apart), 1.0)
