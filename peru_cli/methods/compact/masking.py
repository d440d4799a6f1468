"""Masks on a vector that all tasks share: which of its entries a task uses, how well that fits, and what it costs.

masks/table.py lists the methods. All arrays are 1-D runs of one tensor's entries, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.methods.compact.superpose import ALONE_PRECISION

PRECISION = 5  # default bits; see `default_precision`
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def add_up(rows: Doubles) -> Doubles:
    """tau_MT: the sum over rows, one after the other, in order of the tasks' names; (tasks, n) -> (n,)."""
    total: Doubles = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total


def rescaler(own: float, kept: float) -> float:
    """A task's own scale from sum |tau_t| and sum |m_t u|, to nine digits; 1 if the mask keeps nothing."""
    return float(f"{own / kept:.9g}") if kept else 1.0


@dataclass(frozen=True)
class Overlap:
    """For one mask: ||m tau_MT||^2, <m tau_MT, tau_t>, and the number of entries kept; with another shared vector, u for tau_MT."""

    square: float
    product: float
    kept: float


def missed(own: float, overlap: Overlap, scale: float) -> float:
    """||scale * m tau_MT - tau_t||^2, given ||tau_t||^2."""
    return own - 2 * scale * overlap.product + scale * scale * overlap.square


def choose_threshold(own: float, overlaps: Sequence[Overlap], scale: float) -> int:
    """The index of the grid's mask with the least squared error; ties: the first."""
    return min(range(len(overlaps)), key=lambda i: (missed(own, overlaps[i], scale), i))


def best_scale(overlaps: Sequence[Overlap]) -> float:
    """The single scale with the least squared error over all tasks: sum <m tau_MT, tau> / sum ||m tau_MT||^2; 0 if all are 0."""
    square = math.fsum(overlap.square for overlap in overlaps)
    return math.fsum(overlap.product for overlap in overlaps) / square if square else 0.0


def default_precision(tasks: int) -> int:
    """The fewest bits of a step that leave the error of retrieved tasks unchanged to three digits.

    This is one more than superposition takes, because masks have smaller errors. For independent, heavy-tailed task vectors
    (Student's t, 4 degrees of freedom; 2 to 64 tasks, thresholds .2 to .6) the error grows by at most 0.03% at 5 bits, by up to
    0.13% at 4."""
    return PRECISION if tasks > 1 else ALONE_PRECISION


def entropy(kept: int, entries: int) -> float:
    """The least bits an entry of a mask, if nothing is known but the number of entries it keeps (order 0)."""
    if not 0 < kept < entries:
        return 0.0
    share = kept / entries
    return -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
