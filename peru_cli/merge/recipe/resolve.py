"""Resolve a recipe for every tensor: which inputs are sources and which are bases, and values from the nearest level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peru_cli.merge.layers import Spot
from peru_cli.merge.recipe.document import Complaints
from peru_cli.merge.recipe.names import ours
from peru_cli.merge.recipe.parts import ModelName, Module, Recipe, Settings, Slice, Source
from peru_cli.merge.varied import Setting, unmatched, value_at
from peru_cli.methods.parameters import Parameters, Value
from peru_cli.methods.table import Method


@dataclass(frozen=True)
class Inputs:
    """The merged sources of a slice, in order, and the one that is the base of task vectors (None if there is none)."""

    merged: tuple[Source, ...]
    base: Source | None


def base_of(recipe: Recipe, part: Slice) -> ModelName | None:
    """The base of a slice: its own, or the recipe's."""
    return part.base or recipe.base


def inputs_of(recipe: Recipe, module: Module, part: Slice) -> Inputs:
    """The inputs of a slice. A base that is not listed is one more source, with the layers that all the others have.

    Methods on whole weights take the base as an input. slerp starts at the base, so it comes first."""
    base = base_of(recipe, part)
    role = recipe.method.base
    listed = [source for source in part.sources if base is not None and source.model == base]
    if base is not None and not listed and role != "none":
        ranges = {source.layers for source in part.sources}
        if len(ranges) == 1:
            listed = [Source(base, next(iter(ranges)), {}, part.line, part.line)]
    if role == "none" or base is None:
        return Inputs(part.sources, None)
    if role == "input":
        rest = tuple(source for source in part.sources if source not in listed[:1])
        return Inputs((*listed[:1], *rest), None)
    return Inputs(tuple(source for source in part.sources if source.model != base), listed[0] if listed else None)


def check(recipe: Recipe, complaints: Complaints) -> None:
    """Check a recipe before any model is opened: the method, numbers of inputs, bases, required values."""
    known = recipe.method
    if ours(known) is None:
        complaints.error(recipe.method_line, f"peru does not have {known.name} yet: `peru merge --list-methods` lists its methods")
    if known.base == "needed" and recipe.base is None and not all(part.base for module in recipe.modules for part in module.slices):
        complaints.error(recipe.method_line, f"{known.name} needs a base: add base_model")
        return
    if known.name == "slerp" and recipe.base is None:
        complaints.error(recipe.method_line, "slerp interpolates from the base to the other model: add base_model, one of the two models")
        return
    for module in recipe.modules:
        for part in module.slices:
            _check_slice(recipe, module, part, complaints)


def _check_slice(recipe: Recipe, module: Module, part: Slice, complaints: Complaints) -> None:
    known = recipe.method
    found = inputs_of(recipe, module, part)
    base = base_of(recipe, part)
    if known.base in ("needed", "possible") and base is not None and found.base is None:
        complaints.error(
            part.line, f"the base model {base} is not among the sources, whose layers differ: list it with its own layer_range"
        )
    least, most = known.inputs
    if len(found.merged) < least or (most is not None and len(found.merged) > most):
        wanted = f"{least}" if most == least else f"at least {least}"
        besides = " besides the base" if known.base in ("needed", "possible") and base is not None else ""
        models = "model" if wanted.endswith("1") else "models"
        what = "more" if len(found.merged) < least else "fewer"
        complaints.error(part.line, f"{known.name} takes {wanted} {models}{besides}, not {len(found.merged)}: list {what}")
    for name, parameter in known.parameters.items():
        if parameter.default is not None:
            continue
        for source in found.merged if parameter.own else found.merged[:1]:
            if not any(name in level for level in _levels(recipe, module, part, source if parameter.own else None)):
                of = f" of {source.model}" if parameter.own else ""
                hint = ": mergekit treats the base as one more input here, so list it with a weight" if source.line == part.line else ""
                hint = hint or f": add {'' if parameter.own else 'top-level '}parameters: {{{name}: {'1' if name == 'weight' else '0.5'}}}"
                complaints.error(source.line if parameter.own else recipe.method_line, f"{known.name} needs a {name}{of}{hint}")


def _levels(recipe: Recipe, module: Module, part: Slice, source: Source | None) -> Iterator[Settings]:
    """Settings from the nearest level to the whole merge."""
    if source is not None:
        yield source.settings
    yield part.settings
    yield module.settings
    yield recipe.settings


