"""Masks on a multi-task vector: which entries of the sum of all task vectors a task uses.

    tau_MT = sum_t tau_t        retrieve   theta_t^ = theta_0 + scale * m_t * tau_MT

TALL-masks: m_t = [|tau_t| > l_t |tau_MT - tau_t|]. Source: Wang et al., Localizing Task Information for Improved Model Merging
and Compression (2024), https://arxiv.org/abs/2405.07813, equation 4; the authors try l_t in {.2, .3, .4, .5, .6}.
Magnitude masking, the paper's baseline: m_t = [tau_t is among its own largest entries].

EMR puts another vector in place of the sum, and gives each task a scale of its own:

    s = sign(sum_t tau_t)      u = s * max over t of |tau_t| where tau_t has the sign s      m_t = [tau_t s > 0]
    theta_t^ = theta_0 + scale * l_t * m_t * u      l_t = sum |tau_t| / sum |m_t u|

Source: Huang et al., EMR-Merging (2024), https://arxiv.org/abs/2405.17461, section 3.2. A sum of 0 has the sign -, as in the
authors' program; that adds up the means of each tensor for l_t, where the paper's equation adds up entries, as here.

Entries that a task does not change are never in its mask. All arrays are 1-D runs of one tensor's entries, float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.methods.compact.superpose import ALONE_PRECISION

TALL, MAGNITUDE, EMR = "tall-masks", "magnitude-masks", "emr"
METHODS = (TALL, MAGNITUDE, EMR)
GRID = (0.2, 0.3, 0.4, 0.5, 0.6)
PRECISION = 5  # default bits; see `default_precision`
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


def tall_mask(own: Doubles, rest: Doubles, threshold: float) -> Flags:
    """[own > threshold * rest], own = |tau_t| and rest = |tau_MT - tau_t|; bools (n,). Equals are left out, and so is 0 > 0."""
    return np.greater(own, threshold * rest)


def magnitude_mask(own: Doubles, threshold: float, equals: bool) -> Flags:
    """The entries of own = |tau_t| above a threshold, with or without its equals, never zeros; bools (n,)."""
    return np.greater_equal(own, threshold) if equals and threshold else np.greater(own, threshold)


def add_up(rows: Doubles) -> Doubles:
    """tau_MT: the sum over rows, one after the other, in order of the tasks' names; (tasks, n) -> (n,)."""
    total: Doubles = rows[0].copy()
    for row in rows[1:]:
        total += row
    return total


def unify(rows: Doubles) -> Doubles:
    """EMR's u: the elected sign, and the largest magnitude of a task that has it; (tasks, n) -> (n,)."""
    sign = np.where(add_up(rows) > 0, 1.0, -1.0)
    largest = np.zeros_like(rows[0])
    for row in rows:
        np.maximum(largest, row * sign, out=largest)
    unified: Doubles = largest * sign
    return unified


def emr_mask(vector: Doubles, unified: Doubles) -> Flags:
    """[tau_t has the sign of u], never zeros; bools (n,)."""
    agrees: Flags = ((vector > 0) & (unified > 0)) | ((vector < 0) & (unified < 0))
    return agrees


def rescaler(own: float, kept: float) -> float:
    """EMR's l_t from sum |tau_t| and sum |m_t u|, to nine digits; 1 if the mask keeps nothing."""
    return float(f"{own / kept:.9g}") if kept else 1.0


@dataclass(frozen=True)
class Overlap:
    """For one mask: ||m tau_MT||^2, <m tau_MT, tau_t>, and the number of entries kept. EMR: with u for tau_MT."""

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
