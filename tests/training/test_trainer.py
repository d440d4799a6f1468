"""transformers' Trainer with the regulariser: what it logs, and that its steps are those of a plain loop."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import LoraConfig, get_peft_model

from peru_cli.errors import UsageError
from peru_cli.training import OtherTasks, TauJp, TauJpTrainer, linearize
from tests.training.test_taujp import batch, bert


class Regularised(TauJpTrainer, tr.Trainer):
    pass


def rows(seed: int) -> list[dict[str, Any]]:
    inputs = batch(seed)
    return [{name: tensor[i] for name, tensor in inputs.items()} | {"labels": i % 3} for i in range(4)]


def trainer(folder: Path, model: Any, tau_jp: TauJp, strength: float = 0.5, **options: Any) -> Regularised:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    settings |= {"per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True}
    arguments = tr.TrainingArguments(output_dir=str(folder), disable_tqdm=True, **settings | options)
    others = OtherTasks({"b": [batch(5)], "c": [batch(7)]})
    return Regularised(
        model=model, args=arguments, train_dataset=rows(3), eval_dataset=rows(3), tau_jp=tau_jp, others=others, strength=strength
    )  # fmt: skip


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    return model


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_are_those_of_a_plain_loop(parts: int, tmp_path: Path) -> None:
    """SGD, three steps, without dropout; the batch whole, or in two accumulated parts.

    transformers adds the mean losses of the parts up where a model takes `num_items_in_batch`, and this one ignores it."""
    model = without_dropout(bert())
    loop = copy.deepcopy(model)
    options = {"per_device_train_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
    made = trainer(tmp_path, model, TauJp(model, model), **options)
    made.train()
    tau_jp, turns = TauJp(loop, bert()), [batch(5), batch(7)] * 3
    inputs, labels = batch(3), torch.tensor([0, 1, 2, 0])
    losses, penalties = [], []
    for step in range(3):
        used = turns[step * parts : (step + 1) * parts]
        penalty = tau_jp.penalty(used)
        loss = parts * loop(**inputs, labels=labels).loss + 0.5 * penalty
        loop.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in loop.parameters():
                parameter.sub_(1e-2 * parameter.grad)
        losses.append(loss.item())
        penalties.append(penalty.item())
    lines = [line for line in made.state.log_history if "tau_jp" in line]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-4)
    assert [line["tau_jp"] for line in lines] == pytest.approx(penalties, rel=1e-5, abs=1e-9) and penalties[2] > penalties[0] == 0
    for name, parameter in loop.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-7, atol=1e-9)


def test_evaluation_is_without_the_penalty(tmp_path: Path) -> None:
    model = bert()
    made = trainer(tmp_path, model, TauJp(model, model))
    made.train()
    model.eval()
    expected = model(**batch(3), labels=torch.tensor([0, 1, 2, 0])).loss.item()
    assert made.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:linearize. attention is eager now")
@pytest.mark.parametrize("kind", ["peft", "linear", "bf16"])
def test_it_trains_adapters_linearised_models_and_in_bfloat16(kind: str, tmp_path: Path) -> None:
    model = bert().float()
    if kind == "peft":
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "dense"]))
    if kind == "linear":
        model = linearize(model)
    made = trainer(tmp_path, model, TauJp(model, bert().float()), max_steps=2, bf16=kind == "bf16")
    made.train()
    lines = [line for line in made.state.log_history if "tau_jp" in line]
    assert len(lines) == 2 and 0 < lines[1]["tau_jp"] < 100 and lines[1]["loss"] > 0.5 * lines[1]["tau_jp"]
    made.save_model(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_model.safetensors"} <= names if kind == "peft" else {"model.safetensors", "config.json"} <= names


def test_another_models_tau_jp_is_refused(tmp_path: Path) -> None:
    model, other = bert(), bert()
    with pytest.raises(UsageError, match="another model"):
        trainer(tmp_path, model, TauJp(other, other))