def check_filters(recipe: Recipe, spots: Mapping[str, Spot], complaints: Complaints, tied: bool) -> None:
    """Report filters that match no tensor's name: an error, but a warning for a tied head, which is not stored."""
    for setting, key in _settings(recipe):
        for clause in unmatched(setting, spots.values()):
            text = f"the filter {clause.filter!r} of {key} matches no tensor"
            if tied and clause.filter is not None and clause.filter in "lm_head.weight":
                complaints.warn(clause.line, f"{text}: the head is tied to the embedding")
            else:
                complaints.error(clause.line, f"{text}: `peru inspect MODEL` lists the names")


def _settings(recipe: Recipe) -> Iterator[tuple[Setting, str]]:
    levels = [recipe.settings]
    for module in recipe.modules:
        levels.append(module.settings)
        for part in module.slices:
            levels.append(part.settings)
            levels += [source.settings for source in part.sources]
    for level in levels:
        for key, setting in level.items():
            yield setting, key


@dataclass(frozen=True)
class Origin:
    """The origin of an output tensor: its module and slice (indices), and its spot."""

    module: int
    slice: int
    spot: Spot


class Values:
    """The values of a recipe, tensor by tensor, in the form that peru's method takes."""

    def __init__(self, recipe: Recipe, method: Method, tasks: Sequence[str], has_base: bool, complaints: Complaints) -> None:
        """`tasks` are the names of the inputs by their position in a slice."""
        assert method.mergekit is not None
        self._recipe, self._method, self._tasks, self._has_base, self._complaints = recipe, method, tuple(tasks), has_base, complaints
        self._mapped = method.mergekit

    def _value(self, origin: Origin, name: str, source: Source | None) -> Value | None:
        module = self._recipe.modules[origin.module]
        for level in _levels(self._recipe, module, module.slices[origin.slice], source):
            if name in level and (value := value_at(level[name], origin.spot)) is not None:
                return value
        default = self._recipe.method.parameters[name].default
        if default is None:
            line = source.line if source is not None else self._recipe.method_line
            of = f" of {source.model}" if source is not None else ""
            self._complaints.error(line, f"no {name}{of} is given for {origin.spot.name}: add one without a filter")
        return default

    def at(self, origin: Origin) -> Parameters | None:
        """The parameters of an output tensor. None after an error."""
        module = self._recipe.modules[origin.module]
        sources = inputs_of(self._recipe, module, module.slices[origin.slice]).merged
        names = self._recipe.method.parameters
        weights = [1.0] * len(sources)
        own: dict[str, tuple[Value, ...]] = {}
        values: dict[str, Value] = dict(self._mapped.fixed)
        for name, parameter in names.items():
            if parameter.own:
                found = [self._value(origin, name, source) for source in sources]
                if any(value is None for value in found):
                    return None
                listed = tuple(value for value in found if value is not None)
                if name == "weight":
                    weights = [float(value) for value in listed if not isinstance(value, str)]
                elif (option := _option(self._mapped.own, name)) is not None:
                    own[option] = listed
                else:
                    self._refuse(name, listed, parameter.default)
            elif (value := self._value(origin, name, None)) is None:
                return None
            else:
                self._whole(name, value, parameter.default, values, weights)
        for option, declared in self._method.options.items():
            if option not in values and option != "weight":
                value = own[option][0] if option in own else declared.default
                assert value is not None
                values[option] = value
        return Parameters(self._tasks[: len(sources)], tuple(weights), values, own, self._has_base, in_doubles=True)

    def _whole(self, name: str, value: Value, default: Value | None, values: dict[str, Value], weights: list[float]) -> None:
        option = _option(self._mapped.whole, name)
        if name == "normalize" and option in (None, "reduce"):
            if option == "reduce":
                values["reduce"] = "mean" if value else "sum"
            elif value and abs(total := sum(weights)) >= 1e-8:  # without an election, all weights are divided by their sum
                weights[:] = [weight / total for weight in weights]
        elif name == "rescale" and "rescale" in self._method.options:
            if not value:
                values["rescale"] = "none"
        elif name in ("rescale_norm",) and "rescale" in self._method.options:
            if value == "default" and values.get("rescale") != "none":
                values["rescale"] = "density"
            elif value != "l1" and value != "default":
                self._refuse(name, (value,), default)
        elif option is not None:
            values[option] = value
        else:
            self._refuse(name, (value,), default)

    def _refuse(self, name: str, found: Sequence[Value], default: Value | None) -> None:
        """Report a parameter that peru's method lacks, unless it has its default value."""
        if any(value != default for value in found) and not (name == "rescale_norm" and "rescale" not in self._method.options):
            self._complaints.error(self._recipe.method_line, f"peru's {self._method.name} has no {name} {found[0]!r}: only {default!r}")


def _option(mapped: Mapping[str, str], name: str) -> str | None:
    """Our option for one of mergekit's parameters."""
    return next((option for option, parameter in mapped.items() if parameter == name), None)
