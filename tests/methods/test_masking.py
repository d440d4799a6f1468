"""Masks as pure functions, against errors computed entry by entry in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peru_cli.methods.compact.masking import Overlap, add_up, best_scale, choose_threshold, entropy, missed, rescaler
from peru_cli.methods.compact.masks.emr import emr_mask, unify
from peru_cli.methods.compact.masks.magnitude import magnitude_mask
from peru_cli.methods.compact.masks.table import MASKS, build_masks
from peru_cli.methods.compact.masks.tall import GRID, tall_mask


def family(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Task vectors of three tasks, (3, n), and their sum, (n,)."""
    tasks = np.random.default_rng(seed).standard_t(4, (3, 400)) * np.array([[1.0], [0.5], [2.0]])
    return tasks, tasks.sum(axis=0)


def overlaps(own: np.ndarray, total: np.ndarray) -> list[tuple[np.ndarray, Overlap]]:
    """The masked sum for each threshold of the grid, and its overlap with a task vector."""
    found = []
    for threshold in GRID:
        masked = tall_mask(np.abs(own), np.abs(total - own), threshold) * total
        found.append((masked, Overlap(float(masked @ masked), float(masked @ own), float(np.count_nonzero(masked)))))
    return found


@pytest.mark.parametrize("scale", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(3))
def test_missed_is_the_squared_distance_and_the_nearest_mask_is_chosen(scale: float, seed: int) -> None:
    tasks, total = family(seed)
    for own in tasks:
        found = overlaps(own, total)
        errors = [float(np.square(scale * masked - own).sum()) for masked, _ in found]
        assert [missed(float(own @ own), overlap, scale) for _, overlap in found] == pytest.approx(errors, rel=1e-9)
        assert choose_threshold(float(own @ own), [overlap for _, overlap in found], scale) == int(np.argmin(errors))


def test_the_best_scale_is_that_of_least_squares() -> None:
    tasks, total = family(5)
    found = [overlaps(own, total)[2] for own in tasks]
    masked, wanted = np.concatenate([one for one, _ in found]), tasks.reshape(-1)
    assert best_scale([overlap for _, overlap in found]) == pytest.approx(float(np.linalg.lstsq(masked[:, None], wanted)[0][0]), rel=1e-9)
    assert best_scale([Overlap(0.0, 0.0, 0.0)] * 2) == 0.0


def test_equals_and_zeros_are_outside_of_masks() -> None:
    own, rest = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 5.0, 5.0, 5.0])
    assert tall_mask(own, rest, 0.4).tolist() == [False, False, False, True]
    assert magnitude_mask(own, 2.0, equals=False).tolist() == [False, False, False, True]
    assert magnitude_mask(own, 2.0, equals=True).tolist() == [False, False, True, True]
    assert magnitude_mask(own, 0.0, equals=True).tolist() == [False, True, True, True]


def test_entropy_is_that_of_one_entry() -> None:
    assert entropy(250, 1000) == pytest.approx(-0.25 * math.log2(0.25) - 0.75 * math.log2(0.75), rel=1e-12)
    assert entropy(1, 2) == 1.0 and entropy(0, 7) == entropy(7, 7) == 0.0


def test_the_sum_is_taken_in_order_and_leaves_its_rows_alone() -> None:
    rows = np.array([[1.0, 1e16], [2.0, 1.0], [4.0, -1e16]])
    before = rows.copy()
    assert add_up(rows).tolist() == [7.0, 0.0]  # 1e16 + 1 is 1e16
    assert np.array_equal(rows, before)


def test_emr_on_entries_that_can_be_checked_by_hand() -> None:
    rows = np.array([[3.0, -1.0, 2.0, 0.0, 1.0, 0.25], [1.0, -4.0, -5.0, 0.0, -1.0, 0.25], [-2.0, 2.0, 4.0, 0.0, 0.0, 0.0]])
    assert rows.sum(axis=0).tolist() == [2.0, -3.0, 1.0, 0.0, 0.0, 0.5]  # a sum of 0 elects -
    unified = unify(rows)
    assert unified.tolist() == [3.0, -4.0, 4.0, 0.0, -1.0, 0.25]
    masks = [emr_mask(row, unified).tolist() for row in rows]
    assert masks == [
        [True, True, True, False, False, True],
        [True, True, False, False, True, True],
        [False, False, True, False, False, False],
    ]


def test_emr_masks_need_the_same_sign_on_both_sides() -> None:
    vector, unified = np.array([1.0, -1.0, 0.5, -0.5, 0.5, -0.5]), np.array([0.0, 0.0, 0.5, -0.5, -0.5, 0.5])
    assert emr_mask(vector, unified).tolist() == [False, False, True, True, False, False]


def test_emr_rescales_to_the_tasks_own_sum_with_nine_digits() -> None:
    assert rescaler(7.25, 11.25) == 0.644444444 and rescaler(5.0, 2.0) == 2.5 and rescaler(5.0, 0.0) == 1.0


def test_thresholds_are_those_that_the_authors_try() -> None:
    assert GRID == (0.2, 0.3, 0.4, 0.5, 0.6)


@pytest.mark.parametrize("name", MASKS)
def test_every_method_of_the_table_masks_nothing_that_a_task_leaves_alone_in_any_unit(name: str) -> None:
    method = build_masks(name)
    tasks, _ = family(5)
    tasks[:, ::7] = 0
    for factor in (1.0, 2.0**-9):
        shared = method.shared(tasks * factor) if method.compares else None
        level = 0.1 * factor if method.ranked else method.thresholds(None)[0]
        for own in tasks * factor:
            mask = method.mask(method.parts(own, shared), level, True)
            assert not mask[own == 0].any() and 0 < mask.sum() < len(mask)
            assert np.array_equal(mask, method.mask(method.parts(own, shared), level, True))
