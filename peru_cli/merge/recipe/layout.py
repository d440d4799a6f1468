"""Lay out the tensors of the output: whole models unchanged, slices restacked under new layer numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.resolve import default_task
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.merge.layers import Spot, comes_first, depth, layer_count, layer_of, main_stack, renumbered, spots
from peru_cli.merge.recipe.document import Complaints
from peru_cli.merge.recipe.parts import ModelName, Module, Recipe, Slice, Source
from peru_cli.merge.recipe.resolve import Inputs, Origin, inputs_of
from peru_cli.shown import listed

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "shared.weight")


class Restacked(Checkpoint):
    """Tensors of several checkpoints under new names."""

    def __init__(self, label: str, taken: Mapping[str, tuple[Checkpoint, str]], like: Checkpoint) -> None:
        """`taken` maps every new name to a model and the name there. Side files are those of `like`."""
        models = {id(model): model for model, _ in taken.values()}
        self.label, self.side_files, self.metadata = label, like.side_files, like.metadata
        self.kind = "layers of " + listed(model.label for model in models.values())
        self.warnings = []
        self.files: Sequence[Place] = [file for model in models.values() for file in model.files]
        self.expanded = all(model.expanded for model in models.values())
        self.public_name = like.public_name
        self._taken = taken
        self.tensors = {name: _named(name, model.tensors[theirs]) for name, (model, theirs) in taken.items()}
        order = [(name, list(models).index(id(model)), theirs, model.part) for name, (model, theirs) in sorted(taken.items())]
        self.part = hashlib.sha256(json.dumps(order).encode()).hexdigest()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        model, theirs = self._taken[name]
        model.read_into(theirs, offset, buffer)


def _named(name: str, info: TensorInfo) -> TensorInfo:
    return TensorInfo(name, info.dtype, info.shape)


@dataclass
class Layout:
    """The inputs of a merge as checkpoints with the output's names, and the origin of each output tensor."""

    base: Checkpoint | None
    tasks: list[tuple[str, Checkpoint]]
    donor: Checkpoint  # of config and tokenizer
    spots: dict[str, Spot]
    places: dict[str, tuple[int, int]]  # module and slice, by output name
    absent: frozenset[tuple[str, str]] = frozenset()  # (task, tensor) whose slice has fewer sources
    config: dict[str, Any] = field(default_factory=dict)  # changes of config.json
    stacked: bool = False  # layers under new numbers, or of several models

    def origin(self, name: str) -> Origin:
        """The origin of an output tensor."""
        module, part = self.places[name]
        return Origin(module, part, self.spots[name])


Opened = Mapping[ModelName, Checkpoint]


def lay_out(recipe: Recipe, opened: Opened, complaints: Complaints) -> Layout | None:
    """The layout of a recipe whose models are open. None after errors: layers that a model lacks, tensors of no module."""
    errors = len(complaints.errors)
    for module in recipe.modules:
        for part in module.slices:
            for source in part.sources:
                _check_layers(source, opened[source.model], complaints)
    if len(complaints.errors) > errors:
        return None
    donor = opened[recipe.base] if recipe.base is not None else opened[recipe.modules[0].slices[0].sources[0].model]
    if len(recipe.modules) == 1 and _whole(recipe.modules[0], opened):
        return _whole_models(recipe, opened, donor)
    return _Stacker(recipe, opened, donor, complaints).layout()


def _layers(model: Checkpoint) -> tuple[str, int]:
    return main_stack(model.tensors, model.config()) or ("", 0)


def _check_layers(source: Source, model: Checkpoint, complaints: Complaints) -> None:
    if source.layers is None:
        return
    _, layers = _layers(model)
    if not layers:
        complaints.error(source.layers_line, f"layer_range: {source.model} has no numbered layers")
    elif source.layers[1] > layers:
        first, last = source.layers
        complaints.error(
            source.layers_line,
            f"layer_range [{first}, {last}] is out of bounds: {source.model} has {layers} layers, so [0, {layers}] takes all of them",
        )


