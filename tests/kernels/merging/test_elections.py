"""TIES' election from bits, against its formulas in NumPy, step by step in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peru_cli.kernels.merging import elections

N = 2051  # two blocks and a remainder
TORCH = {"BF16": (torch.bfloat16, torch.int16), "F16": (torch.float16, torch.int16), "F32": (torch.float32, torch.int32)}


def bits(numbers: torch.Tensor, dtype: str) -> np.ndarray:
    """Numbers as bits of a dtype."""
    kind, integers = TORCH[dtype]
    return numbers.to(kind).view(integers).numpy()


def floats(patterns: np.ndarray, dtype: str) -> np.ndarray:
    """Bits as float32."""
    return torch.from_numpy(patterns).view(TORCH[dtype][0]).float().numpy()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(("mean", "strict"), [(True, False), (False, True)])
def test_elections_equal_their_formulas(dtype: str, mean: bool, strict: bool) -> None:
    noise = torch.Generator().manual_seed(1)
    base = bits(torch.randn(N, generator=noise), dtype)
    fines = [bits(torch.from_numpy(floats(base, dtype)) + 0.05 * torch.randn(N, generator=noise), dtype) for _ in range(3)]
    taus = [floats(fine, dtype) - floats(base, dtype) for fine in fines]
    keys = [np.abs(tau).view(np.int32) for tau in taus]
    least, most = (int(np.float32(edge).view(np.int32)) for edge in (0.02, 0.08))
    flags = np.random.default_rng(0).random(N) < 0.5
    kept = [(least, elections.MOST, None), (0, most, None), (0, elections.MOST, flags)]
    stays = [keys[0] >= least, keys[1] <= most, flags]
    before, after, shares = [(1.0, 0.5), (-0.4, 2.0), (1.3, 1.0)], [1.0, 0.7, 1.0], [0.5, -0.4, 1.3]
    votes = [tau * stay * np.float32(a) * np.float32(b) for tau, stay, (a, b) in zip(taus, stays, before, strict=True)]
    total = votes[0] + votes[1] + votes[2]
    sign = np.where(total > 0 if strict else total >= 0, np.float32(1), np.float32(-1))
    parts = [np.maximum(vote * sign, np.float32(0)) for vote in votes]
    want = parts[0] * np.float32(after[0]) + parts[1] * np.float32(after[1]) + parts[2] * np.float32(after[2])
    if mean:
        divisor = sum((part > 0) * np.float32(share) for part, share in zip(parts, shares, strict=True))
        want = want / np.where(np.abs(divisor) < 1e-8, np.float32(1), divisor)
    want = want * sign * np.float32(0.7) + floats(base, dtype)
    found, finite = elections.merged(fines, dtype, base, kept, before, after, shares if mean else None, strict, 0.7)
    assert finite and np.array_equal(found, bits(torch.from_numpy(want), dtype))
    assert elections.elected(fines, dtype, base, kept, before) == np.count_nonzero(total > 0) - np.count_nonzero(total < 0)
    inside, count = elections.within(fines[0], dtype, base, least, most)
    assert np.array_equal(inside, (keys[0] >= least) & (keys[0] <= most)) and count == np.count_nonzero(inside)
