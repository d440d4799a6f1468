"""Spherical interpolation of two models, tensor by tensor: from the first (t = 0) to the second (t = 1).

    sin((1 - t) omega) / sin(omega) * theta_1 + sin(t omega) / sin(omega) * theta_2,
    cos(omega) = <theta_1, theta_2> / (|theta_1| |theta_2|)

Source: Shoemake, Animating rotation with quaternion curves (1985), https://doi.org/10.1145/325334.325242,
section 3.3. Vectors that are nearly parallel (|cos| > 0.9995) are interpolated linearly, as mergekit does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Result, Rule, RuleInput, weighted_sum

PARALLEL = 0.9995


def coefficients(products: Sequence[Sequence[float]], t: float) -> tuple[float, float]:
    """Factors of the two tensors from their inner products, a table (2, 2)."""
    lengths = math.sqrt(products[0][0]), math.sqrt(products[1][1])
    if min(lengths) < 1e-8:  # a tensor of zeros has no direction
        return 1.0 - t, t
    cosine = products[0][1] / (lengths[0] * lengths[1])
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    omega = math.acos(cosine)
    return math.sin((1.0 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega)


class Slerp(Rule):
    """See the module."""

    on_vectors = False
    wants_products = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._factors: dict[int, tuple[float, float]] = {}

    def decide(self, products: Mapping[int, Sequence[Sequence[float]]]) -> None:
        t = self.parameters.number("t")
        self._factors = {slot: coefficients(table, t) for slot, table in products.items()}

    def merge(self, tile: RuleInput) -> Result:
        return weighted_sum(self._factors[tile.slot])
