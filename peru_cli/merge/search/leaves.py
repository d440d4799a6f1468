"""The numbers of a recipe that can be searched: their names, their places in the text, and the text with other numbers.

A name is the way to the number, as in messages about recipes: `models[1].parameters.weight`, `parameters.t[1].value[3]`. Its end is
enough where only one number has it (`lambda`), and `weight.a` is the weight of the model a."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from peru_cli.checkpoints.resolve import default_task
from peru_cli.errors import UsageError
from peru_cli.merge.recipe.document import Complaints, Document, Path, read_documents
from peru_cli.merge.recipe.names import Known
from peru_cli.merge.recipe.parts import Recipe
from peru_cli.merge.recipe.plan import read_all
from peru_cli.merge.recipe.schema import exact, spelt_path
from peru_cli.merge.search.space import Dimension, Point, Range, decimal, dimension

_MOST = 12  # names listed in a message


@dataclass(frozen=True)
class Leaf:
    """A number of a recipe: its name, its short name (`weight.a`), its characters in the text, its value."""

    name: str
    short: str
    span: tuple[int, int]
    value: Fraction
    whole: bool

    def answers_to(self, name: str) -> bool:
        """Whether a typed name could mean this number."""
        return name in (self.name, self.short) or self.name.endswith(f".{name}")


class Leaves:
    """The searched numbers of a recipe's result document."""

    def __init__(self, text: str, label: str, recipe: Recipe, ranges: Sequence[Range]) -> None:
        """UsageError for names that mean no number, or several, and for bounds that make an impossible recipe. Opens no model."""
        self._text, self._label = text, label
        document = next(d for d in read_documents(text, label) if isinstance(d.data, dict) and d.data.get("name") == recipe.name)
        known = list(_leaves(document, recipe.method))
        self._chosen = [_choose(one.name, known, label) for one in ranges]
        if len({leaf.span for leaf in self._chosen}) < len(self._chosen):
            raise UsageError("--search names one number of the recipe twice", "give each number one range")
        self.dimensions: list[Dimension] = [
            dimension(one, leaf.value, int if leaf.whole else float) for one, leaf in zip(ranges, self._chosen, strict=True)
        ]
        for corner in (self.lowest, tuple(d.high for d in self.dimensions)):
            try:
                self.recipes(corner)
            except UsageError as error:
                bounds = ",".join(f"{d.name}={d.text}" for d in self.dimensions)
                raise UsageError(f"--search {bounds}: at an end of the range, {error.message}", error.hint) from error

    @property
    def lowest(self) -> Point:
        """The least of all numbers."""
        return tuple(d.low for d in self.dimensions)

    @property
    def start(self) -> Point:
        """The recipe's own numbers, or those in range next to them."""
        return tuple(d.start for d in self.dimensions)

    def text(self, point: Point) -> str:
        """The recipe's text with the numbers of a point."""
        text = self._text
        places = sorted(zip(self._chosen, point, strict=True), key=lambda pair: pair[0].span, reverse=True)
        for leaf, number in places:
            text = text[: leaf.span[0]] + decimal(number) + text[leaf.span[1] :]
        return text

    def recipes(self, point: Point) -> list[Recipe]:
        """The recipe's documents at a point, the result last. UsageError if it is impossible."""
        return read_all(read_documents(self.text(point), self._label), Complaints(self._label))


def _choose(name: str, known: Sequence[Leaf], label: str) -> Leaf:
    found = [leaf for leaf in known if name in (leaf.name, leaf.short)] or [leaf for leaf in known if leaf.answers_to(name)]
    if len(found) == 1:
        return found[0]
    listed = [f"{leaf.name}" + (f" ({leaf.short})" if leaf.short != leaf.name else "") for leaf in found or known]
    more = f" and {len(listed) - _MOST} more" if len(listed) > _MOST else ""
    if found:
        raise UsageError(f"--search {name} means {len(found)} numbers of {label}", f"name one of {', '.join(listed[:_MOST])}{more}")
    hint = f"it has {', '.join(listed[:_MOST])}{more}" if known else "write one there first: the search begins at it"
    raise UsageError(f"--search {name}: no number in the parameters of {label} has this name", hint)


def _leaves(document: Document, method: Known) -> Iterator[Leaf]:
    """All numbers of parameters that have an effect, in order."""

    def walk(data: Any, path: Path, model: str | None) -> Iterator[Leaf]:
        if isinstance(data, list):
            for number, item in enumerate(data):
                yield from walk(item, (*path, number), model)
        elif isinstance(data, dict):
            named = data.get("model") if path and path[-2:-1] in (("models",), ("sources",)) else None
            model = default_task(named.partition("+")[2] or named) if isinstance(named, str) else model
            for key, item in data.items():
                if key == "parameters" and isinstance(item, dict):
                    for name, value in item.items():
                        parameter = method.parameters.get(name)
                        if parameter is not None and parameter.kind in ("number", "share", "whole") and (parameter.own or model is None):
                            yield from numbers(value, (*path, key, name), name, model, parameter.kind == "whole")
                else:
                    yield from walk(item, (*path, key), model)

    def numbers(data: Any, path: Path, key: str, model: str | None, whole: bool) -> Iterator[Leaf]:
        if isinstance(data, (list, dict)):
            for step, item in enumerate(data) if isinstance(data, list) else data.items():
                if step != "filter":
                    yield from numbers(item, (*path, step), key, model, whole)
        elif (value := exact(data)) is not None:
            name = spelt_path(path)
            end = name[name.index(f"parameters.{key}") + len("parameters.") :]
            yield Leaf(name, end.replace(key, f"{key}.{model}", 1) if model is not None else name, document.spans[path], value, whole)

    yield from walk(document.data, (), None)
