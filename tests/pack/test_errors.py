"""A pack's reported errors and size, against what follows from the numbers of tasks and steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from peru_cli.artifacts.packs.pack import Pack
from tests.pack.test_superpose import Packs, Peru, family


@pytest.fixture
def packs(tmp_path: Path, peru: Peru) -> Callable[..., Packs]:
    return lambda tasks, **more: Packs(tmp_path, peru, *family(tasks, **more))


@pytest.mark.parametrize("tasks", [2, 8])
def test_error_follows_the_square_root_of_the_tasks(packs: Callable[..., Packs], tasks: int) -> None:
    names = "abcdefgh"[:tasks]
    made = packs(names, size=40)
    made.run(names, "--json", "--seed", 1)
    report = json.loads(made.text)
    for task in report["packed"]:
        assert task["error"] == pytest.approx(math.sqrt(tasks - 1), rel=0.02)  # 195,000 entries
        assert task["cosine"] == pytest.approx(1 / math.sqrt(tasks), rel=0.02)
        assert task["predicted_error"] == pytest.approx(task["error"], rel=0.01)
    assert report["best_scale"] == pytest.approx(1 / tasks, rel=0.02)
    fine_step = json.loads((made.run(names, "--json", "--seed", 1, "--precision", 12), made.text)[1])
    for coarse, fine in zip(report["packed"], fine_step["packed"], strict=True):
        assert coarse["error"] == pytest.approx(fine["error"], rel=1e-3)  # three digits
        assert fine["rounding"] < coarse["rounding"] / 100


@pytest.mark.parametrize("bits", [0, 3])
def test_the_error_of_rounding_alone_is_predicted(packs: Callable[..., Packs], bits: int) -> None:
    """A single task has no interference: its error is that of rounding to a step, step / sqrt(12)."""
    made = packs("a", size=40)
    pack = made.run("a", "--json", "--precision", bits)
    (task,) = json.loads(made.text)["packed"]
    steps = {record.info.name: 2.0**record.exponent for record in Pack(pack).index.tensors if record.is_sum}
    squared = sum(steps[name] ** 2 / 12 * made.base[name].numel() for name in steps)
    norm = math.sqrt(sum(float((made.fine["a"][name] - made.base[name]).double().square().sum()) for name in steps))
    assert task["predicted_error"] == pytest.approx(math.sqrt(squared) / norm, rel=1e-3)
    assert task["error"] == pytest.approx(task["predicted_error"], rel=0.03)


def test_the_size_grows_by_the_entropy_of_a_wider_sum_only(packs: Callable[..., Packs]) -> None:
    made = packs("abcdefgh", size=40)
    bits = {}
    for tasks in ("ab", "abcdefgh"):
        made.run(tasks, "--json", "--seed", 1)
        said = json.loads(made.text)
        bits[len(tasks)] = 8 * said["sums_bytes"] / said["entries"]
    assert bits[8] - bits[2] == pytest.approx(math.log2(math.sqrt(8 / 2)), abs=0.05)


def test_superposition_decorrelates_the_shared_part(packs: Callable[..., Packs]) -> None:
    """T = 8, a shared variance of 0.3: plain sums have error sqrt(7 + 7 * 6 * 0.3) = 4.43, superposed ones sqrt(7) = 2.65."""
    names = "abcdefgh"
    made = packs(names, shared=0.3, size=40)
    errors = {}
    for key, options in {"plain": ("--decorrelate", "none", "--no-signs"), "apart": ()}.items():
        made.run(names, "--json", "--target", ".", *options)
        found = json.loads(made.text)["packed"]
        errors[key] = sum(task["error"] for task in found) / 8
        # About 130 signs a task: cosines of the shared part are 0.3 / sqrt(130) = 0.026, for 28 pairs.
        assert sum(task["predicted_error"] for task in found) / 8 == pytest.approx(errors[key], rel=0.05)
    assert errors["plain"] == pytest.approx(math.sqrt(7 + 7 * 6 * 0.3), rel=0.02)
    assert errors["apart"] == pytest.approx(math.sqrt(7), rel=0.05)
