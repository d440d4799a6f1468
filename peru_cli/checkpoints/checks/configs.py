"""Whether two config.json files describe the same function of the same weights.

All fields are compared, except those known to change nothing that a forward pass computes from given weights and inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# How the model was made, saved or trained, or should generate; class names, heads and labels.
_HARMLESS = re.compile(
    r"_.*|transformers_version|torch_dtype|dtype|architectures|auto_map|tokenizer_class|processor_class|quantization_config|unsloth_\w*"
    r"|use_cache|\w*(dropout|dropout_prob|_pdrop|drop_rate|drop_path_rate|layerdrop|drop_prob)|initializer_\w+|init_\w+|gradient_checkpointing"
    r"|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|vocab_size|\w*_token_id|\w*_token_ids|\w*_token_index"
    r"|output_\w+|return_dict|return_dict_in_generate|torchscript|pretraining_tp|use_bfloat16|tf_legacy_loss|prefix|remove_invalid_values"
    r"|max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p|typical_p"
    r"|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences"
    r"|chunk_size_feed_forward|forced_\w+|suppress_tokens|begin_suppress_tokens|exponential_decay_length_penalty|tie_word_embeddings"
    r"|mask_time_\w+|mask_feature_\w+|apply_spec_augment|ctc_\w+|router_aux_loss_coef|output_router_logits|pruned_heads"
)
_NOTHING: tuple[object, ...] = (None, False, [], {})


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields that count; those of inner tables have dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if _HARMLESS.fullmatch(key):
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _differ(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, with both values. An absent field counts as null, and false and empty fields as absent."""
    one, other = _flat(a), _flat(b)
    found = {}
    for key in sorted({*one, *other}):
        x, y = one.get(key), other.get(key)
        if x != y and not (x in _NOTHING and y in _NOTHING):
            found[key] = (x, y)
    return found


def _completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with its model type's defaults, in the terms of the installed transformers. Unchanged if it does not know the type."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or config.get("auto_map"):
        return config
    from transformers import CONFIG_MAPPING

    if kind not in CONFIG_MAPPING:
        return config
    try:
        completed: dict[str, Any] = CONFIG_MAPPING[kind].from_dict(dict(config)).to_dict()
    except Exception:  # whatever a model's own code raises for an unusual config; then only its own fields are compared
        return config
    return completed


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configs compute differently: dotted name -> both values. Empty if either config is empty."""
    if not a or not b:
        return {}
    found = _differ(a, b)
    if found and a.get("model_type") == b.get("model_type"):
        # Versions of transformers write different fields and different words for the same thing: compare them as this version reads them.
        found = _differ(_completed(a), _completed(b))
    return found


def describe(named: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """One line for each field in which a config differs from the first non-empty one."""
    lines: list[str] = []
    first: tuple[str, Mapping[str, Any]] | None = None
    for name, config in named:
        if not config:
            continue
        if first is None:
            first = name, config
            continue
        for key, (x, y) in differences(first[1], config).items():
            lines.append(f"{key}: {_show(x)} in {first[0]}, {_show(y)} in {name}")
    return lines


def _show(value: object) -> str:
    text = repr(value) if value is not None else "nothing"
    return text if len(text) <= 60 else f"{text[:57]}..."
