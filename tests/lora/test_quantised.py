"""An adapter with quantised factors: `peru prune ADAPTER --base BASE --max-bytes`, in peru's own container."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.lora.test_options import factors, save_adapter

SHAPES = {
    "model.layers.0.self_attn.q_proj": (240, 200),
    "model.layers.0.mlp.up_proj": (450, 200),
    "model.layers.10.mlp.down_proj": (200, 450),
}


def test_quantised_factors_have_less_error_than_truncated_ones_of_the_same_size(tmp_path: Path, peru) -> None:
    noise = torch.Generator().manual_seed(5)
    base = {f"{name}.weight": torch.randn(*shape, generator=noise) for name, shape in SHAPES.items()}
    save_file(base, tmp_path / "base.safetensors")
    adapter = save_adapter(tmp_path / "a", factors(16, torch.bfloat16, shapes=SHAPES), 16)
    limit, at = 20_000, ["--base", tmp_path / "base.safetensors", "--no-sync"]
    peru("svd-lora", adapter, "-o", tmp_path / "truncated", "--max-bytes", limit, "--no-sync")
    (said,) = json.loads(peru("prune", adapter, *at, "-o", tmp_path / "q.safetensors", "--max-bytes", limit, "--json"))
    assert (tmp_path / "q.safetensors").stat().st_size == said["file_bytes"] <= limit
    missed = {}
    wanted = unpacked(peru, adapter, tmp_path, at)
    for name in ("truncated", "q.safetensors"):
        back = unpacked(peru, tmp_path / name, tmp_path, at)
        missed[name] = sum(float((back[n] - wanted[n]).double().square().sum()) for n in base)
    assert missed["q.safetensors"] < 0.25 * missed["truncated"]


def unpacked(peru, model: Path, folder: Path, at: list[object]) -> dict[str, torch.Tensor]:
    peru("unpack", model, *at, "-o", folder / "full.safetensors", "--force")
    return load_file(folder / "full.safetensors")
