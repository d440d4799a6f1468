"""Routed experts in models in memory: fine-tunes come back at full rank, heads follow the router, the base is untouched afterwards."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr

import peru_cli
from peru_cli.artifacts.packs.smile import Smile
from peru_cli.errors import BadFile, Mismatch, UsageError
from peru_cli.live.routed import AppliedRouted, Routing
from tests.conftest import raw
from tests.support.models import SMALL, WORDS, enlarge

Peru = Callable[..., str]
IDS = torch.randint(4, len(WORDS), (5, 9), generator=torch.Generator().manual_seed(0))


def bits(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in model.state_dict().items()}


def bert(labels: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = tr.BertConfig(vocab_size=len(WORDS), num_labels=labels, hidden_dropout_prob=0, attention_probs_dropout_prob=0, **SMALL)
    return tr.BertForSequenceClassification(config).eval()


def write(folder: Path, labels: tuple[int, ...] = (3, 4), rank: int = 6) -> list[Any]:
    """A bare encoder and classifiers on it, whose linear layers differ by products of thin factors."""
    base = enlarge(bert(3, 0), 6.0)
    base.bert.save_pretrained(folder / "base")
    models = []
    for number, count in enumerate(labels):
        model = bert(count, number + 1)
        model.bert.load_state_dict(base.bert.state_dict())
        noise = torch.Generator().manual_seed(number + 10)
        with torch.no_grad():
            for module in model.bert.modules():
                if isinstance(module, torch.nn.Linear):
                    out, width = module.weight.shape
                    module.weight += 0.1 * torch.randn(out, rank, generator=noise) @ torch.randn(rank, width, generator=noise)
                    module.bias += 0.1 * torch.randn(out, generator=noise)
            model.classifier.weight.mul_(8)
        model.save_pretrained(folder / f"t{number}")
        models.append(model)
    return models


def pack(folder: Path, peru: Peru, tasks: int, *more: object) -> Smile:
    given = [f"t{n}={folder / f't{n}'}" for n in range(tasks)]
    options = ["--method", "smile", "--no-sync", "--force", *more]
    peru("shuffle-pack", *given, "-b", folder / "base", "-o", folder / "r.safetensors", *options)
    opened = peru_cli.open_artifact(folder / "r.safetensors")
    assert isinstance(opened, Smile)
    return opened


def of_base(folder: Path, labels: int = 3) -> Any:
    torch.manual_seed(9)
    return tr.BertForSequenceClassification.from_pretrained(folder / "base", num_labels=labels).eval()


def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(ids, **more).logits
    return found


def routing_of(applied: object) -> Routing:
    """How the last forward pass was routed."""
    assert isinstance(applied, AppliedRouted) and applied.routing is not None
    return applied.routing


def test_one_task_at_full_rank_gives_the_outputs_of_its_fine_tune(tmp_path: Path, peru: Peru) -> None:
    (fine,) = write(tmp_path, (3,))
    routed = pack(tmp_path, peru, 1, "--rank", 32)
    model = of_base(tmp_path)
    before = bits(model)
    applied = peru_cli.apply(model, routed)
    torch.testing.assert_close(logits(model), logits(fine), atol=1e-5, rtol=1e-5)
    assert routing_of(applied).shares.eq(1).all()
    assert bits(model) == before  # no weight is touched
    applied.restore()
    assert bits(model) == before and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(logits(model), logits(of_base(tmp_path)), atol=0, rtol=0)


def test_conv1d_layers_of_gpt2_are_routed(tmp_path: Path, peru: Peru) -> None:
    torch.manual_seed(0)
    config = tr.GPT2Config(
        vocab_size=len(WORDS), n_embd=32, n_layer=2, n_head=4, n_positions=24, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, eos_token_id=3
    )
    fine = enlarge(tr.GPT2LMHeadModel(config)).eval()
    fine.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in fine.named_parameters():
            if ".c_" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    fine.save_pretrained(tmp_path / "t0")
    routed = pack(tmp_path, peru, 1, "--rank", 96, "--gate-rank", 2)
    assert len(routed.layers) == 8 and all(layer.transposed for layer in routed.layers)
    model = tr.GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    with peru_cli.apply(model, routed):
        torch.testing.assert_close(logits(model), logits(fine), atol=2e-5, rtol=1e-4)


def test_each_input_gets_the_head_of_the_task_that_it_chose(tmp_path: Path, peru: Peru) -> None:
    models = write(tmp_path)
    routed = pack(tmp_path, peru, 2)
    model = of_base(tmp_path)
    ids = torch.randint(4, len(WORDS), (40, 9), generator=torch.Generator().manual_seed(1))
    with peru_cli.apply(model, routed) as applied:
        found = logits(model, ids)
        routing = routing_of(applied)
        assert set(routing.chosen.tolist()) == {0, 1} and found.shape == (40, 4)
        torch.testing.assert_close(routing.shares.sum(1), torch.ones(40))
        body = model.bert(ids).pooler_output
        for row, task in enumerate(routing.chosen.tolist()):
            assert routing.task(row) == f"t{task}"
            wanted = torch.nn.functional.linear(body[row], models[task].classifier.weight, models[task].classifier.bias)
            torch.testing.assert_close(found[row, : len(wanted)], wanted, atol=1e-5, rtol=1e-5)
            assert found[row, len(wanted) :].eq(-torch.inf).all()
        assert isinstance(applied, AppliedRouted)
        applied.head = "t1"
        forced = logits(model, ids)
        assert torch.isfinite(forced).all()
        torch.testing.assert_close(forced[routing.chosen == 1], found[routing.chosen == 1])
        with pytest.raises(UsageError, match="pass no labels"):
            model(ids, labels=torch.zeros(40, dtype=torch.long))


def test_the_share_is_the_mean_over_layers_and_tokens_without_padding(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    model = of_base(tmp_path)
    with peru_cli.apply(model, pack(tmp_path, peru, 2)) as applied:
        alone = logits(model, IDS[:1, :5])
        first = routing_of(applied)
        padded = torch.cat([torch.nn.functional.pad(IDS[:1, :5], (0, 4)), IDS[1:2]])
        mask = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
        together = logits(model, padded, attention_mask=mask)
        second = routing_of(applied)
        torch.testing.assert_close(second.shares[:1], first.shares)
        torch.testing.assert_close(together[0, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)
        logits(model, padded, attention_mask=torch.ones_like(mask))
        assert not torch.allclose(routing_of(applied).shares[0], first.shares[0])


def test_a_model_in_another_dtype_and_place_is_routed_after_to(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    model = of_base(tmp_path)
    with peru_cli.apply(model, pack(tmp_path, peru, 2)):
        wanted = logits(model)
        model.double()
        found = logits(model)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), wanted, atol=1e-4, rtol=1e-4)


def test_artifacts_replace_each_other_on_a_module(tmp_path: Path, peru: Peru) -> None:
    models = write(tmp_path)
    routed = pack(tmp_path, peru, 2)
    peru("prune", f"t0={tmp_path / 't0'}", "-b", tmp_path / "base", "-o", tmp_path / "a.safetensors", "--lossless", "--no-sync")
    model = of_base(tmp_path)
    before = bits(model)
    peru_cli.apply(model, routed)
    delta = peru_cli.apply(model, peru_cli.open_artifact(tmp_path / "a.safetensors"))
    torch.testing.assert_close(logits(model), logits(models[0]))
    peru_cli.apply(model, routed).restore()
    assert bits(model) == before
    delta.restore()
    assert bits(model) == before


def test_wrong_models_and_uses_are_refused_and_leave_nothing_behind(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    routed = pack(tmp_path, peru, 2)
    model = of_base(tmp_path)
    with pytest.raises(UsageError, match="not in a state dict"):
        peru_cli.apply(model.state_dict(), routed)
    with pytest.raises(UsageError, match="chooses a task for every input"):
        peru_cli.apply(model, routed, task="t0")
    with pytest.raises(Mismatch, match=r"no place for: classifier\.bias"):
        peru_cli.apply(tr.BertModel.from_pretrained(tmp_path / "base"), routed)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.LayerNorm.bias[3] += 1
    with pytest.raises(Mismatch, match=r"not the base of .*LayerNorm.bias"):
        peru_cli.apply(model, routed)
    model = of_base(tmp_path)

    class Odd(torch.nn.Linear):
        pass

    odd = Odd(32, 32)
    odd.load_state_dict(model.bert.encoder.layer[0].attention.self.key.state_dict())
    model.bert.encoder.layer[0].attention.self.key = odd
    with pytest.raises(Mismatch, match=r"self.key.weight: Odd"):
        peru_cli.apply(model, routed)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model = of_base(tmp_path)
    other = pack(tmp_path, peru, 2, "--exclude", "self.key")
    assert len(other.layers) == len(routed.layers) - 2
    peru_cli.apply(model, other).restore()


def test_weights_of_another_thread_are_refused(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    routed, model = pack(tmp_path, peru, 2), of_base(tmp_path)
    ready, done = threading.Event(), threading.Event()

    def hold() -> None:
        with peru_cli.apply(model, routed):
            ready.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert ready.wait(30)
    try:
        with pytest.raises(UsageError, match="another thread has applied"):
            peru_cli.apply(model, routed)
    finally:
        done.set()
        thread.join()
    peru_cli.apply(model, routed).restore()


def test_a_damaged_expert_is_refused_before_anything_is_installed(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    path = tmp_path / "r.safetensors"
    with pack(tmp_path, peru, 2) as routed:
        at = routed._expert_at[3][1] + routed.container.header_bytes
    data = bytearray(path.read_bytes())
    data[at + 20] ^= 1
    path.write_bytes(data)
    model = of_base(tmp_path)
    with pytest.raises(BadFile, match=r"the expert of t1 for 'encoder.layer.0.attention.self.query.weight' was altered|was altered"):
        peru_cli.apply(model, peru_cli.open_artifact(path))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_that_is_thrown_away_is_not_held(tmp_path: Path, peru: Peru) -> None:
    write(tmp_path)
    model = of_base(tmp_path)
    applied = peru_cli.apply(model, pack(tmp_path, peru, 2))
    del model
    gc.collect()
    applied.restore()
