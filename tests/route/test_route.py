"""`peru route`: the mean over layers and tokens of each router's softmax, recomputed with NumPy's SVD from the base's activations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file

from tests.live.test_routed import pack, write
from tests.support.models import sentences, tokenizer

Peru = Callable[..., str]


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base with a tokenizer, two fine-tunes, and sentences."""
    write(tmp_path)
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(12, seed=4)))
    return tmp_path


def wanted(folder: Path, gate: int) -> np.ndarray:
    """Shares of each sentence, (12, 2), from float64 SVDs."""
    model = tr.BertModel.from_pretrained(folder / "base").eval()
    fines = [load_file(folder / f"t{number}" / "model.safetensors") for number in (0, 1)]
    seen: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.__setitem__(name, args[0][0].double().numpy()))
    rows = []
    for text in sentences(12, seed=4):
        with torch.inference_mode():
            model(**tokenizer()(text, return_tensors="pt"))
        means = []
        for name, inputs in seen.items():
            norms = []
            for fine in fines:
                vector = (fine[f"bert.{name}.weight"] - model.get_submodule(name).weight).double().detach().numpy()
                norms.append(np.linalg.norm(np.atleast_2d(inputs) @ np.linalg.svd(vector)[2][:gate].T, axis=1))
            exps = np.exp(np.array(norms) - np.max(norms, axis=0))
            means.append((exps / exps.sum(0)).mean(1))
        rows.append(np.mean(means, axis=0))
    return np.array(rows)


def shares(printed: str) -> np.ndarray:
    rows = [json.loads(line) for line in printed.splitlines()]
    assert all(row["share"] == row["shares"][row["task"]] == max(row["shares"].values()) for row in rows)
    return np.array([[row["shares"]["t0"], row["shares"]["t1"]] for row in rows])


def test_shares_of_fine_tunes_equal_a_reference(family: Path, peru: Peru) -> None:
    given = [f"t{number}={family / f't{number}'}" for number in (0, 1)]
    found = shares(peru("route", *given, "-b", family / "base", "--text", family / "in.jsonl", "--gate-rank", 3, "--json"))
    np.testing.assert_allclose(found, wanted(family, 3), atol=1e-5)


def test_an_artifact_gives_the_shares_of_its_own_routers(family: Path, peru: Peru) -> None:
    pack(family, peru, 2, "--rank", 4, "--gate-rank", 2)
    command = ["route", family / "r.safetensors", "-b", family / "base", "--text", family / "in.jsonl"]
    found = shares(peru(*command, "--json"))
    np.testing.assert_allclose(found, wanted(family, 2), atol=1e-5)
    np.testing.assert_array_equal(shares(peru(*command, "--json", "--batch-size", 12)).argmax(1), found.argmax(1))
    lines = peru(*command, "--max-samples", 3).splitlines()
    assert lines[0].split() == ["task", "share", "input"] and len(lines) == 4
    assert lines[1].split()[0] == f"t{found[0].argmax()}" and lines[1].endswith(sentences(12, seed=4)[0])


def test_wrong_arguments_are_refused(family: Path, peru: Peru) -> None:
    pack(family, peru, 2)
    text = ["--text", family / "in.jsonl"]
    for arguments, code, said in (
        ([f"a={family / 't0'}", "-b", family / "base", *text], 2, "leaves nothing to choose"),
        ([family / "r.safetensors", "-b", family / "base", *text, "--gate-rank", 2], 2, "--gate-rank: fixed when"),
        ([family / "r.safetensors", "-b", family / "t0", *text], 1, "is not the base"),
        ([family / "r.safetensors", "-b", family / "base", "--text", family / "none.jsonl"], 2, "no such file"),
    ):
        peru("route", *arguments, code=code)
        assert said in peru.stderr, peru.stderr  # type: ignore[attr-defined]
    (family / "base" / "tokenizer.json").unlink()
    for models in ([family / "r.safetensors"], [f"t{number}={family / f't{number}'}" for number in (0, 1)]):
        peru("route", *models, "-b", family / "base", *text, code=1)
        assert "no tokenizer" in peru.stderr  # type: ignore[attr-defined]
