"""`peru eval` of routed experts equals what `peru_cli.apply` and the fine-tunes' own heads give, input by input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import peru_cli
from tests.live.test_routed import of_base, pack, routing_of, write
from tests.support.models import sentences, tokenizer

Peru = Callable[..., str]
TASKS = ("t0", "t1")


@pytest.fixture
def family(tmp_path: Path, peru: Peru) -> Path:
    """A base with a tokenizer, fine-tunes with 3 and 4 classes, their artifact, and sentences with labels."""
    write(tmp_path)
    tokenizer().save_pretrained(tmp_path / "base")
    for number, task in enumerate(TASKS):
        rows = [{"text": text, "label": i % (3 + number)} for i, text in enumerate(sentences(30, seed=number))]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack(tmp_path, peru, 2)
    return tmp_path


def data(folder: Path) -> list[object]:
    return [part for task in TASKS for part in ("--data", f"{task}={folder / task}.jsonl")]


def test_accuracy_and_shares_are_those_of_the_model_in_memory(family: Path, peru: Peru) -> None:
    told = json.loads(peru("eval", family / "r.safetensors", "-b", family / "base", *data(family), "--json", "--csv", family / "out.csv"))
    coder, model = tokenizer(), of_base(family)
    for number, (task, score) in enumerate(zip(TASKS, told["tasks"], strict=True)):
        rows = [json.loads(line) for line in (family / f"{task}.jsonl").read_text().splitlines()]
        routed, right, given = [], [], []
        with peru_cli.apply(model, peru_cli.open_artifact(family / "r.safetensors")) as applied, torch.inference_mode():
            for row in rows:
                batch = coder(row["text"], return_tensors="pt")
                found = int(model(**batch).logits[0].argmax())
                routed.append(int(routing_of(applied).chosen[0]))
                right.append(found == row["label"] and routed[-1] == number)
                applied.head = task  # type: ignore[attr-defined]
                given.append(int(model(**batch).logits[0].argmax()) == row["label"])
                applied.head = None  # type: ignore[attr-defined]
        metrics = {name: metric["value"] for name, metric in score["metrics"].items()}
        assert metrics == pytest.approx({"accuracy": sum(right) / 30, "given": sum(given) / 30, "routed": routed.count(number) / 30})
        assert told["routing"][task] == pytest.approx({"t0": routed.count(0) / 30, "t1": routed.count(1) / 30})
    assert told["bytes_in_all"] == (family / "r.safetensors").stat().st_size
    assert "t1,routed," in (family / "out.csv").read_text()
    shown = peru("eval", family / "r.safetensors", "-b", family / "base", *data(family))
    assert "routed right %" in shown and "routed to, % of inputs" in shown


def test_gates_hold_for_accuracy_and_routing(family: Path, peru: Peru) -> None:
    command = ["eval", family / "r.safetensors", "-b", family / "base", *data(family), "--max-samples", 8]
    peru(*command, "--fail-below", "routed=0%")
    peru(*command, "--fail-below", "routed=100%", "--fail-below", "accuracy=100%", code=3)
    assert "accuracy is" in peru.stderr  # type: ignore[attr-defined]


def test_wrong_data_and_options_are_refused(family: Path, peru: Peru) -> None:
    command = ["eval", family / "r.safetensors", "-b", family / "base"]
    for more, code, said in (
        (["--data", family / "t0.jsonl"], 2, "write --data TASK=FILE; the tasks are t0, t1"),
        (["--data", f"x={family / 't0.jsonl'}"], 2, "has no such task"),
        ([], 2, "add --base BASE --data TASK=FILE"),
        ([*data(family), "--against", family / "t0"], 2, "--against: no meaning with routed experts"),
        ([*data(family), "--fail-above", "kl=1"], 2, "will not be measured for routed experts"),
    ):
        peru(*command, *more, code=code)
        assert said in peru.stderr, peru.stderr  # type: ignore[attr-defined]
    peru("eval", family / "r.safetensors", "-b", family / "t0", *data(family), code=1)
    assert "is not the base" in peru.stderr  # type: ignore[attr-defined]
