"""Arcee fusion: take from the other model only the changes that matter most.

    I = |tau| * KL(softmax(theta) || softmax(theta_0)) of the row;   keep tau where I >= median(I) + 1.5 (Q3 - Q1), in each tensor

Source: Arcee AI, mergekit 0.1.5 (`arcee_fusion`). Rows are along the last axis, 1e-8 is added to probabilities. Quantile q of n
sorted entries is number floor(q (n - 1)), exact at any size (the program samples beyond 10^6 entries); all in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.methods.matrices import Matrices, MatrixRule
from peru_cli.streaming.arrays import Host

_EPSILON = 1e-8


def importance(fine: Host, base: Host) -> Host:
    """I of every entry; float64 (rows, columns)."""
    p, q = (_softmax(weights.astype(np.float64)) + _EPSILON for weights in (fine, base))
    divergence = (p * np.log(p / q)).sum(axis=1, keepdims=True)
    found: Host = np.abs(fine - base) * divergence
    return found


def _softmax(rows: Any) -> Any:
    rows = np.exp(rows - rows.max(axis=1, keepdims=True))
    return rows / rows.sum(axis=1, keepdims=True)


class ArceeFusion(MatrixRule):
    """See the module."""

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return 6 * 8 * rows * columns

    def merge_matrix(self, matrices: Matrices) -> Host:
        vector, base = matrices[0], matrices.base()
        length = matrices.shape[-1] if matrices.shape else 1
        fine = (base + vector).reshape(-1, length)
        found = importance(fine, base.reshape(-1, length)).reshape(vector.shape)
        first, middle, third = np.quantile(found, [0.25, 0.5, 0.75], method="lower")
        vector[found < middle + 1.5 * (third - first)] = 0
        return vector
