"""Merged adapters compared with peft's result for the same folder: orientations, untied heads, vocabularies."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 50}
IDS = torch.arange(14).view(2, 7) % 40


def gpt2() -> Any:
    return tr.GPT2LMHeadModel(tr.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=50, n_positions=32))


def llama(tied: bool = False) -> Any:
    return tr.LlamaForCausalLM(tr.LlamaConfig(**SMALL, tie_word_embeddings=tied))


def adapt(model: Any, folder: Path, **settings: Any) -> Any:
    """Save a base and a random adapter on it. Returns the peft model."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder / "base")
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(**{"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    wrapped.save_pretrained(folder / "lora")
    return wrapped.eval()


def unpacked(peru, folder: Path) -> Any:
    peru("unpack", folder / "lora", "-b", folder / "base", "-o", folder / "full", "--no-sync")
    model, info = tr.AutoModelForCausalLM.from_pretrained(folder / "full", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    return model.eval()


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("dora", [False, True])
def test_orientation_follows_the_modules_type(tmp_path: Path, peru, kind: str, flag: bool, dora: bool) -> None:
    """Square matrices: only the module's type tells. PEFT corrects fan_in_fan_out on loading, whatever the file says."""
    made, targets = (gpt2(), ["attn.c_proj"]) if kind == "gpt2" else (llama(), ["q_proj", "o_proj"])
    wrapped = adapt(made, tmp_path, target_modules=targets, fan_in_fan_out=kind == "gpt2", use_dora=dora)
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fan_in_fan_out": flag}))
    merged = PeftModel.from_pretrained(copy.deepcopy(made), tmp_path / "lora").merge_and_unload().state_dict()
    got = unpacked(peru, tmp_path)
    for name, tensor in got.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, wrapped(IDS).logits, rtol=1e-4, atol=1e-4)


HEADS: dict[str, dict[str, Any]] = {
    "a saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "a saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "factors of the head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_that_becomes_untied_from_its_embedding(tmp_path: Path, peru, case: str) -> None:
    """The written model computes what the adapter's does: with a tied config, every loader would tie them again."""
    wrapped = adapt(llama(tied=True), tmp_path, **HEADS[case])
    got = unpacked(peru, tmp_path)
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and got.lm_head.weight is not got.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, wrapped(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_tied_head_that_stays_one_stays_tied(tmp_path: Path, peru) -> None:
    adapt(llama(tied=True), tmp_path, target_modules=["q_proj"])
    before = (tmp_path / "base" / "config.json").read_bytes()
    unpacked(peru, tmp_path)
    assert (tmp_path / "full" / "config.json").read_bytes() == before


@pytest.mark.parametrize("rows", [44, 56])
@pytest.mark.parametrize("tied", [True, False])
def test_saved_embeddings_of_another_size_fix_the_vocabulary(tmp_path: Path, peru, rows: int, tied: bool) -> None:
    model = llama(tied)
    torch.manual_seed(3)
    model.save_pretrained(tmp_path / "base")
    grown = copy.deepcopy(model)
    grown.resize_token_embeddings(rows)
    wrapped = get_peft_model(grown, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        wrapped.get_input_embeddings().weight.normal_(std=0.3)
    wrapped.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    got = unpacked(peru, tmp_path)
    assert got.config.vocab_size == rows == len(got.model.embed_tokens.weight) == len(got.lm_head.weight)
    assert got.config.tie_word_embeddings is tied
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, wrapped(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_tensor_that_nothing_names_is_refused(tmp_path: Path, peru) -> None:
    """A key of an adapter's file is used or refused, never written as a tensor of the model because it is unknown."""
    adapt(llama(), tmp_path, target_modules=["q_proj"])
    from safetensors.torch import save_file

    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.model.layers.0.extra": torch.ones(3)}, file)
    peru("unpack", tmp_path / "lora", "-b", tmp_path / "base", "-o", tmp_path / "full", code=1)
    assert "model.layers.0.extra" in peru.stderr and "modules_to_save" in peru.stderr


def test_a_merge_of_adapters_whose_heads_differ_is_untied(tmp_path: Path, peru) -> None:
    """Task arithmetic of one task at weight 1 equals the task: in the merge under its head, and if the base stores both."""
    wrapped = adapt(llama(tied=True), tmp_path, **HEADS["a saved head"])
    peru(
        "merge", f"a={tmp_path / 'lora'}", "-b", tmp_path / "base", "-o", tmp_path / "m", "-m", "task-arithmetic", "--scale", 1, "--no-sync"
    )
    peru("unpack", tmp_path / "m", "--task", "a", "-o", tmp_path / "back", "--no-sync")
    got = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, wrapped(IDS).logits, rtol=1e-4, atol=1e-4)
    # a base that stores the tied matrix twice, like older transformers and other programs
    from safetensors.torch import save_file

    table = load_file(tmp_path / "base" / "model.safetensors")
    save_file(table | {"lm_head.weight": table["model.embed_tokens.weight"].clone()}, tmp_path / "base" / "model.safetensors")
    peru(
        "merge", f"a={tmp_path / 'lora'}", "-b", tmp_path / "base", "-o", tmp_path / "n", "-m", "task-arithmetic", "--scale", 1, "--no-sync"
    )
    assert json.loads((tmp_path / "n" / "config.json").read_text())["tie_word_embeddings"] is False
    got = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "n").eval()
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, wrapped(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_tied_head_that_the_base_stores_again_follows_its_embedding(tmp_path: Path, peru) -> None:
    """Factors of the embedding change the head, too: for PEFT the two are one tensor."""
    from safetensors.torch import save_file

    wrapped = adapt(llama(tied=True), tmp_path, target_modules=["embed_tokens"])
    table = load_file(tmp_path / "base" / "model.safetensors")
    save_file(table | {"lm_head.weight": table["model.embed_tokens.weight"].clone()}, tmp_path / "base" / "model.safetensors")
    peru("unpack", tmp_path / "lora", "-b", tmp_path / "base", "-o", tmp_path / "full", "--no-sync")
    assert "lm_head.weight repeats the embedding" in peru.stderr
    merged = wrapped.merge_and_unload().eval()
    got = tr.AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    assert got.lm_head.weight is got.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(got(IDS).logits, merged(IDS).logits, rtol=1e-4, atol=1e-4)


def test_an_adapter_cannot_remove_what_the_fine_tune_lacks(tmp_path: Path, peru) -> None:
    """A tied head that only the base stores would stay the base's; other tensors stay with a note."""
    from safetensors.torch import save_file

    adapt(llama(tied=True), tmp_path, target_modules=["q_proj"])
    table = load_file(tmp_path / "base" / "model.safetensors")
    fine = tmp_path / "fine"
    fine.mkdir()
    (fine / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    save_file({n: t + 0.1 * torch.randn(t.shape) for n, t in table.items() if "layers.1.mlp.up" not in n}, fine / "model.safetensors")
    at = ["-b", tmp_path / "base", "--rank", 2, "--no-sync", "--rest", "delta"]
    peru("svd-lora", fine, *at, "-o", tmp_path / "out")
    assert "lacks 1 tensor of the base, kept as in the base: model.layers.1.mlp.up_proj.weight" in peru.stderr
    save_file(table | {"lm_head.weight": table["model.embed_tokens.weight"].clone()}, tmp_path / "base" / "model.safetensors")
    peru("svd-lora", fine, *at, "-o", tmp_path / "out2", code=2)
    assert "lm_head.weight" in peru.stderr and "ties it to its embedding" in peru.stderr


@pytest.mark.parametrize("model", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_model_and_an_adapter_in_one_folder(tmp_path: Path, peru, model: str) -> None:
    """Nothing tells which is meant: both are named in the error, and their files can be given."""
    adapt(llama(), tmp_path, target_modules=["q_proj"])
    both = tmp_path / "lora" / model
    both.write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    lora, out = tmp_path / "lora", ("-o", tmp_path / "out")
    for command in (
        ("unpack", lora, "-b", tmp_path / "base", *out),
        ("svd-lora", lora, "--rank", 1, *out),
        ("merge", f"a={lora}", "-b", tmp_path / "base", "-m", "task-arithmetic", *out),
        ("prune", tmp_path / "base", "-b", lora, "--keep", "10%", "-o", tmp_path / "out.safetensors"),
        ("inspect", lora),
        ("eval", lora, "-b", tmp_path / "base", "--against", tmp_path / "base"),
    ):
        peru(*command, code=2)
        assert "holds an adapter, adapter_model.safetensors, and a model, " + model in peru.stderr, peru.stderr
    peru("unpack", lora / "adapter_model.safetensors", "-b", tmp_path / "base", *out, "--no-sync")


def test_models_whose_output_is_tied_by_default() -> None:
    """For configs without the setting, as before transformers 5, their model type's default counts."""
    from peru_cli.checkpoints.architectures import _TIED

    assert [kind for kind in sorted(_TIED) if not tr.CONFIG_MAPPING[kind]().tie_word_embeddings] == []


def test_a_square_matrix_of_a_base_without_config(tmp_path: Path, peru) -> None:
    """GPT-2's names, no config.json: whether a square weight is stored as (in, out) is not guessed."""
    adapt(gpt2(), tmp_path, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    (tmp_path / "base" / "config.json").unlink()
    peru("unpack", tmp_path / "lora", "-b", tmp_path / "base", "-o", tmp_path / "full", code=1)
    assert "attn.c_proj" in peru.stderr and "config.json" in peru.stderr
