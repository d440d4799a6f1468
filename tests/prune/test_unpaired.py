"""Tensors without a partner are counted: refused above a tenth of either side's bytes, reported above a hundredth, except heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import assert_same_tensors, save

Tensors = dict[str, torch.Tensor]


def layers(prefix: str, count: int, size: int = 40) -> Tensors:
    return {f"{prefix}.{i}.weight": torch.randn(size, size) for i in range(count)}


def test_a_half_renamed_model_is_refused_unless_allowed(tmp_path: Path, peru) -> None:
    base = layers("visual", 6) | layers("model.layers", 4)
    fine = {n: t + 0.1 for n, t in base.items() if n.startswith("visual")} | layers("model.language_model.layers", 4)
    b, f = save(base, tmp_path / "base.safetensors"), save(fine, tmp_path / "fine.safetensors")
    command = ["prune", f, "-b", b, "-o", tmp_path / "a.safetensors", "--keep", "50%", "--no-sync"]
    peru(*command, code=1)
    for text in (
        "(40%) have no partner: model.language_model.layers.*.weight (25,600)",
        "model.layers.*.weight (25,600)",
        "--allow-unpaired",
    ):
        assert text in peru.stderr
    assert not (tmp_path / "a.safetensors").exists()
    peru(*command, "--allow-unpaired")
    peru("unpack", tmp_path / "a.safetensors", "-b", b, "-o", tmp_path / "r.safetensors", "--no-sync")
    got = load_file(tmp_path / "r.safetensors")
    assert all(torch.equal(got[n], t) for n, t in fine.items() if "language" in n)


@pytest.mark.parametrize(("size", "code", "said"), [(30, 1, True), (20, 0, True), (5, 0, False)])
@pytest.mark.parametrize("side", ["fine", "base"])
def test_a_tenth_is_refused_and_a_hundredth_is_reported(tmp_path: Path, peru, size: int, code: int, said: bool, side: str) -> None:
    models = {name: layers("layers", 4) for name in ("fine", "base")}
    models[side]["extra.weight"] = torch.randn(size, size)
    paths = {name: save(t, tmp_path / f"{name}.safetensors") for name, t in models.items()}
    peru("prune", paths["fine"], "-b", paths["base"], "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync", code=code)
    assert ("extra.weight" in peru.stderr and "have no partner" in peru.stderr) == said
    if not code:
        peru("unpack", tmp_path / "a.safetensors", "-b", paths["base"], "-o", tmp_path / "r.safetensors", "--no-sync")
        assert_same_tensors(tmp_path / "r.safetensors", models["fine"])


def test_heads_and_named_tensors_are_exempt(tmp_path: Path, peru) -> None:
    base = layers("layers", 4) | {"lm_head.weight": torch.randn(90, 40), "cls.predictions.bias": torch.randn(900)}
    fine = layers("layers", 4) | {"classifier.out_proj.weight": torch.randn(50, 40), "adapter.own.weight": torch.randn(60, 40)}
    b, f = save(base, tmp_path / "base.safetensors"), save(fine, tmp_path / "fine.safetensors")
    command = ["prune", f, "-b", b, "-o", tmp_path / "a.safetensors", "--keep", "50%", "--no-sync"]
    peru(*command, code=1)
    assert "adapter.own.weight" in peru.stderr and "classifier" not in peru.stderr.split("no partner")[1]
    peru(*command, "--per-task", r"^adapter\.own")
    assert "no partner" not in peru.stderr
