"""PCB: entries of task vectors compete, within a task by size and between tasks by agreement. The losers are dropped.

    intra_t = exp(T norm(|tau_t|)^2),   inter_t = tanh(tau_t sum_s tau_s),   b_t = intra_t inter_t
    b_t below its quantile 1 - keep is 0;   tau = sum_t norm(b_t) tau_t / sum_t norm(b_t)

Source: Du et al., Parameter Competition Balancing (2024), https://arxiv.org/abs/2410.02396, equations 2 to 6. norm scales to
0 ... 1. The paper takes quantiles over all entries of a model. Here they are taken in each tensor, so that one tensor at a
time is enough."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from peru_cli.methods.matrices import Matrices, MatrixRule, Panels
from peru_cli.methods.order import Counts, largest, number_of, ordered
from peru_cli.methods.parameters import Parameters
from peru_cli.streaming.arrays import Host

_LEAST = 1e-12


def in_range(values: Host, low: float, high: float) -> Host:
    """Scale so that `low` is 0 and `high` 1. All zeros if the two are equal."""
    scaled: Host = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return scaled


class _Ranges(NamedTuple):
    """Of each task: the smallest and the largest magnitude, the score below which entries lose, and the largest score."""

    magnitudes: list[tuple[float, float]]
    scores: list[tuple[float, float]]


class Pcb(MatrixRule):
    """See the module."""

    by_rows = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.studies = 2 + len(parameters.tasks)

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return (tasks + 6) * 8 * rows * columns

    def _vectors(self, panel: Matrices) -> list[Host]:
        return [panel[task].astype(np.float64) * weight for task, weight in zip(range(panel.tasks), self.parameters.weights, strict=True)]

    def study(self, panels: Panels) -> _Ranges:
        def extremes(panel: Matrices) -> tuple[int, list[tuple[float, float]]]:
            sizes = [np.abs(vector) for vector in self._vectors(panel)]
            return sizes[0].size, [(float(size.min()), float(size.max())) for size in sizes]

        found = panels.each(extremes)
        n, tasks = sum(n for n, _ in found), range(len(found[0][1]))
        magnitudes = [(min(pairs[task][0] for _, pairs in found), max(pairs[task][1] for _, pairs in found)) for task in tasks]
        counts = [Counts("i8") for _ in tasks]

        def count(panel: Matrices) -> list[float]:
            scores = list(_scores(self._vectors(panel), magnitudes))
            for counted, score in zip(counts, scores, strict=True):
                counted.add(ordered(score).reshape(-1))
            return [float(score.max()) for score in scores]

        most = [max(column) for column in zip(*panels.each(count), strict=True)]
        k = max(1, int(self.parameters.share("keep") * n))
        ends = [self._end(panels, counts[task], magnitudes, task, k) for task in tasks]
        return _Ranges(magnitudes, list(zip(ends, most, strict=True)))

    def _end(self, panels: Panels, counts: Counts, magnitudes: list[tuple[float, float]], task: int, k: int) -> float:
        """The k-th largest score of a task."""
        taken = largest(panels, counts, lambda panel: ordered(list(_scores(self._vectors(panel), magnitudes))[task]).reshape(-1), [k])
        return number_of(taken[0].key, "f8")

    def merge_matrix(self, matrices: Matrices) -> Host:
        vectors, ranges = self._vectors(matrices), matrices.studied
        merged, divisor = np.zeros_like(vectors[0]), np.zeros_like(vectors[0])
        for vector, score, (low, high) in zip(vectors, _scores(vectors, ranges.magnitudes), ranges.scores, strict=True):
            share = in_range(np.maximum(score, low), low, high)
            merged += share * vector
            divisor += share
        merged /= np.maximum(divisor, _LEAST)
        merged *= self.parameters.number("scale")
        return merged


def _scores(vectors: list[Host], magnitudes: list[tuple[float, float]]) -> Iterator[Host]:
    """b of each task."""
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    for vector, (low, high) in zip(vectors, magnitudes, strict=True):
        yield np.exp(len(vectors) * in_range(np.abs(vector), low, high) ** 2) * np.tanh(vector * total)