def _whole(module: Module, opened: Opened) -> bool:
    """Whether all layers of all sources keep their place."""
    return module.whole or (len(module.slices) == 1 and all(s.layers == (0, _layers(opened[s.model])[1]) for s in module.slices[0].sources))


def _whole_models(recipe: Recipe, opened: Opened, donor: Checkpoint) -> Layout:
    found = inputs_of(recipe, recipe.modules[0], recipe.modules[0].slices[0])
    every = [opened[source.model] for source in (*found.merged, *([found.base] if found.base is not None else []))]
    full = {id(model): _with_head(model, every) for model in every}
    names = task_names([[source] for source in found.merged])
    tasks = [(name, full[id(opened[source.model])]) for name, source in zip(names, found.merged, strict=True)]
    base = full[id(opened[found.base.model])] if found.base is not None else None
    reference = base if base is not None else tasks[0][1]
    config = {"tie_word_embeddings": False} if any(full[id(m)] is not m for m in every) else {}
    return Layout(base, tasks, donor, spots(reference.tensors), dict.fromkeys(reference.tensors, (0, 0)), config=config)


def _with_head(model: Checkpoint, others: Sequence[Checkpoint]) -> Checkpoint:
    """The model with its embedding as head, if it has no head of its own and another model does."""
    if HEAD in model.tensors or not any(HEAD in other.tensors for other in others):
        return model
    tied = next((name for name in model.tensors if name.endswith(_EMBEDDINGS)), None)
    if tied is None:
        return model
    full = Restacked(model.label, {name: (model, name) for name in model.tensors} | {HEAD: (model, tied)}, model)
    full.kind = f"{model.kind}, with its embedding as the missing head"
    return full


def task_names(sources: Sequence[Sequence[Source]]) -> list[str]:
    """A distinct name for the inputs of each position: the model's if it is the same everywhere, otherwise its number."""
    found: list[str] = []
    for position, at_position in enumerate(sources):
        models = {source.model for source in at_position}
        model = next(iter(models))
        name = default_task(model.lora or model.model) if len(models) == 1 else f"input{position + 1}"
        taken = {other.lower() for other in found}
        plain, number = name, 2
        while name.lower() in taken:
            name, number = f"{plain[:60]}-{number}", number + 1
        found.append(name)
    return found


