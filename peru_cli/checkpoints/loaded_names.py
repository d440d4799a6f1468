"""The names that transformers gives a checkpoint's tensors once loaded; PEFT uses these names.

For most models they equal the checkpoint's. Some models were renamed after their checkpoints were made (a ViT's
`encoder.layer.0.attention.attention.query` is `layers.0.attention.q_proj` in memory), and loading and saving translate.
Building the model without weights and asking transformers for its names in a saved file yields both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Common models whose names are the same, listed to avoid importing transformers, which takes seconds (a test asks it).
SAME_NAMES = frozenset({"bert", "distilbert", "gemma", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3", "roberta", "t5"})


def names_in_memory(config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """Names in memory by names in the checkpoint, for tensors whose names differ; and the reason if they are unknown.

    Tensors that loading fuses or splits are left out. `config` is the model's config.json. Without a known model type and
    architecture in it there is nothing to ask, which is no problem either."""
    architectures, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(architectures, list) or not architectures or not isinstance(kind, str) or config.get("auto_map"):
        return {}, None
    return ({}, None) if kind in SAME_NAMES else ask_transformers(architectures[0], kind, config)


def ask_transformers(architecture: str, kind: str, config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """The same, asked of transformers itself."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    cls = getattr(transformers, str(architecture), None)
    if cls is None or kind not in transformers.CONFIG_MAPPING:
        return {}, None
    try:
        with torch.device("meta"):
            model = cls(transformers.CONFIG_MAPPING[kind].from_dict(dict(config)))
        table = model.state_dict(keep_vars=True)
        saved = revert_weight_conversion(model, dict(table))
    except Exception as error:  # whatever a model's own code raises for an unusual config
        return {}, f"transformers cannot build a {architecture} of its config.json ({type(error).__name__}: {error})"
    names: dict[int, list[str]] = {}
    for name, tensor in table.items():
        names.setdefault(id(tensor), []).append(name)  # tied tensors have several
    found = {name: names.get(id(tensor), [name]) for name, tensor in saved.items()}
    return {name: own[0] for name, own in found.items() if name not in own}, None
