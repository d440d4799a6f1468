"""TSV-M: the top singular directions of every task, orthogonalised against those of the others.

    tau_t = U_t S_t V_t^T, the top r / T directions of each, r = min(rows, columns);   tau = polar([U_1 ... U_T]) S polar([V_1 ... V_T])^T

Source: Gargiulo et al., Task Singular Vectors (2025), https://arxiv.org/abs/2412.00081, section 4.3 and algorithm 1. Tensors that
are not matrices are averaged, and so are matrices with a side shorter than T."""

from __future__ import annotations

import torch

from peru_cli.methods.matrices import Matrices, SpectralRule
from peru_cli.methods.spectral.directions import polar, top_directions


class TsvM(SpectralRule):
    """See the module."""

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return super().takes(name, shape) and min(shape[0], _columns(shape)) >= len(self.parameters.tasks)

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        return 8 * (3 * rows * columns + 4 * (rows + columns) * min(rows, columns))

    def merge_matrix(self, matrices: Matrices) -> torch.Tensor:
        count = min(matrices.rows, matrices.columns) // matrices.tasks
        parts = [top_directions(self.vector(matrices, task), count) for task in range(matrices.tasks)]
        left, values, right = (torch.cat([part[i] for part in parts], dim=-1) for i in range(3))
        return (polar(left) * values) @ polar(right).T * self.parameters.number("scale")


def _columns(shape: tuple[int, ...]) -> int:
    entries = 1
    for side in shape[1:]:
        entries *= side
    return entries
