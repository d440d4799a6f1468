"""Weights and densities from the command line, for one task or all, for all tensors or by tensor: `--keep a='0..31:[10%,50%]'`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from peru_cli import options
from peru_cli.errors import UsageError
from peru_cli.merge.layers import spots
from peru_cli.merge.varied import Setting, build, check_setting, is_plain, parse_setting, read_number, value_at
from peru_cli.methods.parameters import Parameters, Value
from peru_cli.methods.table import Method
from peru_cli.shown import listed

if TYPE_CHECKING:
    from peru_cli.methods.rules import Rule

BY_TASK = ("keep", "gamma", "epsilon")  # options that can differ by task: TASK=VALUE
BY_TENSOR = (*BY_TASK, "scale", "t")
_SHARES = ("keep", "gamma")
ALL = ""  # in place of a task's name


@dataclass
class Given:
    """What was typed for options that may vary: by option and task, the setting and its text."""

    settings: dict[str, dict[str, Setting]] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, option: str, texts: Sequence[str], tasks: bool = True) -> None:
        """Read everything that was typed for an option. UsageError for values that cannot be read or are given twice."""
        for text in texts:
            task, equals, value = text.partition("=")
            if not equals or not tasks:
                task, value = ALL, text
            found = self.settings.setdefault(option, {})
            if task in found:
                raise UsageError(f"--{option} is given twice" + (f" for {task}" if task else ""))
            found[task] = parse_setting(value, _reader(option), f"--{option}")
            self.texts.setdefault(option, {})[task] = value

    def first(self, option: str) -> Value:
        """One value of an option: that for all tasks, if there is one."""
        found = self.settings[option]
        return found.get(ALL, next(iter(found.values())))[0].values[0]

    @property
    def of_single_tasks(self) -> list[str]:
        """Options given only for some tasks."""
        return [name for name, found in self.settings.items() if ALL not in found and name != "weight"]

    @property
    def by_tensor(self) -> list[str]:
        """Options that differ from tensor to tensor."""
        return [name for name, found in self.settings.items() if not all(is_plain(setting) for setting in found.values())]

    def check_tasks(self, names: Sequence[str]) -> None:
        """UsageError for a task without a model."""
        for option, found in self.settings.items():
            for task in found:
                if task != ALL and task not in names:
                    text = f"--{option} {task}={self.texts[option][task]}: no model is called {task!r}"
                    raise UsageError(text, f"write TASK=VALUE; the tasks are {listed(names)}")
                if task == ALL and option == "weight":
                    raise UsageError(f"--weight {self.texts[option][task]} names no task", f"write TASK=W; the tasks are {listed(names)}")


def _reader(option: str) -> Callable[[str], Value]:
    if option in _SHARES:
        return lambda text: options.parse_density(text, f"--{option}")
    return read_number(f"--{option}")


def first_parameters(given: Given, parameters: Parameters) -> Parameters:
    """The parameters with the values that differ by task. Values that differ by tensor are replaced by the first: enough to
    know the method's kind."""
    own, values, weights = dict(parameters.own), dict(parameters.values), list(parameters.weights)
    for option, found in given.settings.items():
        if ALL in found:
            values[option] = found[ALL][0].values[0]
        listed = [found[task][0].values[0] if task in found else values.get(option, 1.0) for task in parameters.tasks]
        if option == "weight":
            weights = [float(value) for value in listed if not isinstance(value, str)]
        elif set(found) - {ALL}:
            own[option] = tuple(listed)
    return replace(parameters, weights=tuple(weights), values=values, own=own)


def build_by_tensor(method: Method, given: Given, parameters: Parameters, names: Sequence[str]) -> Rule:
    """The rule for tensors of these names. Each gets the values for its name, layer and depth.

    Raises UsageError for a filter or layers that match no tensor."""
    where = spots(names)
    for option, found in given.settings.items():
        for setting in found.values():
            check_setting(setting, where, f"--{option}")
    each = []
    for name in names:
        values, own, weights = dict(parameters.values), dict(parameters.own), list(parameters.weights)
        for option, found in given.settings.items():
            every = value_at(found[ALL], where[name]) if ALL in found else None
            if every is not None:
                values[option] = every
            default = every if every is not None else default_of(method, option)
            if every is None and ALL in found:
                values[option] = default
            mine = [value_at(found[task], where[name]) if task in found else None for task in parameters.tasks]
            listed = [value if value is not None else default for value in mine]
            if option == "weight":
                weights = [float(value) for value in listed if not isinstance(value, str)]
            elif set(found) - {ALL}:
                own[option] = tuple(listed)
        each.append(replace(parameters, weights=tuple(weights), values=values, own=own))
    return build(method, each)


def default_of(method: Method, option: str) -> Value:
    """The value of tensors that no part of a setting matches."""
    default = method.options[option].default
    assert default is not None
    return default


def shown(
    given: Given, values: Mapping[str, Value], weights: Sequence[Value], tasks: Sequence[str]
) -> tuple[dict[str, Value], tuple[Value, ...], tuple[tuple[str, str, str], ...]]:
    """Options and weights as they were typed, and those of single tasks (option, task, text): for cards and summaries."""
    words, own = dict(values), []
    listed = list(weights)
    for option, found in given.texts.items():
        for task, text in found.items():
            if option == "weight":
                if not is_plain(given.settings[option][task]):
                    listed[tasks.index(task)] = text
            elif task == ALL:
                if not is_plain(given.settings[option][task]):
                    words[option] = text
            else:
                own.append((option, task, text))
    return words, tuple(listed), tuple(own)
