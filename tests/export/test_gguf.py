"""`peru export --to gguf`: gguf's own reader finds the names of llama.cpp, and factors whose product is PEFT's update."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

Peru = Callable[..., str]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "tie_word_embeddings": False,
}  # fmt: skip
PLACES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate", "down_proj": "ffn_down",
}  # fmt: skip


def adapter(folder: Path, model: Any, **more: Any) -> Any:
    """A LoRA adapter with random factors on a saved base; the PEFT model."""
    torch.manual_seed(0)
    model.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": list(PLACES)} | more))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    wrapped.save_pretrained(folder / "adapter")
    return wrapped


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def hf_rows(update: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as in transformers of rows as in llama.cpp: there halves of a head's rotation are interleaved."""
    size = update.shape[0] // heads
    order = [head * size + half * (size // 2) + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    back = torch.empty_like(update)
    back[order] = update
    return back


def update(fields: dict[str, Any], tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """What llama.cpp adds to a matrix."""
    down, up = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
    return fields["adapter.lora.alpha"] / up.shape[1] * up @ down


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"k_proj": 3}}])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_llama_cpp_would_add_what_peft_adds(tmp_path: Path, peru: Peru, family: str, options: dict[str, Any]) -> None:
    config, cls = (LlamaConfig, LlamaForCausalLM) if family == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    model = adapter(tmp_path, cls(config(**SIZES)), **options)
    told = json.loads(
        peru("export", tmp_path / "adapter", "--base", tmp_path / "base", "--to", "gguf", "-o", tmp_path / "a.gguf", "--json")
    )
    fields, tensors = read(tmp_path / "a.gguf")
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora" and fields["general.architecture"] == family
    assert told["modules"] == len(tensors) / 2 == 2 * len(PLACES) and told["bytes"] == (tmp_path / "a.gguf").stat().st_size
    for layer in range(2):
        for module, place in PLACES.items():
            block = model.base_model.model.model.layers[layer]
            owner = getattr(block.self_attn if "proj" in module and module[0] in "qkvo" else block.mlp, module)
            got = update(fields, tensors, f"blk.{layer}.{place}.weight")
            if family == "llama" and module in ("q_proj", "k_proj"):
                got = hf_rows(got, 4 if module == "q_proj" else 2)
            torch.testing.assert_close(got.float(), owner.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


def test_plain_factors_keep_their_bits(tmp_path: Path, peru: Peru) -> None:
    model = adapter(tmp_path, Qwen2ForCausalLM(Qwen2Config(**SIZES)), target_modules=["v_proj", "embed_tokens", "lm_head"])
    peru("export", tmp_path / "adapter", "--base", tmp_path / "base", "--to", "gguf", "-o", tmp_path / "a.gguf")
    fields, tensors = read(tmp_path / "a.gguf")
    owner = model.base_model.model.model.layers[1].self_attn.v_proj
    assert fields["adapter.lora.alpha"] == 8
    assert torch.equal(tensors["blk.1.attn_v.weight.lora_a"], owner.lora_A["default"].weight.detach())
    assert torch.equal(tensors["blk.1.attn_v.weight.lora_b"], owner.lora_B["default"].weight.detach())
    embedding = model.base_model.model.model.embed_tokens
    assert torch.equal(tensors["token_embd.weight.lora_a"], embedding.lora_embedding_A["default"].detach().T)
    assert torch.equal(tensors["token_embd.weight.lora_b"], embedding.lora_embedding_B["default"].detach())
    assert tensors["output.weight.lora_a"].shape == (4, 32)


def test_what_gguf_cannot_hold_is_refused(tmp_path: Path, peru: Peru) -> None:
    export = ["export", tmp_path / "adapter", "--base", tmp_path / "base", "--to", "gguf", "-o", tmp_path / "a.gguf"]
    adapter(tmp_path, Qwen2ForCausalLM(Qwen2Config(**SIZES)), use_dora=True, target_modules=["v_proj"])
    peru(*export, code=1)
    assert "has more" in peru.stderr and "convert_lora_to_gguf" in peru.stderr  # type: ignore[attr-defined]
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"qwen2"', '"bloom"'))
    peru(*export, code=2)
    assert "'bloom'" in peru.stderr  # type: ignore[attr-defined]
    peru("export", tmp_path / "base", "--base", tmp_path / "base", "--to", "gguf", "-o", tmp_path / "a.gguf", code=2)
    peru(*export[:-1], tmp_path / "a.bin", code=2)
    adapter(tmp_path, Qwen2ForCausalLM(Qwen2Config(**SIZES | {"tie_word_embeddings": True})), target_modules=["lm_head"])
    peru(*export, code=1)
    assert "no matrix for lm_head" in peru.stderr and not (tmp_path / "a.gguf").exists()  # type: ignore[attr-defined]
