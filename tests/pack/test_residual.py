"""`shuffle-pack --residual`: the largest losses of superposition, against a plain program, wherever packs are read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file

import peru_cli
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.inference.eval_model import Base, open_eval_model
from tests.conftest import raw
from tests.pack.test_superpose import Packs, family
from tests.support.readers.format_reader import read_safetensors
from tests.support.readers.pack_reader import PackReader

Peru = Callable[..., str]
Table = dict[str, torch.Tensor]


def floating(made: Packs) -> list[str]:
    return sorted(name for name, tensor in made.base.items() if tensor.is_floating_point())


def bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16 by torch."""
    return torch.from_numpy(values).bfloat16().float().numpy()


def plain_residual(fine: Table, back: Table, names: list[str], share: float, rounded: bool) -> Table:
    """The retrieved task with the largest differences corrected: all sorted at once, ties in order."""
    f, g = (np.concatenate([table[name].float().numpy().reshape(-1) for name in names]) for table in (fine, back))
    keys = np.abs(f - g)
    chosen = np.argsort(-keys, kind="stable")[: math.floor(share * len(keys))]
    chosen = chosen[keys[chosen] > 0]
    g[chosen] = g[chosen] + bf16(f[chosen] - g[chosen]) if rounded else f[chosen]
    wanted, at = dict(back), 0
    for name in names:
        n = back[name].numel()
        wanted[name] = torch.from_numpy(g[at : at + n].reshape(back[name].shape).copy()).to(back[name].dtype)
        at += n
    return wanted


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("residual", "share"), [("1%", 0.01), ("0.3", 0.3)])
def test_the_largest_losses_are_corrected(tmp_path: Path, peru: Peru, dtype: str, residual: str, share: float) -> None:
    made = Packs(tmp_path, peru, *family("abc", dtype, size=3))
    options = ("--seed", 7, "--scale", "0.6", "--tile-entries", 16384)
    plain = made.run("abc", *options, name="plain")
    pack = made.run("abc", *options, "--residual", residual, "--json")
    report = {task["task"]: task for task in json.loads(made.text)["packed"]}
    names = floating(made)
    base = read_safetensors(made.at["base"].read_bytes())[1]
    total = sum(made.base[name].numel() for name in names)
    for task in "abc":
        without, back = made.unpack(plain, task), made.unpack(pack, task)
        wanted = plain_residual(made.fine[task], without, names, share, rounded=dtype == "fp32")
        assert {n: raw(t) for n, t in back.items()} == {n: raw(t) for n, t in wanted.items()}
        if dtype != "fp16":  # the reader does not implement casts for it
            assert (
                PackReader(pack.read_bytes()).retrieve(task, base) == read_safetensors((tmp_path / "unpacked.safetensors").read_bytes())[1]
            )
        missed, norm = (
            math.sqrt(sum(float((a[n].double() - made.fine[task][n].double()).square().sum()) for n in names)) for a in (back, made.base)
        )
        assert report[task]["residual_error"] == pytest.approx(missed / norm, rel=1e-3)  # recorded with four digits
        assert report[task]["residual_error"] < report[task]["error"]
    with Pack(pack) as opened:
        assert [sum(r.kept) for r in opened.index.residuals] == [math.floor(share * total)] * 3
        assert [r.nbytes for r in opened.index.residuals] == [report[task]["residual_bytes"] for task in "abc"]
        assert opened.container.file_bytes - plain.stat().st_size == pytest.approx(sum(r.nbytes for r in opened.index.residuals), abs=700)
    assert "with residual" in made.peru("inspect", pack)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_full_residual_restores_the_fine_tunes_bits(tmp_path: Path, peru: Peru, dtype: str) -> None:
    made = Packs(tmp_path, peru, *family("ab", dtype))
    pack = made.run("ab", "--residual", "100%", "--json")
    assert [task["residual_error"] for task in json.loads(made.text)["packed"]] == [0.0, 0.0]
    for task in "ab":
        back = made.unpack(pack, task)
        assert {n: raw(t) for n, t in back.items()} == {n: raw(t) for n, t in made.fine[task].items()}


def test_ties_at_the_threshold_are_kept_in_order(tmp_path: Path, peru: Peru) -> None:
    """One task, steps of 2^-4 below an RMS of 1: all differences are one of a few values."""
    base = {f"layers.{i}.w": torch.zeros(50, 40) for i in range(3)}
    torch.manual_seed(0)
    fine = {name: (torch.randint(-64, 65, tensor.shape) / 64.0) for name, tensor in base.items()}
    made = Packs(tmp_path, peru, base, {"a": fine})
    options = ("--precision", 3, "--no-signs", "--decorrelate", "none")
    plain, pack = made.run("a", *options, name="plain"), made.run("a", *options, "--residual", "20%")
    wanted = plain_residual(fine, made.unpack(plain, "a"), sorted(base), 0.2, rounded=True)
    assert {n: raw(t) for n, t in made.unpack(pack, "a").items()} == {n: raw(t) for n, t in wanted.items()}


