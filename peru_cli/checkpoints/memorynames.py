"""What transformers calls a checkpoint's tensors once they are loaded: PEFT goes by those names.

For most models they are the checkpoint's own. Some were renamed since their checkpoints were made (a ViT's
`encoder.layer.0.attention.attention.query` is `layers.0.attention.q_proj` in memory); loading and saving translate.
Building the model without its weights and having transformers name them for saving gives both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def names_in_memory(config: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """Names in memory by names in the checkpoint, of tensors whose two names differ; and why they cannot be told, if so.

    Tensors that loading fuses or splits are left out. `config` is the model's config.json; without a known model type
    and architecture in it there is nothing to ask, and no problem either.
    """
    architectures, kind = config.get("architectures"), config.get("model_type")
    if not isinstance(architectures, list) or not architectures or not isinstance(kind, str) or config.get("auto_map"):
        return {}, None
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    cls = getattr(transformers, str(architectures[0]), None)
    if cls is None or kind not in transformers.CONFIG_MAPPING:
        return {}, None
    try:
        with torch.device("meta"):
            model = cls(transformers.CONFIG_MAPPING[kind].from_dict(dict(config)))
        table = model.state_dict(keep_vars=True)
        saved = revert_weight_conversion(model, dict(table))
    except Exception as error:  # whatever a model's own code makes of a strange config
        return {}, f"transformers cannot build a {architectures[0]} of its config.json ({type(error).__name__}: {error})"
    names = {id(tensor): name for name, tensor in table.items()}
    return {name: names[id(tensor)] for name, tensor in saved.items() if names.get(id(tensor), name) != name}, None
