"""Options of merge methods on the command line: the table of methods declares them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.errors import UsageError
from peru_cli.merge.given import BY_TASK, BY_TENSOR, Given, default_of
from peru_cli.methods.table import FLAGS, Flag, Method, flag_help
from peru_cli.methods.then.table import find_pass
from peru_cli.shown import listed

if TYPE_CHECKING:
    from peru_cli.checkpoints.quantized.requantize import Requantized
    from peru_cli.checkpoints.source import Checkpoint
    from peru_cli.methods.parameters import Value
    from peru_cli.methods.rules import Rule


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


def refuse_beside_a_recipe(given: dict[str, Value], searching: bool, of_search: dict[str, object], **others: object) -> None:
    """UsageError for options that repeat what a recipe says, or that only a search has a use for."""
    typed = {name: value for name, value in given.items() if not (searching and name in ("seed", "max-samples"))}
    both = [f"--{name}" for name, value in (typed | others | ({} if searching else of_search)).items() if value is not None]
    if both:
        raise UsageError(f"{', '.join(both)} cannot be combined with a recipe", "write it into the recipe, or name the models instead")


def refuse_on_a_cluster(recipe: bool, **others: object) -> None:
    """UsageError for what is computed on one machine."""
    if recipe:
        raise UsageError("--executor ray does not take recipes", "name the models and --method instead")
    for name, value in others.items():
        if value:
            raise UsageError(f"--{name} is computed on one machine", "leave --executor out")


def check_then(then: str, base: Optional[str], search: Optional[str], write_recipe: Optional[str]) -> None:
    """UsageError for a pass that is unknown or cannot follow."""
    find_pass(then)
    if base is None:
        raise UsageError("--then needs a base: it changes the merged task vector", "add --base BASE")
    if search is not None:
        raise UsageError("--then and --search exclude each other", "search first, then merge with the value found")
    if write_recipe is not None:
        raise UsageError("--then and --write-recipe exclude each other: mergekit has no such pass", "leave one of the two out")


def check_follows(then: str, rule: Rule, method: str) -> None:
    """UsageError for a pass that cannot follow a method."""
    if rule.isotropic and find_pass(then).spectral:
        raise UsageError(f"--then {then} has nothing to hold on to after {method}: all singular values are equal", "use another method")


def check_varied(varied: Given, method: Method, given: dict[str, Value], values: dict[str, Value]) -> None:
    """UsageError for values by tensor if one value is needed. A share that differs by tensor is taken in each tensor."""
    several = [f"--{name}" for name in varied.by_tensor]
    if several and method.statistics is not None:
        raise UsageError(f"{method.name} takes one value for all tensors, but {', '.join(several)} has several", "write one number")
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


def check_names(names: Sequence[str], has_base: bool, config: Optional[str], tokenizer: Optional[str], pad_vocab_to: Optional[int]) -> None:
    """UsageError for a config or a tokenizer of no model."""
    known = (*names, "base") if has_base else names
    if config is not None and config not in known:
        raise UsageError(
            f"--config {config}: no model is called {config!r}", f"name one of {listed(names)}{' or base' if has_base else ''}"
        )
    if tokenizer is not None and tokenizer not in ("union", *known):
        raise UsageError(f"--tokenizer {tokenizer}: no model has this name", f"write union or {listed(known)}")
    if tokenizer is None and pad_vocab_to is not None:
        raise UsageError("--pad-vocab-to needs --tokenizer", "add --tokenizer union")


def words(**typed: object) -> list[str]:
    """Options as words of a command line, without those that were not typed."""
    found: list[str] = []
    for name, value in typed.items():
        option = f"--{name.replace('_', '-')}"
        for each in value if isinstance(value, list) else [value] if value else []:
            found += [option] if each is True else [option, str(each)]
    return found
