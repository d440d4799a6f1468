"""Packs applied to weights in memory: unpack's result while applied, another task in its place, the base's bits afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

import peru_cli
from peru_cli.errors import BadFile, Mismatch, UsageError
from peru_cli.inference import eval_model as subjects
from peru_cli.inference.eval_model import Base, open_eval_model
from tests.conftest import FLOATS, raw

Peru = Callable[..., str]
CONFIG = tr.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48, num_labels=3)
TASKS = ("a", "b")


def bits(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: raw(tensor) for name, tensor in state.items()}


class Family:
    """A bare encoder, two classifiers on it, their pack, and each unpacked."""

    def __init__(self, folder: Path, peru: Peru, dtype: str) -> None:
        self.folder = folder
        torch.manual_seed(0)
        base = tr.BertModel(CONFIG).to(FLOATS[dtype])
        base.save_pretrained(folder / "base")
        for number, task in enumerate(TASKS):
            torch.manual_seed(number + 1)
            model = tr.BertForSequenceClassification(CONFIG).to(FLOATS[dtype])
            model.bert.load_state_dict({n: t + (0.01 * torch.randn(t.shape)).to(t.dtype) for n, t in base.state_dict().items()})
            model.save_pretrained(folder / task)
        self.path = folder / "pack.safetensors"
        peru(
            "shuffle-pack",
            *(folder / task for task in TASKS),
            "-b",
            folder / "base",
            "-o",
            self.path,
            "--seed",
            7,
            "--no-sync",
            "--scale",
            "0.6",
        )
        for task in TASKS:
            peru("unpack", self.path, "--task", task, "-b", folder / "base", "-o", folder / f"out-{task}", "--no-sync")
        self.expected = {task: bits(self.load(f"out-{task}").state_dict()) for task in TASKS}

    def load(self, name: str) -> torch.nn.Module:
        return tr.BertForSequenceClassification.from_pretrained(self.folder / name, dtype="auto")


@pytest.fixture(params=["fp32", "bf16", "fp16"])
def family(tmp_path: Path, peru: Peru, request: pytest.FixtureRequest) -> Family:
    return Family(tmp_path, peru, request.param)


def test_a_module_goes_from_task_to_task_and_back_to_the_base(family: Family) -> None:
    model = family.load("base")
    before = bits(model.state_dict())
    pack = peru_cli.open_artifact(family.path)
    first = peru_cli.apply(model, pack, task="a")
    assert bits(model.state_dict()) == family.expected["a"] != before
    second = peru_cli.apply(model, pack, task="b")
    assert second is first and bits(model.state_dict()) == family.expected["b"] != family.expected["a"]
    first.switch("a")
    assert bits(model.state_dict()) == family.expected["a"]
    first.restore()
    assert bits(model.state_dict()) == before
    first.restore()
    with peru_cli.apply(model, pack, task="b"):
        assert bits(model.state_dict()) == family.expected["b"]
    assert bits(model.state_dict()) == before


def test_the_base_is_no_longer_needed(family: Family) -> None:
    model = family.load("base")
    (family.folder / "base" / "model.safetensors").unlink()
    pack = peru_cli.open_artifact(family.path)
    for task in ("a", "b", "a"):
        peru_cli.apply(model, pack, task=task)
        assert bits(model.state_dict()) == family.expected[task]


def test_a_state_dict_gains_and_loses_the_head(family: Family) -> None:
    state = load_file(family.folder / "base" / "model.safetensors")
    before = bits(state)
    pack = peru_cli.open_artifact(family.path)
    with peru_cli.apply(state, pack, task="a") as applied:
        head = {name: raw(t) for name, t in load_file(family.folder / "a" / "model.safetensors").items() if "classifier" in name}
        assert {name: raw(t) for name, t in state.items() if "classifier" in name} == head
        applied.switch("b")
        assert raw(state["encoder.layer.0.output.dense.weight"]) == family.expected["b"]["bert.encoder.layer.0.output.dense.weight"]
    assert bits(state) == before


@pytest.mark.parametrize("kind", ["superposed", "masks"])
def test_tasks_are_computed_beside_an_unchanged_base(family: Family, peru: Peru, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path = family.folder, family.path
    if kind == "masks":
        path = folder / "masks.safetensors"
        peru("shuffle-pack", folder / "a", folder / "b", "-b", folder / "base", "-o", path, "--method", "tall-masks", "--no-sync")
        for task in TASKS:
            peru("unpack", path, "--task", task, "-b", folder / "base", "-o", folder / f"out-{task}", "--no-sync", "--force")
    calls = Counter[str]()
    for module, name in ((subjects, "open_artifact"), (subjects, "verify_base"), (subjects, "read_tensors")):
        monkeypatch.setattr(module, name, partial(_counted, calls, getattr(module, name)))
    with Base(str(folder / "base")) as base:
        before = bits(base.table)
        states = {task: open_eval_model(str(path), task, base).read() for task in TASKS}
        again = open_eval_model(str(path), "a", base).read()
        assert bits(base.table) == before
        wanted = {task: bits(load_file(folder / f"out-{task}" / "model.safetensors")) for task in TASKS}
        assert {task: bits(state) for task, state in states.items()} == wanted and bits(again) == wanted["a"] != wanted["b"]
    assert calls == {"open_artifact": 1, "verify_base": 1, "read_tensors": 1}
    other = load_file(folder / "base" / "model.safetensors")
    other["encoder.layer.2.output.dense.bias"][3] += 1
    (folder / "other").mkdir()
    save_file(other, folder / "other" / "model.safetensors")
    with Base(str(folder / "other")) as base, pytest.raises(Mismatch, match=r"not the base of .*encoder.layer.2.output.dense.bias"):
        open_eval_model(str(path), "a", base).read()


def _counted(calls: Counter[str], function: Callable[..., Any], *arguments: Any) -> Any:
    calls[function.__name__] += 1
    return function(*arguments)


def test_an_artifact_and_a_pack_take_turns(family: Family, peru: Peru) -> None:
    peru("prune", family.folder / "a", "-b", family.folder / "base", "-o", family.folder / "d.safetensors", "--lossless")
    delta, pack = peru_cli.open_artifact(family.folder / "d.safetensors"), peru_cli.open_artifact(family.path)
    model = family.load("base")
    before = bits(model.state_dict())
    peru_cli.apply(model, pack, task="b")
    applied = peru_cli.apply(model, delta)
    assert bits(model.state_dict()) == bits(family.load("a").state_dict())
    peru_cli.apply(model, pack, task="a")
    assert bits(model.state_dict()) == family.expected["a"]
    applied.restore()  # a handle that was superseded does nothing
    assert bits(model.state_dict()) == family.expected["a"]
    peru_cli.apply(model, pack, task="b").restore()
    assert bits(model.state_dict()) == before
    with pytest.raises(UsageError, match="is not a pack"):
        peru_cli.apply(model, delta, task="a")


def test_wrong_bases_tasks_and_models_change_nothing(family: Family) -> None:
    pack = peru_cli.open_artifact(family.path)
    model = family.load("base")
    before = bits(model.state_dict())
    for task in ("c", None):
        with pytest.raises(UsageError, match="holds a, b"):
            peru_cli.apply(model, pack, task=task)
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.bias[3] += 1
    changed = bits(model.state_dict())
    with pytest.raises(Mismatch, match=r"the model is not the base of .*encoder.layer.2.output.dense.bias"):
        peru_cli.apply(model, pack, task="a")
    assert bits(model.state_dict()) == changed != before
    bare = tr.BertModel.from_pretrained(family.folder / "base", dtype="auto")
    with pytest.raises(Mismatch, match=r"classifier\.\w+: .* the module has no such tensor"):
        peru_cli.apply(bare, pack, task="a")


def test_a_damaged_block_puts_the_base_back(family: Family) -> None:
    data = bytearray(family.path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    data[8 + size + 1000] ^= 1
    family.path.write_bytes(data)
    model = family.load("base")
    before = bits(model.state_dict())
    with pytest.raises(BadFile, match="block 0 of its sums was altered"):
        peru_cli.apply(model, peru_cli.open_artifact(family.path), task="a")
    assert bits(model.state_dict()) == before


def test_tied_tensors_are_set_once_or_refused(tmp_path: Path, peru: Peru) -> None:
    """A base that stores two tensors which a model may tie."""
    torch.manual_seed(0)
    base = {"one.weight": torch.randn(40, 8), "two.weight": torch.zeros(40, 8)}
    base["two.weight"] = base["one.weight"].clone()
    same = {name: tensor + 0.25 for name, tensor in base.items()}
    other = {"one.weight": base["one.weight"] + 0.25, "two.weight": base["two.weight"] - 0.25}
    for name, table in {"base": base, "same": same, "other": other}.items():
        save_file(table, tmp_path / f"{name}.safetensors")
    for name in ("same", "other"):
        out = tmp_path / f"p-{name}.safetensors"
        peru("shuffle-pack", f"t={tmp_path}/{name}.safetensors", "-b", tmp_path / "base.safetensors", "-o", out)
    tied = base["one.weight"].clone()
    state = {"one.weight": tied, "two.weight": tied}
    with peru_cli.apply(state, peru_cli.open_artifact(tmp_path / "p-same.safetensors")):
        assert torch.allclose(tied, base["one.weight"] + 0.25, atol=1e-3)
    assert torch.equal(tied, base["one.weight"])
    with pytest.raises(Mismatch, match=r"one.weight and two.weight are tied in this model"):
        peru_cli.apply(state, peru_cli.open_artifact(tmp_path / "p-other.safetensors"))
    assert torch.equal(tied, base["one.weight"])
