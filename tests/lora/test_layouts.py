"""`peru svd-lora` and `unpack` on adapters in kohya's and diffusers' layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import raw
from tests.lora.test_options import spectrum


def test_kohya_files_stay_kohya_files(tmp_path: Path, peru) -> None:
    noise = torch.Generator().manual_seed(0)
    table = {
        "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.randn(8, 20, generator=noise),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.randn(30, 8, generator=noise),
        "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(4.0),
        "lora_unet_conv_in.lora_down.weight": torch.randn(6, 5, 3, 3, generator=noise),
        "lora_unet_conv_in.lora_up.weight": torch.randn(16, 6, 1, 1, generator=noise),
        "lora_unet_conv_in.alpha": torch.tensor(3.0, dtype=torch.float16),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.randn(8, 20, generator=noise).half(),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.randn(30, 8, generator=noise).half(),
    }
    metadata = {"ss_network_dim": "8", "ss_network_alpha": "4.0", "ss_base_model_version": "sd_v1", "sshs_model_hash": "0" * 64}
    save_file(table, tmp_path / "in.safetensors", metadata=metadata)
    peru("svd-lora", tmp_path / "in.safetensors", "-o", tmp_path / "out.safetensors", "--rank", 7, "--no-sync")
    with safe_open(tmp_path / "out.safetensors", "pt") as out:
        assert sorted(out.keys()) == sorted(table)
        found = out.metadata()
        assert found["ss_base_model_version"] == "sd_v1" and found["ss_network_dim"] == "Dynamic" and "sshs_model_hash" not in found
        for name in [n.removesuffix(".lora_up.weight") for n in table if "lora_up" in n]:
            alpha = float(table[f"{name}.alpha"]) if f"{name}.alpha" in table else len(table[f"{name}.lora_down.weight"])
            before = table[f"{name}.lora_up.weight"].double().flatten(1) @ table[f"{name}.lora_down.weight"].double().flatten(1)
            before *= alpha / len(table[f"{name}.lora_down.weight"])
            down, up = out.get_tensor(f"{name}.lora_down.weight"), out.get_tensor(f"{name}.lora_up.weight")
            assert down.dtype == table[f"{name}.lora_down.weight"].dtype and down.shape[1:] == table[f"{name}.lora_down.weight"].shape[1:]
            if f"{name}.alpha" in table:
                assert float(out.get_tensor(f"{name}.alpha")) == len(down)  # so that kohya's alpha / dim is 1
            s = spectrum(before)
            error = float((before - up.double().flatten(1) @ down.double().flatten(1)).square().sum())
            assert len(down) == min(7, len(table[f"{name}.lora_down.weight"]))
            rounding = 1e-6 if down.dtype == torch.float16 else 1e-10
            assert error == pytest.approx(float(s[len(down) :].square().sum()), rel=1e-3, abs=rounding * float(s.square().sum()))
    peru("svd-lora", tmp_path / "in.safetensors", "-o", tmp_path / "folder", "--rank", 2, "--no-sync")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["in.safetensors"]


DIFFUSERS = {
    "today's": ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "unet.down_blocks.0.attn1.to_q.lora_B.weight"),
    "linear layer": (
        "text_encoder.layers.0.q_proj.lora_linear_layer.down.weight",
        "text_encoder.layers.0.q_proj.lora_linear_layer.up.weight",
    ),
    "lora.down": ("unet.down_blocks.0.attn1.to_q.lora.down.weight", "unet.down_blocks.0.attn1.to_q.lora.up.weight"),
    "processor": ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "unet.mid_block.attn1.processor.to_q_lora.up.weight"),
}


@pytest.mark.parametrize("style", DIFFUSERS)
@pytest.mark.parametrize("scaled", ["", "component", "model"])
def test_diffusers_files_keep_their_names(tmp_path: Path, peru, style: str, scaled: str) -> None:
    down, up = DIFFUSERS[style]
    table = {down: torch.randn(8, 20), up: torch.randn(30, 8), "unet.other.bias": torch.ones(3)}
    prefix = down.partition(".")[0] + "." if scaled == "component" else ""  # a pipeline's file, or one model's
    metadata = {"lora_adapter_metadata": json.dumps({f"{prefix}r": 8, f"{prefix}lora_alpha": 4})} if scaled else {}
    (tmp_path / "in").mkdir()
    save_file(table, tmp_path / "in" / "pytorch_lora_weights.safetensors", metadata={"format": "pt"} | metadata)
    peru("svd-lora", tmp_path / "in", "-o", tmp_path / "out", "--rank", 3, "--no-sync")
    with safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt") as out:
        # no alpha and no recorded config: diffusers then uses the rank as alpha
        assert sorted(out.keys()) == sorted(table) and "lora_adapter_metadata" not in out.metadata()
        assert raw(out.get_tensor("unet.other.bias")) == raw(table["unet.other.bias"])
        after = out.get_tensor(up).double() @ out.get_tensor(down).double()
    u, s, vt = torch.linalg.svd((0.5 if scaled else 1.0) * table[up].double() @ table[down].double(), full_matrices=False)
    torch.testing.assert_close(after, (u[:, :3] * s[:3]) @ vt[:3], rtol=1e-4, atol=1e-5)


def test_kohya_and_diffusers_files_fold_into_their_base(tmp_path: Path, peru) -> None:
    base = {
        "down_blocks.0.attn1.to_q.weight": torch.randn(30, 20),
        "conv_in.weight": torch.randn(16, 5, 3, 3),
        "conv_in.bias": torch.randn(16),
    }
    save_file(base, tmp_path / "unet.safetensors")
    a, b, ca, cb = torch.randn(4, 20), torch.randn(30, 4), torch.randn(2, 5, 3, 3), torch.randn(16, 2, 1, 1)
    kohya = {"lora_unet_down_blocks_0_attn1_to_q": (a, b), "lora_unet_conv_in": (ca, cb)}
    table = {f"{n}.lora_down.weight": d for n, (d, _) in kohya.items()} | {f"{n}.lora_up.weight": u for n, (_, u) in kohya.items()}
    save_file(table | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}, tmp_path / "kohya.safetensors")
    names = {"unet.down_blocks.0.attn1.processor.to_q": (a, b), "unet.conv_in": (ca, cb / 2)}
    table = {f"{n}.lora_A.weight": d for n, (d, _) in names.items()} | {f"{n}.lora_B.weight": u for n, (_, u) in names.items()}
    save_file(table, tmp_path / "diffusers.safetensors")
    wanted = {
        "down_blocks.0.attn1.to_q.weight": base["down_blocks.0.attn1.to_q.weight"] + b @ a,
        "conv_in.weight": base["conv_in.weight"] + (cb.flatten(1) @ ca.flatten(1)).view(16, 5, 3, 3) / 2,
        "conv_in.bias": base["conv_in.bias"],
    }
    for name in ("kohya", "diffusers"):
        peru(
            "unpack",
            tmp_path / f"{name}.safetensors",
            "-b",
            tmp_path / "unet.safetensors",
            "-o",
            tmp_path / f"{name}-full.safetensors",
            "--no-sync",
        )
        got = load_file(tmp_path / f"{name}-full.safetensors")
        assert sorted(got) == sorted(wanted)
        for key, tensor in wanted.items():
            torch.testing.assert_close(got[key], tensor, rtol=1e-5, atol=1e-5)
