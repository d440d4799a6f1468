"""`merge --executor ray`: the same bytes and messages as on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peru_cli.merge.passes import tiles
from tests.conftest import save
from tests.support.damage import files
from tests.support.fake_ray import FakeRay, installed


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """Ray in this process, with small batches."""
    return installed(monkeypatch, 1 << 18)


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Large tensors, and small ones that share tiles; few distinct differences, so that many equal a threshold."""
    noise = torch.Generator().manual_seed(0)
    shapes = {f"layers.{i}.weight": (300, 200 + i) for i in range(4)} | {f"layers.{i}.norm.weight": (64,) for i in range(4)}
    base = {name: torch.randn(shape, generator=noise).bfloat16() for name, shape in shapes.items()}
    save(base, tmp_path / "base.safetensors")
    for task in "abc":
        fine = {n: (t.float() + torch.randint(-3, 4, t.shape, generator=noise) / 256).bfloat16() for n, t in base.items()}
        save(fine, tmp_path / f"{task}.safetensors")
    return tmp_path


def arguments(folder: Path, out: str, *options: object, tasks: str = "abc") -> list[str]:
    given = [f"{task}={folder / task}.safetensors" for task in tasks]
    return [str(a) for a in ("merge", *given, "-o", folder / out, "--no-sync", "--threads", 1, "--tile-entries", 16384, *options)]


RAY = ["--executor", "ray"]
METHODS = {
    "linear": ["-m", "linear", "--weight", "a=0.5"],
    "task-arithmetic": ["-m", "task-arithmetic", "--scale", "0.3", "-b"],
    "ties": ["-m", "ties", "--keep", "20%", "-b"],
    "ties by tensor": ["-m", "ties", "--keep", "a=0..1:[10%,50%],0.2", "-b"],
    "dare": ["-m", "dare", "--keep", "30%", "-b"],
    "dare-ties": ["-m", "dare-ties", "--keep", "30%", "--scale", "0.7", "-b"],
    "breadcrumbs": ["-m", "breadcrumbs", "-b"],
    "signs of the whole model": ["-m", "ties", "--keep", "20%", "--variant", "authors", "-b"],
    "inner products": ["-m", "model-stock", "-b"],
    "consensus": ["-m", "consensus", "-b"],
}


@pytest.mark.parametrize("name", METHODS)
def test_same_bytes_as_one_machine(models: Path, peru, ray: FakeRay, name: str) -> None:
    """Two batches or more for each pass; some are taken while others are already selected."""
    options = [*METHODS[name], *([models / "base.safetensors"] if METHODS[name][-1] == "-b" else [])]
    peru(*arguments(models, "here", *options))
    assert not ray.tasks
    peru(*arguments(models, "there", *options, *RAY))
    assert files(models / "there") == files(models / "here")
    assert ray.tasks > 4


def test_workers_that_die_are_replaced(models: Path, peru, ray: FakeRay) -> None:
    given = [*METHODS["ties"], models / "base.safetensors"]
    peru(*arguments(models, "here", *given))
    ray.deadly = {1, *range(4, 60, 7)}
    peru(*arguments(models, "there", *given, *RAY))
    assert files(models / "there") == files(models / "here") and ray.actors > 4


@pytest.mark.parametrize("first", ["here", "there"])
def test_what_one_way_has_finished_the_other_continues(models: Path, peru, ray: FakeRay, monkeypatch, first: str) -> None:
    given = [*METHODS["ties"], models / "base.safetensors"]
    peru(*arguments(models, "whole", *given))
    with monkeypatch.context() as patch:
        real = tiles.Merge.collect

        def stopped(self, tile, result):
            if tile.tensor > 3:
                raise KeyboardInterrupt
            real(self, tile, result)

        patch.setattr(tiles.Merge, "collect", stopped)
        peru(*arguments(models, "out", *given, *(RAY if first == "there" else [])), code=130)
    peru(*arguments(models, "out", *given, *(RAY if first == "here" else [])))
    assert "continuing after" in peru.stderr
    assert files(models / "out") == files(models / "whole")


def test_an_error_of_a_worker_is_told_as_here(models: Path, peru, ray: FakeRay) -> None:
    """A weight that is not a number, in one of the inputs."""
    from safetensors.torch import load_file

    broken = load_file(models / "b.safetensors")
    broken["layers.1.weight"][3, 4] = float("nan")
    save(broken, models / "b.safetensors")
    given = [*METHODS["task-arithmetic"], models / "base.safetensors"]
    peru(*arguments(models, "here", *given), code=1)
    said = peru.stderr
    peru(*arguments(models, "there", *given, *RAY), code=1)
    assert "'layers.1.weight' is NaN or infinite at entry 607" in said and peru.stderr == said


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["-m", "tsv-m", "-b"], "merges tile by tile, and tsv-m takes rows or whole matrices"),
        (["-m", "ties", "--compress", "5%", "-b"], "--compress is computed on one machine"),
        (["-m", "ties", "--then", "lines", "-b"], "--then is computed on one machine"),
        (["-m", "ties", "--device", "cuda", "-b"], "not on GPUs"),
    ],
)
def test_what_cannot_be_spread_is_refused(models: Path, peru, ray: FakeRay, options: list[str], told: str) -> None:
    peru(*arguments(models, "out", *options, models / "base.safetensors", *RAY), code=2)
    assert told in peru.stderr and not (models / "out").exists()
