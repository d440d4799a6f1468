"""Magnitude masking: m_t = [tau_t is among its own largest entries]. The baseline of https://arxiv.org/abs/2405.07813."""

from __future__ import annotations

import numpy as np

from peru_cli.methods.compact.masking import Doubles, Flags
from peru_cli.methods.compact.masks.table import MaskMethod


def magnitude_mask(own: Doubles, threshold: float, equals: bool) -> Flags:
    """The entries of own = |tau_t| above a threshold, with or without its equals, never zeros; bools (n,)."""
    return np.greater_equal(own, threshold) if equals and threshold else np.greater(own, threshold)


class MagnitudeMasks(MaskMethod):
    """The threshold is the smallest magnitude kept."""

    ranked = True
    compares = False

    def parts(self, vector: Doubles, shared: Doubles | None) -> tuple[Doubles, ...]:
        return (np.abs(vector),)

    def mask(self, parts: tuple[Doubles, ...], threshold: float, equals: bool) -> Flags:
        return magnitude_mask(parts[0], threshold, equals)
