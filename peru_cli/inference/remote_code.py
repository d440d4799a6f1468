"""Python code that comes with a model (`auto_map`): run only with --trust-remote-code."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from peru_cli.checkpoints.local.inputs import read_small
from peru_cli.checkpoints.places import children, locate
from peru_cli.errors import Mismatch, UsageError

_TELLING = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")  # files that may name code
_Code = dict[str, bytes]  # Python files by name
_trusted: ContextVar[dict[str, _Code] | None] = ContextVar("trusted", default=None)


def auto_map(content: bytes) -> dict[str, Any]:
    """The code that a JSON file asks to run: maps transformers' classes to the code's. Empty if there is none."""
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    found = table.get("auto_map") if isinstance(table, dict) else None
    return found if isinstance(found, dict) else {}


@contextmanager
def trusting(models: Iterable[str], trust: bool) -> Iterator[None]:
    """With `trust`, code beside these models may be run inside.

    Raises:
        UsageError: a model names code in another repo.
        Mismatch: two models name the same code, and it differs."""
    if not trust:
        yield
        return
    import transformers.dynamic_module_utils

    dynamic: Any = transformers.dynamic_module_utils
    kept = dynamic.HF_MODULES_CACHE
    with tempfile.TemporaryDirectory(prefix="peru-code-") as place:
        token = _trusted.set(_collect(models))
        dynamic.HF_MODULES_CACHE = place
        try:
            yield
        finally:
            _trusted.reset(token)
            dynamic.HF_MODULES_CACHE = kept
            sys.path[:] = [path for path in sys.path if path != place]
            for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
                del sys.modules[name]


def _collect(models: Iterable[str]) -> dict[str, _Code]:
    found: dict[str, _Code] = {}
    for model in models:
        place = locate(model)
        folder = place if place.is_dir() else place.parent
        named = [auto_map(read_small(folder / name)) for name in _TELLING if (folder / name).is_file()]
        code = {path.name: read_small(path) for path in children(folder, "*.py")} if any(named) else {}
        for table in filter(None, named):
            if "--" in json.dumps(table):
                raise UsageError(f"{model} names code of another repo", "put that code beside the model: only what lies there is run")
            if found.setdefault(_key(table), code) != code:
                raise Mismatch(f"{model} names the same code as another model, and has other code", "run each of them on its own")
    return found


def _key(table: Mapping[str, Any]) -> str:
    return json.dumps(table, sort_keys=True)


def code_for(files: Mapping[str, bytes]) -> _Code:
    """Python files that may be run for a model with these side files. None without --trust-remote-code, or if none are named."""
    trusted = _trusted.get() or {}
    tables = [auto_map(files[name]) for name in _TELLING if name in files]
    return {name: content for table in tables for name, content in trusted.get(_key(table), {}).items()}


def register_models(config: Any, named: Mapping[str, Any], place: Path, kinds: Iterable[Any]) -> Any:
    """Register the code's model classes for a config with transformers' `kinds` (AutoModelFor...). Returns the config, in its own class."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own: Any = type(config)
    if not own.__module__.startswith("transformers_modules"):  # otherwise every model of transformers' config would use the code's class
        own = type(own.__name__, (own,), {"__module__": own.__module__})
        config.__class__ = own
    for auto in kinds:
        if isinstance(reference := named.get(auto.__name__), str):
            model: Any = get_class_from_dynamic_module(reference, place, local_files_only=True)
            model.config_class = own
            auto.register(own, model, exist_ok=True)
    return config
