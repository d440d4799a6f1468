"""`--whole-weights` (PSP) against a plain program, and `--scale auto` against least squares."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import peru_cli
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.superposed import PackMode
from tests.conftest import FLOATS, raw
from tests.methods.test_superpose import plain_moves, plain_signs
from tests.pack.test_superpose import DEPTH, Packs, family, plain_place
from tests.support.readers.format_reader import read_safetensors
from tests.support.readers.pack_reader import PackReader

Peru = Callable[..., str]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sums_of_whole_weights_match_a_plain_program(tmp_path: Path, peru: Peru, dtype: str) -> None:
    made = Packs(tmp_path, peru, *family("ab", dtype))
    pack = made.run("ab", "--seed", 7, "--whole-weights", "--scale", "0.5", "--tile-entries", 16384)
    assert "a baseline, not for use" in made.peru.stderr  # type: ignore[attr-defined]
    with Pack(pack) as opened:
        targets = [r for r in opened.index.tensors if r.mode == PackMode.WEIGHTS]
        assert {r.info.name for r in targets} == {f"layers.{i}.{kind}.weight" for i in range(DEPTH) for kind in ("mlp", "attn")}
        assert {r.info.name for r in opened.index.tensors if r.mode == PackMode.SUM} >= {"embed.weight", "norm.weight"}
        steps = {r.info.name: 2.0**r.exponent for r in targets}
        found = {r.info.name: opened.sums(r, 0, r.info.entries).reshape(len(made.base[r.info.name]), -1) for r in targets}
    moves = {task: plain_moves(7, task, "layers.", DEPTH) for task in "ab"}
    signs = {(t, n): np.array(plain_signs(7, t, n, sums.shape[1]), np.float32) for t in "ab" for n, sums in found.items()}
    wanted = {name: np.zeros(sums.shape, np.int64) for name, sums in found.items()}
    for task in "ab":
        for name in found:
            place = plain_place(name, moves[task])
            weights = made.fine[task][name].float().numpy().reshape(wanted[place].shape)
            wanted[place] += np.rint(weights * signs[task, place] / np.float32(steps[place])).astype(np.int64)
    assert all(np.array_equal(found[name], wanted[name]) for name in found)
    base = read_safetensors(made.at["base"].read_bytes())[1]
    for task in "ab":
        back = made.unpack(pack, task)
        for name in found:
            place = plain_place(name, moves[task])
            vector = wanted[place].astype(np.float32) * np.float32(0.5 * steps[place]) * signs[task, place]
            expected = (torch.from_numpy(vector).reshape(made.base[name].shape) + 0.0).to(FLOATS[dtype])
            assert raw(back[name]) == raw(expected), (task, name)
        assert PackReader(pack.read_bytes()).retrieve(task, base) == read_safetensors((tmp_path / "unpacked.safetensors").read_bytes())[1]
        state = load_file(made.at["base"])
        with peru_cli.apply(state, peru_cli.open_artifact(pack), task=task):
            assert {n: raw(t) for n, t in state.items()} == {n: raw(t) for n, t in back.items()}
    assert "superposes whole weights" in peru("inspect", pack)


def test_one_task_alone_and_changes(tmp_path: Path, peru: Peru) -> None:
    made = Packs(tmp_path, peru, *family("ab"))
    alone = made.run("a", "--whole-weights", name="alone")
    back = made.unpack(alone, "a")
    with Pack(alone) as opened:
        for record in opened.index.tensors:
            if record.mode == PackMode.WEIGHTS:
                error = float((back[record.info.name].double() - made.fine["a"][record.info.name].double()).abs().max())
                assert error <= 2.0**record.exponent / 2
    both = made.run("b", "--add-to", alone, name="both")
    assert made.run("b", "--remove-from", both, name="again").read_bytes() == alone.read_bytes()


@pytest.mark.parametrize("tasks", ["a", "abc"])
def test_scale_auto_equals_least_squares(tmp_path: Path, peru: Peru, tasks: str) -> None:
    made = Packs(tmp_path, peru, *family(tasks, shared=0.2, size=40))
    pack = made.run(tasks, "--seed", 1, "--scale", "auto", "--json")
    report = json.loads(made.text)
    assert Pack(pack).metadata["peru.scale"] == repr(report["scale"])
    assert report["scale"] == pytest.approx(report["best_scale"], rel=0.01)  # predicted against measured
    names = [name for name, tensor in made.base.items() if tensor.is_floating_point()]
    one = made.run(tasks, "--seed", 1, "--precision", Pack(pack).metadata["peru.precision"], name="one")
    came, wanted = [], []
    for task in tasks:
        back = made.unpack(one, task)
        for name in names:
            came.append((back[name].double() - made.base[name].double()).numpy().reshape(-1))
            wanted.append((made.fine[task][name].double() - made.base[name].double()).numpy().reshape(-1))
    best = np.linalg.lstsq(np.concatenate(came)[:, None], np.concatenate(wanted), rcond=None)[0][0]
    assert report["scale"] == pytest.approx(best, rel=0.01)
    assert [t.exponent for t in Pack(one).index.tensors] == [t.exponent for t in Pack(pack).index.tensors]


def test_invalid_scales_are_refused(tmp_path: Path, peru: Peru) -> None:
    made = Packs(tmp_path, peru, *family("ab"))
    for text in ("0", "nan", "inf", "often"):
        made.run("ab", "--scale", text, code=2)
        assert f"--scale {text} is neither auto nor a finite number" in made.peru.stderr  # type: ignore[attr-defined]
    made.run("ab", "--scale", "auto", "--method", "tall-masks", code=2)
    made.run("ab", "--whole-weights", "--method", "tall-masks", code=2)
    assert "--whole-weights" in made.peru.stderr  # type: ignore[attr-defined]
