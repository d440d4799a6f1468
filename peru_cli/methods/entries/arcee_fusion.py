"""Arcee fusion: take only the most important changes from the other model.

    I = |tau| * KL(softmax(theta) || softmax(theta_0)) of the row;   keep tau where I >= median(I) + 1.5 (Q3 - Q1), in each tensor

Source: Arcee AI, Meet Mergekit v0.1 (2025),
https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-multi-gpu-acceleration:
difference times KL of softmaxes, threshold median + 1.5 (Q3 - Q1). Where it is silent, this follows what mergekit 0.1.5
(LGPL) computes, found by running it; none of its code is here. Rows are along the last axis. Quantile q of n sorted entries
is number floor(q (n - 1)): of NumPy's rules this one disagrees with mergekit in the fewest entries, 2 of 66,947, the others in 3
to 8. Adding 1e-8 keeps logarithms finite and changes no entry there. Quantiles are exact at any size (the program samples
beyond 10^6 entries). All is float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.methods.matrices import Matrices, MatrixRule, Panels
from peru_cli.methods.order import Counts, Keys, largest, number_of, ordered
from peru_cli.streaming.arrays import Host

_EPSILON = 1e-8


def importance(fine: Host, base: Host) -> Host:
    """I for every entry; float64 (rows, columns)."""
    p, q = (_softmax(weights.astype(np.float64)) + _EPSILON for weights in (fine, base))
    divergence = (p * np.log(p / q)).sum(axis=1, keepdims=True)
    found: Host = np.abs(fine - base) * divergence
    return found


def _softmax(rows: Any) -> Any:
    rows = np.exp(rows - rows.max(axis=1, keepdims=True))
    return rows / rows.sum(axis=1, keepdims=True)


class ArceeFusion(MatrixRule):
    """See the module."""

    by_rows = True
    studies = 2

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return 6 * 8 * rows * columns

    def study(self, panels: Panels) -> float:
        """The least importance of what is kept."""
        counts = Counts("i8")

        def count(panel: Matrices) -> int:
            keys = _keys(panel)
            counts.add(keys)
            return len(keys)

        n = sum(panels.each(count))
        ranks = [n - int(quantile * (n - 1)) for quantile in (0.25, 0.5, 0.75)]
        first, middle, third = (number_of(taken.key, "f8") for taken in largest(panels, counts, _keys, ranks))
        return middle + 1.5 * (third - first)

    def merge_matrix(self, matrices: Matrices) -> Host:
        vector, found = _importance(matrices)
        vector[found < matrices.studied] = 0
        return vector


def _importance(panel: Matrices) -> tuple[Host, Host]:
    """The task vector and I, (rows, columns)."""
    vector, base = panel[0], panel.base()
    length = panel.shape[-1] if panel.shape else 1
    fine = (base + vector).reshape(-1, length)
    return vector, importance(fine, base.reshape(-1, length)).reshape(vector.shape)


def _keys(panel: Matrices) -> Keys:
    return ordered(_importance(panel)[1]).reshape(-1)
