"""Linearised models against a linear model, central differences and transformers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers as tr
from peft import LoraConfig, get_peft_model

from peru_cli.errors import UsageError
from peru_cli.training import linearize
from tests.support import models
from tests.support.data_family import gpt2
from tests.training.test_taujp import batch, bert, move

pytestmark = pytest.mark.filterwarnings("ignore:linearize. attention is eager now")


def test_a_linear_model_is_its_own_expansion() -> None:
    model = torch.nn.Linear(7, 5).double()
    linear = linearize(copy.deepcopy(model))
    move(model)
    move(linear)
    x = torch.randn(3, 7, dtype=torch.float64)
    torch.testing.assert_close(linear(x), model(x), rtol=1e-13, atol=1e-15)
    linear(x).square().sum().backward()
    model(x).square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, model.weight.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_encoder_is_the_expansion_and_the_head_is_as_it_was(kind: str) -> None:
    torch.manual_seed(0)
    model = bert().eval() if kind == "bert" else models.enlarge(gpt2(), 4.0).double().eval()
    inputs = batch()
    if kind == "gpt2":
        del inputs["token_type_ids"]
    base = copy.deepcopy(model)
    base.set_attn_implementation("eager")
    move(linearize(model), 0.05)
    origin, theta = copy.deepcopy(base.state_dict()), model.state_dict()
    sides = []
    for sign in (1, -1):
        base.load_state_dict({n: t + sign * 1e-5 * (theta[n] - t) for n, t in origin.items()})
        sides.append(base.base_model(**inputs).last_hidden_state)
    base.load_state_dict(origin)
    expected = base.base_model(**inputs).last_hidden_state + (sides[0] - sides[1]) / 2e-5
    got = model.base_model(**inputs)
    torch.testing.assert_close(got.last_hidden_state, expected, rtol=1e-5, atol=1e-7)
    assert type(got) is type(base.base_model(**inputs))
    if kind == "bert":
        torch.testing.assert_close(model(**inputs).logits, model.classifier(got.pooler_output))
    with torch.inference_mode():
        torch.testing.assert_close(model.base_model(**inputs).last_hidden_state, got.last_hidden_state)


def test_what_is_saved_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = linearize(bert().eval())
    start = model(**batch()).logits
    torch.testing.assert_close(start, bert().eval()(**batch()).logits)
    move(model)
    model.save_pretrained(tmp_path)
    loaded, info = tr.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float64)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    plain = loaded(**batch()).logits
    assert not torch.allclose(plain, model(**batch()).logits)  # the usual model again
    again = linearize(loaded, bert())  # and the linear one, at the base's weights
    torch.testing.assert_close(again(**batch()).logits, model(**batch()).logits)


def test_lora_is_linear_in_the_merged_weights() -> None:
    base = bert().eval()
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "dense"]))
    merged = linearize(copy.deepcopy(move(model)).merge_and_unload(), base)
    linear = linearize(model, base)
    torch.testing.assert_close(linear(**batch()).logits, merged(**batch()).logits, rtol=1e-9, atol=1e-12)
    linear(**batch()).logits.sum().backward()
    assert all("lora_" in n or "classifier" in n for n, p in linear.named_parameters() if p.grad is not None)


def test_without_its_adapter_it_is_the_base() -> None:
    base = bert().eval()
    model = linearize(move(get_peft_model(copy.deepcopy(base), LoraConfig(r=3, target_modules=["query"]))), base)
    with model.disable_adapter():
        torch.testing.assert_close(model(**batch()).logits, base(**batch()).logits)


def test_a_copy_is_linear_in_its_own_weights() -> None:
    model = linearize(bert().eval())
    before = model(**batch()).logits
    other = move(copy.deepcopy(model), 0.1)
    assert torch.equal(model(**batch()).logits, before)
    torch.testing.assert_close(other(**batch()).logits, move(model, 0.1)(**batch()).logits)


def test_dropout_follows_the_model() -> None:
    model = linearize(bert())
    move(model)
    model.train()
    assert not torch.equal(model(**batch()).logits, model(**batch()).logits)
    model.eval()
    assert torch.equal(model(**batch()).logits, model(**batch()).logits)


def test_what_cannot_be_linearised_is_refused() -> None:
    with pytest.warns(UserWarning, match="attention is eager now, not sdpa"):
        model = linearize(bert())
    with pytest.raises(UsageError, match="linearised already"):
        linearize(model)
    model.gradient_checkpointing_enable()
    with pytest.raises(UsageError, match="cannot use gradient checkpointing"):
        model(**batch())
    dropping = get_peft_model(bert(), LoraConfig(target_modules=["query"], lora_dropout=0.1))
    with pytest.raises(UsageError, match="lora_dropout=0"):
        linearize(dropping)
