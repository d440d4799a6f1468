"""Merges of many small tensors: they share tiles, and the merge is the same as if each had its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peru_cli.checkpoints import bundle
from peru_cli.merge.passes.tiles import Merge
from tests.conftest import run_peru, save
from tests.prune.test_many import many

METHODS = [
    ["linear"], ["task-arithmetic"], ["ties"], ["ties", "--variant", "mergekit"], ["breadcrumbs"], ["consensus"], ["dare"], ["dare-ties"],
    ["task-arithmetic", "--dtype", "fp32"],
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    base, a = many(150, mixed=True)
    a = {name: tensor[:5000] if name == "embed.weight" else tensor for name, tensor in a.items() if name in base}
    noise = torch.Generator().manual_seed(2)
    b = {n: t + (torch.randn(t.shape, generator=noise) * 0.1).to(t.dtype) if t.is_floating_point() else t for n, t in a.items()}
    for name, tensors in (("base", base), ("a", a), ("b", b)):
        save(tensors, folder / f"{name}.safetensors")
    return folder


def command(models: Path, method: list[str], out: Path) -> list[object]:
    return ["merge", models / "a.safetensors", models / "b.safetensors", "-b", models / "base.safetensors", "-m", *method, "-o", out]


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_small_tensors_that_share_tiles_give_the_same_merge(models: Path, tmp_path: Path, peru, method: list[str], monkeypatch) -> None:
    tiles = []
    apply = Merge.apply
    monkeypatch.setattr(Merge, "apply", lambda self, tile, room: (tiles.append(tile), apply(self, tile, room))[1])
    peru(*command(models, method, tmp_path / "together.safetensors"), "--no-sync")
    together = len(tiles)
    monkeypatch.setattr(bundle, "MOST", -1)
    peru(*command(models, method, tmp_path / "alone.safetensors"), "--no-sync")
    assert (tmp_path / "together.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert together < 20 or "mergekit" in method


def test_what_does_not_fit_is_named_as_if_each_had_its_own_tile(models: Path, tmp_path: Path) -> None:
    failed = run_peru(*command(models, ["task-arithmetic", "--scale", "1e30", "--dtype", "fp16"], tmp_path / "out.safetensors"))
    assert failed.returncode == 1
    assert "the merged 'embed.weight' does not fit F16" in failed.stderr or "'experts." in failed.stderr
    assert "and" not in failed.stderr.split("'")[1]
