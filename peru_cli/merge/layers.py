"""Find the layer of a tensor by its name: `model.layers.7.mlp.up_proj.weight` is in layer 7 of `model.layers`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from peru_cli.checkpoints.header import TensorInfo

_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")  # names of the number of layers in configs
_FIRST = re.compile(r"embed|(^|\.)(wte|wpe|emb)(\.|$)")  # before the layers; all other tensors outside of layers come after them


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack (the name up to the first number) and the layer's number; None outside of layers."""
    match = _NUMBER.search(name)
    return (name[: match.start()], int(match.group(1))) if match else None


def renumbered(name: str, number: int) -> str:
    """The name of the same tensor in another layer."""
    match = _NUMBER.search(name)
    assert match is not None
    return f"{name[: match.start(1)]}{number}{name[match.end(1) :]}"


def stacks(names: Iterable[str]) -> dict[str, int]:
    """The number of layers of each stack."""
    found: dict[str, int] = {}
    for name in names:
        if (layer := layer_of(name)) is not None:
            found[layer[0]] = max(found.get(layer[0], 0), layer[1] + 1)
    return found


def layer_count(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The key and the number of layers in a config."""
    inner = config.get("text_config")
    for table in (config, inner if isinstance(inner, dict) else {}):
        for key in _COUNTS:
            if isinstance(value := table.get(key), int) and not isinstance(value, bool):
                return key, value
    return None


def main_stack(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The stack that a layer range refers to: the one whose length the config states, or the largest in bytes. None without layers."""
    lengths = stacks(tensors)
    sizes = dict.fromkeys(lengths, 0)
    for name, info in tensors.items():
        if (layer := layer_of(name)) is not None:
            sizes[layer[0]] += info.nbytes
    stated = layer_count(config)
    fits = [stack for stack, n in lengths.items() if stated is not None and n == stated[1]] or list(lengths)
    return max(((stack, lengths[stack]) for stack in fits), key=lambda pair: sizes[pair[0]], default=None)


def comes_first(name: str) -> bool:
    """Whether a tensor outside of layers comes before them: embeddings do, norms and heads do not."""
    return bool(_FIRST.search(name)) and "lm_head" not in name


@dataclass(frozen=True)
class Spot:
    """The place of a tensor: its name, its layer (None outside of layers), and its depth in its run of layers, from 0 to 1."""

    name: str
    layer: int | None
    depth: Fraction


def spots(names: Iterable[str]) -> dict[str, Spot]:
    """The spot of every tensor: depth i / (L - 1) in its own stack of L layers, 1 in a stack of one, 0 outside of layers."""
    listed = list(names)
    lengths = stacks(listed)
    found = {}
    for name in listed:
        layer = layer_of(name)
        found[name] = Spot(name, None, Fraction(0)) if layer is None else Spot(name, layer[1], depth(layer[1], lengths[layer[0]]))
    return found


def depth(number: int, layers: int) -> Fraction:
    """The depth of layer `number` in a run of layers: 0 for the first, 1 for the last or only one."""
    return Fraction(number, layers - 1) if layers > 1 else Fraction(1)
