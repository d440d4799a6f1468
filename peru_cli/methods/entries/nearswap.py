"""Nearswap: take the other model's weights where they are close, otherwise move only a step of `t` towards them.

    theta_0 + clip(t / max(|tau|, 1e-6), 0, 1) tau

Source: alchemonaut, QuartetAnemoi-70B (2024), https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001, whose t is 0.0001;
mergekit 0.1.5 (`nearswap`)."""

from __future__ import annotations

from peru_cli.kernels.merging.verbs import stepped
from peru_cli.methods.rules import Result, Rule, RuleInput, onto_base

_LEAST = 1e-6


class NearSwap(Rule):
    """See the module."""

    def merge(self, tile: RuleInput) -> Result:
        xp, vector = tile.xp, tile.inputs(0)
        if xp.compiled:
            return onto_base(stepped(vector, self.parameters.number("t"), _LEAST), 1.0)
        size = xp.clip(xp.absolute(vector, out=tile.room("size", tile.n)), _LEAST, None, out=tile.room("size", tile.n))
        share = xp.divide(xp.fill(tile.room("share", tile.n), self.parameters.number("t")), size, out=tile.room("share", tile.n))
        xp.clip(share, 0.0, 1.0, out=share)
        return onto_base(xp.multiply(vector, share, out=vector), 1.0)
