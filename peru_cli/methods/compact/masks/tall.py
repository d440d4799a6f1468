"""TALL-masks: m_t = [|tau_t| > l_t |tau_MT - tau_t|].

Source: Wang et al., Localizing Task Information for Improved Model Merging and Compression (2024),
https://arxiv.org/abs/2405.07813, equation 4; the authors try l_t in {.2, .3, .4, .5, .6}."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peru_cli.methods.compact.masking import Doubles, Flags
from peru_cli.methods.compact.masks.table import MaskMethod

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


def tall_mask(own: Doubles, rest: Doubles, threshold: float) -> Flags:
    """[own > threshold * rest], own = |tau_t| and rest = |tau_MT - tau_t|; bools (n,). Equals are left out, and so is 0 > 0."""
    return np.greater(own, threshold * rest)


class TallMasks(MaskMethod):
    """The thresholds are l_t."""

    def thresholds(self, given: float | None) -> Sequence[float]:
        return GRID if given is None else (given,)

    def parts(self, vector: Doubles, shared: Doubles | None) -> tuple[Doubles, ...]:
        assert shared is not None
        return np.abs(vector), np.abs(shared - vector)

    def mask(self, parts: tuple[Doubles, ...], threshold: float, equals: bool) -> Flags:
        own, rest = parts
        return tall_mask(own, rest, threshold)
