"""RAM: entries that only one task changed are taken unchanged, those that several tasks changed are averaged.

    active_t = [|tau_t| > epsilon];   tau = sum_t active_t tau_t / max(sum_t active_t, 1)

`ramplus-tl` amplifies entries that only one task changed, by 1 + r clip(shared_t / unique_t, 0, alpha) for each task and
tensor. shared_t and unique_t count the task's active entries that other tasks also have, and do not have.

Source: https://arxiv.org/abs/2601.13572, sections 3.2 (RAM) and 3.3 (RAM+); mergekit 0.1.5 (`ram`, `ramplus_tl`)."""

from __future__ import annotations

import numpy as np

from peru_cli.methods.matrices import Matrices, MatrixRule, Panels
from peru_cli.methods.parameters import Parameters
from peru_cli.streaming.arrays import Host


class Ram(MatrixRule):
    """See the module. It works entry by entry, so panels of rows are enough."""

    by_rows = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._epsilon = parameters.number("epsilon")

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def _active(self, matrices: Matrices) -> tuple[list[Host], list[Host], Host]:
        """Task vectors, their active entries, and the number of tasks active at each entry."""
        vectors = [matrices[task] for task in range(matrices.tasks)]
        active: list[Host] = [np.abs(vector) > self._epsilon for vector in vectors]
        count = np.zeros(vectors[0].shape, np.int32)
        for flags in active:
            count += flags
        return vectors, active, count

    def _factor(self, matrices: Matrices, task: int) -> float:
        """Factor of entries that only this task changed."""
        return 1.0

    def merge_matrix(self, matrices: Matrices) -> Host:
        vectors, active, count = self._active(matrices)
        total = np.zeros_like(vectors[0])
        for task, (vector, flags) in enumerate(zip(vectors, active, strict=True)):
            factor = vector.dtype.type(self._factor(matrices, task))
            total += np.where(flags, np.where(count == 1, vector * factor, vector), 0)
        total /= np.maximum(count, 1)
        return total


class RamPlus(Ram):
    """See the module."""

    studies = 1

    def study(self, panels: Panels) -> list[int]:
        """How many active entries other tasks also have, and do not have, of each task."""

        def counted(panel: Matrices) -> list[int]:
            _, active, count = self._active(panel)
            return [int(np.count_nonzero(flags & which)) for flags in active for which in (count > 1, count == 1)]

        return [sum(numbers) for numbers in zip(*panels.each(counted), strict=True)]

    def _factor(self, matrices: Matrices, task: int) -> float:
        shared, unique = matrices.studied[2 * task : 2 * task + 2]
        ratio = min(max(shared / unique, 0.0), self.parameters.number("alpha")) if unique else 0.0
        return 1.0 + self.parameters.number("amplify") * ratio
