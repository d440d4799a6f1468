"""Names that changed between versions of transformers come together by its own tables, and load with equal logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.conftest import assert_same_tensors

Tensors = dict[str, torch.Tensor]


def pair(tmp_path: Path, model: PreTrainedModel) -> tuple[Path, Path, Tensors]:
    """A model saved by transformers, and its fine-tune; also what the fine-tune's file holds."""
    model.save_pretrained(tmp_path / "base")
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=noise)
    model.save_pretrained(tmp_path / "fine")
    return tmp_path / "base", tmp_path / "fine", load_file(tmp_path / "fine" / "model.safetensors")


def rewrite(path: Path, tensors: Tensors) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def qwen() -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(0)
    text = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": 80, "rope_parameters": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    special = {"image_token_id": 70, "video_token_id": 71, "vision_start_token_id": 72, "vision_end_token_id": 73}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special)).eval()


def other_names(name: str) -> str:
    """What transformers 4.52 to 4.57 saved: the vision tower and the text model below `model.`; the reverse of what is there."""
    if name.startswith("model.visual."):
        return name.removeprefix("model.")
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "model.")
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


def test_a_vision_language_model_of_another_version(tmp_path: Path, peru, qwen) -> None:
    base, fine, tensors = pair(tmp_path, qwen)
    renamed = {other_names(name): tensor for name, tensor in tensors.items()}
    assert not any(n.startswith(("visual", "model.visual")) for n in renamed.keys() & tensors.keys())
    rewrite(fine, renamed)
    at = ["-b", base, "--no-sync"]
    peru("prune", fine, *at, "-o", tmp_path / "a.safetensors", "--lossless")
    assert "renamed by transformers' tables, such as" in peru.stderr
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        assert any(rule.startswith("^") for rule in json.loads(file.metadata()["peru.rename"]))
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r")
    assert_same_tensors(tmp_path / "r" / "model.safetensors", tensors)
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        logits = [AutoModelForImageTextToText.from_pretrained(tmp_path / p).eval()(ids).logits for p in ("r", "fine")]
    assert torch.equal(*logits)
    peru("merge", f"x={fine}", *at, "-o", tmp_path / "m", "-m", "task-arithmetic", "--scale", 0.5)
    got, before = load_file(tmp_path / "m" / "model.safetensors"), load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        torch.testing.assert_close(got[name], (tensor + before[name]) / 2, rtol=1e-5, atol=1e-6)
    peru("shuffle-pack", f"x={fine}", *at, "-o", tmp_path / "p.safetensors")
    assert "renamed by transformers' tables" in peru.stderr


def test_an_expert_that_lacks_a_part_is_refused_by_name(tmp_path: Path, peru) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, vocab_size=32, num_local_experts=2))
    base, fine, tensors = pair(tmp_path, model)
    rewrite(base, {name: weight.detach() for name, weight in model.state_dict().items()})  # as they lie in memory
    rewrite(fine, {name: tensor for name, tensor in tensors.items() if not name.endswith("experts.1.w3.weight")})
    for command in (["prune", fine, "--keep", "10%"], ["merge", f"x={fine}", "-m", "ties"], ["shuffle-pack", f"x={fine}"]):
        peru(*command, "-b", base, "-o", tmp_path / "o.safetensors", code=1)
        assert "different forms" in peru.stderr and "experts" in peru.stderr and "save_pretrained" in peru.stderr
        assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("alias", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])
def test_the_shared_embedding_of_t5_under_another_name(tmp_path: Path, peru, alias: str) -> None:
    torch.manual_seed(0)
    config = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=64, tie_word_embeddings=True)
    base, fine, tensors = pair(tmp_path, T5ForConditionalGeneration(config))
    rewrite(fine, {alias if name == "shared.weight" else name: tensor for name, tensor in tensors.items()})
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync")
    assert f"{alias} to shared.weight" in peru.stderr and "stored whole" not in peru.stderr
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r.safetensors", "--no-sync")
    assert_same_tensors(tmp_path / "r.safetensors", tensors)


def test_square_weights_are_not_matched_by_their_shape(tmp_path: Path, peru) -> None:
    for name, key in (("base", "query"), ("fine", "key")):
        (tmp_path / name).mkdir()
        save_file({f"encoder.layer.{i}.{key}.weight": torch.randn(16, 16) for i in range(3)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    peru("prune", tmp_path / "fine", "-b", tmp_path / "base", "-o", tmp_path / "a.safetensors", "--lossless", code=1)
    assert "share only 0" in peru.stderr
