"""Gated MLPs in models in memory: fine-tunes come back from a perfect router, each input has its own gates, the base is untouched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr

import peru_cli
from peru_cli.artifacts.packs.wemoe import Wemoe
from peru_cli.errors import Mismatch
from peru_cli.live.wemoe import GatedMlps, GatedModules
from peru_cli.methods.compact.wemoe import Change, Changes, Router
from tests.live.test_routed import IDS, bits, logits, of_base, routing_of
from tests.live.test_routed import write as write_linear
from tests.support.models import SMALL, WORDS, enlarge, llama

Peru = Callable[..., str]


def write(folder: Path, labels: tuple[int, ...] = (3, 4)) -> list[Any]:
    """The family of tests/live/test_routed.py, with changes in embeddings and norms, too."""
    models = write_linear(folder, labels)
    for number, model in enumerate(models):
        noise = torch.Generator().manual_seed(number + 50)
        with torch.no_grad():
            for name, parameter in model.bert.named_parameters():
                if "LayerNorm" in name or "embeddings" in name:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
        model.save_pretrained(folder / f"t{number}")
    return models


def pack(folder: Path, peru: Peru, tasks: int, *more: object) -> Wemoe:
    given = [f"t{n}={folder / f't{n}'}" for n in range(tasks)]
    options = ["--method", "wemoe", "--steps", 0, "--bits", 64, "--dtype", "fp32", "--no-sync", "--force", *more]
    peru("shuffle-pack", *given, "-b", folder / "base", "-o", folder / "w.safetensors", *options)
    opened = peru_cli.open_artifact(folder / "w.safetensors")
    assert isinstance(opened, Wemoe)
    return opened


def force(applied: Any, task: int) -> None:
    """Let every router say 1 for one task and 0 for the others."""
    gated: GatedMlps = applied.installed
    for router in gated.routers:
        for tensor in router.tensors:
            tensor.zero_()
        router.layers[-1][1][task] = 1


def test_fine_tunes_come_back_from_a_perfect_router_with_their_own_other_tensors(tmp_path: Path, peru: Peru) -> None:
    fines = write(tmp_path)
    routed = pack(tmp_path, peru, 2)
    model = of_base(tmp_path)
    before = bits(model)
    applied = peru_cli.apply(model, routed)
    mlp = ("intermediate.dense", "output.dense.")
    for task, fine in enumerate(fines):
        force(applied, task)
        with torch.no_grad():
            own = dict(fine.bert.named_parameters())
            for name, parameter in model.bert.named_parameters():
                if not any(part in name.replace("attention.output", "") for part in mlp):
                    parameter.copy_(own[name])
        found = logits(model)
        assert routing_of(applied).shares.argmax(1).eq(task).all() and routing_of(applied).shares.max() == 1
        torch.testing.assert_close(found[:, : 3 + task], logits(fine), atol=5e-4, rtol=5e-4)
    applied.restore()  # puts the tensors back that it changed itself: all but MLPs
    assert bits(model) == before and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gates_are_those_of_each_input_without_padding(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    model = of_base(tmp_path)
    with peru_cli.apply(model, pack(tmp_path, peru, 2)) as applied:
        for router in applied.installed.routers:  # type: ignore[attr-defined]
            router.layers[-1][0].mul_(400)  # gates that depend on the input
        alone = logits(model, IDS[:1, :5])
        first = routing_of(applied).shares
        padded = torch.cat([torch.nn.functional.pad(IDS[:1, :5], (0, 4)), IDS[1:2]])
        mask = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
        together = logits(model, padded, attention_mask=mask)
        second = routing_of(applied).shares
        torch.testing.assert_close(second[:1], first)
        assert not torch.allclose(second[0], second[1], atol=1e-3)
        torch.testing.assert_close(together[0, : alone.shape[1]], alone[0], atol=1e-4, rtol=1e-4)


def gpt2() -> Any:
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    return tr.GPT2LMHeadModel(tr.GPT2Config(vocab_size=len(WORDS), eos_token_id=3, **config))


def clip() -> Any:
    return tr.CLIPVisionModel(tr.CLIPVisionConfig(image_size=8, patch_size=4, **{k: SMALL[k] for k in list(SMALL)[:4]}))


@pytest.mark.parametrize(("make", "layers"), [(gpt2, 4), (llama, 6), (clip, 4)])
def test_mlps_of_other_architectures_are_found_and_come_back(tmp_path: Path, peru: Peru, make: Callable[[], Any], layers: int) -> None:
    torch.manual_seed(0)
    fine = enlarge(make(), 4).eval()
    fine.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in fine.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    fine.save_pretrained(tmp_path / "t0")
    routed = pack(tmp_path, peru, 1, "--scale", 1)
    assert sum(len(mlp.layers) for mlp in routed.mlps) == layers and len(routed.mlps) == 2
    model = type(fine).from_pretrained(tmp_path / "base").eval()
    before = bits(model)
    inputs = {"input_ids": IDS} if make in (gpt2, llama) else {"pixel_values": torch.randn(3, 3, 8, 8)}
    with peru_cli.apply(model, routed) as applied, torch.inference_mode():
        force(applied, 0)
        found, wanted = (next(iter(one(**inputs).values())) for one in (model, fine))
        assert float((found - wanted).abs().max() / wanted.abs().max()) < 5e-3  # 16-bit factors, no better
    assert bits(model) == before


def test_layers_that_run_in_another_order_are_refused(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path, (3,))
    routed, model = pack(tmp_path, peru, 1), of_base(tmp_path)
    with peru_cli.apply(model, routed) as applied:
        gated = GatedModules(applied, Router([]))  # type: ignore[arg-type]
        with pytest.raises(Mismatch, match="runs before those that should take its input"):
            gated.layer(Changes([Change()], 2, 2), False, torch.ones(1, 1, 2), torch.ones(1, 1, 2))
