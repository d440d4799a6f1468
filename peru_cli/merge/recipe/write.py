"""`--write-recipe`: write the command as a recipe for mergekit, with comments where mergekit differs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.errors import UsageError
from peru_cli.merge.given import ALL, Given
from peru_cli.merge.layers import Spot, depth, stacks
from peru_cli.merge.output import show
from peru_cli.merge.varied import Clause, is_plain
from peru_cli.methods.parameters import Value
from peru_cli.methods.table import Method


@dataclass(frozen=True)
class Typed:
    """A merge as it was typed: models by task, and effective values."""

    method: Method
    base: str | None
    models: Sequence[tuple[str, str]]  # task, the model's argument
    values: Mapping[str, Value]
    given: Given
    names: Sequence[str]  # of the merged tensors
    dtype: Dtype  # of the output


def recipe_text(typed: Typed) -> tuple[str, list[str]]:
    """The recipe, and notes on options that mergekit lacks or treats differently.

    Raises UsageError for a method that mergekit lacks."""
    import yaml

    method, mapped = typed.method, typed.method.mergekit
    if mapped is None:
        raise UsageError(f"mergekit has no method like {method.name}", "leave --write-recipe out")
    document: dict[str, Any] = {"merge_method": mapped.name}
    if typed.base is not None:
        document["base_model"] = typed.base
    elif mapped.name == "slerp":
        document["base_model"] = typed.models[0][1]
    document["models"] = []
    for task, model in typed.models:
        own = {theirs: _value(typed, option, task) for option, theirs in mapped.own.items()}
        document["models"].append({"model": model, **({"parameters": own} if own else {})})
    whole: dict[str, Any] = {}
    for option, theirs in mapped.whole.items():
        whole[theirs] = typed.values[option] == "mean" if option == "reduce" else _value(typed, option, ALL)
    if whole:
        document["parameters"] = whole
    document |= {"dtype": "float32", "out_dtype": typed.dtype.torch_name}  # peru computes in float32 and rounds once
    known = {*mapped.own, *mapped.whole}
    differing = [(name, value) for name, value in mapped.fixed.items() if typed.values[name] != value]
    said = [f"--{name} {show(typed.values[name])}: mergekit has {show(value)}" for name, value in differing]
    for name, declared in method.options.items():
        if name not in known | {*mapped.fixed, "weight"} and typed.values[name] != declared.default:
            said.append(f"--{name} {show(typed.values[name])}: mergekit has no such option")
    comments = "".join(f"# {line}\n" for line in said)
    return f"{comments}{yaml.safe_dump(document, sort_keys=False, default_flow_style=None, width=120)}", said


def _value(typed: Typed, option: str, task: str) -> Any:
    """An option of a task, or of the whole merge, in a recipe's form."""
    found = typed.given.settings.get(option, {})
    setting = found.get(task, found.get(ALL))
    if setting is None:
        return _plain(typed.values.get(option, 1.0))
    if is_plain(setting):
        return _plain(setting[0].values[0])
    tables = [table for clause in setting for table in _tables(clause, typed.names)]
    if all("filter" in table for table in tables):  # other tensors have the default, which mergekit would not know
        default = typed.method.options[option].default
        assert default is not None
        tables.append({"value": _plain(default)})
    return tables


def _tables(clause: Clause, names: Sequence[str]) -> list[dict[str, Any]]:
    """A clause as tables with filters. A range of layers becomes one table for each layer."""
    if clause.layers is None:
        value = [_plain(v) for v in clause.values] if clause.gradient else _plain(clause.values[0])
        return [{**({"filter": clause.filter} if clause.filter is not None else {}), "value": value}]
    first, last = clause.layers
    return [
        {"filter": f"{stack}.{layer}.", "value": _plain(clause.at(Spot("", layer, depth(layer - first, last - first + 1))))}
        for stack, layers in stacks(names).items()
        for layer in range(first, min(last + 1, layers))
    ]


def _plain(value: Value) -> float | int | str | bool:
    return float(value) if isinstance(value, Fraction) else value


def check_path(path: Path, force: bool) -> None:
    """UsageError for a recipe that already exists or cannot be written there."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists already", "choose another --write-recipe, or --force to replace it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path.absolute().parent}: no such folder, so {path.name} cannot be written there")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.peru-partial")
    beside.write_text(text, "utf-8")
    os.replace(beside, path)
