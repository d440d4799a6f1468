"""A base that looks wrong is reported before anything is written; the right one is not doubted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import save


def weights(seed: int, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """Twenty matrices and their norms, bf16."""
    noise = torch.Generator().manual_seed(seed)
    shapes = {f"layers.{i}.weight": (96, 130) for i in range(20)} | {f"layers.{i}.norm": (96,) for i in range(20)}
    return {name: (torch.randn(shape, generator=noise) * scale).bfloat16() for name, shape in shapes.items()}


def near(base: dict[str, torch.Tensor], seed: int = 9) -> dict[str, torch.Tensor]:
    """A fine-tune of it, 3% away."""
    return {name: (base[name].float() + 0.03 * change.float()).bfloat16() for name, change in weights(seed).items()}


def said(tmp_path: Path, peru, base: dict[str, torch.Tensor], fine: dict[str, torch.Tensor], *more: str) -> str:
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    command = (
        "prune",
        tmp_path / "fine.safetensors",
        "-b",
        tmp_path / "base.safetensors",
        "-o",
        tmp_path / "a.safetensors",
        "--keep",
        "5%",
    )
    peru(*command, "--no-sync", *more)
    return peru.stderr


def test_a_fine_tune_of_the_base_is_not_doubted(tmp_path: Path, peru) -> None:
    assert "warning" not in said(tmp_path, peru, weights(0), near(weights(0)))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_another_model_of_the_same_shapes_is(tmp_path: Path, peru, more: tuple[str, ...]) -> None:
    found = said(tmp_path, peru, weights(0), weights(1), *more)
    # independent weights of equal size: the difference has sqrt(2) times the norm
    assert "the task vector is as large as the weights (14" in found and "is this the base that the model was made from?" in found
    assert (tmp_path / "a.safetensors").exists() == (not more)


def test_equal_models_are_warned_about(tmp_path: Path, peru) -> None:
    assert "base and fine-tune are equal in all shared tensors" in said(tmp_path, peru, weights(0), weights(0))


def test_one_changed_entry_is_not_nothing(tmp_path: Path, peru) -> None:
    fine = weights(0)
    fine["layers.7.weight"][3, 3] += 1
    assert "warning" not in said(tmp_path, peru, weights(0), fine)


def test_swapped_models_cause_a_warning_if_a_head_shows_it(tmp_path: Path, peru) -> None:
    base = weights(0)
    found = said(tmp_path, peru, near(base) | {"classifier.weight": torch.zeros(3, 96).bfloat16()}, base)
    assert "the base has tensors that the fine-tune lacks (classifier.weight): are the two swapped?" in found