class _Stacker:
    """Stacks slices, module by module."""

    def __init__(self, recipe: Recipe, opened: Opened, donor: Checkpoint, complaints: Complaints) -> None:
        self._recipe, self._opened, self._donor, self._complaints = recipe, opened, donor, complaints
        self._taken: list[dict[str, tuple[Checkpoint, str]]] = []  # by position
        self._base: dict[str, tuple[Checkpoint, str]] = {}
        self._sources: list[list[Source]] = []  # by position
        self._places: dict[str, tuple[int, int]] = {}
        self._spots: dict[str, Spot] = {}
        self._origins: list[int] = []  # the donor's layer of each layer of the output
        self._changed: dict[str, Any] = {}

    def layout(self) -> Layout | None:
        """See `lay_out`."""
        names = [module.name for module in self._recipe.modules]
        for number, module in enumerate(self._recipe.modules):
            at = 0
            for index, part in enumerate(module.slices):
                at = self._slice(number, index, module, part, inputs_of(self._recipe, module, part), at, names)
            if not module.whole and len(names) == 1:
                self._config(at)
        if not self._taken:
            return None
        tasks = []
        for name, taken in zip(task_names(self._sources), self._taken, strict=True):
            tasks.append((name, Restacked(name, taken, self._donor)))
        base = Restacked("the base's layers", self._base, self._donor) if self._base else None
        every = set(self._places)
        absent = frozenset((name, tensor) for (name, _), taken in zip(tasks, self._taken, strict=True) for tensor in every - set(taken)
                           if self._lacks(tensor, taken))  # fmt: skip
        return Layout(base, list(tasks), self._donor, self._spots, self._places, absent, self._changed, stacked=True)

    def _lacks(self, tensor: str, taken: Mapping[str, tuple[Checkpoint, str]]) -> bool:
        """Whether the slice of a tensor has no source at this position."""
        module, part = self._places[tensor]
        position = next(i for i, mine in enumerate(self._taken) if mine is taken)
        inner = self._recipe.modules[module]
        return position >= len(inputs_of(self._recipe, inner, inner.slices[part]).merged)

    def _slice(self, number: int, index: int, module: Module, part: Slice, found: Inputs, at: int, names: Sequence[str | None]) -> int:
        """Take a slice's tensors. Returns the number of the output's next layer."""
        first, last = index == 0, index == len(module.slices) - 1
        every = [self._opened[source.model] for source in (*found.merged, *([found.base] if found.base is not None else []))]
        length = 0
        for position, source in enumerate((*found.merged, *([found.base] if found.base is not None else []))):
            base = position == len(found.merged)
            while not base and len(self._taken) <= position:
                self._taken.append({})
                self._sources.append([])
            into = self._base if base else self._taken[position]
            if not base:
                self._sources[position].append(source)
            model = _with_head(self._opened[source.model], every)
            if model is not self._opened[source.model]:
                self._changed["tie_word_embeddings"] = False
            stack, layers = _layers(model)
            theirs = spots(model.tensors) if module.whole else {}
            begin, end = source.layers or (0, layers)
            length = end - begin
            if position == 0 and model.config().get("model_type") == self._donor.config().get("model_type"):
                self._origins += range(begin, end)
            for name in model.tensors:
                if names != [None] and _module_of(name, names) != module.name:
                    continue
                layer = layer_of(name)
                if module.whole or layer is None or layer[0] != stack:
                    if module.whole or (first if comes_first(name) else last):
                        self._put(into, name, model, name, number, index, theirs.get(name) or Spot(name, None, Fraction(0)))
                elif begin <= layer[1] < end:
                    new = renumbered(name, at + layer[1] - begin)
                    spot = Spot(new, at + layer[1] - begin, depth(layer[1] - begin, length))
                    self._put(into, new, model, name, number, index, spot)
        return at + length

    def _put(
        self, into: dict[str, tuple[Checkpoint, str]], name: str, model: Checkpoint, theirs: str, module: int, part: int, spot: Spot
    ) -> None:
        into[name] = (model, theirs)
        self._places[name] = (module, part)
        self._spots[name] = spot

    def _config(self, layers: int) -> None:
        """Update the output's config.json for its layers."""
        config = self._donor.config()
        stated = layer_count(config)
        if stated is None:
            return
        key, before = stated
        where = self._changed if key in config else self._changed.setdefault("text_config", {})
        table = config if key in config else config["text_config"]
        where[key] = layers
        for name, value in table.items():  # entries for each layer move with the layers
            if isinstance(value, list) and len(value) == before and len(self._origins) == layers and max(self._origins) < before:
                where[name] = [value[i] for i in self._origins]


def _module_of(name: str, modules: Sequence[str | None]) -> str | None:
    """The module of a tensor: the one whose name is part of the tensor's, or the one with a generic name."""
    parts = name.split(".")
    for module in modules:
        if module in parts:
            return module
    rest = [module for module in modules if module in ("default", "text_decoder", "language_model", "text_model", "decoder")]
    return rest[0] if rest else None


def changed_config(content: bytes, changes: Mapping[str, Any]) -> bytes:
    """config.json with some of its values replaced, including inner tables."""
    config = json.loads(content)

    def put(table: dict[str, Any], new: Mapping[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, dict) and isinstance(table.get(key), dict):
                put(table[key], value)
            else:
                table[key] = value

    put(config, changes)
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
