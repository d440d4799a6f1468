"""The names that transformers gives a checkpoint's tensors once loaded; PEFT uses these names.

For most models they equal the checkpoint's. Some models were renamed after their checkpoints were made (a ViT's
`encoder.layer.0.attention.attention.query` is `layers.0.attention.q_proj` in memory), and loading and saving translate.
Building the model without weights and asking transformers for its names in a saved file yields both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peru_cli.checkpoints.names.built import CannotBuild, build

# Common models whose names are the same, listed to avoid importing transformers, which takes seconds (a test asks it).
SAME_NAMES = frozenset({"bert", "distilbert", "gemma", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "roberta", "t5"})


def names_in_memory(config: Mapping[str, Any], tensors: int) -> tuple[dict[str, str], str | None]:
    """Names in memory by names in the checkpoint, for tensors whose names differ; and the reason if they are unknown.

    Tensors that loading fuses or splits are left out. `config` is the model's config.json, `tensors` the number of tensors in the
    checkpoint. Without a known model type and architecture there is nothing to ask, which is no problem either."""
    kind = config.get("model_type")
    return ({}, None) if isinstance(kind, str) and kind in SAME_NAMES else ask_transformers(config, tensors)


def ask_transformers(config: Mapping[str, Any], tensors: int) -> tuple[dict[str, str], str | None]:
    """The same, asked of transformers itself."""
    try:
        model = build(config, tensors)
        if model is None:
            return {}, None
        from transformers.core_model_loading import revert_weight_conversion

        table = model.state_dict(keep_vars=True)
        saved = revert_weight_conversion(model, dict(table))
    except CannotBuild as error:
        return {}, str(error)
    except Exception as error:  # whatever a conversion raises for an unusual model
        return {}, f"transformers cannot say how it names this model's tensors ({type(error).__name__}: {error})"
    names: dict[int, list[str]] = {}
    for name, tensor in table.items():
        names.setdefault(id(tensor), []).append(name)  # tied tensors have several
    found = {name: names.get(id(tensor), [name]) for name, tensor in saved.items()}
    return {name: own[0] for name, own in found.items() if name not in own}, None
