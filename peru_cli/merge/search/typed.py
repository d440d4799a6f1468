"""Searched options of the command line: `scale`, `keep`, or of one task `weight.a`, `keep.a`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

from peru_cli.errors import UsageError
from peru_cli.merge.given import ALL, BY_TASK, BY_TENSOR, Given, default_of, first_parameters
from peru_cli.merge.search.space import Dimension, Point, Range, decimal, dimension
from peru_cli.merge.varied import Clause
from peru_cli.methods.parameters import Parameters, Value
from peru_cli.methods.table import FLAGS, Method
from peru_cli.shown import listed

if TYPE_CHECKING:
    from peru_cli.merge.output import Recipe

_OF_TASKS = ("weight", *BY_TASK)


def typed_dimensions(ranges: Sequence[Range], method: Method, given: dict[str, Value], varied: Given) -> list[Dimension]:
    """The dimensions of a search over a method's options. UsageError with what could be typed.

    The search begins at the options' defaults, or where a task's value is searched, at the value given for all."""
    found = []
    for one in ranges:
        option, dot, task = one.name.partition(".")
        numeric = [name for name in method.options if name in FLAGS and FLAGS[name].kind in (float, int, Fraction)]
        names = [*(["weight.TASK"] if "weight" in method.options else []), *numeric]
        if option not in numeric and not (option == "weight" and "weight" in method.options):
            raise UsageError(f"--search: {method.name} has no numeric option --{option}", f"it has {', '.join(names)}")
        if option == "weight" and not task:
            raise UsageError("--search weight names no task", "write --search weight.TASK=0:1")
        if dot and option not in _OF_TASKS:
            raise UsageError(f"--search {one.name}: --{option} is the same for all tasks", f"write --search {option}=...")
        settings = varied.settings.get(option, {})
        if (task in settings) if dot else (option in given and option != "weight"):
            raise UsageError(f"--{option}{f' of {task}' if task else ''} is both given and searched", "leave one of the two out")
        start = settings[ALL][0].values[0] if ALL in settings else default_of(method, option)
        assert not isinstance(start, str)
        kind = float if option == "weight" else FLAGS[option].kind
        made = dimension(one, Fraction(repr(start)) if isinstance(start, float) else Fraction(start), kind)
        _check_bounds(made, option)
        found.append(made)
    return found


def _check_bounds(made: Dimension, option: str) -> None:
    flag = FLAGS.get(option)
    if flag is None:
        return
    if flag.least is not None and made.low < flag.least:
        raise UsageError(f"--search {made.name}={made.text}: --{option} must be at least {flag.least}")
    if flag.kind is Fraction and not 0 < made.low <= made.high <= 1:
        raise UsageError(f"--search {made.name}={made.text}: --{option} must be above 0 and at most 100%")


def check_tasks(dimensions: Sequence[Dimension], names: Sequence[str]) -> None:
    """UsageError for a task without a model."""
    for made in dimensions:
        _, dot, task = made.name.partition(".")
        if dot and task not in names:
            raise UsageError(f"--search {made.name}: no model is called {task!r}", f"the tasks are {listed(names)}")


def at(dimensions: Sequence[Dimension], point: Point, varied: Given, parameters: Parameters) -> tuple[Given, Parameters]:
    """What was typed, and the parameters, with the values of a point."""
    changed = Given({name: dict(found) for name, found in varied.settings.items()}, {n: dict(found) for n, found in varied.texts.items()})
    values = dict(parameters.values)
    for made, number in zip(dimensions, point, strict=True):
        option, _, task = made.name.partition(".")
        value = made.value(number)
        if option == "weight" or option in BY_TENSOR:
            changed.settings.setdefault(option, {})[task or ALL] = (Clause((value,)),)
            changed.texts.setdefault(option, {})[task or ALL] = decimal(number)
        if not task:
            values[option] = value
    return changed, first_parameters(changed, replace(parameters, values=values))


def first_point(dimensions: Sequence[Dimension]) -> Point:
    """Where checks look before the search: the smallest share of entries, and the start of everything else."""
    return tuple(made.low if made.kind is Fraction else made.start for made in dimensions)


def with_ranges(recipe: Recipe, dimensions: Sequence[Dimension]) -> Recipe:
    """The record of a merge with the ranges in place of the values that are searched."""
    own = [(option, task, made.text) for made in dimensions for option, dot, task in [made.name.partition(".")] if dot]
    whole = {made.name: made.text for made in dimensions if "." not in made.name}
    return replace(recipe, values=recipe.values | whole, own=(*recipe.own, *own))
