"""PEFT's methods besides LoRA: peru's result equals peft's own merged model, bit for bit; and peft's names and fields are covered."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file, save_file

from peru_cli.checkpoints.lora.foreign import _REASONS, PREFIXES

IDS = torch.arange(14).view(2, 7)
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "target_r": 4, "init_r": 4},
    "BOFT": {"boft_block_size": 8},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "GRALORA": {"r": 8, "gralora_k": 2},
    "HIRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 4, "alpha": 6, "rank_pattern": {"q_proj": 2}},
    "LOKR": {"r": 2, "alpha": 6, "decompose_both": True},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8, "r": 0},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"num_vectors": 16, "vector_length": 8},
    "VERA": {"r": 6, "save_projection": False, "projection_prng_key": 7},
    "WAVEFT": {"n_frequency": 20},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
    model = tr.LlamaForCausalLM(tr.LlamaConfig(**sizes, attention_bias=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("methods") / "base"
    model.save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Save a random adapter. Returns peft's merged result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tr.AutoModelForCausalLM.from_pretrained(base)
        settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **SETTINGS.get(kind, {})}
        wrapped = get_peft_model(copy.deepcopy(model), PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**settings))
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
        wrapped.save_pretrained(folder)
        merged: dict[str, torch.Tensor] = PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict()
    return merged


@pytest.mark.parametrize("kind", sorted(PREFIXES))
def test_every_method_is_merged_as_peft_does_it(tmp_path: Path, peru, base: Path, kind: str) -> None:
    wanted = adapt(base, tmp_path / "adapter", kind)
    peru("unpack", tmp_path / "adapter", "-b", base, "-o", tmp_path / "full", "--no-sync")
    got, before = load_file(tmp_path / "full" / "model.safetensors"), load_file(base / "model.safetensors")
    assert sorted(got) == sorted(before) and any(not torch.equal(got[name], before[name]) for name in got)
    for name, tensor in got.items():
        # Some methods multiply matrices: the last bit depends on the processor, and on where a tensor lies in memory.
        last = torch.finfo(tensor.dtype).eps * float(wanted[name].abs().max())
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2 * last)
    assert kind in peru("inspect", tmp_path / "adapter")


CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "LOHA": {"r": 3, "alpha": 6},
    "LOHA with Tucker cores": {"r": 3, "alpha": 6, "use_effective_conv2d": True},
    "LOKR": {"r": 2, "alpha": 6, "decompose_both": True},
    "LOKR with Tucker cores": {"r": 2, "alpha": 6, "use_effective_conv2d": True},
    "OFT": {"oft_block_size": 4, "r": 0},
    "BOFT": {"boft_block_size": 4},
}


@pytest.mark.parametrize("method", sorted(CONVOLUTIONS))
def test_convolutions_are_merged_as_peft_does_it(tmp_path: Path, peru, method: str) -> None:
    torch.manual_seed(0)
    settings = tr.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    model = tr.ResNetForImageClassification(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "base")
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method.split()[0])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(copy.deepcopy(model), kind(target_modules=r".*stages.*convolution", **CONVOLUTIONS[method]))
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.1)
        wrapped.save_pretrained(tmp_path / "adapter")
        wanted = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    peru("unpack", tmp_path / "adapter", "-b", tmp_path / "base", "-o", tmp_path / "full", "--no-sync")
    got, before = load_file(tmp_path / "full" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    changed = [name for name in got if got[name].dim() == 4 and not torch.equal(got[name], before[name])]
    assert len(changed) == sum("stages" in name for name in got if got[name].dim() == 4)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=0)


def test_the_other_commands_take_them(tmp_path: Path, peru, base: Path) -> None:
    """merge, svd-lora (with the base, as a full fine-tune) and eval; also given the file instead of its folder."""
    wanted = adapt(base, tmp_path / "loha", "LOHA")
    file = tmp_path / "loha" / "adapter_model.safetensors"
    peru("merge", f"a={file}", "-b", base, "-m", "task-arithmetic", "--scale", 1, "-o", tmp_path / "merged", "--no-sync")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    peru("svd-lora", tmp_path / "loha", "-o", tmp_path / "lora", "--rank", 16, code=2)
    assert "LOHA" in peru.stderr and "add --base BASE" in peru.stderr
    name = "model.layers.0.mlp.down_proj.weight"
    peru("svd-lora", tmp_path / "loha", "-b", base, "-o", tmp_path / "lora", "--rank", 12, "--no-sync")
    peru("unpack", tmp_path / "lora", "-b", base, "-o", tmp_path / "back", "--no-sync")
    u, s, vt = torch.linalg.svd((wanted[name] - load_file(base / "model.safetensors")[name]).double())
    best = load_file(base / "model.safetensors")[name] + ((u[:, :12] * s[:12]) @ vt[:12]).float()
    torch.testing.assert_close(load_file(tmp_path / "back" / "model.safetensors")[name], best, rtol=1e-3, atol=1e-3)
    said = json.loads(peru("eval", tmp_path / "loha", "-b", base, "--against", tmp_path / "merged", "--json"))
    assert next(iter(said["weights"].values()))["total"]["error"] < 1e-5


def test_a_file_with_a_missing_or_an_extra_part(tmp_path: Path, peru, base: Path) -> None:
    adapt(base, tmp_path / "loha", "LOHA")
    file = tmp_path / "loha" / "adapter_model.safetensors"
    table = load_file(file)
    part = "base_model.model.model.layers.0.self_attn.q_proj.hada_w1_a"
    for changed, says in (
        ({n: t for n, t in table.items() if n != part}, "finds no "),
        (table | {f"{part}x": torch.ones(1)}, "hada_w1_ax"),
    ):
        save_file(changed, file)
        peru("unpack", tmp_path / "loha", "-b", base, "-o", tmp_path / "full", "--no-sync", code=1)
        assert says in peru.stderr and "q_proj.hada_w1_a" in peru.stderr and not (tmp_path / "full").exists(), peru.stderr


def test_a_setting_that_the_installed_peft_does_not_know(tmp_path: Path, peru, base: Path) -> None:
    adapt(base, tmp_path / "loha", "LOHA")
    path = tmp_path / "loha" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_new_thing": True}))
    peru("unpack", tmp_path / "loha", "-b", base, "-o", tmp_path / "full", code=2)
    assert "use_new_thing=True" in peru.stderr and peft.__version__ in peru.stderr


def test_prefixes_and_methods_match_the_installed_peft() -> None:
    """Every method of a new peft is either read or refused with a reason; none is forgotten."""
    known = {str(kind.value): prefix for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items()}
    assert {kind: known[kind] for kind in PREFIXES} == PREFIXES
    every = {str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert every - set(PREFIXES) - set(_REASONS) - {"LORA"} == set()


def test_every_field_of_loraconfig_is_written_or_checked() -> None:
    """A new field of peft may change what an adapter means: somebody has to look at it."""
    from peru_cli.checkpoints.lora.config import HANDLED

    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - set(HANDLED) == set()


def test_svd_lora_writes_a_peft_configuration(tmp_path: Path, peru, base: Path) -> None:
    from peru_cli.checkpoints.lora.config import new_config

    written = new_config({"a.q": 4, "a.v": 2}, ["a.q", "a.v"], [], "org/base")
    made = peft.LoraConfig(**{name: value for name, value in written.items() if name != "peft_type"})
    assert made.r == made.lora_alpha == 4 and made.rank_pattern == made.alpha_pattern == {"^a\\.v": 2} and not made.use_rslora
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    assert peft.PeftConfig.from_pretrained(tmp_path).to_dict() == made.to_dict() | {"peft_type": "LORA"}


def test_an_error_of_peft_that_says_nothing_is_named(base: Path, tmp_path: Path, peru, monkeypatch) -> None:
    adapt(base, tmp_path / "adapter", "LOHA")

    def fail(*given: object) -> None:
        raise KeyError

    monkeypatch.setattr("peft.set_peft_model_state_dict", fail)
    peru("unpack", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out", "--no-sync", code=1)
    assert "peft cannot merge the" in peru.stderr and peru.stderr.rstrip().endswith("KeyError"), peru.stderr
