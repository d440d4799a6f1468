"""`prune --min-quality --data`: the fewest bytes that keep the fine-tune's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tr

from tests.prune.test_mixed_data import WIDE, wide_bert, wide_llama, write
from tests.support import models

Peru = Callable[..., str]


def answers(folder: Path, kind: Any, texts: list[str]) -> list[Any]:
    """What transformers makes of a folder: classes, or tokens one text after the other."""
    model, tokenizer = kind.from_pretrained(folder, dtype=torch.float32).eval(), tr.AutoTokenizer.from_pretrained(folder)
    found: list[Any] = []
    with torch.no_grad():
        for text in texts:
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
            found += (logits[:-1] if logits.dim() == 2 else logits[None]).argmax(-1).tolist()
    return found


@pytest.mark.parametrize(
    ("make", "kind", "unit"),
    [(wide_bert, tr.AutoModelForSequenceClassification, "examples"), (wide_llama, tr.AutoModelForCausalLM, "tokens")],
)
def test_the_unpacked_model_gives_as_many_of_the_answers_as_are_printed(
    peru: Peru, tmp_path: Path, make: Callable[[], Any], kind: Any, unit: str
) -> None:
    base, fine = models.pair(make, tmp_path, change=0.05)
    sentences = models.sentences(60)
    texts = write(tmp_path / "t.jsonl", sentences)
    out = tmp_path / "a.safetensors"
    (said,) = json.loads(peru("prune", fine, "--base", base, "-o", out, "--min-quality", "90%", "--data", texts, "--json", "--no-sync"))
    peru("unpack", out, "--base", base, "-o", tmp_path / "back", "--no-sync")
    wanted, got = answers(fine, kind, sentences), answers(tmp_path / "back", kind, sentences)
    assert said["data"]["unit"] == unit and said["data"]["counted"] == len(wanted)
    assert said["data"]["agreed"] == int(np.equal(wanted, got).sum()) >= 0.9 * len(wanted)
    assert "answers are the fine-tune's" in peru("inspect", out)


def test_fewer_bytes_keep_fewer_answers_than_were_asked_for(peru: Peru, tmp_path: Path) -> None:
    base, fine = models.pair(wide_bert, tmp_path, change=0.05)
    sentences = models.sentences(100)
    texts = write(tmp_path / "t.jsonl", sentences)
    command = ["prune", fine, "--base", base, "--no-sync", "--json", "-o"]
    (said,) = json.loads(peru(*command, tmp_path / "a.safetensors", "--min-quality", "95%", "--data", texts))
    peru(*command, tmp_path / "less.safetensors", "--max-bytes", int(said["file_bytes"] - 0.4 * said["delta_bytes"]))
    peru("unpack", tmp_path / "less.safetensors", "--base", base, "-o", tmp_path / "back", "--no-sync")
    kind = tr.AutoModelForSequenceClassification
    assert np.equal(answers(fine, kind, sentences), answers(tmp_path / "back", kind, sentences)).mean() < 0.95


def test_every_task_keeps_its_own_answers(peru: Peru, tmp_path: Path) -> None:
    base, fine = models.pair(wide_bert, tmp_path, change=0.05)
    given = [f"--data={task}={write(tmp_path / f'{task}.jsonl', models.sentences(50, seed=seed))}" for seed, task in enumerate("ab")]
    made = json.loads(
        peru("prune", f"a={fine}", f"b={fine}", "-b", base, "-o", f"{tmp_path}/out/", "--min-quality", "0.9", *given, "--no-sync", "--json")
    )
    assert all(row["data"]["agreed"] >= 45 for row in made) and made[0]["data"]["digest"] != made[1]["data"]["digest"]


def test_a_regression_has_no_equal_answers(peru: Peru, tmp_path: Path) -> None:
    def value() -> Any:
        return tr.BertForSequenceClassification(
            tr.BertConfig(vocab_size=len(models.WORDS), num_labels=1, problem_type="regression", **WIDE)
        )

    base, fine = models.pair(value, tmp_path, change=0.05)
    texts = write(tmp_path / "t.jsonl", models.sentences(20))
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--min-quality", "90%", "--data", texts, code=2)
    assert "predicts numbers" in peru.stderr and not (tmp_path / "a.safetensors").exists()


def test_where_nothing_changed_nothing_is_stored(peru: Peru, tmp_path: Path) -> None:
    base, fine = models.pair(wide_bert, tmp_path, change=0.0)
    texts = write(tmp_path / "t.jsonl", models.sentences(20))
    (said,) = json.loads(
        peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--min-quality", "99%", "--data", texts, "--json", "--no-sync")
    )
    assert said["data"]["agreed"] == said["data"]["counted"] == 20 and said["ranks"] == {}
