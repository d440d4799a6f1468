"""The little that tensor names and shapes do not tell about how modules use their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Models of transformers whose linear layers are Conv1D: weights are stored as (in, out).
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
# Models whose fused experts are stored as (experts, in, out): `is_transposed` in transformers; the others (experts, out, in).
_EXPERTS_IN_OUT = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}
# Modules that look rows up: nn.Embedding in transformers, fairseq and timm.
_EMBEDDING = re.compile(r"[^.]*emb[^.]*|wte|wpe|shared|relative_attention_bias")


def _model_types(config: Mapping[str, Any]) -> set[str]:
    nested = config.get("text_config")
    found = {config.get("model_type"), nested.get("model_type") if isinstance(nested, dict) else None}
    return {kind for kind in found if isinstance(kind, str)}


def is_conv1d_model(config: Mapping[str, Any]) -> bool:
    """Whether two-dimensional weights of the model's layers are stored as (in, out)."""
    return bool(_model_types(config) & _CONV1D)


def experts_are_in_out(config: Mapping[str, Any]) -> bool:
    """Whether fused experts are stored as (experts, in, out)."""
    return bool(_model_types(config) & _EXPERTS_IN_OUT)


def is_embedding(module: str) -> bool:
    """Whether a module with a two-dimensional weight is a table of rows, by its name's last part."""
    return bool(_EMBEDDING.fullmatch(module.rpartition(".")[2]))
