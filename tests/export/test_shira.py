"""`peru export --to shira`: PEFT loads the adapter on the base and computes as the fine-tune does."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

Peru = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def bert() -> BertForSequenceClassification:
    config = BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=3)
    return BertForSequenceClassification(config)


def pair(folder: Path, make: Callable[[], torch.nn.Module], dtype: torch.dtype, dense: tuple[str, ...] = (), biases: bool = False) -> None:
    """A base, and a fine-tune with few changed entries; in tensors whose names contain one of `dense` all of them."""
    torch.manual_seed(0)
    base = make().to(dtype)
    fine = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in fine.named_parameters():
            share = 1.0 if any(part in name for part in dense) else 0.02 if parameter.ndim == 2 or biases else 0.0
            parameter[torch.rand(parameter.shape) < share] += 0.01
    fine.save_pretrained(folder / "fine")
    base.save_pretrained(folder / "base")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_peft_computes_the_fine_tunes_logits(tmp_path: Path, peru: Peru, dtype: torch.dtype) -> None:
    pair(tmp_path, llama, dtype, dense=("norm", "embed_tokens", "layers.1.mlp.up_proj"))
    peru("prune", tmp_path / "fine", "--base", tmp_path / "base", "-o", tmp_path / "a.safetensors", "--lossless")
    told = json.loads(
        peru("export", tmp_path / "a.safetensors", "--base", tmp_path / "base", "--to", "shira", "-o", tmp_path / "s", "--json")
    )
    assert told["sparse_modules"] == 14 and told["whole_modules"] == 7 and (told["inexact"] == 0 or dtype is torch.float32)
    inputs = torch.arange(12)[None]
    for used in {dtype, torch.float32}:
        fine, base = (LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=used).eval() for name in ("fine", "base"))
        model = PeftModel.from_pretrained(base, tmp_path / "s").eval()
        with torch.no_grad():
            got, wanted = model(inputs).logits, fine(inputs).logits
        if told["inexact"]:
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(got, wanted), used
        merged = model.merge_and_unload().state_dict()
        for name, tensor in fine.state_dict().items():
            torch.testing.assert_close(merged[name], tensor, rtol=2e-7 if told["inexact"] else 0, atol=0)


def test_layers_whose_biases_change_are_saved_whole(tmp_path: Path, peru: Peru) -> None:
    pair(tmp_path, bert, torch.float32, dense=("attention.output.dense.bias", "classifier", "LayerNorm"))
    peru("export", tmp_path / "fine", "--base", tmp_path / "base", "--to", "shira", "-o", tmp_path / "s")
    tensors = load_file(tmp_path / "s" / "adapter_model.safetensors")
    assert "base_model.model.bert.encoder.layer.0.attention.output.dense.weight" in tensors
    assert "base_model.model.bert.encoder.layer.0.intermediate.dense.shira_weight" in tensors
    fine, base = (BertForSequenceClassification.from_pretrained(tmp_path / name).eval() for name in ("fine", "base"))
    model = PeftModel.from_pretrained(base, tmp_path / "s").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(9)[None]).logits, fine(torch.arange(9)[None]).logits, rtol=1e-5, atol=1e-6)


def test_what_shira_cannot_hold_is_refused(tmp_path: Path, peru: Peru) -> None:
    pair(tmp_path, llama, torch.float32, dense=("",))
    export = ["export", tmp_path / "fine", "--base", tmp_path / "base", "--to", "shira", "-o", tmp_path / "s"]
    peru(*export, code=1)
    assert "keep fewer entries" in peru.stderr  # type: ignore[attr-defined]
    peru(*export, "--step", 3, code=2)
    fine = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        fine.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
    fine.save_pretrained(tmp_path / "nan")
    peru("export", tmp_path / "nan", "--base", tmp_path / "base", "--to", "shira", "-o", tmp_path / "s", code=1)
    assert "NaN" in peru.stderr and not (tmp_path / "s").exists()  # type: ignore[attr-defined]


def test_a_dry_run_says_what_it_takes(tmp_path: Path, peru: Peru) -> None:
    pair(tmp_path, llama, torch.bfloat16)
    export = ["export", tmp_path / "fine", "--base", tmp_path / "base", "--to", "shira", "-o", tmp_path / "s", "--json"]
    planned = json.loads(peru(*export, "--dry-run"))
    assert not (tmp_path / "s").exists()
    peru(*export)
    tensors = load_file(tmp_path / "s" / "adapter_model.safetensors")
    assert planned["tensor_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert json.loads((tmp_path / "s" / "adapter_config.json").read_text())["r"] == planned["rank"]
