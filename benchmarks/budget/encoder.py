"""MiniLM's forward pass, lean: weights in bfloat16, as in the checkpoints, sums and norms in float32.

It is cheaper than transformers' own: small batches that stay in the cache, one product for query, key and value, and in the last
layer only the first token, the only one that the pooler reads. Activations are rounded to bfloat16 before each product: the KL to
the float32 computation is about 1e-5 (`compare.py --check` measures it)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

LAYERS, HEADS, EPSILON = 6, 12, 1e-12
HALF = torch.bfloat16


class Encoder:
    """BERT with 6 layers and 12 heads, like `sentence-transformers/all-MiniLM-L6-v2`."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """`tensors` under the bare encoder's names; weights are rounded to bfloat16."""
        half = {name: tensor.to(HALF) for name, tensor in tensors.items()}
        self.norms = {name: tensor.float() for name, tensor in half.items() if "LayerNorm" in name}
        self.words, self.positions, self.types = (
            half[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")
        )
        self.dense = {name.removesuffix(".weight"): (half[name], half[name[:-6] + "bias"]) for name in half if _is_dense(name)}
        for layer in range(LAYERS):
            parts = [self.dense.pop(f"encoder.layer.{layer}.attention.self.{part}") for part in ("query", "key", "value")]
            self.dense[f"{layer}.qkv"] = (torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts]))

    def pooled(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The pooler's output for each text's first token: ids and mask (texts, tokens) -> float32 (texts, width)."""
        tokens = ids.shape[1]
        states = self.words[ids].float() + self.types[0].float() + self.positions[:tokens].float()
        states = self._norm(states, "embeddings")
        seen = mask[:, None, None, :].bool()
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            query, key, value = self._linear(states, f"{layer}.qkv").unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            if layer == LAYERS - 1:
                query, states = query[:, :, :1], states[:, :1]
            mixed = functional.scaled_dot_product_attention(query, key, value, seen).transpose(1, 2).flatten(2)
            states = self._norm(states + self._linear(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output")
            wide = functional.gelu(self._linear(states, f"{name}.intermediate.dense"))
            states = self._norm(states + self._linear(wide, f"{name}.output.dense"), f"{name}.output")
        return torch.tanh(self._linear(states[:, 0], "pooler.dense").float())

    def _linear(self, inputs: Tensor, name: str) -> Tensor:
        return functional.linear(inputs.to(HALF), *self.dense[name])

    def _norm(self, states: Tensor, name: str) -> Tensor:
        weight, bias = (self.norms[f"{name}.LayerNorm.{part}"] for part in ("weight", "bias"))
        return functional.layer_norm(states, weight.shape, weight, bias, EPSILON)


def _is_dense(name: str) -> bool:
    return name.endswith(".weight") and "embeddings" not in name and "LayerNorm" not in name
