"""Values that differ between tensors: by part of the name, by layer or by depth. For recipes and `--weight a='mlp:0.7'`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from peru_cli.errors import UsageError
from peru_cli.merge.layers import Spot
from peru_cli.methods.parameters import Parameters, Value
from peru_cli.methods.table import Method

if TYPE_CHECKING:
    from peru_cli.methods.rules import Rule

_CLAUSE = re.compile(r"(?:(?P<first>\d+)\.\.(?P<last>\d+):|(?P<filter>[^:,\[\]]+):)?(?P<value>\[[^\[\]]*\]|[^:,\[\]]+)")


@dataclass(frozen=True)
class Clause:
    """A value, or a gradient (several), for tensors with `filter` in their names, in layers `first` to `last`. None: all."""

    values: tuple[Value, ...]
    gradient: bool = False
    filter: str | None = None
    layers: tuple[int, int] | None = None
    line: int | None = None  # in a recipe

    def applies(self, spot: Spot) -> bool:
        """Whether a tensor gets this value."""
        if self.layers is not None and (spot.layer is None or not self.layers[0] <= spot.layer <= self.layers[1]):
            return False
        return self.filter in (None, "*") or str(self.filter) in spot.name

    def at(self, spot: Spot) -> Value:
        """The value of a tensor. A gradient is interpolated at the tensor's depth; for words and flags the nearest lower value is used."""
        if not self.gradient:
            return self.values[0]
        depth = spot.depth
        if self.layers is not None and spot.layer is not None:
            first, last = self.layers
            depth = Fraction(spot.layer - first, last - first) if last > first else Fraction(1)
        place = depth * (len(self.values) - 1)
        below = int(place)
        if isinstance(self.values[0], (bool, str)):
            return self.values[below]
        above = min(below + 1, len(self.values) - 1)
        low, high = (_exact(self.values[i]) for i in (below, above))
        value = low + (place - below) * (high - low)
        return value if isinstance(self.values[0], Fraction) else float(value)


def _exact(value: Value) -> Fraction:
    assert not isinstance(value, str)
    return Fraction(value)


Setting = tuple[Clause, ...]


def value_at(setting: Setting, spot: Spot) -> Value | None:
    """The value of the first clause that applies. None if none does."""
    return next((clause.at(spot) for clause in setting if clause.applies(spot)), None)


def is_plain(setting: Setting) -> bool:
    """Whether every tensor has the same value."""
    return len(setting) == 1 and not setting[0].gradient and setting[0].filter in (None, "*") and setting[0].layers is None


def unmatched(setting: Setting, spots: Iterable[Spot]) -> list[Clause]:
    """The clauses whose filter or layers match no tensor."""
    listed = list(spots)
    return [clause for clause in setting if not any(clause.applies(spot) for spot in listed)]


def parse_setting(text: str, read: Callable[[str], Value], option: str) -> Setting:
    """Parse `0.5`, `mlp:0.7,self_attn:0.3`, `0..31:[10%,50%,10%]` into clauses. `read` parses one value. UsageError otherwise."""
    clauses, at = [], 0
    while at < len(text):
        match = _CLAUSE.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != ","):
            raise UsageError(f"{option} {text!r} cannot be read", f"write {option} 'mlp:0.7,0.3' or {option} '0..31:[0.1,0.5]'")
        value = match["value"].strip()
        parts = [part.strip() for part in value[1:-1].split(",")] if value.startswith("[") else [value]
        if not all(parts):
            raise UsageError(f"{option} {text!r}: {value} lacks a value")
        layers = None
        if match["first"] is not None:
            layers = (int(match["first"]), int(match["last"]))
            if layers[1] < layers[0]:
                raise UsageError(f"{option} {text!r}: layers {layers[0]}..{layers[1]} are in the wrong order")
        name = match["filter"].strip() if match["filter"] is not None else None
        clauses.append(Clause(tuple(read(part) for part in parts), value.startswith("["), name, layers))
        at = match.end() + 1
        if match.end() < len(text) <= at:
            raise UsageError(f"{option} {text!r} ends in a comma")
    if not clauses:
        raise UsageError(f"{option} has no value")
    return tuple(clauses)


def read_number(option: str) -> Callable[[str], Value]:
    """Reads one finite number; UsageError otherwise."""

    def read(text: str) -> Value:
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.IGNORECASE) or not math.isfinite(float(text)):
            raise UsageError(f"{option}: {text!r} is not a number", f"write it as {option} 0.7")
        return float(text)

    return read


def check_setting(setting: Setting, spots: Mapping[str, Spot], option: str) -> None:
    """UsageError for a filter or layers that match no tensor."""
    for clause in unmatched(setting, spots.values()):
        what = f"layers {clause.layers[0]}..{clause.layers[1]}" if clause.layers is not None else repr(clause.filter)
        raise UsageError(f"{option}: {what} matches no tensor that is merged", "`peru inspect MODEL` lists the names")
    for clause in setting:
        last = max((spot.layer for spot in spots.values() if spot.layer is not None), default=-1)
        if clause.layers is not None and clause.layers[1] > last:
            raise UsageError(f"{option}: layers {clause.layers[0]}..{clause.layers[1]} go beyond the last layer, {last}")


def build(method: Method, parameters: Sequence[Parameters]) -> Rule:
    """The method with the parameters of each tensor (in canonical order). Tensors with equal parameters share a rule."""
    from peru_cli.methods.by_tensor import ByTensor

    rules: list[Rule] = []
    known: dict[object, int] = {}
    chosen = []
    for each in parameters:
        key = (each.tasks, each.weights, tuple(each.values.items()), tuple(each.own.items()))
        if key not in known:
            known[key] = len(rules)
            rules.append(method.build(each))
        chosen.append(known[key])
    return rules[0] if len(rules) == 1 else ByTensor(rules, chosen)
