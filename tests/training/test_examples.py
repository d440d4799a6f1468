"""The examples of docs/training.md run as written, on a tiny model."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as tr

from tests.support import models
from tests.support.data_family import write_rows

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text("utf-8")


@pytest.mark.filterwarnings("ignore:linearize. attention is eager now")
def test_the_examples_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    models.enlarge(models.bert(), 4.0).bert.save_pretrained(tmp_path / "base")  # a bare encoder, as in the everyday case
    tokenizer = models.tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    for seed, task in enumerate("abc"):
        write_rows(tmp_path / f"{task}.jsonl", 40, seed)
    yours = ModuleType("datasets_of_yours")

    def tokenized(file: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        return [dict(tokenizer(row["text"])) | {"labels": row["label"]} for row in rows]

    yours.tokenized = tokenized  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets_of_yours", yours)
    monkeypatch.chdir(tmp_path)
    loop, trainer, linear = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(loop, "loop", "exec"), {})
    first = tr.AutoModelForSequenceClassification.from_pretrained("a").state_dict()
    exec(compile(trainer, "trainer", "exec"), {})
    assert "'tau_jp'" in capsys.readouterr().out
    second = tr.AutoModelForSequenceClassification.from_pretrained("a").state_dict()
    assert any(not torch.equal(first[name], tensor) for name, tensor in second.items())
    found: dict[str, Any] = {}
    exec(compile(linear, "linear", "exec"), found)
    inputs = dict(tokenizer(["w1 w2", "w3"], padding=True, return_tensors="pt"))
    torch.testing.assert_close(found["again"].eval()(**inputs).logits, found["model"].eval()(**inputs).logits)
