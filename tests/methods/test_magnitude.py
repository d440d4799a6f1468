"""Where the search for a threshold looks next, against sorted keys. tests/vectors/test_threshold.py has the search itself."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peru_cli.methods.compact.magnitude import MAX_BINS, Counted, Tally, Window, key_value, predict_window

LARGEST = 0x7F800000  # the key of infinity


def predicted(n: int, k: int, step: int, share: float) -> tuple[int, int]:
    """Lowest and highest key of the window for the k-th largest of the keys 0, step, ..., if all are sampled.

    `share` is the part of the margin that is left: 5% of the rank plus four standard deviations of a fair sample's rank."""
    margin = share * (0.05 * k + 4 * math.sqrt(k) + 2)
    first, last = math.ceil(k - margin) - 1, math.ceil(k + margin) - 1  # indices into descending keys; ranks count from 1
    return (n - 1 - last) * step if last < n else 0, (n - 1 - first) * step if first > 0 else LARGEST


@pytest.mark.parametrize("k", [40, 1000, 9000, 9900])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_predicted_window_is_the_rank_with_its_margin(k: int, weighted: bool) -> None:
    keys, weights = np.arange(10_000, dtype=np.int32), np.ones(10_000)
    if weighted:  # every second key stands for itself, the others for two that are equal: the ranks are no longer those of the sample
        keys = np.repeat(np.arange(5_000, dtype=np.int32) * 2, 2)
        low, high = predicted(10_000, k, 1, 1.0)
        window = predict_window(keys, np.tile([0.5, 1.5], 5_000), k, LARGEST)
        assert abs(window.low - low) <= 2 and (abs(window.high - high) <= 2 or window.high >= high == LARGEST)
        return
    low, high = predicted(10_000, k, 1, 1.0)
    window = predict_window(np.random.default_rng(0).permutation(keys), weights, k, LARGEST)
    assert window.low == low
    assert window.high == high if high != LARGEST else window.high >= LARGEST


def test_the_margin_shrinks_until_each_bin_is_one_key() -> None:
    n, k, step = 2_000, 1_000, 20_000
    window = predict_window(np.arange(n, dtype=np.int64)[::-1] * step, np.ones(n), k, LARGEST)
    for shrunk in range(100):
        low, high = predicted(n, k, step, 0.7**shrunk)
        if (high - low) + 1 <= MAX_BINS:
            break
    assert shrunk > 1 and (window.low, window.high, window.shift) == (low, high, 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_missed_window_says_on_which_side_and_at_which_rank_the_key_is(seed: int) -> None:
    noise = np.random.default_rng(seed)
    keys = np.sort(noise.integers(0, 3_000, 500))[::-1]
    window = Window(1_000, 1, 400)  # keys 1000 to 1799
    tally = Tally(window)
    inside = (keys >= 1_000) & (keys < 1_800)
    tally.add(Counted(int((keys >= 1_800).sum()), len(keys), keys[inside].astype(np.int32)))
    seen = set()
    for k in range(1, 501):
        key, found = int(keys[k - 1]), tally.missed(k, LARGEST, len(keys))
        if 1_000 <= key < 1_800:
            assert found is None
            seen.add("inside")
            continue
        assert found is not None
        rank, low, high, number = found
        assert (low, high) == ((1_800, LARGEST) if key >= 1_800 else (0, 999))
        side = keys[(keys >= low) & (keys <= high)]
        assert number == len(side) and int(side[rank - 1]) == key
        seen.add("above" if key >= 1_800 else "below")
    assert seen == {"inside", "above", "below"}


@pytest.mark.parametrize("value", [0.0, 1.5, 6e-5, 1e-40])
def test_a_key_stands_for_its_magnitude(value: float) -> None:
    assert key_value(int(np.float32(value).view(np.int32)), wide=False) == float(np.float32(value))
    assert key_value(int(np.float64(value).view(np.int64)), wide=True) == value
