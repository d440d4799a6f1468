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
