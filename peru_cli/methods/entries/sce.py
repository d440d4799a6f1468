"""SCE: select the entries that differ most between tasks, weight tasks by their energy, erase the minority's sign.

    select  the top `keep` of the entries with non-zero variance over tasks, in each tensor
    w_t     mean of tau_t^2 over the selected entries, divided by its sum over tasks: a weight for each tensor
    erase   the sign of sum_t tau_t wins, where 0 is positive;   tau = sum w_t m_t tau_t / max(sum w_t m_t, 1e-6)

Source: Wan et al., FuseChat (2024), https://arxiv.org/abs/2408.07990, section 3.3: SCE; the paper selects 10%. Equal
variances are taken in canonical order."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from peru_cli.kernels.merging import halved_sum
from peru_cli.methods.matrices import Matrices, MatrixRule
from peru_cli.streaming.arrays import Host

_LEAST = 1e-6


def selected(variance: Host, k: int) -> Host:
    """The k entries with the highest variance, ties in canonical order; bools (rows, columns)."""
    flat = variance.reshape(-1)
    chosen = np.zeros(len(flat), np.bool_)
    if k:
        threshold = np.partition(flat, len(flat) - k)[len(flat) - k]
        above = flat > threshold
        equal = np.flatnonzero(flat == threshold)[: k - int(np.count_nonzero(above))]
        chosen = above
        chosen[equal] = True
    return chosen.reshape(variance.shape)


class Sce(MatrixRule):
    """See the module."""

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def _count(self, share: Fraction, n: int) -> int:
        """floor(share * n). mergekit multiplies a tensor's count by a number, which torch does in float32."""
        return int(np.float32(n) * np.float32(share)) if self.parameters.in_doubles else int(share * n)

    def merge_matrix(self, matrices: Matrices) -> Host:
        vectors = [matrices[task] for task in range(matrices.tasks)]
        if (share := self.parameters.share("keep")) < 1:
            variance = np.var(vectors, axis=0)
            mask = selected(variance, self._count(share, int(np.count_nonzero(variance))))
            vectors = [vector * mask for vector in vectors]
        energies = [halved_sum((vector * vector).reshape(-1)) for vector in vectors]
        total = sum(energies)
        weights = [energy / total if total / vectors[0].size >= _LEAST else 1 / len(energies) for energy in energies]
        votes = vectors[0].copy()
        for vector in vectors[1:]:
            votes += vector
        sign = np.where(votes >= 0, votes.dtype.type(1), votes.dtype.type(-1))
        merged, divisor = np.zeros_like(votes), np.zeros_like(votes)
        for vector, weight in zip(vectors, weights, strict=True):
            agrees = (vector * sign > 0) * votes.dtype.type(weight)
            merged += vector * agrees
            divisor += agrees
        merged /= np.maximum(divisor, votes.dtype.type(_LEAST))
        merged *= votes.dtype.type(self.parameters.number("scale"))
        return merged