def test_a_model_with_its_own_base(tmp_path: Path, peru: Peru) -> None:
    made = Packs(tmp_path, peru, *family("ab", "bf16", size=2))
    options = ("--seed", 7, "--residual", "5%")
    plain = made.run("ab", *options, name="plain")
    merged = made.run("ab", *options, "--merge-base", tmp_path / "merged")
    assert Pack(merged).index.entries < Pack(plain).index.entries
    for task in "ab":
        expected = {n: raw(t) for n, t in made.unpack(plain, task).items()}
        peru("prune", f"{task}={merged}", "-b", tmp_path / "merged", "-o", tmp_path / "d.safetensors", "--lossless", "--force")
        peru("unpack", tmp_path / "d.safetensors", "-b", tmp_path / "merged", "-o", tmp_path / "m.safetensors", "--force")
        assert {n: raw(t) for n, t in load_file(tmp_path / "m.safetensors").items()} == expected
        peru("unpack", merged, "--task", task, "-b", tmp_path / "merged", "-o", tmp_path / "m.safetensors", "--force")
        assert {n: raw(t) for n, t in load_file(tmp_path / "m.safetensors").items()} == expected
        state = load_file(tmp_path / "merged" / "model.safetensors")
        before = {n: raw(t) for n, t in state.items()}
        pack = peru_cli.open_artifact(merged)
        with peru_cli.apply(state, pack, task=task) as applied:
            assert {n: raw(t) for n, t in state.items()} == expected
            applied.switch("ab".replace(task, ""))
            applied.switch(task)
            assert {n: raw(t) for n, t in state.items()} == expected
        assert {n: raw(t) for n, t in state.items()} == before


def test_live_models_and_eval_use_the_residual_too(tmp_path: Path, peru: Peru) -> None:
    config = tr.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, num_labels=3)
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        torch.manual_seed(0)
        base = tr.BertModel(config).to(dtype)
        base.save_pretrained(folder / "base")
        for number, task in enumerate("ab"):
            torch.manual_seed(10 + number)
            model = tr.BertForSequenceClassification(config).to(dtype)
            model.bert.load_state_dict({n: (t + 0.01 * torch.randn(t.shape)).to(dtype) for n, t in base.state_dict().items()})
            model.save_pretrained(folder / task)
        pack = folder / "p.safetensors"
        peru("shuffle-pack", folder / "a", folder / "b", "-b", folder / "base", "-o", pack, "--residual", "3%", "--scale", 0.5)
        peru("unpack", pack, "--task", "b", "-b", folder / "base", "-o", folder / "out")
        wanted = {n: raw(t) for n, t in load_file(folder / "out" / "model.safetensors").items()}
        subject = open_eval_model(str(pack), "b", Base(str(folder / "base")))
        assert {n: raw(t) for n, t in subject.read().items()} == wanted
        model = tr.BertForSequenceClassification.from_pretrained(folder / "base", dtype="auto")
        before = {n: raw(t) for n, t in model.state_dict().items()}
        applied = peru_cli.apply(model, peru_cli.open_artifact(pack), task="a")
        peru_cli.apply(model, peru_cli.open_artifact(pack), task="b")
        assert {n: raw(t) for n, t in model.state_dict().items() if n in wanted} == wanted
        applied.restore()
        peru_cli.apply(model, peru_cli.open_artifact(pack), task="b").restore()
        assert {n: raw(t) for n, t in model.state_dict().items()} == before


def test_neither_threads_nor_tiles_change_a_byte(tmp_path: Path, peru: Peru) -> None:
    made = Packs(tmp_path, peru, *family("abc", size=40))
    first = made.run("abc", "--residual", "2%", "--threads", 1, "--tile-entries", 16384).read_bytes()
    assert made.run("cba", "--residual", "2%", "--threads", 4, "--tile-entries", 65536).read_bytes() == first


def test_a_changed_pack_has_no_residuals(tmp_path: Path, peru: Peru) -> None:
    """They correct what the old sums returned."""
    made = Packs(tmp_path, peru, *family("abc"))
    plain, pack = made.run("ab", "--seed", 7, name="plain"), made.run("ab", "--seed", 7, "--residual", "5%")
    before = pack.read_bytes()
    added = made.run("c", "--add-to", pack, name="added")
    assert "the residuals of a, b are left out" in made.peru.stderr  # type: ignore[attr-defined]
    assert added.read_bytes() == made.run("c", "--add-to", plain, name="other").read_bytes()
    removed = made.run("b", "--remove-from", pack, name="removed")
    assert removed.read_bytes() == made.run("b", "--remove-from", plain, name="other").read_bytes()
    assert made.run("c", "--remove-from", added, name="back").read_bytes() == plain.read_bytes()
    assert pack.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--residual", "0.0001%"), "keeps nothing"),
        (("--residual", "5"), "did you mean --residual 5%"),
        (("--residual", "x"), "is not a density"),
    ],
)
def test_invalid_shares_are_refused(tmp_path: Path, peru: Peru, options: tuple[str, ...], says: str) -> None:
    made = Packs(tmp_path, peru, *family("ab"))
    out = made.run("ab", *options, code=2)
    assert says in made.peru.stderr and not out.exists()  # type: ignore[attr-defined]
    plain = made.run("a", name="plain")
    made.run("b", "--add-to", plain, "--residual", "1%", code=2)
    assert "--residual: fixed when" in made.peru.stderr  # type: ignore[attr-defined]
