"""Options of merge methods on the command line: the table of methods declares them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.errors import UsageError
from peru_cli.merge.given import BY_TASK, BY_TENSOR, Given, default_of
from peru_cli.methods.table import FLAGS, Flag, Method, flag_help
from peru_cli.methods.then.table import find_pass

if TYPE_CHECKING:
    from peru_cli.checkpoints.quantized.requantize import Requantized
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.methods.parameters import Value

_MOST_POINTS = 1000
_NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)(%?)", re.IGNORECASE)


def with_method_options(command: Callable[..., None], after: str) -> Callable[..., None]:
    """The command with an option for each flag in the table, None by default. It gets them as `**typed`."""
    signature = inspect.signature(command, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            parameters.append(parameter)
        if parameter.name == after:
            parameters += [_parameter(name, flag) for name, flag in FLAGS.items()]

    @wraps(command)
    def typed(*arguments: Any, **keywords: Any) -> None:
        command(*arguments, **keywords)

    del typed.__wrapped__  # its annotations differ
    typed.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    typed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return typed


def _parameter(name: str, flag: Flag) -> inspect.Parameter:
    kind: Any = list[str] if name in BY_TASK else str if name in BY_TENSOR or flag.kind is Fraction else flag.kind
    option = f"--{name}/--no-{name}" if flag.kind is bool else f"--{name}"
    names = [option, *([flag.short] if flag.short else [])]
    declared = typer.Option(
        *names, metavar=flag.metavar or None, min=None if name in BY_TENSOR else flag.least, help=flag_help(name), show_default=False
    )
    declared.rich_help_panel = "Method"
    annotation = Annotated[Optional[kind], declared]
    return inspect.Parameter(name.replace("-", "_"), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def given_values(typed: Mapping[str, Any]) -> tuple[dict[str, Value], Given]:
    """What was typed, by option name, and what varies by task or tensor. UsageError for invalid numbers and shares."""
    found: dict[str, Value] = {}
    varied = Given()
    for name, flag in FLAGS.items():
        value = typed[name.replace("-", "_")]
        if value is None:
            continue
        if name in BY_TENSOR:
            varied.add(name, value if name in BY_TASK else [value], name in BY_TASK)
            continue
        if flag.kind is Fraction:
            value = options.parse_density(value, f"--{name}")
        elif flag.kind is float and not math.isfinite(value):
            raise UsageError(f"--{name} {value} is not a finite number")
        found[name] = value
    for name in varied.settings:
        found[name] = varied.first(name)
    return found, varied


@dataclass(frozen=True)
class Searched:
    """An option whose best value is searched: the values to try, and how they were typed."""

    option: str
    points: tuple[Value, ...]
    text: str


def parse_search(text: str, method: Method, given: Mapping[str, Value]) -> Searched:
    """Parse `scale=0:1:0.05` into values of an option of the method. UsageError otherwise, with what could be typed."""
    name, _, bounds = text.partition("=")
    numeric = [option for option in method.options if option in FLAGS and FLAGS[option].kind in (float, int, Fraction)]
    if name not in numeric:
        raise UsageError(f"--search: {method.name} has no numeric option --{name}", f"it has {', '.join(numeric)}")
    if name in given:
        raise UsageError(f"--{name} is both given and searched", "leave one of the two out")
    return Searched(name, tuple(_point(name, number, text) for number in parse_range(bounds, f"--search {name}")), bounds)


def parse_range(text: str, option: str) -> list[Fraction]:
    """Parse `0:1:0.05` into numbers from FROM to TO. UsageError otherwise."""
    numbers = [_NUMBER.fullmatch(part.strip()) for part in text.split(":")]
    if len(numbers) != 3 or not all(numbers):
        raise UsageError(f"{option} {text!r} is not FROM:TO:STEP in numbers", "write three numbers, as 0:1:0.05")
    start, stop, step = (Fraction(match.group(1)) / (100 if match.group(2) else 1) for match in numbers if match is not None)
    if step <= 0 or stop < start:
        raise UsageError(f"{option} {text} has no values", "FROM must be at most TO, and STEP above 0")
    steps = (stop - start) // step + 1
    if steps > _MOST_POINTS:
        raise UsageError(f"{option} {text} has {steps:,} values", "make the STEP larger")
    return [start + i * step for i in range(steps)]


def _point(name: str, number: Fraction, text: str) -> Value:
    flag = FLAGS[name]
    if flag.least is not None and number < flag.least:
        raise UsageError(f"--search {text}: --{name} must be at least {flag.least}")
    if flag.kind is Fraction:
        if not 0 < number <= 1:
            raise UsageError(f"--search {text}: --{name} must be above 0 and at most 100%")
        return number
    if flag.kind is int:
        if number.denominator != 1:
            raise UsageError(f"--search {text}: --{name} must be a whole number")
        return int(number)
    return float(number)


def refuse_beside_a_recipe(given: dict[str, Value], **others: object) -> None:
    """UsageError for options that repeat what a recipe says."""
    both = [f"--{name}" for name, value in (given | others).items() if value is not None]
    if both:
        raise UsageError(f"{', '.join(both)} cannot be combined with a recipe", "write it into the recipe, or name the models instead")


def check_then(then: str, base: Optional[str], search: Optional[str], write_recipe: Optional[str]) -> None:
    """UsageError for a pass that is unknown or cannot follow."""
    find_pass(then)
    if base is None:
        raise UsageError("--then needs a base: it changes the merged task vector", "add --base BASE")
    if search is not None:
        raise UsageError("--then and --search exclude each other", "search first, then merge with the value found")
    if write_recipe is not None:
        raise UsageError("--then and --write-recipe exclude each other: mergekit has no such pass", "leave one of the two out")


def check_varied(varied: Given, method: Method, search: Optional[str], given: dict[str, Value], values: dict[str, Value]) -> None:
    """UsageError for values by tensor if one value is needed. A share that differs by tensor is taken in each tensor."""
    several = [f"--{name}" for name in varied.by_tensor]
    if several and (method.statistics is not None or search is not None):
        what = "--search" if search is not None else method.name
        raise UsageError(f"{what} takes one value for all tensors, but {', '.join(several)} has several", "write one number")
    if set(varied.by_tensor) & {"keep", "gamma"} and values.get("scope") == "global":
        if "scope" in given:
            raise UsageError("with --scope global, the density cannot differ between tensors", "leave --scope out, or use --scope tensor")
        values["scope"] = "tensor"
    for name in varied.of_single_tasks:
        values[name] = default_of(method, name)


def layout_of(model: Checkpoint) -> Requantized:
    """The FP8 layout of the model that gives the output its names; UsageError if that is no FP8 model."""
    from peru_cli.checkpoints.quantized.fp8 import Dequantized
    from peru_cli.checkpoints.quantized.requantize import Requantized

    if not isinstance(model, Dequantized):
        raise UsageError(
            f"--dtype fp8 writes the layout of the base, but {model.label} is not quantised", "name an FP8 model as --base, or write bf16"
        )
    return Requantized(model)
