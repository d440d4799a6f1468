"""`peru unpack MERGE --task`: the merged weights under one task's head, as a model that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.conftest import raw

SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A bare BERT and classifiers of three and of five classes built on it."""
    torch.manual_seed(0)
    bare = transformers.BertModel(transformers.BertConfig(**SIZES))
    bare.save_pretrained(tmp_path / "base")
    for task, labels in (("a", 3), ("b", 5)):
        config = transformers.BertConfig(**SIZES, id2label={i: f"{task}{i}" for i in range(labels)})
        model = transformers.BertForSequenceClassification(config)
        model.bert.load_state_dict(bare.state_dict())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
        model.save_pretrained(tmp_path / task)
    return tmp_path


def merge(family: Path, peru, *options: object) -> Path:
    peru("merge", f"a={family / 'a'}", f"b={family / 'b'}", "-b", family / "base", "-o", family / "m", "--no-sync", *options)
    return family / "m"


def test_each_task_is_a_model_that_transformers_loads(family: Path, peru) -> None:
    merged = merge(family, peru, "-m", "task-arithmetic", "--scale", 0.5)
    tokens = torch.arange(12).view(2, 6)
    encoder = transformers.BertModel.from_pretrained(merged).eval()
    for task, labels in (("a", 3), ("b", 5)):
        peru("unpack", merged, "--task", task, "-b", family / "base", "-o", family / f"full-{task}", "--no-sync")
        model, said = transformers.AutoModelForSequenceClassification.from_pretrained(family / f"full-{task}", output_loading_info=True)
        assert not said["missing_keys"] and not said["unexpected_keys"]
        assert type(model).__name__ == "BertForSequenceClassification" and model.config.id2label[labels - 1] == f"{task}{labels - 1}"
        own = transformers.AutoModelForSequenceClassification.from_pretrained(family / task)
        with torch.inference_mode():
            expected = own.classifier(encoder(tokens).pooler_output)  # dropout is off: from_pretrained returns models in eval mode
            assert torch.equal(model(tokens).logits, expected)


def test_to_a_file_in_another_dtype(family: Path, peru) -> None:
    merged = merge(family, peru, "-m", "ties")
    peru("unpack", merged, "--task", "b", "-b", family / "base", "-o", family / "b.safetensors", "--dtype", "bf16", "--no-sync")
    got, encoder, own = (
        load_file(family / "b.safetensors"),
        load_file(merged / "model.safetensors"),
        load_file(family / "b" / "model.safetensors"),
    )
    assert sorted(got) == sorted(own)
    for name, tensor in got.items():
        source = own[name] if name.startswith("classifier") else encoder[name.removeprefix("bert.")]
        assert raw(tensor) == raw(source.bfloat16()), name


def test_tensors_that_the_base_has_too_come_from_the_head(family: Path, peru) -> None:
    """With --per-task the merge holds the base's own tensor of that name; the task's is used."""
    merged = merge(family, peru, "-m", "task-arithmetic", "--per-task", "pooler|classifier")
    peru("unpack", merged, "--task", "a", "-b", family / "base", "-o", family / "a.safetensors", "--no-sync")
    got, own = load_file(family / "a.safetensors"), load_file(family / "a" / "model.safetensors")
    assert raw(got["bert.pooler.dense.weight"]) == raw(own["bert.pooler.dense.weight"])


def test_a_task_must_be_named_if_there_are_several(family: Path, peru) -> None:
    merged = merge(family, peru, "-m", "ties")
    for options in ([], ["--task", "c"], ["--task", "../a"]):
        peru("unpack", merged, *options, "-b", family / "base", "-o", family / "x", code=2)
        assert "--task TASK: a, b" in peru.stderr and not (family / "x").exists()
    printed = peru("unpack", merged, "--task", "a", "-b", family / "base", "-o", family / "x", "--dry-run", "--json")
    assert json.loads(printed)["task"] == "a" and not (family / "x").exists()
