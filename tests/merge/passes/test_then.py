"""`--then`: passes over merged tensors, after methods on entries and on matrices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.merge.test_methods import Merged

SHAPES = {"a.weight": (17, 23), "conv.weight": (6, 3, 2, 2), "tall.weight": (40, 9), "bias": (41,), "embeddings.word.weight": (50, 8)}


def family(count: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Fine-tunes whose task vectors have half in common."""
    noise = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=noise) for name, shape in SHAPES.items()}
    common = {name: 0.1 * torch.randn(shape, generator=noise) for name, shape in SHAPES.items()}
    return base, [{n: t + common[n] + 0.1 * torch.randn(t.shape, generator=noise) for n, t in base.items()} for _ in range(count)]


def case_in(folder: Path, peru, base: dict[str, torch.Tensor], fine: list[dict[str, torch.Tensor]]) -> Merged:
    folder.mkdir()
    return Merged(folder, peru, base, fine)


def calibrated(merged: np.ndarray, vectors: list[np.ndarray]) -> np.ndarray:
    """SVC as the authors' program has it (merge_func.py), in float64 with an SVD."""
    u, s, vt = np.linalg.svd(merged, full_matrices=False)
    shares = []
    for vector in vectors:
        response = u.T @ vector
        shares.append(((u.T @ merged) * response).sum(1) / np.maximum((response**2).sum(1), 1e-12))
    return (u * (s / np.maximum(shares, 1 / len(vectors)).mean(0))) @ vt


METHODS = [("task-arithmetic", "--scale", "0.6"), ("ties", "--keep", "30%"), ("dare", "--keep", "40%"), ("tsv-m",), ("linear",), ("star",)]


@pytest.mark.parametrize("words", METHODS, ids=lambda words: words[0])
def test_svc_equals_its_formula_after_any_method(words: tuple[str, ...], tmp_path: Path, peru) -> None:
    base, fine = family(3)
    case = Merged(tmp_path, peru, base, fine)
    plain, got = case.run("-m", *words), case.run("-m", *words, "--then", "svc")
    for name, shape in SHAPES.items():
        if len(shape) == 1 or name.startswith("embed"):
            assert torch.equal(got[name], plain[name])
            continue
        tau = [(t[name] - base[name]).double().numpy().reshape(shape[0], -1) for t in fine]
        expected = calibrated((plain[name] - base[name]).double().numpy().reshape(shape[0], -1), tau)
        assert not np.allclose(expected, (plain[name] - base[name]).numpy().reshape(shape[0], -1), rtol=0.05)
        # The merged vector was rounded to float32 once more here than inside: 2^-24 of a weight, over a direction's response.
        np.testing.assert_allclose((got[name] - base[name]).numpy().reshape(shape[0], -1), expected, rtol=1e-4, atol=3e-6, err_msg=name)


def test_what_two_tasks_share_counts_once_and_what_one_has_alone_grows(tmp_path: Path, peru) -> None:
    """s = 2 along what both have, and 1 and 0 along what one has: mean(max(1/2, s)) is 2 and 3/4."""
    base = {"w": torch.zeros(4, 4)}
    both, first, second = (torch.outer(torch.eye(4)[i], torch.eye(4)[i]) for i in range(3))
    case = Merged(tmp_path, peru, base, [{"w": both + 0.5 * first}, {"w": both + 0.25 * second}])
    got = case.run("-m", "task-arithmetic", "--scale", "1", "--then", "svc")["w"]
    torch.testing.assert_close(got, both + 0.5 / 0.75 * first + 0.25 / 0.75 * second, rtol=1e-6, atol=1e-7)


def test_tasks_of_weight_0_do_not_count(tmp_path: Path, peru) -> None:
    base, fine = family(3)
    three, two = case_in(tmp_path / "three", peru, base, fine), case_in(tmp_path / "two", peru, base, fine[:2])
    got = three.run("-m", "task-arithmetic", "--then", "svc", "-w", "t2=0")
    for name, tensor in two.run("-m", "task-arithmetic", "--then", "svc").items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7)


PARTS = {"w": (9, 7), "b": (11,)}
LAYERS = {"embed.weight": (40, 6), **{f"enc.layer.{i}.{part}": shape for i in range(3) for part, shape in PARTS.items()}, "head.0.w": (5,)}
BEFORE = [("task-arithmetic", "--scale", "0.4"), ("ties",), ("iso-c", "--scale", "2"), ("dare",)]


