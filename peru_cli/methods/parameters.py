"""The options of a method, with their values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

Value = Fraction | float | int | str | bool


@dataclass(frozen=True)
class Parameters:
    """Effective options of one merge, or of one tensor: task names and weights in command-line order, and all others.

    `own` has options that differ by task, one value for each: `number` and `share` of a task look there first. `has_base` says
    whether a base was given, for methods that work with and without one. With `in_doubles`, shares of entries are counted as
    mergekit counts them, in doubles, where 29% of 100 is 28."""

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    values: Mapping[str, Value] = field(default_factory=dict)
    own: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    has_base: bool = False
    in_doubles: bool = False

    def _value(self, name: str, task: int | None) -> Value:
        return self.own[name][task] if task is not None and name in self.own else self.values[name]

    def number(self, name: str, task: int | None = None) -> float:
        """An option's value as a float. `task` selects the value of one task (its index) if it may differ by task."""
        value = self._value(name, task)
        assert not isinstance(value, str)
        return float(value)

    def share(self, name: str, task: int | None = None) -> Fraction:
        """An exact share of the entries. `task` selects the value of one task if it may differ by task."""
        value = self._value(name, task)
        assert isinstance(value, Fraction)
        return value

    def count(self, share: Fraction, n: int) -> int:
        """floor(share * n): the number of entries in a share of n."""
        return int(float(share) * n) if self.in_doubles else int(share * n)

    def flag(self, name: str) -> bool:
        """An option's value as yes or no."""
        value = self.values[name]
        assert isinstance(value, bool)
        return value

    def text(self, name: str) -> str:
        """An option's value as a word."""
        value = self.values[name]
        assert isinstance(value, str)
        return value
