"""What is settled before a pack is written - steps, scale, predicted errors - against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peru_cli.artifacts.packs.superposed import PackedTensor, PackMode
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.resolve import open_model
from peru_cli.methods.compact.superpose import Arrangement, Group
from peru_cli.pack.measure import Measured, measure, predict_errors, predicted_scale, settle_steps
from peru_cli.pack.plan import PackOptions, plan_pack
from peru_cli.vectors.settings import streaming
from tests.conftest import save

NAMES = ["blocks.0.w", "blocks.1.w", "head.w"]


@pytest.mark.parametrize("options", [PackOptions(), PackOptions(decorrelate="none", signs=False), PackOptions(decorrelate="none")])
def test_products_count_as_apart_where_tensors_are_moved_or_flipped(tmp_path: Path, options: PackOptions) -> None:
    noise = torch.Generator().manual_seed(0)
    base = {name: torch.randn(12, 5, generator=noise) for name in NAMES}
    models = []
    for task in "ab":
        fine = {name: weight + torch.randn(12, 5, generator=noise) for name, weight in base.items()}
        models.append((task, fine))
    opened = [(task, open_model(str(save(fine, tmp_path / f"{task}.safetensors")))) for task, fine in models]
    plan = plan_pack(open_model(str(save(base, tmp_path / "base.safetensors"))), opened, options)
    with streaming("cpu", 1, None, lambda n: None) as how:
        measured = measure(plan, how)
    rows = {name: np.stack([(fine[name] - base[name]).double().flatten().numpy() for _, fine in models]) for name in NAMES}
    tables = {name: row @ row.T for name, row in rows.items()}
    moved = NAMES[:2] if options.signs else []  # head.w has no repeats
    assert [tensor.info.name for tensor in plan.sums if tensor.is_target] == NAMES[:2]
    assert measured.everything == pytest.approx(sum(tables.values()), rel=1e-6)
    assert measured.apart == pytest.approx(sum((tables[name] for name in moved), np.zeros((2, 2))), rel=1e-6)
    alone = measured.without(0)
    assert alone.everything.shape == (1, 1) and alone.everything[0, 0] == measured.everything[1, 1]
    assert alone.tables[NAMES[2]].tolist() == [[measured.tables[NAMES[2]][1, 1]]]


def stub(entries: dict[str, int], groups: list[Group] | None = None, old: Any = None) -> Any:
    """A plan of plain sums for two tasks."""
    tensors = [PackedTensor(TensorInfo(name, BY_NAME["F32"], (n,)), PackMode.SUM, BY_NAME["F32"]) for name, n in entries.items()]
    return SimpleNamespace(
        vectors=["a", "b"], sums=tensors, entries=sum(entries.values()), arrangement=Arrangement(groups or [], 0), old=old, metadata={}
    )


def energies(by_tensor: dict[str, tuple[float, float]]) -> Measured:
    """What was measured of two orthogonal tasks with these squared norms."""
    tables = {name: np.diag(np.array(pair)) for name, pair in by_tensor.items()}
    return Measured(sum(tables.values()), np.zeros((2, 2)), tables)


def test_a_step_lies_the_precision_below_the_root_mean_square_of_its_group() -> None:
    plan = stub({"a": 8, "b": 8, "c": 16, "unchanged": 32}, [Group("", ["a", "b"])])
    # Two tasks of two members of 8 entries: 2048 / 32 = 8^2. c: 2 / 32 = (1/4)^2. All of it: 2050 / (2 * 64) = 4.002^2.
    measured = energies({"a": (1000.0, 536.0), "b": (300.0, 212.0), "c": (1.5, 0.5), "unchanged": (0.0, 0.0)})
    assert settle_steps(plan, measured, 7) == 7
    assert {tensor.info.name: tensor.exponent for tensor in plan.sums} == {"a": 3 - 7, "b": 3 - 7, "c": -2 - 7, "unchanged": 2 - 7}
    assert settle_steps(plan, measured, None) == 4  # the default of several tasks
    assert plan.sums[0].exponent == 3 - 4


def rounded() -> Any:
    """A plan whose roundings add 12 * 4^-1 / 12 + 24 * 4^0 / 12 = 2.25 to a squared distance; z has no change to round."""
    plan = stub({"x": 12, "y": 24, "z": 60})
    for tensor, exponent in zip(plan.sums, (-1, 0, 3), strict=True):
        tensor.exponent = exponent
    return plan


APART, PLAIN = np.array([[2.0, 0.7], [0.7, 4.0]]), np.array([[3.0, 1.0], [1.0, 5.0]])
TABLES = {"x": APART, "y": PLAIN, "z": np.zeros((2, 2))}


def test_the_predicted_scale_is_that_of_least_squares_to_four_digits() -> None:
    # <S, a> = 2 + (3 + 1), <S, b> = 4 + (1 + 5), |S|^2 = (2 + 4) + (3 + 1 + 1 + 5) + 2 * 2.25: what tasks moved apart share is 0.
    assert predicted_scale(rounded(), Measured(APART + PLAIN, APART, TABLES)) == 0.3902  # 16 / (2 * 20.5)
    assert predicted_scale(rounded(), energies(dict.fromkeys("xyz", (0.0, 0.0)))) == 1.0  # nothing was changed


def test_errors_of_tasks_added_to_a_pack_count_the_tasks_in_it_as_independent() -> None:
    old = SimpleNamespace(index=SimpleNamespace(tasks=[SimpleNamespace(norm="3"), SimpleNamespace(norm="0.5")]))
    for others, plan in {0.0: rounded(), 9.25 + 2 * 2.25: SimpleNamespace(**{**vars(rounded()), "old": old})}.items():
        square = 20.5 + others
        found = predict_errors(plan, Measured(APART + PLAIN, APART, TABLES), 0.5)
        expected = [math.sqrt((square / 4 - product + own) / own) for own, product in ((5.0, 6.0), (9.0, 10.0))]
        assert [quality.error for quality in found] == pytest.approx(expected, rel=1e-12)
        assert [q.cosine for q in found] == pytest.approx([6 / math.sqrt(5 * square), 10 / math.sqrt(9 * square)], rel=1e-12)
