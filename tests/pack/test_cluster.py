"""`shuffle-pack --executor ray`: the same bytes and messages as on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import save
from tests.support.fake_ray import FakeRay, installed

RAY = ["--executor", "ray"]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Ray in this process. A batch has two blocks of sums at most, and rarely begins where one does."""
    return installed(monkeypatch, 6 << 18)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    noise = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.weight": (600, 301) for i in range(3)} | {f"layers.{i}.norm.weight": (64,) for i in range(3)}
    base = {name: torch.randn(shape, generator=noise).bfloat16() for name, shape in shapes.items()}
    save(base | {"embed.weight": torch.randn((1000, 301), generator=noise)}, tmp_path / "base.safetensors")
    for task in "abc":
        fine = {n: (t.float() + torch.randn(t.shape, generator=noise) * 0.01).bfloat16() for n, t in base.items()}
        fine["embed.weight"] = load_file(tmp_path / "base.safetensors")["embed.weight"] * (1.01 if task == "b" else 1.001)
        save(fine | {f"head.{task}": torch.ones(3)}, tmp_path / f"{task}.safetensors")
    return tmp_path


def arguments(folder: Path, out: str, *options: object) -> list[str]:
    models = [f"{task}={folder / task}.safetensors" for task in "abc"]
    given = ["shuffle-pack", *models, "--base", folder / "base.safetensors", "-o", folder / out, "--per-task", "head"]
    return [str(a) for a in (*given, "--no-sync", "--threads", 1, "--tile-entries", 16384, *options)]


@pytest.mark.parametrize(
    "options",
    [["--scale", "auto"], ["--decorrelate", "shift", "--whole-weights", "--precision", 9], ["--max-error", 1.4]],
    ids=["shuffled", "shifted", "without a task"],
)
def test_same_bytes_as_one_machine(models: Path, peru, ray: FakeRay, options: list[object]) -> None:
    peru(*arguments(models, "here.safetensors", *options))
    assert not ray.tasks
    assert (" is left out: " in peru.stderr) == ("--max-error" in options)
    peru(*arguments(models, "there.safetensors", *options, *RAY))
    assert (models / "there.safetensors").read_bytes() == (models / "here.safetensors").read_bytes()
    assert ray.tasks > 12


def test_workers_that_die_are_replaced(models: Path, peru, ray: FakeRay) -> None:
    peru(*arguments(models, "here.safetensors"))
    ray.deadly = {1, *range(4, 60, 5)}
    peru(*arguments(models, "there.safetensors", *RAY))
    assert (models / "there.safetensors").read_bytes() == (models / "here.safetensors").read_bytes() and ray.actors > 4


def test_an_error_of_a_worker_is_told_as_here(models: Path, peru, ray: FakeRay) -> None:
    broken = load_file(models / "b.safetensors")
    broken["layers.1.weight"][3, 4] = float("nan")
    save(broken, models / "b.safetensors")
    peru(*arguments(models, "here.safetensors"), code=1)
    said = peru.stderr
    peru(*arguments(models, "there.safetensors", *RAY), code=1)
    assert "'layers.1.weight' differs from the base by NaN or infinity" in said and peru.stderr == said


@pytest.mark.parametrize(
    "options", [["--method", "tall-masks"], ["--method", "smile"], ["--residual", "1%"], ["--merge-base", "new"], ["--add-to", "pack"]]
)
def test_what_cannot_be_spread_is_refused(models: Path, peru, ray: FakeRay, options: list[str]) -> None:
    peru(*arguments(models, "out.safetensors", *options, *RAY), code=2)
    assert f"{' '.join(options[: 1 + (options[0] == '--method')])} is computed on one machine" in peru.stderr
    assert not (models / "out.safetensors").exists()