@pytest.mark.parametrize("words", BEFORE, ids=lambda words: words[0])
def test_lines_equals_its_formula_after_any_method(words: tuple[str, ...], tmp_path: Path, peru) -> None:
    """(alpha + beta l / (L - 1)) tau in float64, of the merge as it is at scale beta; vectors and the embedding, too."""
    noise = torch.Generator().manual_seed(3)
    base = {name: torch.randn(shape, generator=noise) for name, shape in LAYERS.items()}
    fine = [{n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in base.items()} for _ in range(4)]
    case = Merged(tmp_path, peru, base, fine)
    plain, got = case.run("-m", *words), case.run("-m", *words, "--then", "lines")
    merged = {name: (plain[name].double() - base[name].double()).numpy() for name in base}
    mean = sum(np.abs(sum((t[name].double() - base[name].double()).numpy() for t in fine)).sum() for name in base) / 4
    alpha = mean / sum(np.abs(tensor).sum() for tensor in merged.values())
    for name, tensor in merged.items():
        depth = {"0": 0.0, "1": 0.5, "2": 1.0}[name.split(".")[2]] if "layer" in name else float("head" in name)
        np.testing.assert_allclose((got[name] - base[name]).numpy(), (alpha + depth) * tensor, rtol=1e-4, atol=1e-6, err_msg=name)


def test_lines_with_a_scale_of_0_is_refused_by_nobody_and_changes_nothing(tmp_path: Path, peru) -> None:
    base, fine = family(2)
    got = Merged(tmp_path, peru, base, fine).run("-m", "task-arithmetic", "--scale", "0", "--then", "lines")
    assert all(torch.equal(got[name], base[name]) for name in base)


@pytest.mark.parametrize(("method", "then"), [("ties", "svc"), ("sce", "svc"), ("star", "svc"), ("ties", "lines"), ("star", "lines")])
def test_threads_and_tiles_change_nothing(method: str, then: str, tmp_path: Path, peru) -> None:
    case = Merged(tmp_path, peru, *family(3))
    first = case.run("-m", method, "--then", then, "--threads", "1")
    again = case.run("-m", method, "--then", then, "--threads", "3", "--tile-entries", "16384")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_masks_of_infinities_stay_and_a_nan_is_refused_by_name(tmp_path: Path, peru) -> None:
    base, fine = family(2)
    mask = torch.full((5, 5), float("-inf")).triu(1)
    for tensors in (base, *fine):
        tensors["mask"] = mask.clone()
    got = case_in(tmp_path / "masked", peru, base, fine).run("-m", "task-arithmetic", "--then", "svc")
    assert torch.equal(got["mask"], mask)
    fine[1]["a.weight"][3, 4] = float("nan")
    broken = case_in(tmp_path / "broken", peru, base, fine)
    out = tmp_path / "broken" / "out"
    peru("merge", *broken.models, "-b", tmp_path / "broken" / "base.safetensors", "-o", out, "-m", "dare", "--then", "svc", code=1)
    assert "t1" in peru.stderr and "'a.weight' is NaN or infinite" in peru.stderr and not out.exists()


def test_the_pass_is_recorded_and_what_it_cannot_follow_is_refused(tmp_path: Path, peru) -> None:
    case = Merged(tmp_path, peru, *family(2))
    arguments = ["merge", *case.models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "folder", "-m", "ties"]
    peru(*arguments, "--then", "svc", "--no-sync")
    assert "--then svc" in (tmp_path / "folder" / "README.md").read_text()
    with safe_open(tmp_path / "folder" / "model.safetensors", "np") as file:
        assert json.loads(file.metadata()["peru.merge.options"])["then"] == "svc"
    for words, said in (
        (["--then", "svc", "-m", "iso-c"], "all singular values are equal"),
        (["--then", "scv"], "did you mean svc?"),
        (["--then", "svc", "--search", "scale=0:1:0.5"], "exclude each other"),
        (["--then", "svc", "--write-recipe", tmp_path / "r.yml"], "mergekit has no such pass"),
    ):
        peru(*arguments, *words, "--force", code=2)
        assert said in peru.stderr
    peru("merge", *case.models, "-o", tmp_path / "x", "-m", "linear", "--then", "svc", code=2)
    assert "needs a base" in peru.stderr
