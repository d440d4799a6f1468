"""What DARE and DELLA share: keep random entries of task vectors, rescale them, then add or elect.

Entry i of a tensor is kept if word(i) < floor(p_i * 2^32), with word from methods/philox.py. Every machine drops the same
entries for the same seed, task name and tensor name. Three ways to rescale:

    density   by 1 / p_i, which preserves the expectation: the papers'
    l1        by |tau|_1 / |kept entries|_1 of the tensor, skipped if either is below 1e-7: mergekit's
    none      not at all"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from peru_cli.kernels.merging import Flags, accumulate, halved_sum
from peru_cli.kernels.random import below, words
from peru_cli.methods.matrices import Matrices, MatrixRule, add, elect
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.philox import stream_key
from peru_cli.streaming.arrays import Host

_NOTHING = 1e-7  # an L1 norm below this counts as 0


class Sampled(MatrixRule):
    """See the module. One-dimensional tensors count as one row."""

    by_rows = True
    elects = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._rescale = parameters.text("rescale")
        self.measures = self._rescale == "l1"

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    @abstractmethod
    def chances(self, vector: Host, task: int) -> Host:
        """The probability that an entry is kept, float64 (rows, columns) or (1, 1)."""

    def _sampled(self, matrices: Matrices, task: int) -> tuple[Host, Flags | None, Host]:
        """A task vector, which entries are kept (None: all), (n,), and their probabilities."""
        vector = matrices[task]
        chances = self.chances(vector, task)
        key = stream_key(int(self.parameters.number("seed")), self.parameters.tasks[task], matrices.name)
        start, limits = matrices.first * matrices.columns, np.floor(chances * 2.0**32)
        if chances.size > 1:
            return vector, (words(key, start, vector.size).reshape(vector.shape) < limits).reshape(-1), chances
        limit = int(limits.item())
        return vector, below(key, start, vector.size, limit) if limit < 2**32 else None, chances

    def measure(self, matrices: Matrices) -> list[float]:
        found = []
        for task in range(matrices.tasks):
            vector, flags, _ = self._sampled(matrices, task)
            found += [halved_sum(vector.reshape(-1), absolute=True), halved_sum(_kept(vector, flags).reshape(-1), absolute=True)]
        return found

    def _part(self, matrices: Matrices, task: int) -> Host:
        vector, flags, chances = self._sampled(matrices, task)
        weight, factor = self.parameters.weights[task], 1.0
        if self._rescale == "density" and chances.size > 1:
            stays = _kept(vector, flags)
            stays *= (1.0 / chances).astype(stays.dtype)
            stays *= stays.dtype.type(weight)
            return stays
        if self._rescale == "density":
            factor = 1.0 / chances.item()
        elif self._rescale == "l1":
            whole, left = matrices.sums[2 * task : 2 * task + 2]
            if min(whole, left) >= _NOTHING:
                factor = whole / left
        return _kept(vector, flags, factor, weight)

    def _reduces(self) -> str:
        return self.parameters.text("reduce")

    def merge_matrix(self, matrices: Matrices) -> Host:
        parts = [self._part(matrices, task) for task in range(matrices.tasks)]
        mean = self._reduces() == "mean"
        merged = (elect if self.elects else add)(parts, self.parameters.weights, mean)
        merged *= merged.dtype.type(self.parameters.number("scale"))
        return merged


def _kept(vector: Host, flags: Flags | None, factor: float = 1.0, weight: float = 1.0) -> Host:
    """vector * flags * factor * weight, each product rounded."""
    out = np.empty(vector.shape, vector.dtype)
    bits = np.ascontiguousarray(vector).reshape(-1)
    accumulate(out.reshape(-1), bits, "F32" if vector.dtype == np.float32 else "F64", None, flags, (factor, weight), True)
    return out
