"""The penalty against central differences and a closed form, under peft against the merged model; what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call

from peru_cli.errors import Mismatch, UsageError
from peru_cli.inference.taujp import features
from peru_cli.training import OtherTasks, TauJp, linearize
from tests.support import models


def bert(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = models.enlarge(models.bert(), 4.0).double()
    model.set_attn_implementation("sdpa")
    return model


def batch(seed: int = 3) -> dict[str, torch.Tensor]:
    return dict(models.tokenizer()(models.sentences(4, seed=seed), padding=True, return_tensors="pt"))


def move(model: torch.nn.Module, by: float = 0.02) -> torch.nn.Module:
    """Pretend that training has moved every weight."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn_like(parameter))
    return model


def test_of_a_linear_model_value_and_gradient_are_the_closed_form() -> None:
    """mean ||x W^T + b||, W and b the changes; its gradient in W is the mean of u x^T, u the unit vectors."""
    model = models.Straight().double()
    tau_jp = TauJp(model, copy.deepcopy(model).state_dict())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    move(model)
    x = torch.randn(6, 7, dtype=torch.float64)
    penalty = tau_jp.penalty({"x": x, "labels": torch.ones(6)})
    change = x @ (model.encoder.weight - before["encoder.weight"]).T + (model.encoder.bias - before["encoder.bias"])
    torch.testing.assert_close(penalty, change.norm(dim=1).mean(), rtol=1e-13, atol=0)
    penalty.backward()
    units = (change / change.norm(dim=1, keepdim=True)).detach()
    torch.testing.assert_close(model.encoder.weight.grad, units.T @ x / 6, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(model.encoder.bias.grad, units.mean(0), rtol=1e-12, atol=1e-15)
    assert model.head.weight.grad is None  # features do not depend on it


def test_the_gradient_is_central_differences_of_central_differences() -> None:
    """Both the product and its gradient in theta, float64, along three random directions."""
    model, inputs = bert(), batch()
    base = copy.deepcopy(model).eval()
    tau_jp = TauJp(model, base.bert.state_dict())  # a bare encoder: its names lack a prefix
    move(model).train()  # dropout is on in training, and off in the penalty
    origin = {name: p.detach() for name, p in base.named_parameters()}

    def numerically(weights: dict[str, torch.Tensor], step: float = 1e-5) -> torch.Tensor:
        sides = [features(base, {n: origin[n] + sign * step * (weights[n] - origin[n]) for n in origin}, inputs) for sign in (1, -1)]
        return ((sides[0] - sides[1]) / (2 * step)).norm(dim=-1).mean()

    theta = {name: p.detach() for name, p in model.named_parameters()}
    penalty = tau_jp.penalty(inputs)
    with torch.no_grad():
        torch.testing.assert_close(penalty.detach(), numerically(theta), rtol=1e-6, atol=0)
        penalty.backward()
        gradient = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert set(gradient) == {n for n in theta if n.startswith("bert.")}
        for _ in range(3):
            along = {n: torch.randn_like(t) for n, t in theta.items()}
            h = 5e-5
            slopes = [numerically({n: t + s * h * along[n] for n, t in theta.items()}) for s in (1, -1)]
            expected = sum((gradient[n] * along[n]).sum() for n in gradient)
            torch.testing.assert_close((slopes[0] - slopes[1]) / (2 * h), expected, rtol=5e-5, atol=1e-8)


def test_it_starts_at_zero_with_a_finite_gradient_and_ignores_what_becomes_of_the_base() -> None:
    model = bert()
    tau_jp = TauJp(model, model)
    first = tau_jp.penalty(batch())
    first.backward()
    assert first == 0 and all(p.grad.isfinite().all() for p in model.bert.parameters())
    move(model)
    assert tau_jp.penalty(batch()) > 0  # theta_0 was copied


def test_several_batches_count_the_same() -> None:
    model = bert()
    tau_jp = TauJp(model, model)
    move(model)
    one, two = batch(3), {name: tensor[:2] for name, tensor in batch(5).items()}
    torch.testing.assert_close(tau_jp.penalty([one, two]), (tau_jp.penalty(one) + tau_jp.penalty(two)) / 2)
    with pytest.raises(UsageError, match="no batch at all"):
        tau_jp.penalty([])


@pytest.mark.parametrize("rest", ["frozen", "pissa"])
def test_under_peft_it_is_the_penalty_of_the_merged_model(rest: str) -> None:
    """Value, and gradient through B and A. PiSSA changes the frozen weights as well."""
    base = bert()
    config = LoraConfig(
        task_type="SEQ_CLS", r=3, lora_alpha=5, lora_dropout=0.3, target_modules=["query", "dense", "word_embeddings"],
        use_rslora=True, init_lora_weights="pissa" if rest == "pissa" else True,
    )  # fmt: skip
    if rest == "pissa":
        config.target_modules = {"query", "dense"}
    model = get_peft_model(copy.deepcopy(base).float(), config).double()  # PiSSA begins in float32
    tau_jp = TauJp(model, base)
    move(model)
    merged = copy.deepcopy(model).merge_and_unload()
    expected = TauJp(merged.requires_grad_(True), base)
    penalty, wanted = tau_jp.penalty(batch()), expected.penalty(batch())
    torch.testing.assert_close(penalty, wanted, rtol=1e-9, atol=0)
    penalty.backward()
    wanted.backward()
    layer = model.base_model.model.bert.encoder.layer[1].attention.self.query
    full = merged.bert.encoder.layer[1].attention.self.query.weight.grad
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    torch.testing.assert_close(b.grad, scale * full @ a.T, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(a.grad, scale * b.T @ full, rtol=1e-8, atol=1e-14)
    assert layer.base_layer.weight.grad is None
    if rest == "frozen":
        with model.disable_adapter():
            assert tau_jp.penalty(batch()) == 0  # the head moved, and features do not see it


def test_fused_attention_and_checkpointing_stay_the_models_own() -> None:
    model = bert()
    tau_jp = TauJp(model, model)
    move(model)
    expected = tau_jp.penalty(batch())
    model.gradient_checkpointing_enable()
    model.train()
    again = TauJp(model, bert())
    torch.testing.assert_close(again.penalty(batch()), expected)
    (model(**batch(), labels=torch.zeros(4, dtype=torch.long)).loss + again.penalty(batch())).backward()
    assert model.config._attn_implementation == "sdpa" and model.is_gradient_checkpointing


def test_torch_attention_of_other_modules_works() -> None:
    """`scaled_dot_product_attention` in a module that transformers knows nothing of."""
    model = torch.nn.Linear(8, 8).double()

    def attended(module: Any, parameters: Any, inputs: Any) -> torch.Tensor:
        q = functional_call(module, dict(parameters), (inputs["x"],))
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).mean((1, 2))

    tau_jp = TauJp(model, model, attended)
    move(model)
    x = torch.randn(3, 2, 4, 8, dtype=torch.float64)
    penalty = tau_jp.penalty({"x": x})
    penalty.backward()
    assert penalty > 0 and model.weight.grad.abs().sum() > 0


def test_a_kernel_without_forward_mode_is_named() -> None:
    model = torch.nn.Linear(8, 8)

    def fused(module: Any, parameters: Any, inputs: Any) -> torch.Tensor:
        q = functional_call(module, dict(parameters), (inputs["x"],))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0].mean((1, 2))

    with pytest.raises(Mismatch, match=r"no forward mode.*_scaled_dot_product_flash"):
        TauJp(model, model, fused).penalty({"x": torch.randn(3, 2, 4, 8)})


