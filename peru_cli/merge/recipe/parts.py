"""The parts of a parsed recipe: models, sources, slices, modules, a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.merge.recipe.names import Known
from peru_cli.merge.varied import Setting


@dataclass(frozen=True)
class ModelName:
    """`path[@revision][+lora[@revision]]`: what to open, in the form of peru's arguments."""

    model: str
    lora: str | None = None

    def __str__(self) -> str:
        return self.model if self.lora is None else f"{self.model}+{self.lora}"


Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class Source:
    """One input of a slice: a model, its layers (None: all of them), and its own parameters."""

    model: ModelName
    layers: tuple[int, int] | None
    settings: Settings
    line: int
    layers_line: int = 0


@dataclass(frozen=True)
class Slice:
    """A run of the output's layers, and its sources."""

    sources: tuple[Source, ...]
    base: ModelName | None
    settings: Settings
    line: int


@dataclass(frozen=True)
class Module:
    """A part of the model with slices of its own. `name` None is the whole model."""

    name: str | None
    slices: tuple[Slice, ...]
    whole: bool  # `models`: all layers of each
    settings: Settings
    line: int


@dataclass(frozen=True)
class Tokenizer:
    """Which tokenizer the output gets: `union`, `base`, or a model's."""

    source: str
    line: int
    pad_to_multiple_of: int | None = None
    tokens: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """One parsed document."""

    name: str | None
    method: Known
    method_line: int
    modules: tuple[Module, ...]
    base: ModelName | None
    settings: Settings
    dtype: Dtype | None  # dtype in which mergekit loads and computes
    out_dtype: Dtype | None
    tokenizer: Tokenizer | None
    chat_template: str | None
    ignored: tuple[str, ...]  # parameters without effect, such as int8_mask

    @property
    def written(self) -> Dtype | None:
        """The dtype of the output. None: the inputs' own."""
        return self.out_dtype or self.dtype

    def models(self) -> Iterator[ModelName]:
        """Every named model, the base first, as often as it is named."""
        if self.base is not None:
            yield self.base
        for module in self.modules:
            for part in module.slices:
                if part.base is not None:
                    yield part.base
                yield from (source.model for source in part.sources)
