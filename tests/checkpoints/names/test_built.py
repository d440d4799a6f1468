"""A stranger's config.json is built as a model without weights only if it names one, and one that the checkpoint could hold."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from peru_cli.checkpoints.names.built import CannotBuild, build

SMALL: dict[str, Any] = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    "field",
    [("num_hidden_layers", 10**6), ("num_hidden_layers", 10**15), ("num_hidden_layers", -1), ("num_local_experts", 10**9)],
)
def test_absurd_counts_are_not_built(field: tuple[str, int]) -> None:
    began = time.perf_counter()
    with pytest.raises(CannotBuild, match=f"{field[0]} = {field[1]}, but the checkpoint has 40 tensors"):
        build(SMALL | dict([field]), 40)
    assert time.perf_counter() - began < 5


def test_modules_are_counted_whatever_the_field_is_called() -> None:
    """CLIP's towers are nested tables, T5 counts by another name, and a list may ask for as many stages."""
    many = {"model_type": "convnextv2", "architectures": ["ConvNextV2Model"], "depths": [3000, 3000, 3000, 3000], "hidden_sizes": [8] * 4}
    with pytest.raises(CannotBuild, match="more than 1800 parts"):
        build(many, 100)


def test_ordinary_models_are_built() -> None:
    assert len(build(SMALL, 40).state_dict()) > 10
    for kind, name in (("bert", "BertModel"), ("t5", "T5ForConditionalGeneration"), ("llava", "LlavaForConditionalGeneration")):
        config = transformers.CONFIG_MAPPING[kind]().to_dict() | {"architectures": [name]}
        assert all(p.device.type == "meta" for p in build(config, 400).parameters())


@pytest.mark.parametrize("name", ["logging", "pipeline", "AutoTokenizer", "BertConfig", "__name__", "no_such_thing", "Trainer"])
def test_only_a_model_class_is_called(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    if name in ("pipeline", "Trainer"):
        monkeypatch.setattr(transformers, name, lambda *a, **k: called.append(name))
    assert build(SMALL | {"architectures": [name]}, 40) is None and not called


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**6}, {"num_hidden_layers": -4}, {"architectures": ["pipeline"]}])
def test_prune_says_what_does_not_pair(tmp_path: Path, peru, change: dict[str, Any]) -> None:
    for folder, name in (
        ("base", "model.layers.0.mlp.experts.gate_up_proj"),
        ("fine", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
    ):
        (tmp_path / folder).mkdir()
        save_file({name: torch.randn(16, 16)}, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(SMALL | change))
    peru("prune", tmp_path / "fine", "-b", tmp_path / "base", "-o", tmp_path / "a.safetensors", "--lossless", code=1)
    assert "share only 0" in peru.stderr
