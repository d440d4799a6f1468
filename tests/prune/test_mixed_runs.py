"""Mixed artifacts in difficult cases: differences that are not finite, and killed runs; and eval of them."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.prune.test_mixed import make_pair
from tests.support import models
from tests.support.damage import files, run_and_kill

Peru = Callable[..., str]


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [
        ("fine", "layer.0.weight", torch.nan),
        ("fine", "norm.1.weight", torch.nan),
        ("fine", "layer.1.weight", -torch.inf),
        ("base", "layer.1.weight", torch.inf),
    ],
)
def test_tensors_that_are_not_finite_are_named_and_can_be_stored_whole(
    peru: Peru, tmp_path: Path, where: str, name: str, value: float
) -> None:
    base, fine = make_pair(tmp_path)
    path = fine if where == "fine" else base
    tensors = load_file(path)
    tensors[name].view(-1)[7] = value
    save_file(tensors, path)
    before = sorted(tmp_path.iterdir())
    command = ["prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--max-bytes", "100kB"]
    peru(*command, code=1)
    assert name in peru.stderr and "NaN or infinit" in peru.stderr and "at entry 7" in peru.stderr
    assert sorted(tmp_path.iterdir()) == before
    hint = next(line.split("'")[1] for line in peru.stderr.splitlines() if "--per-task" in line)
    peru(*command, "--per-task", f"{hint}|head.*")
    peru("unpack", tmp_path / "a.safetensors", "--base", base, "-o", tmp_path / "back.safetensors")
    back, wanted = load_file(tmp_path / "back.safetensors"), load_file(fine)
    assert torch.equal(back[name].view(torch.int32), wanted[name].view(torch.int32))


def test_a_killed_run_leaves_no_artifact_and_starts_again(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    (tmp_path / "out").mkdir()
    models_at = [f"{task}={fine}" for task in "ab"]
    command = ["prune", *models_at, "--base", str(base), "--max-bytes", "30kB", "--no-sync", "-o"]
    peru(*command, tmp_path / "whole/")
    expected = files(tmp_path / "whole")
    assert sorted(expected) == ["a.safetensors", "b.safetensors"]
    moment, killed = 1, 0
    while run_and_kill(moment, [*command, f"{tmp_path}/out/", "--force"]) == -signal.SIGKILL:
        killed += 1
        left = files(tmp_path / "out")
        assert all(content == expected.get(name) for name, content in left.items() if not name.startswith("."))
        peru(*command, f"{tmp_path}/out/", "--force")
        assert files(tmp_path / "out") == expected, moment
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        moment += 1 if moment < 3 else 7
    assert killed >= 3


def test_eval_measures_the_unpacked_model(peru: Peru, tmp_path: Path) -> None:
    base, fine = models.pair(models.bert, tmp_path)
    out, at = tmp_path / "a.safetensors", ["--base", base]
    (made,) = json.loads(peru("prune", fine, *at, "-o", out, "--min-quality", "80%", "--json", "--no-sync"))
    peru("unpack", out, *at, "-o", tmp_path / "back", "--no-sync")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text, "label": 0}) + "\n" for text in models.sentences(40)))
    ours, theirs = (
        json.loads(peru("eval", model, *at, "--against", fine, "--data", tmp_path / "texts.jsonl", "--json", "--quiet"))
        for model in (out, tmp_path / "back")
    )
    one, two = ours["tasks"][0], theirs["tasks"][0]
    assert one["metrics"] == two["metrics"] and one["metrics"]["kl"]["value"] > 0
    assert one["bytes"] == one["own_bytes"] == out.stat().st_size == ours["bytes_in_all"]
    error = next(iter(ours["weights"].values()))["total"]["error"]
    assert error == pytest.approx(made["relative_error"], rel=1e-6)
    peru("eval", out, *at, "--against", fine, "--fail-above", f"error={error * 0.9}", code=3)


def test_a_limit_too_small_for_any_change_is_reported(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    command = ["prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--max-bytes"]
    peru(*command, "1kB", code=2)
    least = re.search(r"an artifact without changes takes ([\d,]+\d)", peru.stderr)
    assert least is not None
    peru(*command, int(least.group(1).replace(",", "")) + 8)
    assert "no change fits into" in peru.stderr
    peru(*command, "20kB", "--force")
    assert "no change fits" not in peru.stderr
