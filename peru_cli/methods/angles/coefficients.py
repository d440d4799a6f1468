"""Rules whose result is a linear combination of the inputs, tensor by tensor, with factors computed from their inner products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Result, Rule, RuleInput, onto_base, weighted_sum

Products = Sequence[Sequence[float]]  # inner products of all inputs of a tensor, (tasks, tasks)


class ByAngles(Rule):
    """Works on task vectors if there is a base (`has_base`), otherwise on weights."""

    wants_products = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self.on_vectors = parameters.has_base
        self._factors: dict[int, Sequence[float]] = {}

    @abstractmethod
    def factors(self, products: Products) -> Sequence[float]:
        """The factor of each input, from a tensor's inner products."""

    def decide(self, products: Mapping[int, Products]) -> None:
        self._factors = {slot: self.factors(table) for slot, table in products.items()}

    def merge(self, tile: RuleInput) -> Result:
        merged = weighted_sum(self._factors[tile.slot])
        return onto_base(merged, 1.0) if self.on_vectors else merged
