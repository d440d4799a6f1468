"""Repeated layers share a row, and nothing is lost in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peru_cli.reports.fold import fold, folded_name
from tests.conftest import random_pair, save


@pytest.mark.parametrize(
    "names,says",
    [
        (["a.0.w", "a.1.w", "a.2.w"], "a.{0..2}.w"),
        (["a.0.w", "a.2.w"], "a.{0,2}.w"),
        (["a.0.w", "a.2.w", "a.4.w", "a.6.w", "a.9.w"], "a.*.w"),
        (["h.3.experts.0.w", "h.3.experts.1.w"], "h.3.experts.{0..1}.w"),
        (["conv1.weight"], "conv1.weight"),
    ],
)
def test_a_folded_name_shows_its_numbers(names: list[str], says: str) -> None:
    assert folded_name(names) == says


def test_only_one_kind_is_folded() -> None:
    items = [("l.0.w", 1), ("l.1.w", 2), ("l.2.w", 1)]
    assert fold(items, lambda i: i[0], lambda i: i[1]) == [("l.{0,2}.w", [items[0], items[2]]), ("l.1.w", [items[1]])]


def test_inspect_folds_layers_and_shows_each_with_all(tmp_path: Path, peru) -> None:
    base, fine = random_pair("bf16")
    pair = (save(fine, tmp_path / "fine.safetensors"), "--base", save(base, tmp_path / "base.safetensors"))
    short, long = peru("inspect", *pair), peru("inspect", *pair, "--all")
    row, ranks = (line.split() for line in short.splitlines() if line.startswith("layers.{0..1}.mlp.weight"))
    assert row[1] == ranks[1] == "2" and "layers.0.mlp.weight" in long and "{" not in long
    changes = [
        t for t in json.loads(peru("inspect", *pair, "--json"))["changes"] if t["name"] in ("layers.0.mlp.weight", "layers.1.mlp.weight")
    ]
    share = sum(t["changed"] for t in changes) / sum(t["entries"] for t in changes)
    norm = sum(t["squared_delta"] for t in changes) ** 0.5
    assert row[4] == f"{100 * share:.2f}%" and row[5] == f"{norm:.4g}"
    peru("prune", *pair, "-o", tmp_path / "a.safetensors", "--keep", "10%", "--no-sync")
    kept = {t["name"]: t["kept"] for t in json.loads(peru("inspect", tmp_path / "a.safetensors", "--json"))["tensors"]}
    (row,) = (
        line.split() for line in peru("inspect", tmp_path / "a.safetensors").splitlines() if line.startswith("layers.{0..1}.mlp.weight")
    )
    assert int(row[-2].replace(",", "")) == kept["layers.0.mlp.weight"] + kept["layers.1.mlp.weight"]
    assert "layers.0.mlp.weight" in peru("inspect", tmp_path / "a.safetensors", "--all")
