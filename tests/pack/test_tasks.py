"""A pack's task wherever a model is named: `prune` and `merge` give the same result as for the unpacked file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import raw, save
from tests.pack.test_superpose import family

Peru = Callable[..., str]
METHODS = {"superpose": ["--seed", "3"], "masks": ["--method", "tall-masks"]}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_task_is_pruned_and_merged_like_its_unpacked_file(tmp_path: Path, peru: Peru, method: str, dtype: str) -> None:
    base, fine = family("ab", dtype, size=50)
    at = {task: save(table, tmp_path / f"{task}.safetensors") for task, table in {"base": base, **fine}.items()}
    pack, under = tmp_path / "pack.safetensors", ["-b", at["base"], "--no-sync"]
    peru("shuffle-pack", f"a={at['a']}", f"b={at['b']}", "-o", pack, *METHODS[method], *under)
    for task in "ab":
        peru("unpack", pack, "--task", task, "-o", tmp_path / f"{task}2.safetensors", *under)
    made = {}
    for kind, models in {"packed": [f"a={pack}", f"b={pack}"], "files": [f"{t}={tmp_path / f'{t}2.safetensors'}" for t in "ab"]}.items():
        peru("prune", *models, "-o", f"{tmp_path / kind}/", "--keep", "10%", "--tile-entries", 16384, *under)
        made[kind] = [(tmp_path / kind / f"{task}.safetensors").read_bytes() for task in "ab"]
        peru("merge", *models, "-o", tmp_path / f"{kind}-merged/", "--method", "task-arithmetic", *under)
    assert made["packed"] == made["files"]
    ours, theirs = (load_file(tmp_path / f"{kind}-merged" / "model.safetensors") for kind in ("packed", "files"))
    assert ours.keys() == theirs.keys() and all(raw(ours[name]) == raw(theirs[name]) for name in ours)
    peru("prune", pack, "-o", tmp_path / "none.safetensors", "--keep", "10%", *under, code=2)
    assert f"holds a, b: choose one\n  write TASK={pack}" in peru.stderr  # type: ignore[attr-defined]


def test_json_of_a_task_that_changes_nothing_holds_no_infinity(tmp_path: Path, peru: Peru) -> None:
    """It returns the other task's vector, an infinite error relative to its norm of 0: null, as JSON (RFC 8259) has no infinity."""
    base, fine = family("a", "fp32", size=20)
    at = {task: save(table, tmp_path / f"{task}.safetensors") for task, table in {"base": base, "none": base, **fine}.items()}
    pack = tmp_path / "pack.safetensors"
    made = peru("shuffle-pack", f"a={at['a']}", f"none={at['none']}", "-b", at["base"], "-o", pack, "--json", "--no-sync")
    for text, listed in ((made, "packed"), (peru("inspect", pack, "--json"), "tasks")):
        tasks = {task["task"]: task for task in json.loads(text, parse_constant=pytest.fail)[listed]}
        assert tasks["none"]["norm"] == 0.0 and tasks["none"]["error"] is None and tasks["a"]["error"] < 0.1
    row = next(line.split() for line in peru("inspect", pack).splitlines() if line.startswith("none "))
    assert row[1:4] == ["0.0", "inf", "inf"]  # norm, expected error, measured
