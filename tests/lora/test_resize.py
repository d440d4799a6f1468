"""Resized adapters of every kind, built by peft on tiny random models, loaded again by peft, against dense float64 SVDs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::peft.utils.warning.PeftWarning", "ignore::RuntimeWarning")


SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, max_position_embeddings=32))


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=60, n_positions=32))


def vit() -> nn.Module:
    config = transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=12, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config)


def wav2vec2() -> nn.Module:
    sizes = {k: v for k, v in SMALL.items() if k != "vocab_size"}
    config = transformers.Wav2Vec2Config(
        **sizes, conv_dim=(12, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=4,
        classifier_proj_size=8,
    )  # fmt: skip
    return transformers.Wav2Vec2ForSequenceClassification(config)


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


def qwen3_moe() -> nn.Module:
    config = transformers.Qwen3MoeConfig(
        **SMALL, num_key_value_heads=2, head_dim=6, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12
    )
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=6, num_local_experts=3, num_experts_per_tok=2, layer_types=["full_attention"] * 2
    )
    return transformers.GptOssForCausalLM(config)


IDS = torch.arange(12).view(2, 6) % 50
INPUTS: dict[Callable[[], nn.Module], dict[str, torch.Tensor]] = {
    bert: {"input_ids": IDS},
    llama: {"input_ids": IDS},
    gpt2: {"input_ids": IDS},
    vit: {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 12 * 12).view(2, 3, 12, 12)},
    wav2vec2: {"input_values": torch.linspace(-1, 1, 2 * 200).sin().view(2, 200)},
    mixtral: {"input_ids": IDS},
    qwen3_moe: {"input_ids": IDS},
    gpt_oss: {"input_ids": IDS},
}
LINEARS = ["q_proj", "v_proj", "up_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# name: model, settings of LoraConfig (r = 6 and lora_alpha = 9 unless given)
KINDS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": LINEARS}),
    "rslora": (llama, {"target_modules": LINEARS, "use_rslora": True}),
    "patterns": (llama, {"target_modules": LINEARS, "rank_pattern": {"v_proj": 3, "0.mlp.up_proj": 5}, "alpha_pattern": {"q_proj": 2}}),
    "embedding": (bert, {"target_modules": ["word_embeddings", "query"]}),
    "heads and biases": (bert, {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "bias": "lora_only"}),
    "lora_bias": (bert, {"target_modules": ["query", "value"], "lora_bias": True}),
    "fan_in_fan_out": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv2d": (vit, {"target_modules": ["projection", "q_proj"], "modules_to_save": ["classifier"]}),
    "conv1d": (wav2vec2, {"target_modules": ["conv_layers.1.conv", "q_proj"]}),
    "dora": (llama, {"target_modules": LINEARS, "use_dora": True}),
    "dora fan_in_fan_out": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "dora embedding": (bert, {"target_modules": ["word_embeddings", "query"], "use_dora": True, "use_rslora": True}),
    "dora conv2d": (vit, {"target_modules": ["projection"], "use_dora": True}),
    "experts": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 4}}),
    "one parameter of experts": (qwen3_moe, {"target_modules": ["v_proj"], "target_parameters": EXPERTS[:1]}),
    "experts stored (in, out)": (gpt_oss, {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True}),
}


def build(kind: str, folder: Path) -> tuple[PeftModel, nn.Module]:
    """A random adapter saved by peft under folder/lora; the peft model and a copy of its base."""
    model, settings = KINDS[kind]
    torch.manual_seed(sorted(KINDS).index(kind))
    base = model().eval()
    fresh = copy.deepcopy(base)
    wrapped = get_peft_model(base, LoraConfig(**{"r": 6, "lora_alpha": 9, **settings})).eval()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand(parameter.shape) + 0.5)
            elif "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
            elif name.endswith(".base_layer.bias") and settings.get("bias") == "lora_only":
                parameter.add_(0.1)
    wrapped.save_pretrained(folder / "lora")
    return wrapped, fresh


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    """The best approximation at a rank, in float64: of a matrix, a flattened kernel, or each of a stack of experts."""
    matrix = delta.double() if delta.ndim == 3 and delta.shape[0] == 3 else delta.double().flatten(1)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return ((u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]).view(delta.shape)


def expected(wrapped: PeftModel, fresh: nn.Module, rank: int) -> nn.Module:
    """The merged model with every update replaced by its best approximation; DoRA's magnitudes are unchanged."""
    deltas = {}
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            weight = name.removeprefix("base_model.model.").replace(".base_layer", "") + "." + getattr(module, "parameter_name", "weight")
            delta = truncated(module.get_delta_weight("default").detach(), rank)
            dora = module.lora_magnitude_vector["default"].weight.detach() if "default" in module.lora_magnitude_vector else None
            turned = getattr(module, "fan_in_fan_out", False) or bool(module.lora_embedding_A)
            deltas[weight] = (delta, dora, turned)
    state = fresh.state_dict()
    merged = copy.deepcopy(wrapped).merge_and_unload().eval()
    table = merged.state_dict()
    for name, (delta, magnitude, turned) in deltas.items():
        weight = state[name].double() + delta
        if magnitude is not None:
            rows = weight.T if turned else weight.flatten(1)
            rows = rows * (magnitude.double().view(-1, 1) / rows.norm(dim=1, keepdim=True))
            weight = (rows.T if turned else rows).reshape(weight.shape)
        table[name].copy_(weight)
    return merged


def load(folder: Path, fresh: nn.Module) -> PeftModel:
    """Load an adapter with peft. Fails on any missing or unexpected key."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|not initialized).*")
        return PeftModel.from_pretrained(copy.deepcopy(fresh), folder).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_the_best_approximation(tmp_path: Path, peru, kind: str) -> None:
    wrapped, fresh = build(kind, tmp_path)
    inputs = INPUTS[KINDS[kind][0]]
    with torch.no_grad():
        for rank in (2, 9):
            peru("svd-lora", tmp_path / "lora", "-o", tmp_path / f"r{rank}", "--rank", rank, "--no-sync")
            wanted = expected(wrapped, fresh, rank)
            got = load(tmp_path / f"r{rank}", fresh)
            torch.testing.assert_close(got(**inputs).logits, wanted(**inputs).logits, rtol=1e-4, atol=1e-4)
            if rank > 6:
                torch.testing.assert_close(got(**inputs).logits, wrapped(**inputs).logits, rtol=1e-4, atol=1e-4)
            merged = got.merge_and_unload().state_dict()
            for name, tensor in wanted.state_dict().items():
                torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_unpack_folds_every_kind_into_its_base(tmp_path: Path, peru, kind: str) -> None:
    wrapped, fresh = build(kind, tmp_path)
    fresh.save_pretrained(tmp_path / "base")
    peru("unpack", tmp_path / "lora", "-b", tmp_path / "base", "-o", tmp_path / "full", "--no-sync")
    loaded, info = type(fresh).from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    with torch.no_grad():
        inputs = INPUTS[KINDS[kind][0]]
        torch.testing.assert_close(loaded.eval()(**inputs).logits, wrapped(**inputs).logits, rtol=1e-4, atol=1e-4)
    merged = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)
