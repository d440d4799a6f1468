"""The schema of recipes, checked by pydantic before anything is opened. Every error and warning has its line."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.merge.recipe.document import Complaints, Document, Path, did_you_mean
from peru_cli.merge.recipe.names import IGNORED, KINDS, KNOWN, Known, Parameter
from peru_cli.merge.recipe.parts import ModelName, Module, Recipe, Slice, Source, Tokenizer
from peru_cli.merge.varied import Clause, Setting
from peru_cli.methods.parameters import Value
from peru_cli.shown import listed

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
_MESSAGES = {
    "missing": "is missing",
    "string_type": "is not a string",
    "list_type": "is not a list",
    "int_type": "is not a whole number",
    "dict_type": "is not a table",
    "model_type": "is not a table",
    "model_attributes_type": "is not a table",
    "bool_type": "is neither true nor false",
}


class _Part(BaseModel):
    """A table of a recipe. Unknown keys are kept apart."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True)


class _Source(_Part):
    model: Any
    layer_range: list[int] | None = None
    parameters: dict[str, Any] | None = None


class _Slice(_Part):
    sources: list[_Source] = Field(min_length=1)
    base_model: Any = None
    parameters: dict[str, Any] | None = None


class _Module(_Part):
    models: list[_Source] | None = None
    slices: list[_Slice] | None = None
    parameters: dict[str, Any] | None = None


class _Tokenizer(_Part):
    source: Any = None
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class _Recipe(_Module):
    merge_method: str
    modules: dict[str, _Module] | None = None
    base_model: Any = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Any = None
    tokenizer: _Tokenizer | None = None
    chat_template: str | None = None
    name: str | None = None


def read_recipe(document: Document, complaints: Complaints) -> Recipe | None:
    """Turn a document into a recipe. None after errors, which are added to the complaints."""
    if not isinstance(document.data, dict):
        complaints.error(document.line(()), "this is not a table of keys: a recipe needs a merge_method and models")
        return None
    errors = len(complaints.errors)
    try:
        parsed = _Recipe.model_validate(document.data)
    except ValidationError as error:
        for found in error.errors():
            path = tuple(key for key in found["loc"] if isinstance(key, (str, int)))
            text = _MESSAGES.get(found["type"], found["msg"].lower())
            if found["type"] == "too_short":
                text = "is empty"
            complaints.error(document.line(path), f"{spelt_path(path)} {text}{_example(path)}")
        return None
    recipe = _Check(document, complaints).recipe(parsed)
    return recipe if len(complaints.errors) == errors else None


def spelt_path(path: Path) -> str:
    """The way to a value: `models[1].parameters.weight`, list items counted from 1."""
    text = ""
    for key in path:
        text += f"[{key + 1}]" if isinstance(key, int) else f".{key}" if text else key
    return text or "the recipe"


_EXAMPLES = {
    "layer_range": "write two numbers, as [0, 32]",
    "merge_method": "name one, as merge_method: ties",
    "model": "name it, as model: org/name",
    "models": "list the models, each as - model: org/name",
    "slices": "list the slices, each with its sources",
    "sources": "list the sources, each as - {model: org/name, layer_range: [0, 32]}",
    "modules": "name modules, each with its slices, or write models",
    "parameters": "write it as parameters: {weight: 0.5}",
    "tokenizer": "write it as tokenizer: {source: union}",
}


def _example(path: Path) -> str:
    """What to write in place of a value of the wrong type: an example for the nearest key that has one."""
    known = [key for key in path if key in _EXAMPLES]
    return f": {_EXAMPLES[str(known[-1])]}" if known else ""


