"""The exact k-th largest key for any window, tiles and ties; and arithmetic on single bits."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.kernels.deltas import CHUNK
from peru_cli.methods.compact.delta import (
    INFINITE_KEY,
    NOT_ROUNDED,
    add_rounded,
    add_ulps,
    cast_bits,
    order,
    round_difference,
)
from peru_cli.methods.compact.magnitude import (
    ALL_CHANGED,
    MAX_BINS,
    Counted,
    Tally,
    Threshold,
    Window,
    decide,
    exact_threshold,
    predict_window,
    take_equals,
)
from peru_cli.streaming.arrays import CPU, Arrays
from peru_cli.streaming.gpu import Gpu

SPACES: list[Arrays] = [CPU, Gpu(torch.device("cpu"))]  # the code that runs on CUDA, on a CPU
INT = {16: np.int16, 32: np.int32, 64: np.int64}
BITS = {16: torch.int16, 32: torch.int32, 64: torch.int64}
FLOAT = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
MANTISSA = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52}
MOST_COUNTS = 5  # a window of 2^20 bins narrows by 20 bits: a miss below or above, then 63 bits in four counts


# -- thresholds ---------------------------------------------------------------------------------------


@st.composite
def keys_of(draw: st.DrawFn) -> np.ndarray:
    """Keys as in prune: -1 for unchanged entries, many equals, some infinite."""
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    top = INFINITE_KEY[kind == torch.int64]
    near = draw(st.integers(0, top - 100))
    palette = draw(st.lists(st.integers(-1, top) | st.integers(near, near + 99) | st.sampled_from([-1, 0, top]), min_size=1, max_size=30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return np.array(palette, dtype=np.int32 if kind == torch.int32 else np.int64)[rng.integers(0, len(palette), draw(st.integers(1, 400)))]


def top_of(keys: np.ndarray) -> int:
    return INFINITE_KEY[keys.dtype == np.int64]


def kept_by(threshold: Threshold, keys: np.ndarray) -> list[int]:
    if threshold.keeps_all:
        return np.flatnonzero(keys >= 0).tolist()
    candidates = np.flatnonzero(keys >= threshold.key)
    assert threshold.equals is not None
    return candidates[take_equals(keys[candidates] == threshold.key, threshold.equals)].tolist()


def sorted_reference(keys: np.ndarray, k: int) -> list[int]:
    """The k largest changed entries, ties by position."""
    ranked = sorted((i for i in range(len(keys)) if keys[i] >= 0), key=lambda i: (-int(keys[i]), i))
    return sorted(ranked[:k])


def tallied(window: Window, keys: np.ndarray, parts: Iterator[int]) -> Tally:
    """Counts of unequal parts, from several threads at once."""
    total = Tally(window)

    def add(start: int, stop: int) -> None:
        part = keys[start:stop]
        within = part[(part >= window.low) & (part <= window.high)]
        total.add(Counted(int(np.count_nonzero(part > window.high)), int(np.count_nonzero(part >= 0)), within))

    edges = sorted({0, len(keys), *parts})
    threads = [threading.Thread(target=add, args=ends) for ends in pairwise(edges)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return total


def search(window: Window, keys: np.ndarray, k: int, edges: list[int]) -> tuple[Threshold, int]:
    for count in range(1, MOST_COUNTS + 2):
        decision = decide(tallied(window, keys, iter(edges)), k, top_of(keys))
        if isinstance(decision, Threshold):
            return decision, count
        assert 0 <= decision.low <= top_of(keys) and 1 <= decision.bins <= MAX_BINS
        window = decision
    raise AssertionError("no end")


def cut(keys: np.ndarray, shares: list[float]) -> list[int]:
    return [int(share * len(keys)) for share in shares]


@settings(max_examples=150, deadline=None)
@given(keys_of(), st.floats(0, 1), st.data(), st.lists(st.floats(0, 1), max_size=5))
def test_any_window_ends_at_the_threshold_of_a_sort(keys: np.ndarray, share: float, data: st.DataObject, shares: list[float]) -> None:
    """Right and wrong windows, of one bin or many, fine or coarse."""
    k = max(1, int(share * len(keys)))
    top = top_of(keys)
    low = data.draw(st.integers(0, top) | st.sampled_from([0, top]) | st.sampled_from([max(int(key), 0) for key in keys]))
    window = data.draw(
        st.builds(Window, st.just(low), st.integers(0, 40), st.sampled_from([1, 2, 7, 1000]))
        | st.integers(low, top).map(lambda high: Window.over(low, high))
    )
    threshold, counts = search(window, keys, k, cut(keys, shares))
    assert kept_by(threshold, keys) == sorted_reference(keys, k)
    assert counts <= MOST_COUNTS
    assert exact_threshold(keys, int(np.count_nonzero(keys >= 0)), k) == threshold


@settings(max_examples=60, deadline=None)
@given(keys_of(), st.floats(0, 1), st.floats(0.01, 1), st.integers(0, 2**32))
def test_predicted_windows_end_at_the_threshold_of_a_sort(keys: np.ndarray, share: float, sampled: float, seed: int) -> None:
    """For any sample: all keys, a few, or one that is nothing like the whole."""
    k = max(1, int(share * len(keys)))
    rng = np.random.default_rng(seed)
    fair = rng.choice(keys, max(1, int(sampled * len(keys))), replace=False)
    for sample in (fair, keys, np.sort(keys)[: len(fair)], np.full(3, -1, dtype=keys.dtype)):
        window = predict_window(sample, np.full(len(sample), len(keys) / len(sample)), k, top_of(keys))
        assert 0 <= window.low <= top_of(keys) and window.bins <= MAX_BINS
        threshold, _ = search(window, keys, k, [len(keys) // 2])
        assert kept_by(threshold, keys) == sorted_reference(keys, k)


def test_a_fair_sample_of_a_million_keys_needs_one_count() -> None:
    noise = torch.Generator().manual_seed(0)
    keys = torch.randn(1_000_000, generator=noise).abs().view(torch.int32).numpy()
    for k in (10_000, 100_000, 500_000):
        window = predict_window(keys[::17], np.full(len(keys[::17]), 17.0), k, top_of(keys))
        threshold, counts = search(window, keys, k, [300_001])
        ascending = np.sort(keys)
        assert counts == 1 and threshold.key == ascending[-k]
        assert threshold.equals == k - int(np.count_nonzero(keys > ascending[-k]))


@given(st.integers(0, 2**62), st.integers(0, 2**62))
def test_a_window_holds_both_ends_in_few_bins(low: int, size: int) -> None:
    window = Window.over(low, low + size)
    assert window.low == low and window.bins <= MAX_BINS
    assert (window.bins - 1) << window.shift <= size < window.bins << window.shift
    assert window.shift == 0 or window.bins > MAX_BINS // 2


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60))
def test_take_equals_keeps_the_first_ones(equal: list[bool], quota: int) -> None:
    left, want = quota, []
    for i, is_equal in enumerate(equal):
        if not is_equal or left > 0:
            want.append(i)
        left -= is_equal
    assert take_equals(np.array(equal, dtype=bool), quota).tolist() == want


def test_all_changed_keeps_no_more_than_what_changed() -> None:
    keys = np.array([-1, 3, -1, 0], dtype=np.int32)
    assert exact_threshold(keys, 2, 2) == exact_threshold(keys, 2, 4) == ALL_CHANGED
    assert exact_threshold(keys, 2, 1) == Threshold(3, 1)


# -- single entries -----------------------------------------------------------------------------------


def patterns(name: str, seed: int = 0) -> torch.Tensor:
    """All patterns of a 16-bit type; for wider ones, every top half with low halves that are 0, full or random."""
    bits = BY_NAME[name].bits
    every = torch.arange(-(2**15), 2**15)
    if bits == 16:
        return every.to(torch.int16)
    low = np.random.default_rng(seed).integers(0, 2 ** (bits - 16), 2**16, dtype=np.int64)
    low[::5], low[1::5], low[2::5] = 0, 2 ** (bits - 16) - 1, 1 << (bits - 17)
    return ((every << (bits - 16)) | torch.from_numpy(low)).to(BITS[bits])


def number(pattern: int, name: str) -> float:
    """The float64 value of a pattern, by the definition of the type (not NaN)."""
    bits, mantissa = BY_NAME[name].bits, MANTISSA[name]
    sign = -1.0 if pattern < 0 else 1.0
    magnitude = pattern & ((1 << (bits - 1)) - 1)
    exponent, fraction = magnitude >> mantissa, magnitude & ((1 << mantissa) - 1)
    bias = (1 << (bits - 2 - mantissa)) - 1
    if exponent == 2 * bias + 1:
        return sign * float("inf")
    scale = max(exponent, 1) - bias - mantissa
    return sign * float(np.ldexp(float(fraction + ((1 << mantissa) if exponent else 0)), scale))


@pytest.mark.parametrize("xp", SPACES, ids=["numpy", "torch"])
@pytest.mark.parametrize("target", FLOAT)
@pytest.mark.parametrize("source", FLOAT)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast")
def test_cast_bits_is_torchs_cast_but_for_nan(source: str, target: str, xp: Arrays) -> None:
    bits = patterns(source)
    before = bits.clone()
    got = torch.from_numpy(xp.download(cast_bits(xp, xp.upload(bits.numpy()), BY_NAME[source], BY_NAME[target])))
    assert torch.equal(bits, before)
    if source == target:
        assert torch.equal(got, bits)
        return
    floats = bits.view(FLOAT[source])
    nan = torch.isnan(floats)
    if source == "F64" and BY_NAME[target].bits == 16:
        floats = floats.to(torch.float32)
    want = floats.to(FLOAT[target]).view(BITS[BY_NAME[target].bits])
    assert torch.equal(got[~nan], want[~nan])
    assert nan.any()
    have, wanted = MANTISSA[source], MANTISSA[target]
    width = BY_NAME[target].bits
    for pattern, result in zip(bits[nan].tolist()[::37], got[nan].tolist()[::37], strict=True):
        payload = pattern & ((1 << have) - 1)
        payload = payload << (wanted - have) if wanted > have else payload >> (have - wanted)
        exponent = ((1 << (width - 1 - wanted)) - 1) << wanted
        quiet = exponent | payload | 1 << (wanted - 1)
        assert result & ((1 << (width - 1)) - 1) == quiet and (result < 0) == (pattern < 0)


@pytest.mark.parametrize("xp", SPACES, ids=["numpy", "torch"])
@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_widening_means_what_the_types_define(kind: str, xp: Arrays) -> None:
    for name in FLOAT if kind == "f8" else ("F16", "BF16", "F32"):
        bits = patterns(name)
        floats = xp.download(xp.widen(xp.upload(bits.numpy()), BY_NAME[name], xp.empty(len(bits), kind)))
        assert floats.dtype == kind
        finite = ~np.isnan(floats)
        expected = bits.view(FLOAT[name]).to(torch.float32 if kind == "f4" else torch.float64).numpy()
        assert np.array_equal(floats[finite].view(f"i{kind[1]}"), expected[finite].view(f"i{kind[1]}"))  # -0.0 differs from 0.0
        for pattern, value in zip(bits.tolist()[::61], floats.tolist()[::61], strict=True):
            assert np.isnan(value) or value == number(pattern, name)


@given(st.integers(0, 2**32), st.floats(0, 1), st.integers(0, 5000))
def test_positions_of_true_entries(seed: int, density: float, n: int) -> None:
    flags = np.random.default_rng(seed).random(n) < density
    for xp in SPACES:
        assert xp.download(xp.where(xp.upload(flags))).tolist() == [i for i in range(n) if flags[i]]


@pytest.mark.parametrize("name", FLOAT)
def test_order_ascends_with_the_numbers_and_is_its_own_inverse(name: str) -> None:
    bits = patterns(name).numpy()
    assert np.array_equal(order(order(bits)), bits)
    floats = torch.from_numpy(bits).view(FLOAT[name]).double().numpy()
    by_order = floats[np.argsort(order(bits), kind="stable")]
    finite = by_order[~np.isnan(by_order)]
    assert np.all(finite[1:] >= finite[:-1])
    negative_nans = np.isnan(floats) & (bits < 0)
    assert order(bits)[negative_nans].max() < order(bits)[~np.isnan(floats)].min()
    zero = BY_NAME[name].bits
    assert order(np.array([-(1 << (zero - 1)), 0], dtype=INT[zero])).tolist() == [-1, 0]  # -0.0 is one below 0.0
    if zero == 16:
        assert sorted(order(bits).tolist()) == list(range(-(2**15), 2**15))


@pytest.mark.parametrize("name", FLOAT)
def test_ulp_differences_undo_themselves_for_every_pattern(name: str) -> None:
    bits = patterns(name).numpy()
    rng = np.random.default_rng(3)
    for fine in (bits, bits[::-1].copy(), rng.permutation(bits), np.full_like(bits, -1), np.full_like(bits, np.iinfo(bits.dtype).min)):
        ulps = order(fine) - order(bits)
        assert ulps.dtype == bits.dtype and np.array_equal(add_ulps(bits, ulps), fine)
        width = BY_NAME[name].bits
        i = rng.integers(0, len(bits), 50)
        exact = [(int(order(fine[j : j + 1])[0]) - int(order(bits[j : j + 1])[0])) % 2**width for j in i]
        assert [int(u) % 2**width for u in ulps[i]] == exact


@pytest.mark.parametrize("xp", SPACES, ids=["numpy", "torch"])
@pytest.mark.parametrize("name,wide", [*((name, True) for name in FLOAT), ("F16", False), ("BF16", False), ("F32", False)])
def test_keys_are_the_pattern_of_the_difference(name: str, wide: bool, xp: Arrays) -> None:
    """In float64 by torch; counts and choices follow from the keys, for tiles of any length."""
    base = patterns(name, seed=1)
    fine = base[torch.randperm(len(base), generator=torch.Generator().manual_seed(2))]
    fine[::3] = base[::3]
    kind = np.float64 if wide else np.float32
    room = xp.differences(len(base) + 5, wide)
    numbers = [bits.view(FLOAT[name]).double().numpy().astype(kind) for bits in (fine, base)]
    ours = [xp.upload(bits.numpy()) for bits in (base, fine)]
    with np.errstate(invalid="ignore", over="ignore"):
        keys = room.keys(*ours, name).copy()
        difference = np.abs(numbers[0] - numbers[1])
    difference[~np.isfinite(difference)] = np.inf
    want = difference.view(np.int64 if wide else np.int32).astype(np.int64)
    changed = (base != fine).numpy()
    assert np.array_equal(keys[changed], want[changed]) and keys.max() == INFINITE_KEY[wide]
    assert np.all(keys[~changed] == -1)
    ulps = order(fine.numpy()) - order(base.numpy())
    middle = int(np.median(keys[changed]))
    for n in (len(keys), 1025, 1024, 7, 0):
        part, bits = keys[:n], [each[:n] for each in ours]
        for low, high in ((0, 2 * middle), (middle, middle), (middle, INFINITE_KEY[wide]), (1, 1 << 20)):
            above, differ, within = room.count(*bits, name, low, high)
            assert above == np.count_nonzero(part > high) and differ == np.count_nonzero(part >= 0)
            assert np.array_equal(within, part[(part >= low) & (part <= high)])
        for least in (0, middle, INFINITE_KEY[wide], INFINITE_KEY[wide] + 2):
            sums = np.zeros((-(-n // CHUNK), 2))
            found = room.select(*bits, name, least, sums)
            at = np.flatnonzero(part >= least)
            places, *found = found
            assert np.array_equal(places, at) and places.dtype in (np.int32, np.int64)
            for got, expected in zip(found, (part[at], ulps[at], fine.numpy()[at]), strict=True):
                assert np.array_equal(got, expected) and got.dtype == expected.dtype
            finite = (part >= 0) & (part < INFINITE_KEY[wide])
            with np.errstate(over="ignore", invalid="ignore"):
                squares = np.square(np.where(finite, difference[:n], 0).astype(np.float64))
                assert sums.sum(0) == pytest.approx([squares.sum(), squares[part < least].sum()], rel=1e-5)


def test_news_of_a_tally_are_what_was_added_since() -> None:
    """A search that continues from them counts the same."""
    window = Window(10, 1, 5)
    tally, again = Tally(window), Tally(window)
    for keys in ([10, 19, 12], [], [13, 13]):
        tally.add(Counted(2, 5, np.array(keys, np.int32)))
        again.restore(*tally.news())
        assert again.bins.tolist() == tally.bins.tolist() and (again.above, again.changed) == (tally.above, tally.changed)
    assert tally.bins.tolist() == [1, 3, 0, 0, 1]


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "F64"])
def test_rounded_differences_are_bf16_or_stored_apart(name: str) -> None:
    base = patterns(name, seed=4).numpy()
    noise, kind = np.random.default_rng(5), torch.float64 if name == "F64" else torch.float32
    near = torch.from_numpy(base).view(FLOAT[name]).to(kind) * torch.from_numpy(1 + noise.normal(size=len(base)) * 0.01).to(kind)
    near = near.to(FLOAT[name]).view(BITS[8 * base.itemsize]).numpy()
    for fine in (noise.permutation(base), near, base):
        codes, apart = round_difference(base, fine, BY_NAME[name])
        result, marked = add_rounded(base, codes, BY_NAME[name])
        assert codes.dtype == np.int16 and np.array_equal(apart, marked)
        a, b = (torch.from_numpy(x).view(FLOAT[name]).to(kind) for x in (base, fine))
        rounded = (b - a).float().bfloat16()
        back = (a + rounded.to(kind)).to(FLOAT[name])
        assert apart.tolist() == torch.nonzero(~torch.isfinite(back)).view(-1).tolist()
        stays = np.setdiff1d(np.arange(len(base)), apart)
        assert np.array_equal(result[stays], back.view(BITS[8 * base.itemsize]).numpy()[stays])
        assert np.array_equal(order(codes)[stays], rounded.view(torch.int16).numpy()[stays])
        assert set(codes[apart].tolist()) <= {NOT_ROUNDED}
        assert NOT_ROUNDED not in codes[stays]


@pytest.mark.parametrize("name", ["F16", "BF16", "F32", "F64"])
def test_octaves_keep_the_sign_and_miss_no_magnitude_by_more_than_three_eighths(name: str) -> None:
    noise, kind = np.random.default_rng(6), torch.float64 if name == "F64" else torch.float32
    wide = torch.from_numpy(noise.normal(size=(2, 50_000)) * [[1], [0.1]]).to(kind)
    a, b = wide[0].to(FLOAT[name]), (wide[0] + wide[1]).to(FLOAT[name])
    difference = (b.to(kind) - a.to(kind)).double()
    chosen = difference.abs() >= (least := 0.03125)
    base, fine = (x[chosen].view(BITS[8 * x.element_size()]).numpy() for x in (a, b))
    codes, apart = round_difference(base, fine, BY_NAME[name], least)
    back = torch.from_numpy(order(codes)).view(torch.bfloat16).double()
    assert not len(apart)
    ratio = (back / difference[chosen]).numpy()
    assert ratio.min() > 1.375 / 2 * (1 - 1e-6) and ratio.max() <= 1.375
    assert set(back.abs().tolist()) <= {1.375 * least * 2.0**k for k in range(8)}  # 1.375 / 32 is a bf16 number
    zero, _ = round_difference(base, base, BY_NAME[name], least)
    assert not zero.any()
