"""Model stock: how far to go from the base to the mean of the fine-tunes, given the angle between them.

    theta_0 + t mean(tau),   t = K c / (1 + (K - 1) c),   c the mean cosine of all pairs of the K task vectors

Source: Jang et al., Model Stock (2024), https://arxiv.org/abs/2403.19522, equations 3 and 5. Computed for each tensor, or
for each row with `--filter-wise`. t is 0 if its divisor is 0. The divisor of a cosine is at least 1e-6, as in mergekit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from peru_cli.methods.angles.coefficients import ByAngles, Products
from peru_cli.methods.matrices import Matrices, MatrixRule
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule
from peru_cli.streaming.arrays import Host

_LEAST = 1e-6


def stock_share(products: Products) -> float:
    """t for the task vectors of one tensor or row."""
    k = len(products)
    pairs = [(i, j) for i in range(k) for j in range(i)]
    cosines = [products[i][j] / max(math.sqrt(products[i][i]) * math.sqrt(products[j][j]), _LEAST) for i, j in pairs]
    cosine = math.fsum(cosines) / len(pairs)
    divisor = 1.0 + (k - 1) * cosine
    return k * cosine / divisor if abs(divisor) > 1e-12 else 0.0


class ModelStock(ByAngles):
    """Works on whole tensors."""

    def factors(self, products: Products) -> Sequence[float]:
        return [stock_share(products) / len(products)] * len(products)


class ModelStockByRow(MatrixRule):
    """Works on rows. A one-dimensional tensor counts as one row."""

    by_rows = True

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def merge_matrix(self, matrices: Matrices) -> Host:
        vectors: Any = np.stack([matrices[task] for task in range(matrices.tasks)])
        products = np.einsum("air,bir->iab", vectors, vectors, dtype=np.float64)
        shares = np.array([stock_share(table) for table in products]).astype(vectors.dtype)
        merged: Host = vectors.mean(axis=0) * shares[:, None]
        return merged


def model_stock(parameters: Parameters) -> Rule:
    """The rule of `model-stock`."""
    return (ModelStockByRow if parameters.flag("filter-wise") else ModelStock)(parameters)
