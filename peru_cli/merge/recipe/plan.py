"""A recipe's documents as merges: models opened, tensors laid out, parameters settled for each of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from peru_cli.checkpoints.names.translated import bring_together
from peru_cli.checkpoints.resolve import open_model
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.finetunes.open import open_fine_tune
from peru_cli.merge.plan import MergePlan, Options, plan_merge
from peru_cli.merge.recipe.document import Complaints, Document
from peru_cli.merge.recipe.layout import HEAD, Layout, changed_config, lay_out
from peru_cli.merge.recipe.names import ours
from peru_cli.merge.recipe.parts import ModelName, Recipe
from peru_cli.merge.recipe.resolve import Values, check, check_filters, inputs_of
from peru_cli.merge.recipe.schema import read_recipe
from peru_cli.merge.recipe.tokens import align_tokens, check_template, settle_tokens
from peru_cli.merge.varied import build
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule
from peru_cli.methods.table import Method


@dataclass
class Stage:
    """One document, ready to be merged."""

    recipe: Recipe
    method: Method
    layout: Layout
    plan: MergePlan
    rule: Rule
    parameters: list[Parameters]  # of each slot
    opened: dict[ModelName, Checkpoint] = field(default_factory=dict)
    models: Sequence[Checkpoint] = ()  # as they were opened
    said: list[str] = field(default_factory=list)  # messages about its names and vocabulary


class Forthcoming(Checkpoint):
    """The future output of an earlier document: its tensors and config are known, but it has no bytes yet."""

    ranged = True  # treated as remote: nothing is sampled

    def __init__(self, name: str, plan: MergePlan) -> None:
        self.label, self.kind, self.warnings, self.metadata = name, "document of this recipe", [], {}
        self.tensors = {info.name: info for info in plan.outputs}
        self.side_files = plan.reference.side_files
        self.part = name
        config = plan.overrides.get("config.json")
        self._config = _parsed(config) if config is not None else plan.reference.config()

    def config(self) -> dict[str, Any]:
        return self._config

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        raise AssertionError(f"{self.label} is not merged yet")


def _parsed(content: bytes) -> dict[str, Any]:
    found = json.loads(content)
    return found if isinstance(found, dict) else {}


def read_all(documents: Sequence[Document], complaints: Complaints) -> list[Recipe]:
    """All documents as recipes in merge order, the result last.

    Raises UsageError with all problems. Opens nothing."""
    recipes = []
    for document in documents:
        recipe = read_recipe(document, complaints)
        if recipe is not None:
            check(recipe, complaints)
            check_template(recipe, document.line(("chat_template",)), complaints)
            recipes.append(recipe)
    complaints.settle()
    return _in_order(recipes, complaints)


def _in_order(recipes: Sequence[Recipe], complaints: Complaints) -> list[Recipe]:
    named: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name is not None and recipe.name in named:
            complaints.error(recipe.method_line, f"two documents are called {recipe.name!r}: rename one")
        if recipe.name is not None:
            named[recipe.name] = recipe
    used = {name.model for recipe in recipes for name in recipe.models()} & set(named)
    results = [recipe for recipe in recipes if recipe.name is None] or [r for r in recipes if r.name not in used]
    if len(results) != 1:
        lines = ", ".join(str(recipe.method_line) for recipe in results) or "none"
        complaints.error(
            None,
            f"exactly one document, the result, must have no name; {len(results)} have none (merge_method in line {lines}): "
            "name all but one, or remove them",
        )
    complaints.settle()
    order: list[Recipe] = []

    def follow(recipe: Recipe, way: tuple[str, ...]) -> None:
        if recipe.name is not None and recipe.name in way:
            complaints.error(
                recipe.method_line,
                f"documents depend on each other in a circle, {' -> '.join([*way, recipe.name])}: name a model in one of them",
            )
            return
        for model in recipe.models():
            if model.model in named:
                follow(named[model.model], (*way, recipe.name or "the result"))
        if recipe not in order:
            order.append(recipe)

    follow(results[0], ())
    complaints.settle()
    for recipe in recipes:
        if recipe not in order:
            complaints.warn(recipe.method_line, f"no other document uses {recipe.name!r}, so it is not merged")
    return order


def open_all(recipe: Recipe, stages: Mapping[str, Checkpoint], complaints: Complaints) -> dict[ModelName, Checkpoint]:
    """Every model of a recipe: an earlier document, a model, an adapter on its own base (`+`) or on the recipe's base, an artifact.

    Raises UsageError with all models that cannot be opened."""
    opened: dict[ModelName, Checkpoint] = {}
    base: Checkpoint | None = None
    for name, line in _lines(recipe).items():
        try:
            if name.model in stages:
                model = stages[name.model]
            elif name == recipe.base or name.lora is not None:
                model = open_model(name.model)
            else:
                model = open_fine_tune(name.model, base)
            opened[name] = model if name.lora is None else open_fine_tune(name.lora, model)
        except UsageError as error:
            complaints.error(line, str(error))
        if name == recipe.base:
            base = opened.get(name)
    complaints.settle()
    return opened


def _under_one_names(recipe: Recipe, opened: Mapping[ModelName, Checkpoint]) -> tuple[dict[ModelName, Checkpoint], list[str]]:
    """All models under the names of the base, or of the first model, by transformers' tables; and messages about it."""
    found = dict(opened)
    first = found.get(recipe.base) if recipe.base is not None else next(iter(found.values()), None)
    full = [name for name, model in found.items() if not isinstance(model, Forthcoming) and model is not first]
    if first is None or isinstance(first, Forthcoming):
        return found, []
    together, said = bring_together([found[name] for name in full], first)
    return found | dict(zip(full, together, strict=True)), said


