"""Tiny random checkpoints in the shape of Llama, without transformers: a base and fine-tunes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = 4
WIDTH = 8
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")

Tensors = dict[str, torch.Tensor]


def shapes(layers: int = LAYERS, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (20, WIDTH), "model.norm.weight": (WIDTH,)}
    if not tied:
        found["lm_head.weight"] = (20, WIDTH)
    for i in range(layers):
        found[f"model.layers.{i}.input_layernorm.weight"] = (WIDTH,)
        for matrix in MATRICES:
            rows, columns = (2 * WIDTH, WIDTH) if "up_proj" in matrix else (WIDTH, 2 * WIDTH) if "down_proj" in matrix else (WIDTH, WIDTH)
            found[f"model.layers.{i}.{matrix}.weight"] = (rows, columns)
    return found


def save(folder: Path, tensors: Tensors, layers: int = LAYERS, **config: object) -> None:
    """A checkpoint folder."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    table = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "vocab_size": 20, **config}
    (folder / "config.json").write_text(json.dumps(table))


def make_family(folder: Path, names: str = "abc") -> dict[str, Tensors]:
    """Write `base` and its fine-tunes into folders of their names. Returns their tensors, float32."""
    noise = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=noise) for name, shape in shapes().items()}
    family = {"base": base}
    for name in names:
        family[name] = {key: tensor + 0.1 * torch.randn(tensor.shape, generator=noise) for key, tensor in base.items()}
    for name, tensors in family.items():
        save(folder / name, tensors)
    return family
