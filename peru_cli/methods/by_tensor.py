"""A method whose parameters differ from tensor to tensor: one rule for each set of parameters, and the rule of each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peru_cli.errors import UsageError
from peru_cli.methods.rules import Result, Rule, RuleInput
from peru_cli.streaming.arrays import Array


class ByTensor(Rule):
    """Passes every tensor (by its index in canonical order) to its rule."""

    def __init__(self, rules: Sequence[Rule], chosen: Sequence[int]) -> None:
        """`chosen[slot]` is the index of a tensor's rule. UsageError if global shares differ by tensor."""
        first = rules[0]
        super().__init__(first.parameters)
        self._rules, self._chosen = rules, chosen
        self.on_vectors, self.holds_all, self.scope = first.on_vectors, any(rule.holds_all for rule in rules), first.scope
        self.suffers_from_norms = first.suffers_from_norms
        self.studies = max(rule.studies for rule in rules)
        self.wants_signs, self.wants_products = first.wants_signs, first.wants_products
        self.trims = max((rule.trims for rule in rules), key=len)
        if self.trims and self.scope == "global" and any(rule.trims != first.trims for rule in rules):
            raise UsageError("with --scope global, the density cannot differ between tensors", "add --scope tensor")

    def at(self, slot: int) -> Rule:
        """The rule of a tensor."""
        return self._rules[self._chosen[slot]]

    def keeps(self, trim: int, task: int, n: int, slot: int) -> int:
        return self.at(slot).keeps(trim, task, n, slot) if trim < len(self.at(slot).trims) else 0

    def elect(self, tile: RuleInput) -> int:
        return self.at(tile.slot).elect(tile)

    def decide(self, products: Mapping[int, Sequence[Sequence[float]]]) -> None:
        for number, rule in enumerate(self._rules):
            rule.decide({slot: table for slot, table in products.items() if self._chosen[slot] == number})

    def merge(self, tile: RuleInput) -> Array | Result:
        return self.at(tile.slot).merge(tile)
