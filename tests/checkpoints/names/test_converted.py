"""Experts stored apart and stored fused are the same model: put together as transformers does it, to the bit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.core_model_loading import Chunk, Concatenate, Interleave, MergeModulelist, PermuteForRope, Transpose

from peru_cli.checkpoints.names import layout
from peru_cli.checkpoints.names.layout import Layout, inverse
from tests.conftest import assert_same_tensors

Tensors = dict[str, torch.Tensor]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
IDS = torch.arange(12).view(1, -1)
# Operations, the number of source patterns, and of tensors for each; 0 means one that is not in a list of experts.
CHAINS = [
    ([MergeModulelist(0)], 1, 2),
    ([MergeModulelist(0), Concatenate(1)], 2, 3),
    ([MergeModulelist(0), Concatenate(1), Transpose(1, 2)], 2, 3),
    ([MergeModulelist(0), Concatenate(1), Interleave(1)], 2, 3),
    ([MergeModulelist(0), Concatenate(1), Interleave(1, inverse=True), Transpose(1, 2)], 2, 3),
    ([Concatenate(0)], 3, 0),
    ([Transpose(0, 1)], 1, 0),
    ([PermuteForRope()], 1, 0),
    ([PermuteForRope(inverse=True)], 1, 0),
    ([Chunk(0)], 1, 0),
    ([Interleave(0), Chunk(0)], 1, 0),
]
TARGETS = {Chunk: ["one", "two"]}


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZES, vocab_size=40, num_local_experts=3))


def qwen2_moe() -> PreTrainedModel:
    own = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "num_experts": 3, "num_experts_per_tok": 2}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, vocab_size=40, **own))


def in_memory(model: PreTrainedModel) -> Tensors:
    """Experts fused, as transformers holds them."""
    return {name: weight.detach().contiguous() for name, weight in model.state_dict().items()}


def write(folder: Path, model: PreTrainedModel, fused: bool) -> tuple[Path, Tensors]:
    model.save_pretrained(folder)
    if fused:
        save_file(in_memory(model), folder / "model.safetensors", {"format": "pt"})
    return folder, load_file(folder / "model.safetensors")


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


@pytest.mark.parametrize("make", [mixtral, qwen2_moe])
@pytest.mark.parametrize("fused_base", [True, False])
def test_experts_apart_and_fused(tmp_path: Path, peru, make, fused_base: bool) -> None:
    torch.manual_seed(0)
    model = make().to(torch.bfloat16)
    base, before = write(tmp_path / "base", model, fused_base)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape)
    fine, _ = write(tmp_path / "fine", model, not fused_base)
    _, wanted = write(tmp_path / "wanted", model, fused_base)  # the fine-tune in the base's form, by transformers
    assert any(".experts." in name for name in wanted.keys() - load_file(fine / "model.safetensors").keys())
    assert torch.equal(logits(fine), logits(tmp_path / "wanted"))

    at = ["-b", base, "--no-sync"]
    peru("prune", fine, *at, "-o", tmp_path / "a.safetensors", "--lossless")
    assert "put together as transformers does it" in peru.stderr and "stored whole" not in peru.stderr
    with safe_open(tmp_path / "a.safetensors", "np") as file:
        put_together = set(json.loads(file.metadata()["peru.converted"]))
    assert put_together == {name for name in wanted if ".experts." in name and "shared" not in name}
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r")
    assert_same_tensors(tmp_path / "r" / "model.safetensors", wanted)
    assert torch.equal(logits(tmp_path / "r"), logits(fine))

    peru("merge", f"x={fine}", *at, "-o", tmp_path / "m", "-m", "task-arithmetic", "--scale", 0.5)
    got = load_file(tmp_path / "m" / "model.safetensors")
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        middle = (tensor.double() + before[name].double()) / 2
        torch.testing.assert_close(got[name].double(), middle, rtol=2**-8, atol=1e-4)
    peru("shuffle-pack", f"x={fine}", *at, "-o", tmp_path / "p.safetensors", "--decorrelate", "none", "--no-signs")
    with safe_open(tmp_path / "p.safetensors", "np") as file:
        assert "peru.converted" in file.metadata()


def test_every_command_that_pairs_two_models(tmp_path: Path, peru) -> None:
    torch.manual_seed(0)
    model = mixtral()
    base, before = write(tmp_path / "base", model, True)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(*weight.shape[:-1], 1) * torch.randn(weight.shape[-1])
    fine, _ = write(tmp_path / "fine", model, False)
    wanted_folder, wanted = write(tmp_path / "wanted", model, True)

    changes = {change["name"]: change for change in json.loads(peru("inspect", fine, "-b", base, "--json"))["changes"]}
    assert "put together" in peru.stderr and {name: change["changed"] for name, change in changes.items()} == {
        name: int((tensor != before[name]).sum()) for name, tensor in wanted.items()
    }
    said = json.loads(peru("eval", f"x={fine}", "-b", base, "-a", wanted_folder, "--json"))
    assert "put together" in peru.stderr and said["weights"]["x"]["total"]["error"] == 0
    peru("svd-lora", fine, "-b", base, "-o", tmp_path / "lora", "--rank", 1, "--rest", "delta", "--no-sync")
    assert "put together" in peru.stderr
    peru("unpack", tmp_path / "lora", "-b", base, "-o", tmp_path / "r", "--no-sync")
    got = load_file(tmp_path / "r" / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)
    recipe = tmp_path / "recipe.yml"
    models = f"[{{model: {fine}, parameters: {{weight: 0.25}}}}]"
    recipe.write_text(f"merge_method: task_arithmetic\nbase_model: {base}\ndtype: float32\nmodels: {models}\n")
    peru("merge", recipe, "-o", tmp_path / "m", "--no-sync")
    assert "put together" in peru.stderr
    got = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], before[name] + 0.25 * (tensor - before[name]), rtol=1e-5, atol=1e-6)


LENGTHS = st.integers(1, 4)


@pytest.mark.parametrize("short", [1, 1 << 15])
@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_layouts_follow_every_operation_of_transformers(monkeypatch, short: int, data: st.DataObject) -> None:
    """Any range of entries equals what the operations make of tensors of numbers, and the inverse finds each entry again."""
    monkeypatch.setattr(layout, "_SHORT", short)  # 1: gather entry by entry where nothing is contiguous
    chain, parts, apart = data.draw(st.sampled_from(CHAINS))
    shape = [4 * data.draw(LENGTHS), data.draw(LENGTHS)]
    counter = iter(range(0, 10**9, 10**4))
    names = [f"{part}.{i}" for part in range(parts) for i in range(data.draw(LENGTHS) if parts == 1 and apart else apart or 1)]
    stored = {name: torch.arange(math.prod(shape)).view(shape) + next(counter) for name in names}

    class Model:
        class config:  # noqa: N801 - as in transformers
            num_attention_heads = 2

    def run(of: Any) -> dict[str, Any]:
        sources = [f"{part}" for part in range(parts)]
        values: dict[str, Any] = {key: [of(name) for name in names if name.startswith(f"{key}.")] for key in sources}
        more = {"source_patterns": sources, "target_patterns": TARGETS.get(chain[-1].__class__, ["made"])}
        for operation in chain:
            values = operation.convert(values, **more, full_layer_name="made", model=Model(), config=Model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in values.items()}

    def read(name: str, first: int, entries: int) -> Any:
        return stored[name].flatten().numpy().view(np.uint64)[first : first + entries]

    wanted, found = run(lambda name: stored[name].clone()), run(lambda name: Layout.of(name, shape))
    for key, tensor in wanted.items():
        flat, made = tensor.flatten().numpy().view(np.uint64), found[key]
        assert made.shape == tuple(tensor.shape) and made.complete()
        start = data.draw(st.integers(0, len(flat) - 1))
        out = np.zeros(data.draw(st.integers(1, len(flat) - start)), np.uint64)
        made.read(start, out, read)
        assert np.array_equal(out, flat[start : start + len(out)])
        for name in names:
            back = inverse(made, key, name, shape)
            if back.complete():
                out = np.zeros(math.prod(shape), np.uint64)
                back.read(0, out, lambda _, first, entries, flat=flat: flat[first : first + entries])
                assert np.array_equal(out, read(name, 0, len(out)))
    if len(wanted) == 1:
        assert all(inverse(next(iter(found.values())), "made", name, shape).complete() for name in names)
