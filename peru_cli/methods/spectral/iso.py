"""Isotropic merging: all singular values of the summed task vector become their mean.

    Iso-C    tau = mean(S) U V^T,  U S V^T = sum_t tau_t
    Iso-CTS  the top `common` share of those directions, and in equal numbers the top directions of each task outside of
             them; polar of both sides, all values their mean

Source: Marczak et al., No Task Left Behind (2025), https://arxiv.org/abs/2502.04959, equations 6 to 8 and algorithms 1 and 2; the paper
keeps 80% common directions. Tensors that are not matrices are averaged, and `--scale` leaves them as they are; the authors' program scales
them, too."""

from __future__ import annotations

import torch

from peru_cli.methods.matrices import Matrices, SpectralRule
from peru_cli.methods.spectral.directions import polar, singular_values, top_directions


class IsoC(SpectralRule):
    """See the module."""

    isotropic = True

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return 8 * (5 * rows * columns + 4 * min(rows, columns) ** 2)

    def _sum(self, matrices: Matrices) -> torch.Tensor:
        total = self.vector(matrices, 0)
        for task in range(1, matrices.tasks):
            total += self.vector(matrices, task)
        return total

    def merge_matrix(self, matrices: Matrices) -> torch.Tensor:
        total = self._sum(matrices)
        return polar(total) * (singular_values(total).mean() * self.parameters.number("scale"))


class IsoCts(IsoC):
    """See the module."""

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return 8 * (4 * rows * columns + 4 * (rows + columns) * min(rows, columns))

    def merge_matrix(self, matrices: Matrices) -> torch.Tensor:
        r, tasks = min(matrices.rows, matrices.columns), matrices.tasks
        # Directions of each task, rounded as the authors' program rounds them.
        own = min(round((r - int(r * self.parameters.share("common"))) / tasks), r // tasks)
        left, values, right = top_directions(self._sum(matrices), r - own * tasks)
        parts = []
        for task in range(tasks if own else 0):
            vector = self.vector(matrices, task)
            parts.append(top_directions(vector - left @ (left.T @ vector), own, float(vector.norm())))
        parts.append((left, values, right))
        u, s, v = (torch.cat([part[i] for part in parts], dim=-1) for i in range(3))
        return polar(u) @ polar(v).T * (s.mean() * self.parameters.number("scale"))
