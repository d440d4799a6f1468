"""Single-file diffusion checkpoints: names as trainers write them, add-difference, weights by block, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SD = {
    "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
    "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    "model.diffusion_model.middle_block.0.in_layers.2.weight": (8, 8, 3, 3),
    "model.diffusion_model.output_blocks.0.0.skip_connection.weight": (8, 16, 1, 1),
    "model.diffusion_model.out.2.bias": (4,),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (12, 8),
}
SDXL = {
    "model.diffusion_model.label_emb.0.0.weight": (8, 10),
    "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (12, 8),
    "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (12, 8),
    "conditioner.embedders.1.model.logit_scale": (),
}
FLUX = {
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (24, 8),
    "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": (8,),
    "model.diffusion_model.single_blocks.0.linear1.weight": (40, 8),
    "vae.decoder.conv_in.weight": (8, 4, 3, 3),
    "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (12, 8),
}
FAMILIES = {"sd1": SD, "sdxl": SD | SDXL, "flux": FLUX}


def checkpoints(folder: Path, kind: str) -> dict[str, Path]:
    noise = torch.Generator().manual_seed(2)
    made, base = {}, {name: torch.randn(shape, generator=noise) for name, shape in FAMILIES[kind].items()}
    for name, step in (("c", 0.0), ("a", 0.1), ("b", 0.1)):
        table = {key: (value + step * torch.randn(value.shape, generator=noise)).half() for key, value in base.items()}
        if kind != "flux":
            table["alphas_cumprod"] = torch.linspace(0.99, 0.01, 10)
            table["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(7)[None]
        made[name] = folder / f"{name}.safetensors"
        save_file(table, made[name])
    return made


def tables(made: dict[str, Path]) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(path) for name, path in made.items()}


@pytest.mark.parametrize("kind", FAMILIES)
def test_add_difference_of_single_files_equals_its_formula(kind: str, tmp_path: Path, peru) -> None:
    made = checkpoints(tmp_path, kind)
    out = tmp_path / "out.safetensors"
    words = ["-m", "task-arithmetic", "--scale", 1, "--weight", "b=0.7"]
    peru("merge", f"a={made['a']}", f"b={made['b']}", "--base", made["c"], "-o", out, *words)
    table, got = tables(made), load_file(out)
    assert got.keys() == table["a"].keys()
    for name, merged in got.items():
        a, b, c = (table[each][name] for each in "abc")
        if name in FAMILIES[kind]:
            assert merged.dtype == torch.float16
            torch.testing.assert_close(merged.double(), a.double() + 0.7 * (b.double() - c.double()), rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(merged, c)


def test_weights_by_block_are_weights_by_name(tmp_path: Path, peru) -> None:
    made = checkpoints(tmp_path, "sd1")
    out = tmp_path / "out.safetensors"
    weights = "input_blocks:0.25,middle_block:0.5,output_blocks:1,diffusion_model:0.1,0"
    words = ["-m", "task-arithmetic", "--scale", 1, "--weight", f"b={weights}"]
    peru("merge", f"a={made['a']}", f"b={made['b']}", "--base", made["c"], "-o", out, *words)
    table, got = tables(made), load_file(out)
    wanted = {"input_blocks": 0.25, "middle_block": 0.5, "output_blocks": 1.0, "diffusion_model": 0.1}
    for name in SD:
        weight = next((value for part, value in wanted.items() if part in name), 0.0)
        a, b, c = (table[each][name].double() for each in "abc")
        torch.testing.assert_close(got[name].double(), a + weight * (b - c), rtol=1e-3, atol=1e-3)


def test_a_plain_average_needs_no_base(tmp_path: Path, peru) -> None:
    made = checkpoints(tmp_path, "sdxl")
    out = tmp_path / "out.safetensors"
    peru("merge", f"a={made['a']}", f"b={made['b']}", "-o", out, "-m", "linear", "--weight", "a=0.3", "--weight", "b=0.7")
    table, got = tables(made), load_file(out)
    for name in FAMILIES["sdxl"]:
        expected = 0.3 * table["a"][name].double() + 0.7 * table["b"][name].double()
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-3, atol=1e-3)


def test_train_difference_equals_supermergers_formula(tmp_path: Path, peru) -> None:
    made = checkpoints(tmp_path, "flux")
    table = tables(made)
    name = next(iter(FLUX))
    for rows, of in ((slice(0, 2), ("a", "b")), (slice(2, 4), ("b", "c")), (slice(4, 6), ("a", "c"))):
        table[of[0]][name][rows] = table[of[1]][name][rows]  # B = A, B = C, A = C
    table["b"][name][6:8] = table["a"][name][6:8] = table["c"][name][6:8]
    for each, path in made.items():
        save_file(table[each], path)
    out = tmp_path / "out.safetensors"
    words = ["-m", "train-difference", "--scale", "double_blocks:0.5,1", "--dtype", "fp32"]
    peru("merge", f"a={made['a']}", f"b={made['b']}", "--base", made["c"], "-o", out, *words)
    got = load_file(out)
    for name in FLUX:
        a, b, c = (table[each][name].double() for each in "abc")
        near, far = (b - c).abs(), (b - a).abs()
        share = torch.where(near + far > 0, far / (near + far), torch.zeros_like(near))
        expected = a + 1.8 * (0.5 if "double_blocks" in name else 1) * torch.sign(b - c) * share * near
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-6, atol=1e-6)
