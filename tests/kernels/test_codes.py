"""FP8 codes against torch: every value, every rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peru_cli.checkpoints.quantized.fp8 import VALUES
from peru_cli.kernels.codes import MOST, decode, encode, largest

KINDS = {"F8_E4M3": "e4m3fn", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3fnuz", "F8_E5M2FNUZ": "e5m2fnuz"}
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("divide", [True, False])
def test_encoding_rounds_as_torch(name: str, divide: bool) -> None:
    noise = np.random.default_rng(0)
    numbers = (noise.standard_normal((60, 300)) * np.exp(6 * noise.standard_normal((60, 300)))).astype(np.float32)
    every = VALUES[name][np.isfinite(VALUES[name])]
    numbers[0, : len(every)], numbers[1, : len(every) - 1] = every, (every[1:] + every[:-1]) / 2  # and all ties
    factors = noise.random(2 * 3).astype(np.float32) + np.float32(0.5)
    factors[0] = 1
    spread = torch.from_numpy(factors.reshape(2, 3)).repeat_interleave(40, 0)[:60].repeat_interleave(128, 1)[:, :300]
    scaled = torch.from_numpy(numbers) / spread if divide else torch.from_numpy(numbers) * spread
    dtype = getattr(torch, f"float8_{KINDS[name]}")
    expected = scaled.clamp(-MOST[name], MOST[name]).to(dtype).view(torch.uint8)
    assert MOST[name] == torch.finfo(dtype).max
    assert np.array_equal(encode(numbers, (40, 128), factors, divide, name).reshape(60, 300), expected.numpy())


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("block", [(128, 128), (1, 200), (40, 64), (2, 7)])
def test_decoding_a_run_of_stacked_matrices(dtype: str, block: tuple[int, int]) -> None:
    noise = np.random.default_rng(1)
    codes = noise.integers(0, 256, (3, 50, 200)).astype(np.uint8)
    down, across = -(-50 // block[0]), -(-200 // block[1])
    scales = noise.random((3, down, across)).astype(np.float32)
    spread = torch.from_numpy(scales).repeat_interleave(block[0], 1)[:, :50].repeat_interleave(block[1], 2)[:, :, :200]
    expected = (torch.from_numpy(VALUES["F8_E4M3"])[torch.from_numpy(codes).long()] * spread).to(TORCH[dtype]).reshape(-1)
    for start, stop in ((0, 30000), (137, 29111), (9999, 10001)):
        out = np.empty(stop - start, "u4" if dtype == "F32" else "u2")
        decode(codes.reshape(-1)[start:stop], start, VALUES["F8_E4M3"], scales.reshape(-1), (50, 200), block, dtype, out)
        got = torch.from_numpy(out.view(np.int32 if dtype == "F32" else np.int16)).view(TORCH[dtype])
        torch.testing.assert_close(got, expected[start:stop], rtol=0, atol=0, equal_nan=True)


def test_the_largest_of_each_block() -> None:
    numbers = np.random.default_rng(2).standard_normal((50, 70)).astype(np.float32)
    numbers[3, 4], numbers[40, 60] = np.nan, -np.inf
    found = largest(numbers, (32, 32)).reshape(2, 3)
    for i in range(2):
        for j in range(3):
            expected = np.abs(numbers[32 * i : 32 * i + 32, 32 * j : 32 * j + 32]).max()
            assert np.array_equal(found[i, j], expected, equal_nan=True)
