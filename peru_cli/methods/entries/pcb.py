"""PCB: entries of task vectors compete, within a task by size and between tasks by agreement. The losers are dropped.

    intra_t = exp(T norm(|tau_t|)^2),   inter_t = tanh(tau_t sum_s tau_s),   b_t = intra_t inter_t
    b_t below its quantile 1 - keep is 0;   tau = sum_t norm(b_t) tau_t / sum_t norm(b_t)

Source: Du et al., Parameter Competition Balancing (2024), https://arxiv.org/abs/2410.02396, equations 2 to 6. norm scales to
0 ... 1. The paper takes quantiles over all entries of a model. Here they are taken in each tensor, so that one tensor at a
time is enough."""

from __future__ import annotations

import numpy as np

from peru_cli.methods.matrices import Matrices, MatrixRule
from peru_cli.streaming.arrays import Host

_LEAST = 1e-12


def unit_range(values: Host) -> Host:
    """Scale so that the smallest value is 0 and the largest 1. All zeros if the values are equal."""
    low, high = values.min(), values.max()
    scaled: Host = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return scaled


class Pcb(MatrixRule):
    """See the module."""

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return (tasks + 6) * 8 * rows * columns

    def merge_matrix(self, matrices: Matrices) -> Host:
        weights = self.parameters.weights
        vectors = [matrices[task].astype(np.float64) * weights[task] for task in range(matrices.tasks)]
        total = vectors[0].copy()
        for vector in vectors[1:]:
            total += vector
        merged, divisor = np.zeros_like(total), np.zeros_like(total)
        drop = total.size - max(1, int(self.parameters.share("keep") * total.size))
        for vector in vectors:
            score = np.exp(len(vectors) * unit_range(np.abs(vector)) ** 2) * np.tanh(vector * total)
            threshold = np.partition(score.reshape(-1), drop)[drop]
            share = unit_range(np.maximum(score, threshold))
            merged += share * vector
            divisor += share
        merged /= np.maximum(divisor, _LEAST)
        merged *= self.parameters.number("scale")
        return merged
