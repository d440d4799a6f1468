"""Multi-way slerp: the normalised weighted sum of all directions, times the weighted sum of the norms.

    mu = sum w_t u_t / |sum w_t u_t|,  u_t = x_t / |x_t|;   mu * sum w_t |x_t|,  x_t the task vectors, or the weights without a base

Source: barycentric interpolation on a hypersphere in mergekit 0.1.5 (`multislerp`), formula as in its documentation: it adds
exp_mu(v) of v = sum w_t (u_t - (u_t.mu) mu), but mu is that sum's own direction, so v is 0. Weights are divided by their sum
(`--no-normalize` leaves them). Directions that cancel out give the weighted sum itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from peru_cli.methods.angles.coefficients import ByAngles, Products
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.weighted.linear import share_of_sum

_ZERO = 1e-8


def multislerp_factors(products: Products, weights: Sequence[float]) -> list[float]:
    """The factor of each input; (tasks,)."""
    tasks = range(len(weights))
    norms = [math.sqrt(products[t][t]) for t in tasks]
    shares = [weights[t] / norms[t] if norms[t] > _ZERO else 0.0 for t in tasks]  # factor of x_t in sum w_t u_t
    length = math.sqrt(max(math.fsum(shares[i] * shares[j] * products[i][j] for i in tasks for j in tasks), 0.0))
    if length < _ZERO:
        return list(weights)
    norm = math.fsum(weight * size for weight, size in zip(weights, norms, strict=True))
    return [share * norm / length for share in shares]


class MultiSlerp(ByAngles):
    """See the module."""

    suffers_from_norms = False

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        factor = share_of_sum(parameters.weights) if parameters.flag("normalize") else 1.0
        self._weights = [weight * factor for weight in parameters.weights]

    def factors(self, products: Products) -> Sequence[float]:
        return multislerp_factors(products, self._weights)
