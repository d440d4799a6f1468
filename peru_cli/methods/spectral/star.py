"""STAR: cut off each task vector's small singular values, restore its nuclear norm, average.

    keep the fewest directions whose singular values sum to `keep` of all;   s <- s * (sum of all) / (sum of the kept)

Source: Lee et al., STAR: Spectral Truncation and Rescale for Model Merging (2025), https://arxiv.org/abs/2502.10339, section 3; the
paper keeps 40%. Task vectors, and tensors that are not matrices, are averaged with the tasks' weights."""

from __future__ import annotations

import torch

from peru_cli.methods.matrices import Matrices, SpectralRule
from peru_cli.methods.spectral.directions import top_directions


def truncated(vector: torch.Tensor, share: float) -> torch.Tensor:
    """A task vector truncated to its top directions and rescaled to its nuclear norm."""
    u, s, v = top_directions(vector, min(vector.shape))
    total = float(s.sum())
    if not total:
        return vector
    rank = min(int((s.cumsum(0) < share * total).sum()) + 1, len(s))
    return (u[:, :rank] * (s[:rank] * (total / s[:rank].sum()))) @ v[:, :rank].T


class Star(SpectralRule):
    """See the module."""

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return 8 * (5 * rows * columns + 4 * min(rows, columns) ** 2)

    def merge_matrix(self, matrices: Matrices) -> torch.Tensor:
        share = self.parameters.number("keep")
        total = truncated(self.vector(matrices, 0), share)
        for task in range(1, matrices.tasks):
            total += truncated(self.vector(matrices, task), share)
        return total * (self.parameters.number("scale") / matrices.tasks)
