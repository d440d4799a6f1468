"""DELLA: drop entries of the task vectors at random, small ones more often than large ones; rescale; elect; merge.

    p_i = keep - epsilon + 2 epsilon (rank_i - 1) / (columns - 1),   rank 1: the smallest magnitude of its row

Source: Deep et al., DELLA-Merging (2024), https://arxiv.org/abs/2406.11617, section 3: MAGPRUNE ranks the entries of each
row and rescales each by 1 / p_i. Then TIES' election follows, and the mean of the entries that agree. `della-linear` adds
without an election. A one-dimensional tensor counts as one row. Equal magnitudes rank in canonical order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peru_cli.errors import UsageError
from peru_cli.kernels.compiling.build import Kernel
from peru_cli.kernels.merging.ranking import ranks, stay_by_rank
from peru_cli.kernels.merging.verbs import Flags, by_rank, disjoins
from peru_cli.kernels.random import draws
from peru_cli.methods.entries.sampled import Sampled
from peru_cli.methods.parameters import Parameters
from peru_cli.streaming.arrays import Host


def by_rank_chances(columns: int, density: float, epsilon: float) -> Host:
    """p of each rank, from the smallest magnitude on; float64 (columns,)."""
    if columns == 1:
        return np.full(1, density)
    chances: Host = density - epsilon + 2 * epsilon * (np.arange(columns) / (columns - 1))
    return chances


def keep_probabilities(magnitudes: Host, density: float, epsilon: float) -> Host:
    """p_i of each entry from the ranks of the magnitudes in their rows; float64 (rows, columns)."""
    columns = magnitudes.shape[1]
    chances: Host = by_rank(magnitudes, by_rank_chances(columns, density, epsilon))
    return chances


class Della(Sampled):
    """See the module."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        for task in range(len(parameters.tasks)):
            density, epsilon = parameters.number("keep", task), parameters.number("epsilon", task)
            if epsilon and density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
                raise UsageError(
                    f"--keep {density:g} and --epsilon {epsilon:g}: probabilities must lie between 0 and 1",
                    "keep - epsilon is above 0, keep + epsilon below 1: lower --epsilon",
                )

    def loops(self, dtype: str) -> Sequence[Kernel]:
        return [*draws(), *ranks(), *(disjoins() if self.elects else [])]

    def chance(self, task: int) -> float | None:
        density = self.parameters.number("keep", task)
        return density if density >= 1 or not self.parameters.number("epsilon", task) else None

    def survivors(self, vector: Host, draws: Host, task: int) -> Flags:
        if vector.dtype != np.float32:
            return (draws < np.floor(self.chances(vector, task).reshape(-1) * 2.0**32)).reshape(-1)
        density, epsilon = self.parameters.number("keep", task), self.parameters.number("epsilon", task)
        return stay_by_rank(vector, draws, np.floor(by_rank_chances(vector.shape[1], density, epsilon) * 2.0**32)).reshape(-1)

    def chances(self, vector: Host, task: int) -> Host:
        return keep_probabilities(np.abs(vector), self.parameters.number("keep", task), self.parameters.number("epsilon", task))


class DellaLinear(Della):
    """See the module."""

    elects = False
