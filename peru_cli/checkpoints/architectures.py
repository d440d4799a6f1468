"""How modules use their weights, where names and shapes do not tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peru_cli.checkpoints.header import TensorInfo

# Models of transformers whose linear layers are Conv1D: weights are stored as (in, out).
_CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
# Models whose fused experts are stored as (experts, in, out): `is_transposed` in transformers. All others use (experts, out, in).
_EXPERTS_IN_OUT = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}
# Modules that look up rows: nn.Embedding in transformers, fairseq and timm.
_EMBEDDING = re.compile(r"[^.]*emb[^.]*|wte|wpe|shared|relative_attention_bias")
_INPUT = re.compile(r"embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared|tokens_embed")
_OUTPUT = re.compile(r"lm_head|embed_out|output|output_projection")
# Model types whose tie_word_embeddings is true by default, so that configs omit it (a test asks transformers).
_TIED = frozenset({
    "bart", "bert", "bloom", "cohere", "cohere2", "electra", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neo", "m2m_100", "marian", "mbart", "mpt", "mt5", "openai-gpt", "opt", "pegasus", "roberta", "smollm3", "starcoder2", "t5", "umt5",
    "xglm", "xlm-roberta",
})  # fmt: skip


def _model_types(config: Mapping[str, Any]) -> set[str]:
    nested = config.get("text_config")
    found = {config.get("model_type"), nested.get("model_type") if isinstance(nested, dict) else None}
    return {kind for kind in found if isinstance(kind, str)}


def experts_are_in_out(config: Mapping[str, Any]) -> bool:
    """Whether fused experts are stored as (experts, in, out)."""
    return bool(_model_types(config) & _EXPERTS_IN_OUT)


def is_embedding(module: str) -> bool:
    """Whether a module with a two-dimensional weight is a table of rows, judged by the last part of its name."""
    return bool(_EMBEDDING.fullmatch(module.rpartition(".")[2]))


def is_conv1d(module: str, config: Mapping[str, Any]) -> bool:
    """Whether a module's two-dimensional weight is stored as (in, out)."""
    leaf = module.rpartition(".")[2]
    return bool(_model_types(config) & _CONV1D) and (leaf.startswith("c_") or leaf == "q_attn")


def orientation_is_known(config: Mapping[str, Any]) -> bool:
    """Whether the model type tells which linear layers are Conv1D: true for transformers' own models, false for a repo's own code."""
    return bool(_model_types(config)) and not config.get("auto_map")


def is_grouped_convolution(shape: tuple[int, ...], config: Mapping[str, Any]) -> bool:
    """Whether a kernel looks like a depthwise convolution's: one input channel, where images have more."""
    return shape[1] == 1 and shape[0] > 1 and config.get("num_channels") != 1


def is_output(name: str) -> bool:
    """Whether a tensor is a language model's output matrix, judged by its module's name."""
    return bool(_OUTPUT.fullmatch(name.removesuffix(".weight").rpartition(".")[2])) and name.endswith(".weight")


def is_input(name: str) -> bool:
    """Whether a tensor is a language model's input embedding, judged by its module's name."""
    return name.endswith(".weight") and bool(_INPUT.fullmatch(name.removesuffix(".weight").rpartition(".")[2]))


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether embedding and output matrix are one tensor, according to the config or its model type's default."""
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    return bool(_model_types(config) & _TIED) if tied is None else bool(tied)


def tied_embedding(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """The input embedding, if the config ties the output matrix to it. None otherwise, or if several candidates exist."""
    if not is_tied(config):
        return None
    found = [
        name for name, info in tensors.items() if len(info.shape) == 2 and _INPUT.fullmatch(name.removesuffix(".weight").rpartition(".")[2])
    ]
    return found[0] if len(found) == 1 else None


def has_tied_embeddings(config: Mapping[str, Any], shape: tuple[int, ...], tensors: Iterable[TensorInfo]) -> bool:
    """Whether a table of rows may also be the model's output matrix: PEFT would replace only one of the two.

    `tensors` are all tensors of the model: an output matrix that is stored separately is not tied."""
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    if tied is False:
        return False
    architectures = config.get("architectures")
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    if tied is None and not any(re.search(r"LMHead|ForCausalLM|ForConditionalGeneration|ForMaskedLM|ForPreTraining", n) for n in names):
        return False
    if tied is True and names and all(re.search(r"Classification|QuestionAnswering|(?<!LMHead)Model$", name) for name in names):
        return False
    vocabulary = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    if isinstance(vocabulary, int) and shape[0] != vocabulary:
        return False
    return not any(t.shape == shape and not is_embedding(t.name.removesuffix(".weight")) for t in tensors)