class _Check:
    """Checks a document that pydantic has accepted."""

    def __init__(self, document: Document, complaints: Complaints) -> None:
        self._document, self._complaints = document, complaints
        self._method: Known | None = None
        self._ignored: dict[str, None] = {}

    def _error(self, path: Path, text: str) -> None:
        self._complaints.error(self._document.line(path), text)

    def _warn(self, path: Path, text: str) -> None:
        self._complaints.warn(self._document.line(path), text)

    def _strangers(self, part: _Part, path: Path) -> None:
        known = [*type(part).model_fields]
        for key in part.model_extra or {}:
            self._warn((*path, key), f"{spelt_path((*path, key))} has no effect; mergekit ignores it, too{did_you_mean(key, known)}")

    def recipe(self, parsed: _Recipe) -> Recipe | None:
        self._strangers(parsed, ())
        self._method = KNOWN.get(parsed.merge_method)
        if self._method is None:
            hint = did_you_mean(parsed.merge_method.replace("-", "_"), KNOWN)
            self._error(("merge_method",), f"merge_method {parsed.merge_method!r} is unknown{hint or ': mergekit has ' + ', '.join(KNOWN)}")
            return None
        base = self._model(parsed.base_model, ("base_model",)) if parsed.base_model is not None else None
        given = [key for key in ("models", "slices", "modules") if getattr(parsed, key) is not None]
        if len(given) != 1:
            said = " and ".join(given) if given else "none of them"
            self._error(
                (given[1],) if given else (),
                f"a recipe needs exactly one of models, slices and modules; this one has {said}{': keep one' if given else ': add models'}",
            )
            return None
        modules = []
        if parsed.modules is not None:
            if not parsed.modules:
                self._error(("modules",), f"modules is empty{_example(('modules',))}")
            for name, inner in parsed.modules.items():
                self._strangers(inner, ("modules", name))
                modules.append(self._module(name, inner, ("modules", name)))
            if len(modules) == 1:  # the whole model, under any name
                modules = [Module(None, m.slices, m.whole, m.settings, m.line) for m in modules]
        else:
            modules.append(self._module(None, parsed, ()))
        settings = self._settings(parsed.parameters, ("parameters",), False) if parsed.modules is not None else {}
        tokenizer = self._tokenizer(parsed)
        return Recipe(
            parsed.name, self._method, self._document.line(("merge_method",)), tuple(modules), base, settings,
            self._dtype(parsed.dtype, "dtype"), self._dtype(parsed.out_dtype, "out_dtype"), tokenizer, parsed.chat_template,
            tuple(self._ignored),
        )  # fmt: skip

    def _dtype(self, text: str | None, key: str) -> Dtype | None:
        if text is None:
            return None
        name = DTYPES.get(text.removeprefix("torch."))
        if name is None:
            self._error((key,), f"{key} {text!r} is unknown: write bfloat16, float16 or float32")
            return None
        return BY_NAME[name]

    def _module(self, name: str | None, parsed: _Module, path: Path) -> Module:
        if (parsed.models is None) == (parsed.slices is None):
            self._error(path, f"{spelt_path(path)} needs exactly one of models and slices")
        slices = []
        if parsed.models is not None:
            where = (*path, "models")
            if not parsed.models:
                self._error(where, f"{spelt_path(where)} is empty{_example(where)}")
            sources = [self._source(source, (*where, number), True) for number, source in enumerate(parsed.models)]
            slices.append(Slice(tuple(s for s in sources if s is not None), None, {}, self._document.line(where)))
        for number, part in enumerate(parsed.slices or ()):
            slices.append(self._slice(part, (*path, "slices", number)))
        if parsed.slices is not None and not parsed.slices:
            self._error((*path, "slices"), f"{spelt_path((*path, 'slices'))} is empty{_example(('slices',))}")
        settings = self._settings(parsed.parameters, (*path, "parameters"), False)
        return Module(name, tuple(slices), parsed.models is not None, settings, self._document.line(path))

    def _slice(self, part: _Slice, path: Path) -> Slice:
        self._strangers(part, path)
        sources = [self._source(source, (*path, "sources", number), False) for number, source in enumerate(part.sources)]
        found = tuple(source for source in sources if source is not None)
        lengths = {source.layers[1] - source.layers[0] for source in found if source.layers is not None}
        if len(lengths) > 1:
            ranges = listed(str(list(source.layers)) for source in found if source.layers is not None)
            self._error(
                (*path, "sources"), f"the sources of a slice have different numbers of layers, {ranges}: write ranges of one length"
            )
        base = self._model(part.base_model, (*path, "base_model")) if part.base_model is not None else None
        return Slice(found, base, self._settings(part.parameters, (*path, "parameters"), False), self._document.line(path))

    def _source(self, parsed: _Source, path: Path, whole: bool) -> Source | None:
        self._strangers(parsed, path)
        model = self._model(parsed.model, (*path, "model"))
        layers = None
        where = (*path, "layer_range")
        if parsed.layer_range is not None and whole:
            self._warn(where, "layer_range has no effect under models; mergekit ignores it, too: write it under slices")
        elif parsed.layer_range is not None:
            if len(parsed.layer_range) != 2:
                self._error(where, f"layer_range has {len(parsed.layer_range)} numbers: write two, as [0, 32]")
            elif not 0 <= parsed.layer_range[0] < parsed.layer_range[1]:
                first, last = parsed.layer_range
                self._error(where, f"layer_range [{first}, {last}] holds no layer: the second number is the first layer that is not taken")
            else:
                layers = (parsed.layer_range[0], parsed.layer_range[1])
        elif not whole:
            self._error(path, "a source of a slice needs a layer_range, such as [0, 32]")
        settings = self._settings(parsed.parameters, (*path, "parameters"), True)
        return Source(model, layers, settings, self._document.line(path), self._document.line(where)) if model is not None else None

    def _model(self, value: Any, path: Path) -> ModelName | None:
        if isinstance(value, dict):
            return self._model_table(value, path)
        if not isinstance(value, str) or not value.strip():
            self._error(path, f"{spelt_path(path)} names no model" + ("" if not isinstance(value, (int, float)) else ": put it in quotes"))
            return None
        model, plus, lora = value.strip().partition("+")
        if plus and not (model and lora):
            self._error(path, f"{value!r} names no model beside the '+': write MODEL+LORA")
            return None
        return ModelName(model, lora or None)

    def _model_table(self, table: dict[str, Any], path: Path) -> ModelName | None:
        names: list[str | None] = []
        for key in ("model", "lora"):
            value = table.get(key)
            if isinstance(value, dict):
                revision = value.get("revision")
                value = value.get("path") if revision is None else f"{value.get('path')}@{revision}"
            if value is not None and not isinstance(value, str):
                self._error((*path, key), f"{spelt_path((*path, key))} names no model")
            names.append(value if isinstance(value, str) else None)
        for key in table:
            if key == "override_architecture":
                self._warn((*path, key), "override_architecture has no effect: peru uses the names of the tensors")
            elif key not in ("model", "lora"):
                self._warn((*path, key), f"{key} has no effect; mergekit ignores it, too")
        if names[0] is None:
            self._error(path, f"{spelt_path(path)} names no model")
            return None
        return ModelName(names[0], names[1])

    def _tokenizer(self, parsed: _Recipe) -> Tokenizer | None:
        if parsed.tokenizer is None:
            if parsed.tokenizer_source is None:
                return None
            source = self._tokenizer_source(parsed.tokenizer_source, ("tokenizer_source",))
            return Tokenizer(source, self._document.line(("tokenizer_source",)))
        if parsed.tokenizer_source is not None:
            self._error(("tokenizer_source",), "tokenizer_source and tokenizer mean the same: keep one of them")
        table = parsed.tokenizer
        self._strangers(table, ("tokenizer",))
        source = "union" if table.source is None else self._tokenizer_source(table.source, ("tokenizer", "source"))
        if table.pad_to_multiple_of is not None and table.pad_to_multiple_of < 1:
            self._error(
                ("tokenizer", "pad_to_multiple_of"), f"pad_to_multiple_of {table.pad_to_multiple_of} is below 1: write the multiple, as 64"
            )
        return Tokenizer(source, self._document.line(("tokenizer",)), table.pad_to_multiple_of, table.tokens or {})

    def _tokenizer_source(self, value: Any, path: Path) -> str:
        if value in ("union", "base"):
            return str(value)
        model = self._model(value, path)
        return str(model) if model is not None else "base"

    def _settings(self, table: dict[str, Any] | None, path: Path, own: bool) -> dict[str, Setting]:
        """The parameters of one level. `own`: they belong to a model."""
        assert self._method is not None
        found: dict[str, Setting] = {}
        for key, value in (table or {}).items():
            where = (*path, key)
            parameter = self._method.parameters.get(key)
            if key in IGNORED:
                self._ignored[key] = None
                self._flag_only(value, where)
            elif parameter is None:
                hint = did_you_mean(key, self._method.parameters)
                have = ", ".join(self._method.parameters) or "none"
                self._warn(where, f"{self._method.name} has no parameter {key!r}; mergekit ignores it, too{hint or f' (it has {have})'}")
            elif own and not parameter.own:
                self._warn(where, f"{key} belongs to the whole merge: on a single model it has no effect; mergekit ignores it, too")
                self._setting(value, where, key, parameter)
            elif (setting := self._setting(value, where, key, parameter)) is not None:
                found[key] = setting
        return found

    def _flag_only(self, value: Any, path: Path) -> None:
        if not isinstance(value, (bool, int)):
            self._error(path, f"{path[-1]} {value!r} is neither true nor false: write one of the two, without quotes")

    def _setting(self, value: Any, path: Path, key: str, parameter: Parameter) -> Setting | None:
        """A scalar, a gradient, a table with a filter, or a list of such tables."""
        if value is None:
            self._error(path, f"{key} has no value: {_wanted(parameter)}")
            return None
        tables = (
            value if isinstance(value, list) and any(isinstance(v, dict) for v in value) else [value] if isinstance(value, dict) else None
        )
        if tables is None:
            clause = self._clause(value, None, path, key, parameter)
            return (clause,) if clause is not None else None
        clauses: list[Clause] = []
        for number, table in enumerate(tables):
            where = (*path, number) if isinstance(value, list) else path
            if not isinstance(table, dict):
                self._error(where, f"{key} mixes tables and bare values: write {{value: {table!r}}}")
                continue
            for stranger in table.keys() - {"filter", "value"}:
                self._warn((*where, stranger), f"{stranger} has no effect here{did_you_mean(stranger, ('filter', 'value'))}")
            word = table.get("filter")
            if word is not None and not isinstance(word, str):
                self._error((*where, "filter"), f"the filter {word!r} of {key} is not a string: put it in quotes")
                continue
            if table.get("value") is None:
                text = (
                    f"{key} has a filter without a value: write {{filter: {word}, value: 0.5}}"
                    if word is not None
                    else f"{key} has no value: {_wanted(parameter)}"
                )
                self._error(where, text)
                continue
            if clauses and clauses[-1].filter in (None, "*"):
                self._warn(where, f"{key}: this value is never used, because the one before applies to all tensors")
            clause = self._clause(table["value"], word, (*where, "value"), key, parameter)
            if clause is not None:
                clauses.append(clause)
        return tuple(clauses) or None

    def _clause(self, value: Any, word: str | None, path: Path, key: str, parameter: Parameter) -> Clause | None:
        gradient = isinstance(value, list)
        if gradient and not value:
            self._error(path, f"the gradient of {key} is empty: write its numbers, as [0, 0.5, 1]")
            return None
        values = [self._scalar(v, path, key, parameter) for v in (value if gradient else [value])]
        if any(v is None for v in values):
            return None
        return Clause(tuple(v for v in values if v is not None), gradient, word, None, self._document.line(path))

    def _scalar(self, value: Any, path: Path, key: str, parameter: Parameter) -> Value | None:
        text = f"{key} {value!r} is {KINDS[parameter.kind]}: {_wanted(parameter)}"
        if parameter.kind == "flag":
            if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
                return bool(value)
            self._error(path, text)
            return None
        if parameter.kind == "word":
            if isinstance(value, str) and value in parameter.choices:
                return value
            self._error(path, f"{key} {value!r} is not {' or '.join(parameter.choices)}")
            return None
        number = exact(value)
        if number is None or (parameter.kind == "whole" and number.denominator != 1):
            self._error(path, text)
            return None
        if parameter.kind == "share":
            if number < 0:
                self._error(path, f"{key} {value!r} is below 0: a density is a share of the entries, from 0 to 1")
                return None
            if number > 1:
                self._warn(path, f"{key} {value!r} is above 1 and counts as 1, as in mergekit")
            return min(number, Fraction(1))
        return int(number) if parameter.kind == "whole" else float(number)


def _wanted(parameter: Parameter) -> str:
    """What to write for a parameter."""
    if parameter.kind in ("flag", "word"):
        return "write " + (" or ".join(parameter.choices) or "true or false, without quotes")
    return "write a whole number, as 10" if parameter.kind == "whole" else "write a number, as 0.5"


def exact(value: Any) -> Fraction | None:
    """A number exactly as written: 0.1 is a tenth. Text that is a number counts too (YAML reads 1e-3 as text)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    text = str(value).strip()
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", text, re.IGNORECASE) or not math.isfinite(float(text)):
        return None
    return Fraction(text)
