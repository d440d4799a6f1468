"""LiNeS (layer-increasing network scaling): a merge that is as weak as the average in the first layer, and stronger layer by layer.

    alpha = ||sum_t tau_t||_1 / (T ||tau||_1)          tau the merged task vector at scale 1, norms over all tensors
    tau_l <- (alpha + beta l / (L - 1)) tau_l          in layer l = 0 ... L - 1; outside of layers alpha

beta is the method's --scale. What the merge gives is m = beta tau, so m_l becomes (||sum_t tau_t||_1 / (T ||m||_1) + l / (L - 1)) m_l.
Shallow layers hold what tasks share, and a strong merge there does the most damage. Each stack of layers has its own L. Tasks of
weight 0 do not count.

Source: Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging (2024),
https://arxiv.org/abs/2410.17146, and its program https://github.com/wang-kee/LiNeS (eval.py: evaluate, LiNeS_scaling), which looks for
beta on validation data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peru_cli.methods.matrices import Matrices
from peru_cli.methods.then.table import Pass


class Lines(Pass):
    """See the module."""

    gathers = True
    _first = 0.0  # alpha / beta

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def held(self, rows: int, columns: int) -> int:
        return 8 * 3 * rows * columns

    def gather(self, merged: torch.Tensor, vectors: Matrices, counted: Sequence[int]) -> list[float]:
        total = torch.zeros_like(merged)
        for task in counted:
            total += vectors.tensor(task)
        return [float(total.abs().sum()) / max(len(counted), 1), float(merged.abs().sum())]

    def settle(self, sums: Sequence[float]) -> None:
        mean, merged = sums
        self._first = mean / merged if merged else 0.0

    def change(self, merged: torch.Tensor, vectors: Matrices, counted: Sequence[int], depth: float) -> torch.Tensor:
        return merged * (self._first + depth)
