"""The options of a method, with their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

Value = Fraction | float | int | str | bool


@dataclass(frozen=True)
class Parameters:
    """Effective options of one merge: task names and weights in the order of the command line, and the rest."""

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    values: Mapping[str, Value] = field(default_factory=dict)

    def number(self, name: str) -> float:
        """An option's value as a float."""
        value = self.values[name]
        assert not isinstance(value, str)
        return float(value)

    def share(self, name: str) -> Fraction:
        """An exact share of the entries."""
        value = self.values[name]
        assert isinstance(value, Fraction)
        return value

    def text(self, name: str) -> str:
        """An option's value as a word."""
        value = self.values[name]
        assert isinstance(value, str)
        return value
