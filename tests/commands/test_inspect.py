"""`peru inspect MODEL --base BASE`: what it predicts is what the commands then write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peru_cli import demo


def test_predicted_sizes_are_within_three_percent_of_the_artifacts(tmp_path: Path, peru: Callable[..., str]) -> None:
    fine = demo.fine_tune("digits")
    plans = json.loads(peru("inspect", fine, "--base", demo.BASE, "--json"))["plans"]
    assert [plan["density"] for plan in plans] == [0.01, 0.05, 0.1, 0.2, None]
    for number, plan in enumerate(plans[1:]):
        how = ["--lossless"] if plan["density"] is None else ["--keep", plan["density"]]
        command = ["prune", fine, "--base", demo.BASE, "-o", tmp_path / f"{number}.safetensors", "--no-sync", "--json"]
        (made,) = json.loads(peru(*command, *how))
        assert plan["bits_per_parameter"] == pytest.approx(made["bits_per_parameter"], rel=0.03), how
        assert plan["relative_error"] == pytest.approx(made["relative_error"], abs=1e-3)


def test_repeated_layers_share_a_row_of_ranks_with_the_error_of_all_of_them(peru: Callable[..., str]) -> None:
    fine = demo.fine_tune("digits")
    table = peru("inspect", fine, "--base", demo.BASE).split("module ")[1].splitlines()
    (row,) = [line for line in table if "{0..7}.intermediate.dense.weight" in line]
    new, old = load_file(fine / "model.safetensors"), load_file(demo.BASE / "model.safetensors")
    matrices = [(new[f"vit.{name}"] - old[name]).double() for name in old if name.endswith("intermediate.dense.weight")]
    energies = [torch.linalg.svdvals(matrix).square() for matrix in matrices]
    error = (sum(float(e[8:].sum()) for e in energies) / sum(float(e.sum()) for e in energies)) ** 0.5
    assert len(matrices) == 8 and f"{error:.3f}" in row.split()
