"""Show repeated layers as one row: `model.layers.{0..31}.mlp.up_proj.weight`."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a name


def fold(items: Iterable[Item], name: Callable[[Item], str], kind: Callable[[Item], Hashable]) -> list[tuple[str, list[Item]]]:
    """Group items whose names differ only in numbers and that are of one kind (shape, dtype), in order of first appearance."""
    groups: dict[tuple[str, Hashable], list[Item]] = {}
    for item in items:
        groups.setdefault((_NUMBER.sub("*", name(item)), kind(item)), []).append(item)
    return [(folded_name([name(item) for item in members]), members) for members in groups.values()]


def folded_name(names: list[str]) -> str:
    """One name for several: `{0..7}` if all numbers from 0 to 7 occur, `{0,2,5}` for a few, `*` otherwise."""
    columns = [sorted(set(map(int, column))) for column in zip(*(_NUMBER.findall(name) for name in names), strict=True)]
    parts = iter([_range(numbers) for numbers in columns])
    return _NUMBER.sub(lambda _: next(parts), names[0])


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}" if len(numbers) <= 4 else "*"