def test_of_a_linearised_model_it_is_how_far_the_features_moved() -> None:
    model = bert().eval()
    with pytest.warns(UserWarning, match="eager"):
        linearize(model)
    tau_jp = TauJp(model, bert())
    before = model.bert(**batch()).pooler_output
    move(model)
    moved = (model.bert(**batch()).pooler_output - before).norm(dim=-1).mean()
    torch.testing.assert_close(tau_jp.penalty(batch()), moved, rtol=1e-9, atol=0)


def test_under_bfloat16_autocast_it_is_near_the_float32_value() -> None:
    model = bert().float()
    tau_jp = TauJp(model, model)
    move(model)
    exact = tau_jp.penalty(batch())
    exact.backward()
    wanted = model.bert.pooler.dense.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = tau_jp.penalty(batch())
    rounded.backward()
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02) and rounded.dtype == torch.float32
    torch.testing.assert_close(model.bert.pooler.dense.weight.grad, wanted, rtol=0.1, atol=0.02 * wanted.abs().max().item())


def test_what_cannot_be_done_is_refused() -> None:
    model, base = bert(), bert()
    with pytest.raises(Mismatch, match=r"the base lacks 2 tensors of the model: bert\.pooler\.dense"):
        TauJp(model, {n: t for n, t in base.state_dict().items() if "pooler" not in n})
    with pytest.raises(Mismatch, match="other shapes of 1 tensors"):
        TauJp(model, base.state_dict() | {"bert.embeddings.word_embeddings.weight": torch.zeros(9, 32)})
    with pytest.raises(Mismatch, match="nothing is trained"):
        TauJp(bert().requires_grad_(False), base)
    with pytest.raises(UsageError, match="say with features="):
        TauJp(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    frozen = bert()
    frozen.bert.embeddings.requires_grad_(False)
    tau_jp = TauJp(frozen, base)
    frozen.requires_grad_(True)
    with pytest.raises(UsageError, match="is trained now"):
        tau_jp.penalty(batch())
    tau_jp = TauJp(model, base)
    get_peft_model(model, LoraConfig(target_modules=["query"]))
    with pytest.raises(UsageError, match="were replaced"):
        tau_jp.penalty(batch())
    with pytest.raises(Mismatch, match="adapter of kind Dora"):
        TauJp(get_peft_model(bert(), LoraConfig(target_modules=["query"], use_dora=True)), base)
    merged = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    tau_jp = TauJp(merged, base)
    merged.merge_adapter()
    with pytest.raises(UsageError, match="unmerge_adapter"):
        tau_jp.penalty(batch())


def test_other_tasks_take_turns_or_come_together() -> None:
    loaders = {"a": [{"x": 1}, {"x": 2}], "b": [{"x": 3}]}
    cyclic = OtherTasks(loaders)
    assert [[b["x"] for b in cyclic.next()] for _ in range(6)] == [[1], [3], [2], [3], [1], [3]]
    strict = OtherTasks(loaders, "strict")
    assert [[b["x"] for b in strict.next()] for _ in range(3)] == [[1, 3], [2, 3], [1, 3]]
    once = OtherTasks({"a": iter([{"x": 1}])})
    once.next()
    with pytest.raises(UsageError, match="cannot be read twice"):
        once.next()
    with pytest.raises(UsageError, match="at least one"):
        OtherTasks({})
    with pytest.raises(UsageError, match="cyclic"):
        OtherTasks(loaders, "all")  # type: ignore[arg-type]
