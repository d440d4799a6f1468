"""What DARE and DELLA share: keep random entries of task vectors, rescale them, then add or elect.

Entry i of a tensor is kept if word(i) < floor(p_i * 2^32), with word from methods/philox.py. Every machine drops the same
entries for the same seed, task name and tensor name. Three ways to rescale:

    density   by 1 / p_i, which preserves the expectation: the papers'
    l1        by |tau|_1 / |kept entries|_1 of the tensor, skipped if either is below 1e-7: mergekit's
    none      not at all"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from peru_cli.kernels.merging.sums import halved_sum
from peru_cli.kernels.merging.verbs import Flags, accumulate, disjoint
from peru_cli.kernels.random import below, words
from peru_cli.methods.matrices import Matrices, MatrixRule, Panels
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.philox import stream_key
from peru_cli.methods.rules import Election, Kept, Result, onto_base
from peru_cli.streaming.arrays import Host

_NOTHING = 1e-7  # an L1 norm below this counts as 0
_LEAST = 1e-8  # a sum of weights below this counts as 0
Packed = np.ndarray[tuple[int], np.dtype[np.uint8]]


class _Norms(NamedTuple):
    """Of each task: its L1 norms before and after, and the entries that were kept, a bit each (None: all), by panel."""

    whole: list[float]
    left: list[float]
    stays: list[list[Packed | None]]


class Sampled(MatrixRule):
    """See the module. One-dimensional tensors count as one row."""

    by_rows = True
    elects = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._rescale = parameters.text("rescale")
        self.studies = int(self._rescale == "l1")

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    @abstractmethod
    def chance(self, task: int) -> float | None:
        """The probability that an entry of a task is kept, if it is the same for all."""

    def survivors(self, vector: Host, draws: Host, task: int) -> Flags:
        """Which entries are kept if there is no common probability, given one word of each, (n,); bools (n,)."""
        raise TypeError(f"{type(self).__name__} has entries of different probabilities and does not say which stay")

    def chances(self, vector: Host, task: int) -> Host:
        """The probability of each entry if there is no common one; float64 (rows, columns)."""
        raise TypeError(f"{type(self).__name__} has entries of different probabilities and does not say which")

    def _stays(self, matrices: Matrices, vector: Host, task: int) -> Flags | None:
        """Which entries of a task vector are kept; bools (n,). None if all are."""
        key = stream_key(int(self.parameters.number("seed")), self.parameters.tasks[task], matrices.name)
        start, chance = matrices.first * matrices.columns, self.chance(task)
        if chance is None:
            return self.survivors(vector, words(key, start, vector.size), task)
        limit = int(np.floor(chance * 2.0**32))
        return below(key, start, vector.size, limit) if limit < 2**32 else None

    def study(self, panels: Panels) -> _Norms:
        def measure(panel: Matrices) -> list[tuple[float, float, Packed | None]]:
            found = []
            for task in range(panel.tasks):
                vector = panel[task]
                flat, stays = vector.reshape(-1), self._stays(panel, vector, task)
                left = halved_sum(flat, "absolute", stays)
                found.append((halved_sum(flat, "absolute"), left, None if stays is None else np.packbits(stays)))
            return found

        every = panels.each(measure)
        tasks = range(len(every[0]))
        whole, left = [_in_order(panel[t][0] for panel in every) for t in tasks], [_in_order(panel[t][1] for panel in every) for t in tasks]
        return _Norms(whole, left, [[panel[task][2] for task in tasks] for panel in every])

    def _factor(self, matrices: Matrices, task: int) -> float:
        """What makes up for the dropped entries of a task with a common factor."""
        if self._rescale == "l1":
            whole, left = matrices.studied.whole[task], matrices.studied.left[task]
            return whole / left if min(whole, left) >= _NOTHING else 1.0
        chance = self.chance(task)
        return 1.0 / chance if self._rescale == "density" and chance is not None else 1.0

    def _stay_of(self, matrices: Matrices, task: int) -> Flags | None:
        """Which entries of a task's vector are kept, as studied before or from the random words alone; bools (n,). None if all are."""
        n = matrices.rows * matrices.columns
        if self._rescale == "l1":
            packed = matrices.studied.stays[matrices.number][task]
            return None if packed is None else np.unpackbits(packed, count=n).view(np.bool_)
        return self._stays(matrices, matrices[task], task)

    def merge_matrix(self, matrices: Matrices) -> Host | Result:
        mean, scale, tasks = self._reduces() == "mean", self.parameters.number("scale"), range(matrices.tasks)
        if (mean and not self.elects) or (self._rescale == "density" and any(self.chance(task) is None for task in tasks)):
            return self._merged(matrices, mean, scale)
        stays = [self._stay_of(matrices, task) for task in tasks]
        factors = [(self._factor(matrices, task), self.parameters.weights[task]) for task in tasks]
        if not self.elects:
            return onto_base(Result([(task, stays[task], *factors[task]) for task in tasks]), scale)
        kept = [Kept(flags=flags) for flags in stays]
        shares = self.parameters.weights if mean else None
        return onto_base(Result(election=Election(kept, factors, [1.0] * len(kept), shares, False)), scale)

    def _part(self, matrices: Matrices, task: int) -> tuple[Host, Flags | None, tuple[float, float]]:
        """A task's vector, which of its entries are kept (None: all), (n,), and two factors."""
        vector, weight = matrices[task], self.parameters.weights[task]
        if self._rescale == "density" and self.chance(task) is None:
            stays = self._stays(matrices, vector, task)
            assert stays is not None
            rescaled = vector * stays.reshape(vector.shape)
            rescaled *= (1.0 / self.chances(vector, task)).astype(vector.dtype)
            return rescaled.reshape(-1), None, (1.0, weight)
        return vector.reshape(-1), self._stay_of(matrices, task), (self._factor(matrices, task), weight)

    def _reduces(self) -> str:
        return self.parameters.text("reduce")

    def _merged(self, matrices: Matrices, mean: bool, scale: float) -> Host:
        """The merged vector of entries that are rescaled one by one, or of a mean without election; (n,)."""
        parts = [self._part(matrices, task) for task in range(matrices.tasks)]
        values, stays, factors = [part[0] for part in parts], [part[1] for part in parts], [part[2] for part in parts]
        weights = self.parameters.weights
        merged: Host = np.empty_like(values[0])
        if self.elects:
            disjoint(values, stays, factors, [1.0] * len(values), weights if mean else None, False, merged)
        else:
            for number, (value, flags, both) in enumerate(parts):
                accumulate(merged, value, "F32" if value.dtype == np.float32 else "F64", None, flags, both, not number)
            whole = _in_order(weights)
            if mean and abs(whole) >= _LEAST:
                merged /= merged.dtype.type(whole)
        if scale != 1.0:
            merged *= merged.dtype.type(scale)
        return merged


def _in_order(numbers: Iterable[float]) -> float:
    total = 0.0
    for number in numbers:  # not sum(), which has used compensated summation since Python 3.12
        total += number
    return total
