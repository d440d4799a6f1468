"""Loops of merges against NumPy, operation by operation: the same bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peru_cli.kernels.merging.verbs import (
    accumulate,
    by_rank,
    disjoint,
    elected,
    largest_magnitude,
    narrowed,
    onto_base,
    trim,
)

N = 2051  # two blocks and a remainder
BEFORE = [(1.0, 0.5), (2.0, 1.0), (1.0, -0.3)]
DTYPE = {"f4": "F32", "f8": "F64"}


def task_vectors(kind: str) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    noise = np.random.default_rng(0)
    values = [noise.standard_normal(N).astype(kind) * (noise.random(N) < 0.7) for _ in range(3)]
    return values, [noise.random(N) < 0.5, None, noise.random(N) < 0.5]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Bit for bit: -0.0 differs from 0.0."""
    return np.array_equal(a.view(f"i{a.itemsize}"), b.view(f"i{b.itemsize}"))


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_election_and_disjoint_merge(kind: str) -> None:
    values, flags = task_vectors(kind)
    number = np.dtype(kind).type
    votes = [
        value * (1 if flag is None else flag.astype(kind)) * number(first) * number(second)
        for value, flag, (first, second) in zip(values, flags, BEFORE, strict=True)
    ]
    total = votes[0] + votes[1] + votes[2]
    assert elected(values, flags, BEFORE) == np.count_nonzero(total > 0) - np.count_nonzero(total < 0)
    for shares in (None, [1.0, 1.0, 1.0], [0.5, 1.0, -0.3]):
        for strict in (False, True):
            signs = np.where(total > 0 if strict else total >= 0, number(1), number(-1))
            agree = [np.where(vote * signs > 0, vote * signs, number(0)) for vote in votes]
            want = agree[0] * number(1) + agree[1] * number(0.7) + agree[2] * number(1)
            if shares is not None:
                divisor = np.zeros(N, kind)
                for part, share in zip(agree, shares, strict=True):
                    divisor += (part > 0).astype(kind) * number(share)
                divisor[np.abs(divisor) < 1e-8] = 1
                want = want / divisor
            got = disjoint(values, flags, BEFORE, [1.0, 0.7, 1.0], shares, strict, np.empty(N, kind))
            assert same(got, want * signs)


@pytest.mark.parametrize("kind", ["f4", "f8"])
def test_trims_sums_and_the_base(kind: str) -> None:
    values, flags = task_vectors(kind)
    number = np.dtype(kind).type
    keys = np.abs(values[0]).view(f"i{kind[1]}")
    for threshold in (int(np.median(keys)), int(keys[np.argmax(keys > 0)]), 0):
        above, at_least, equals = trim(values[0], threshold)
        assert np.array_equal(above, keys > threshold) and np.array_equal(at_least, keys >= threshold)
        assert equals == np.count_nonzero(keys == threshold)
    total = np.empty(N, kind)
    accumulate(total, values[0], DTYPE[kind], values[1], flags[0], (1.0, 0.3), True)
    want = (values[0] - values[1]) * flags[0].astype(kind) * number(0.3)
    assert same(total, want)
    accumulate(total, values[1], DTYPE[kind], None, None, (0.1, 2.0), False)
    want = want + values[1] * number(0.1) * number(2)
    assert same(total, want)
    assert same(onto_base(total, values[2], 0.7), want * number(0.7) + values[2])


def test_rounding_to_16_bits_is_torchs() -> None:
    """Halves of a unit, subnormal numbers and overflow included."""
    tops = np.arange(1 << 16, dtype=np.uint32) << 16
    patterns = np.concatenate(
        [tops, tops | 0x8000, tops | 0x7FFF, tops | 0x1000, np.arange(0x3300_0000, 0x3900_0000, 9973, dtype=np.uint32)]
    )
    numbers = patterns.astype(np.uint32).view(np.float32)
    plain = ~np.isnan(numbers)
    for dtype, target in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        want = torch.from_numpy(numbers).to(target).view(torch.int16).numpy()
        got = narrowed(numbers, dtype)
        assert np.array_equal(got[plain], want[plain])
        assert torch.isnan(torch.from_numpy(got).view(target)[torch.from_numpy(~plain)]).all()


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "i8"])
def test_the_largest_pattern_is_found_without_signs(kind: str) -> None:
    info, rng = np.iinfo(kind), np.random.default_rng(0)
    assert largest_magnitude(np.zeros(0, kind)) == -1
    for n in (1, 7, 10_000):
        bits = rng.integers(info.min, info.max, n, kind, endpoint=True)
        bits[0] = info.min  # a negative zero
        assert largest_magnitude(bits) == int((bits & info.max).max())


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_ranks_in_rows_count_equals_in_order(kind: type) -> None:
    noise = np.random.default_rng(0)
    magnitudes = np.abs(noise.integers(-3, 4, (5, 64)) * noise.choice([1e-40, 1.0, 1e38], (5, 64))).astype(kind)
    table = noise.standard_normal(64)
    for row, got in zip(magnitudes, by_rank(magnitudes, table), strict=True):
        order = sorted(range(64), key=lambda i: (row[i], i))
        assert [got[i] for i in order] == table.tolist()
