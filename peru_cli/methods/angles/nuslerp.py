"""NuSLERP: weighted slerp of two models, on task vectors if there is a base.

    t = w_2 / (w_1 + w_2), 1/2 where they cancel out;   sin((1 - t) omega) / sin(omega) x_1 + sin(t omega) / sin(omega) x_2

Source: mergekit 0.1.5 (`nuslerp`), formula of Shoemake 1985 (https://doi.org/10.1145/325334.325242, section 3.3). The angle
is that of the flattened tensors. With `--no-flatten` each row has its own angle; with `--row-wise` in addition each column
has (vectors along axis 0: mergekit's program does this, its documentation says the opposite). Colinear vectors
(|sin omega| below 1e-8) are interpolated linearly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from peru_cli.errors import UsageError
from peru_cli.kernels.merging.panels import add_products
from peru_cli.methods.angles.coefficients import ByAngles, Products
from peru_cli.methods.matrices import Matrices, MatrixRule, Panels
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule
from peru_cli.streaming.arrays import Host

_COLINEAR, _ZERO = 1e-8, 1e-7


def share(weights: Sequence[float]) -> float:
    """t for two weights."""
    total = weights[0] + weights[1]
    return weights[1] / total if abs(total) >= 1e-6 else 0.5


def nuslerp_factors(inner: float, squares: tuple[float, float], t: float) -> tuple[float, float]:
    """Factors of two vectors from their inner product and squared norms."""
    lengths = [max(math.sqrt(square), _ZERO) for square in squares]
    omega = math.acos(min(1.0, max(-1.0, inner / (lengths[0] * lengths[1]))))
    if abs(math.sin(omega)) < _COLINEAR:
        return 1.0 - t, t
    return math.sin((1.0 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


class NuSlerp(ByAngles):
    """Works on whole tensors."""

    suffers_from_norms = False

    def factors(self, products: Products) -> Sequence[float]:
        return nuslerp_factors(products[0][1], (products[0][0], products[1][1]), share(self.parameters.weights))


class NuSlerpAlong(MatrixRule):
    """Works on rows or columns. A one-dimensional tensor counts as one vector."""

    suffers_from_norms = False
    by_rows = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.on_vectors = parameters.has_base
        self._columns = parameters.flag("row-wise")
        self.studies = int(self._columns)

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return True

    def study(self, panels: Panels) -> Host:
        """Inner products of columns; float64 (3, columns)."""
        total: Host = np.zeros((3, 0))

        def add(both: tuple[Host, Host]) -> None:
            nonlocal total
            total = total if total.size else np.zeros((3, both[0].shape[1]))
            for sums, (x, y) in zip(total, _pairs(*both), strict=True):
                add_products(x, y, sums)

        panels.each(lambda panel: (panel[0], panel[1]), add)
        return total

    def merge_matrix(self, matrices: Matrices) -> Host:
        a, b = matrices[0], matrices[1]
        along = self._columns and len(matrices.shape) >= 2
        t = share(self.parameters.weights)
        products = matrices.studied if along else [np.einsum("ij,ij->i", x, y, dtype=np.float64) for x, y in _pairs(a, b)]
        found: Any = np.array([nuslerp_factors(float(inner), (float(x), float(y)), t) for inner, x, y in zip(*products, strict=True)])
        one, two = (found[:, i].astype(a.dtype) for i in (0, 1))
        merged: Host = a * one + b * two if along else a * one[:, None] + b * two[:, None]
        return merged


def _pairs(a: Host, b: Host) -> tuple[tuple[Host, Host], ...]:
    return (a, b), (a, a), (b, b)


def nuslerp(parameters: Parameters) -> Rule:
    """The rule of `nuslerp`. UsageError for `--row-wise` without `--no-flatten`."""
    if parameters.flag("flatten") and parameters.flag("row-wise"):
        raise UsageError("--row-wise chooses the vectors of a matrix, but --flatten makes the matrix one vector", "add --no-flatten")
    return (NuSlerp if parameters.flag("flatten") else NuSlerpAlong)(parameters)
