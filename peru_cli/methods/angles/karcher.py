"""Karcher mean: the point of the sphere closest to all models, tensor by tensor, times their mean norm.

    mu <- exp_mu(mean_t log_mu(u_t)),  u_t = theta_t / |theta_t|,  until the step is shorter than `tol`, at most `max-iter` times

Source: Riemannian centre of mass (Karcher 1977) for merging, https://arxiv.org/abs/2603.04972, section 3. mu is always a
combination of the u_t, so all steps work on its factors and the inner products of the u_t: weights are not read again.
Tensors of zeros have no direction and are left out. If the u_t cancel out, mu starts at the first of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from peru_cli.methods.angles.coefficients import ByAngles, Products
from peru_cli.methods.parameters import Parameters

Vector = np.ndarray[Any, np.dtype[np.float64]]
_ZERO = 1e-12


def karcher_factors(products: Products, max_iter: int, tol: float) -> list[float]:
    """The factor of each input; (tasks,)."""
    gram = np.array(products, np.float64)
    norms = np.sqrt(np.diagonal(gram))
    there = norms > _ZERO
    if not there.any():
        return [1.0 / len(norms)] * len(norms)
    count = int(there.sum())
    cosines = gram[np.ix_(there, there)] / np.outer(norms[there], norms[there])
    mean = np.full(count, 1.0 / count)
    length = _length(mean, cosines)
    mu: Vector = mean / length if length > _ZERO else np.eye(count)[0]
    for _ in range(max_iter):
        step = np.zeros(count)
        for t in range(count):
            cosine = min(1.0, max(-1.0, float(cosines[t] @ mu)))
            angle = math.acos(cosine)
            if math.sin(angle) > _ZERO:  # log_mu(u_t) = angle / sin(angle) * (u_t - cosine mu)
                step += (angle / math.sin(angle) / count) * (np.eye(count)[t] - cosine * mu)
        length = _length(step, cosines)
        if length < tol:
            break
        mu = math.cos(length) * mu + math.sin(length) / length * step
        mu = mu / _length(mu, cosines)
    factors = np.zeros(len(norms))
    factors[there] = mu * norms[there].mean() / norms[there]
    return [float(factor) for factor in factors]


def _length(factors: Vector, cosines: Any) -> float:
    return math.sqrt(max(float(factors @ cosines @ factors), 0.0))


class Karcher(ByAngles):
    """See the module."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.on_vectors = False

    def factors(self, products: Products) -> Sequence[float]:
        return karcher_factors(products, int(self.parameters.number("max-iter")), self.parameters.number("tol"))