def _lines(recipe: Recipe) -> dict[ModelName, int]:
    """Every model once, the base first, with the line that names it."""
    found: dict[ModelName, int] = {}
    if recipe.base is not None:
        found[recipe.base] = recipe.method_line
    for module in recipe.modules:
        for part in module.slices:
            for source in part.sources:
                if found.get(source.model, recipe.method_line) == recipe.method_line:
                    found[source.model] = source.line
            if part.base is not None:
                found.setdefault(part.base, part.line)
    return found


@dataclass(frozen=True)
class Wanted:
    """What the command line says about a recipe's tensors."""

    per_task: str | None = None
    merge_heads: bool = False
    config: str | None = None


def plan_stage(recipe: Recipe, opened: dict[ModelName, Checkpoint], wanted: Wanted, complaints: Complaints) -> Stage:
    """Plan one document from the headers of its models.

    Raises UsageError with lines for layers and filters that do not exist, Mismatch as `plan_merge` does."""
    method = ours(recipe.method)
    assert method is not None
    given = opened
    opened, renamed = _under_one_names(recipe, opened)
    opened, said = align_tokens(recipe, opened, complaints)
    layout = lay_out(recipe, opened, complaints)
    complaints.settle()
    assert layout is not None
    first = inputs_of(recipe, recipe.modules[0], recipe.modules[0].slices[0])
    has_base = layout.base is not None
    names = [name for name, _ in layout.tasks]
    values = Values(recipe, method, names, has_base, complaints)
    tied = not any(name == HEAD for name in layout.spots)
    check_filters(recipe, layout.spots, complaints, tied)
    tokens = settle_tokens(recipe, opened, layout.donor)
    complaints.settle()
    probe = values.at(layout.origin(next(iter(sorted(layout.places)))))
    complaints.settle()
    assert probe is not None and first.merged
    on_vectors = method.build(probe).on_vectors
    options = Options(wanted.per_task, wanted.merge_heads, recipe.written, config=wanted.config, absent=layout.absent)
    plan = plan_merge(layout.base if on_vectors else None, layout.tasks, on_vectors, options)
    parameters = [values.at(layout.origin(slot.info.name)) for slot in plan.slots]
    complaints.settle()
    settled = [each for each in parameters if each is not None]
    _side_files(plan, layout, tokens)
    return Stage(recipe, method, layout, plan, build(method, settled), settled, opened, tuple(given.values()), renamed + said)


def _side_files(plan: MergePlan, layout: Layout, tokens: Mapping[str, bytes]) -> None:
    """Config and tokenizer of the donor if it is not the plan's reference, with the layout's changes."""
    if layout.donor is not plan.reference:
        plan.overrides |= {name: place.read_bytes() for name, place in layout.donor.side_files.items()}
    plan.overrides |= tokens
    config = (plan.config or layout.donor).side_files.get("config.json")
    if config is not None and (plan.config is not None or layout.donor is not plan.reference):
        plan.overrides["config.json"] = config.read_bytes()
    if layout.config and config is not None:
        plan.overrides["config.json"] = changed_config(config.read_bytes(), layout.config)
