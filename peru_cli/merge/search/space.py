"""What a search looks through: ranges as typed, `weight.a=0:1,scale=0.2:1.5`, and the points in them.

Every point is an exact decimal: a range without a STEP has steps of a power of ten, at least a thousand of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from peru_cli.errors import UsageError
from peru_cli.methods.parameters import Value

_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)(%?)", re.IGNORECASE)
_MOST_POINTS = 1000  # of a search that tries all
_FINE = 1000  # the least number of steps if none is typed

Point = tuple[Fraction, ...]  # a number for each dimension


@dataclass(frozen=True)
class Range:
    """One range as typed. `text` is what follows the equals sign."""

    name: str
    text: str
    low: Fraction
    high: Fraction
    step: Fraction | None


@dataclass(frozen=True)
class Dimension:
    """A value that is searched: `low`, `low + step`, ... `low + steps * step`, and the value to begin with.

    `kind` is float, int, or Fraction for a share of the entries."""

    name: str
    text: str
    low: Fraction
    step: Fraction
    steps: int
    start: Fraction
    kind: type[Value] = float

    @property
    def high(self) -> Fraction:
        """The last point."""
        return self.low + self.steps * self.step

    def points(self) -> list[Fraction]:
        """All points in ascending order."""
        return [self.low + i * self.step for i in range(self.steps + 1)]

    def nearest(self, number: Fraction) -> Fraction:
        """The point that is nearest to a number."""
        return self.low + min(max(round((number - self.low) / self.step), 0), self.steps) * self.step

    def value(self, number: Fraction) -> Value:
        """A point as an option's value."""
        return number if self.kind is Fraction else int(number) if self.kind is int else float(number)


def parse_ranges(text: str, trials: bool) -> list[Range]:
    """Parse `scale=0:1:0.05`, or with `trials` also several ranges and ranges without a step. UsageError otherwise."""
    if "," in text and not trials:
        raise UsageError("--search of several options needs --trials, the number of points to try", "add --trials 60")
    found: dict[str, Range] = {}
    for part in text.split(","):
        name, equals, bounds = (word.strip() for word in part.partition("="))
        if not equals or not name:
            raise UsageError(f"--search {part.strip()!r} is not OPTION=FROM:TO:STEP", "write --search scale=0:1:0.05")
        if name in found:
            raise UsageError(f"--search names {name} twice", "give each option one range")
        found[name] = _parse_range(name, bounds, trials)
    return list(found.values())


def parse_range(text: str, option: str) -> list[Fraction]:
    """Parse `0:1:0.05` into numbers from FROM to TO. UsageError otherwise."""
    start, stop, step = _bounds(text, option, False)
    assert step is not None
    steps = (stop - start) // step + 1
    if steps > _MOST_POINTS:
        raise UsageError(f"{option} {text} has {steps:,} values", "make the STEP larger")
    return [start + i * step for i in range(steps)]


def _parse_range(name: str, text: str, trials: bool) -> Range:
    if not trials:
        parse_range(text, f"--search {name}")
    return Range(name, text, *_bounds(text, f"--search {name}", trials))


def _bounds(text: str, option: str, short: bool) -> tuple[Fraction, Fraction, Fraction | None]:
    """FROM, TO and STEP. `short`: the step may be missing."""
    numbers = [_NUMBER.fullmatch(part.strip()) for part in text.split(":")]
    if len(numbers) not in ((2, 3) if short else (3,)) or not all(numbers):
        if short:
            raise UsageError(f"{option} {text!r} is not FROM:TO or FROM:TO:STEP in numbers", "write 0:1 or 0:1:0.05")
        more = "; FROM:TO is enough with --trials N" if len(numbers) == 2 else ""
        raise UsageError(f"{option} {text!r} is not FROM:TO:STEP in numbers", f"write three numbers, as 0:1:0.05{more}")
    start, stop, *rest = (Fraction(match.group(1)) / (100 if match.group(2) else 1) for match in numbers if match is not None)
    step = rest[0] if rest else None
    if (step is not None and step <= 0) or stop < start:
        raise UsageError(f"{option} {text} has no values", "FROM must be at most TO, and STEP above 0")
    if step is None and stop == start:
        raise UsageError(f"{option} {text} has one value", "leave it out of --search, and give the value itself")
    return start, stop, step


def dimension(found: Range, start: Fraction, kind: type[Value]) -> Dimension:
    """The points of a range. The search begins near `start`. UsageError for whole numbers that are not whole."""
    step = found.step
    if step is None:
        step = Fraction(1)
        while kind is not int and (found.high - found.low) / step < _FINE:
            step /= 10
    if kind is int and (found.low.denominator != 1 or step.denominator != 1):
        raise UsageError(f"--search {found.name}={found.text}: {found.name} must be a whole number")
    made = Dimension(found.name, found.text, found.low, step, int((found.high - found.low) / step), found.low, kind)
    return replace(made, start=made.nearest(start))


def decimal(number: Fraction) -> str:
    """A point as it would be typed."""
    return str(number.numerator) if number.denominator == 1 else repr(float(number))


def spelt(dimensions: Sequence[Dimension], point: Point) -> str:
    """A point in words: `weight.a 0.3, scale 0.8`."""
    return ", ".join(f"{d.name} {decimal(number)}" for d, number in zip(dimensions, point, strict=True))
