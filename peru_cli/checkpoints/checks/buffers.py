"""Tensors that are not weights: statistics, frequencies, masks. Recognised by the names that torch and transformers use.

A part of the difference between two of them is meaningless, and a sum of such differences can leave the valid range (a variance
below 0)."""

from __future__ import annotations

import re

from peru_cli.checkpoints.header import TensorInfo

_STATISTICS = frozenset({"running_mean", "running_var"})  # last parts of names
_FIXED = _STATISTICS | {
    "inv_freq", "original_inv_freq", "masked_bias", "causal_mask", "attn_mask", "attention_mask", "relative_coords_table",
    "relative_position_index", "position_ids",
}  # fmt: skip
_GPT2_MASK = re.compile(r"(^|\.)(attn|attention|self_attn|attn\.attention)\.bias$")


def is_statistic(name: str) -> bool:
    """Whether a tensor is the running mean or variance of a batch normalisation."""
    return name.rpartition(".")[2] in _STATISTICS


def is_buffer(info: TensorInfo) -> bool:
    """Whether a tensor is a statistic, or fixed by the architecture: frequencies, masks, positions."""
    if info.name.rpartition(".")[2] in _FIXED:
        return True
    square = len(info.shape) == 4 and info.shape[:2] == (1, 1) and info.shape[2] == info.shape[3]
    return square and bool(_GPT2_MASK.search(info.name))
