"""`peru prune`: the relative error that it prints, and `--fail-above`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import FLOATS, save

Peru = Callable[..., str]


@pytest.fixture(params=["bf16", "fp32", "fp64"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Several tiles, many equal differences, zeros of both signs, and differences that are not finite."""
    dtype, noise = FLOATS[request.param], torch.Generator().manual_seed(1)
    base = {f"layers.{i}": (torch.randn(40_000, generator=noise) / 16).to(dtype) for i in range(3)}
    steps = torch.randint(-4, 5, (3, 40_000), generator=noise).double() / 256
    fine = {name: (tensor.double() + step).to(dtype) for (name, tensor), step in zip(base.items(), steps, strict=True)}
    base["odd"] = torch.tensor([0.0, -0.0, 1.0, torch.inf, 1.0, torch.nan]).to(dtype)
    fine["odd"] = torch.tensor([-0.0, 0.0, torch.nan, 1.0, -torch.inf, torch.nan]).to(dtype)
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "fine.safetensors"


def relative_error(back: dict[str, torch.Tensor], fine: dict[str, torch.Tensor], base: dict[str, torch.Tensor]) -> float:
    """||back - fine|| / ||fine - base|| over finite differences, in float64."""
    lost = energy = 0.0
    for name, tensor in base.items():
        difference = fine[name].double() - tensor.double()
        finite = torch.isfinite(difference)
        lost += float((back[name].double() - fine[name].double())[finite].square().sum())
        energy += float(difference[finite].square().sum())
    return math.sqrt(lost / energy)


@pytest.mark.parametrize(
    "options",
    [
        ["--keep", "7%"],
        ["--keep", "60%", "--scope", "tensor"],
        ["--keep", "30%", "--values", "exact"],
        ["--keep", "30%", "--values", "log2"],
        ["--keep", "100%", "--values", "log2"],
        ["--keep", "0.01%"],
        ["--lossless"],
    ],
    ids=" ".join,
)
def test_the_relative_error_is_that_of_the_unpacked_model(peru: Peru, pair: tuple[Path, Path], tmp_path: Path, options: list[str]) -> None:
    base, fine = pair
    at = ["--base", base, "--no-sync"]
    said = [
        json.loads(peru("prune", fine, *at, "-o", tmp_path / "a.safetensors", *options, "--json", "--force", *settings))[0][
            "relative_error"
        ]
        for settings in (["--threads", 1], ["--threads", 3, "--tile-entries", 16384])
    ]
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "back.safetensors")
    back, wanted, origin = (load_file(path) for path in (tmp_path / "back.safetensors", fine, base))
    assert said[0] == said[1] == pytest.approx(relative_error(back, wanted, origin), rel=5e-4, abs=1e-12)


def test_differences_too_large_for_squares_in_float32(peru: Peru, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(2)
    base = {"w": torch.randn(20_000, generator=noise) * 1e25}
    fine = {"w": base["w"] + torch.randn(20_000, generator=noise) * 1e25}
    for name, tensors in (("base", base), ("fine", fine)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    at = ["--base", tmp_path / "base.safetensors", "--no-sync"]
    (said,) = json.loads(peru("prune", tmp_path / "fine.safetensors", *at, "-o", tmp_path / "a.safetensors", "--keep", "10%", "--json"))
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "back.safetensors")
    found = relative_error(load_file(tmp_path / "back.safetensors"), fine, base)  # four digits are shown
    assert said["relative_error"] == pytest.approx(found, rel=5e-4)


def two_tasks(folder: Path) -> list[object]:
    noise = torch.Generator().manual_seed(3)
    base = {"w": torch.randn(100, 80, generator=noise)}
    save_file(base, folder / "base.safetensors")
    for task, size in (("a", 0.1), ("b", 0.2)):
        save_file({"w": base["w"] + size * torch.randn(100, 80, generator=noise)}, folder / f"{task}.safetensors")
    return [
        "prune",
        *(f"{t}={folder}/{t}.safetensors" for t in "ab"),
        "--base",
        folder / "base.safetensors",
        "-o",
        folder / "out/",
        "--no-sync",
    ]


@pytest.mark.parametrize("much", [["--keep", "10%"], ["--max-bytes", "5kB"]], ids=["sparse", "mixed"])
def test_a_missed_gate_writes_nothing_and_exits_with_3(peru: Peru, tmp_path: Path, much: list[str]) -> None:
    command = [*two_tasks(tmp_path), *much]
    peru(*command, "--fail-above", "error=0.99", "--fail-above", "bytes=1kB", code=3)
    assert "missed --fail-above bytes=1kB" in peru.stderr and "in 2 artifacts" in peru.stderr and "no artifact was written" in peru.stderr
    peru(*command, "--fail-above", "error=1%", code=3)
    assert "missed --fail-above error=1%: relative error 0." in peru.stderr and "at worst (" in peru.stderr
    assert [path.name for path in tmp_path.rglob("*") if "peru" in path.name or path.parent.name == "out"] == []


@pytest.mark.parametrize("much", [["--keep", "10%"], ["--max-bytes", "5kB"]], ids=["sparse", "mixed"])
def test_passed_gates_are_reported(peru: Peru, tmp_path: Path, much: list[str]) -> None:
    peru(*two_tasks(tmp_path), *much, "--fail-above", "error=99%", "--fail-above", "bytes=1MB")
    assert "passed --fail-above error=99%: relative error 0." in peru.stderr and "passed --fail-above bytes=1MB: " in peru.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.safetensors", "b.safetensors"]


def test_an_old_artifact_survives_a_missed_gate(peru: Peru, tmp_path: Path) -> None:
    command = two_tasks(tmp_path)
    peru(*command, "--keep", "10%")
    before = (tmp_path / "out" / "a.safetensors").read_bytes()
    peru(*command, "--keep", "1%", "--force", "--fail-above", "error=0.5", code=3)
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("gate", "says"),
    [("kl=1", "neither error nor bytes"), ("error=much", "not a number"), ("bytes=3XB", "not a size"), ("error", "not a number")],
)
def test_meaningless_gates_are_refused(peru: Peru, tmp_path: Path, gate: str, says: str) -> None:
    peru(*two_tasks(tmp_path), "--keep", "10%", "--fail-above", gate, code=2)
    assert says in peru.stderr
