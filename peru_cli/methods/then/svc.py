"""SVC (singular value calibration): shrink the directions of a merged matrix to which several tasks added the same.

    tau = U S V^T                              the merged task vector of one matrix
    s_rt = <u_r^T tau, u_r^T tau_t> / ||u_r^T tau_t||^2      how much of task t's own response the merge gives along u_r: above 1, too much
    S_r <- S_r / mean_t max(1 / T, s_rt)

Only singular values change. A scale of the merged vector cancels out wherever s_rt is above 1 / T, so there is next to none to tune.
Tasks of weight 0 do not count. Directions below 1e-6 of the largest are dropped (spectral/directions.py).

Source: Li et al., When Shared Knowledge Hurts (2026), https://arxiv.org/abs/2602.05536, and its program https://github.com/lyymuwu/SVC
(merge_func.py) with its alpha = 1 / T. As there, embeddings stay as they were merged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from peru_cli.methods.matrices import Matrices
from peru_cli.methods.spectral.directions import top_directions
from peru_cli.methods.then.table import Pass

_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared)\.")
_LEAST = 1e-12  # of a squared response, as the authors' program has it


class Svc(Pass):
    """See the module."""

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return super().takes(name, shape) and not _EMBEDDING.search(name)

    def held(self, rows: int, columns: int) -> int:
        return 8 * (4 * rows * columns + (2 * rows + 2 * columns + 2 * min(rows, columns)) * min(rows, columns))

    def change(self, merged: torch.Tensor, vectors: Matrices, counted: Sequence[int], depth: float) -> torch.Tensor:
        left, values, right = top_directions(merged, min(merged.shape))
        total = torch.zeros_like(values)
        for task in counted:
            response = left.T @ vectors.tensor(task)  # (directions, columns)
            share = values * (response * right.T).sum(dim=1) / response.square().sum(dim=1).clamp_min(_LEAST)
            total += share.clamp_min(1.0 / len(counted))
        return (left * (values * len(counted) / total)) @ right.T
