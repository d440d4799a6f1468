"""`peru_cli.diff`: two state dicts in memory become the artifact that `peru prune --lossless` writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import peru_cli
from peru_cli.checkpoints.local import atomic
from peru_cli.errors import BadFile, Mismatch, UsageError
from tests.export.test_export import same_bits, states

Peru = Callable[..., str]


@pytest.mark.parametrize("memfd", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_bytes_are_those_of_prune(tmp_path: Path, peru: Peru, monkeypatch: pytest.MonkeyPatch, memfd: bool, threads: int) -> None:
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    base, fine = states()
    for name, state in (("base", base), ("fine", fine)):
        save_file(state, tmp_path / f"{name}.safetensors", {"format": "pt"})
    out = tmp_path / "a.safetensors"
    peru("prune", f"update={tmp_path / 'fine.safetensors'}", "--base", tmp_path / "base.safetensors", "-o", out, "--lossless")
    before = {name: tensor.clone() for name, tensor in base.items()}
    assert peru_cli.diff(base, fine, threads=threads) == out.read_bytes()
    assert same_bits(base, before)


def test_an_update_in_memory_is_applied_and_taken_off(tmp_path: Path) -> None:
    base, fine = states(seed=3)
    weights = {name: tensor.clone() for name, tensor in base.items()}
    artifact = peru_cli.open_artifact(peru_cli.diff(base, fine))
    with peru_cli.apply(weights, artifact):
        assert same_bits(weights, fine)
    assert same_bits(weights, base)
    weights["half"][3] += 1
    with pytest.raises(Mismatch, match="half"):
        peru_cli.apply(weights, artifact)


def test_altered_bytes_are_refused() -> None:
    base, fine = states()
    data = peru_cli.diff(base, fine)
    for at in range(9, len(data), len(data) // 7):
        altered = bytearray(data)
        altered[at] ^= 1
        with pytest.raises(BadFile):
            peru_cli.apply({name: tensor.clone() for name, tensor in base.items()}, peru_cli.open_artifact(bytes(altered)))
    with pytest.raises(BadFile):
        peru_cli.open_artifact(data[: len(data) // 2])


def test_views_and_parameters_of_a_module_will_do() -> None:
    before, after = torch.nn.Linear(30, 20), torch.nn.Linear(30, 20)
    after.load_state_dict({"weight": before.weight * 2, "bias": before.bias})
    turned = {"weight": before.weight.detach().t().contiguous().t(), "bias": before.bias.detach()}
    assert peru_cli.diff(dict(before.named_parameters()), after.state_dict()) == peru_cli.diff(turned, after.state_dict())


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base, fine = states()
    with pytest.raises(UsageError, match="config"):
        peru_cli.diff(base, {**fine, "config": {"a": 1}})  # type: ignore[dict-item]
    with pytest.raises(Mismatch, match="share only"):
        peru_cli.diff({"other": torch.zeros(10)}, fine)
    with pytest.raises(UsageError, match="no floating-point"):
        peru_cli.diff({"a": torch.arange(3)}, {"a": torch.arange(3)})
    with pytest.raises(UsageError, match="task name"):
        peru_cli.diff(base, fine, name="a b")
    opened: list[atomic.MemoryFile] = []
    monkeypatch.setattr("peru_cli.export.diff.MemoryFile", lambda: opened.append(atomic.MemoryFile()) or opened[0])
    monkeypatch.setattr("peru_cli.export.diff.run", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peru_cli.diff(base, fine)
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(opened[0].fd)


def test_updates_step_by_step_are_those_of_diff() -> None:
    """Each begins where the last one ended, also where dtypes and names change; the weights given are not kept."""
    base, fine = states()
    live = {name: tensor.clone() for name, tensor in base.items()}
    updates = peru_cli.Updates(live, threads=2)
    steps = [fine, base, base | {"half": base["half"].float()}, fine | {"new": torch.arange(5)}, fine]
    before = {name: tensor.clone() for name, tensor in base.items()}
    for step in steps:
        live = {name: tensor.clone() for name, tensor in step.items()}
        assert updates.next(live) == peru_cli.diff(before, step)
        before = {name: tensor.clone() for name, tensor in step.items()}
        for tensor in live.values():
            tensor.zero_()
    live = {name: tensor.clone() for name, tensor in fine.items()}
    for _ in range(3):  # in place
        old = {name: tensor.clone() for name, tensor in live.items()}
        for tensor in live.values():
            tensor += 1
        data = updates.next(live)
        with peru_cli.apply(old, peru_cli.open_artifact(data)):
            assert same_bits(old, live)


def test_what_cannot_follow_leaves_updates_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    base, fine = states()
    updates = peru_cli.Updates(base)
    for wrong, error in (({**fine, "config": {"a": 1}}, UsageError), ({"other": torch.zeros(10)}, Mismatch)):
        with pytest.raises(error):
            updates.next(wrong)  # type: ignore[arg-type]
    assert updates.next(fine) == peru_cli.diff(base, fine)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("peru_cli.export.diff.run", lambda *a: 1 / 0)
        updates.next(base)
    with pytest.raises(UsageError, match="begin again"):
        updates.next(base)
