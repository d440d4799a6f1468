"""Build a model without weights from its config.json, to ask transformers about its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Fields of configs that say how often something is repeated.
_REPEATED = re.compile(r"(num|n)_(\w+_)?(layers?|blocks|experts|heads)|\w*layers|\w*depth")


class CannotBuild(Exception):
    """Why there is no model to ask."""


def build(config: Mapping[str, Any], tensors: int) -> Any:
    """The model on torch's meta device. None if config.json does not name one of transformers' models.

    `tensors` is the number of tensors in the checkpoint. A model of many times as many is not built: a stranger's config may ask for
    a million layers. Raises CannotBuild for that, and for what the model's own code raises."""
    architectures, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(architectures, list) or not architectures or not isinstance(kind, str) or config.get("auto_map"):
        return None
    import torch
    import transformers

    cls: Any = getattr(transformers, str(architectures[0]), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)) or kind not in transformers.CONFIG_MAPPING:
        return None  # a stranger's config may name anything that transformers has
    most = 8 * tensors + 1000  # a stored tensor may be split into several, and modules contain modules
    for field, value in _counts(config):
        if not 0 <= value <= most:
            raise CannotBuild(f"its config.json says {field} = {value}, but the checkpoint has {tensors} tensors")
    try:
        with torch.device("meta"), _at_most(most):
            return cls(transformers.CONFIG_MAPPING[kind].from_dict(dict(config)))
    except CannotBuild:
        raise
    except Exception as error:  # whatever a model's own code raises for an unusual config
        raise CannotBuild(
            f"transformers cannot build a {architectures[0]} from its config.json ({type(error).__name__}: {error})"
        ) from error


def _counts(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for field, value in config.items():
        if isinstance(value, dict):
            yield from _counts(value)
        elif isinstance(value, int) and _REPEATED.fullmatch(field):
            yield field, value


@contextmanager
def _at_most(most: int) -> Iterator[None]:
    """Raise CannotBuild once more than `most` modules or parameters are created."""
    from torch.nn.modules.module import register_module_module_registration_hook, register_module_parameter_registration_hook

    made = 0

    def count(*_: object) -> None:
        nonlocal made
        made += 1
        if made > most:
            raise CannotBuild(f"its config.json describes more than {most} parts, far more than the checkpoint has tensors")

    hooks = [register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
