"""The loop that sums, adds the base and rounds, against torch's conversions and against the GPU's code on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.gpu import Gpu

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
N = 2051


def bits(numbers: torch.Tensor, dtype: str) -> np.ndarray:
    """Numbers as bits of a dtype."""
    wide = numbers.to(TORCH[dtype])
    return wide.view(torch.int32 if dtype == "F32" else torch.int16).numpy()


def floats(patterns: np.ndarray, dtype: str) -> torch.Tensor:
    """Bits as float32."""
    return torch.from_numpy(patterns).view(TORCH[dtype]).float()


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("on_base", [True, False])
def test_sums_are_rounded_as_torch_does(dtype: str, on_base: bool) -> None:
    noise = torch.Generator().manual_seed(0)
    inputs = [bits(torch.randn(N, generator=noise), dtype) for _ in range(3)]
    base = bits(torch.randn(N, generator=noise), dtype) if on_base else None
    flags = [None, np.random.default_rng(0).random(N) < 0.5, None]
    factors = [(0.5, 1.0), (2.0, -0.25), (1.0, 1.5)]
    total = torch.zeros(N)
    for number, (mine, kept, both) in enumerate(zip(inputs, flags, factors, strict=True)):
        part = floats(mine, dtype) - (floats(base, dtype) if base is not None else 0)
        part = part * (1 if kept is None else torch.from_numpy(kept)) * both[0] * both[1]
        total = part if not number else total + part
    total = total * 0.7
    want = total if base is None else total * 1.25 + floats(base, dtype)
    for xp in (CPU, Gpu(torch.device("cpu"))):
        given = [xp.upload(part) for part in inputs], BY_NAME[dtype], None if base is None else xp.upload(base)
        found, finite = xp.rounded_sum(*given, [None if f is None else xp.upload(f) for f in flags], factors, 0.7, 1.25 if on_base else 1.0)
        assert finite and np.array_equal(found, bits(want, dtype))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_what_does_not_fit_is_told(dtype: str) -> None:
    vector, base = torch.full((5,), 1.0), bits(torch.tensor([1.0, 2.0, -3.0, 4.0, 0.0]), dtype)
    for xp in (CPU, Gpu(torch.device("cpu"))):
        found, finite = xp.rounded_onto(xp.upload(vector.clone().numpy()), BY_NAME[dtype], xp.upload(base), 0.5)
        assert finite and np.array_equal(found, bits(floats(base, dtype) + 0.5, dtype))
        vector[3] = np.inf
        assert not xp.rounded_onto(xp.upload(vector.clone().numpy()), BY_NAME[dtype], xp.upload(base), 0.5)[1]
        vector[3] = 1.0
