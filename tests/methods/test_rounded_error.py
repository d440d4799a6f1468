"""The error foreseen after rounding to 16 bits, against real rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.methods.mixed.sums import rounded_error, ulp_counts


@pytest.mark.parametrize(("torch_dtype", "name"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_the_error_after_rounding_is_foreseen_within_two_percent(torch_dtype: torch.dtype, name: str, spread: float) -> None:
    noise = torch.Generator().manual_seed(1)
    base = (0.05 * torch.randn(2000, 300, generator=noise)).to(torch_dtype)
    fine = (base.double() + 1e-3 * torch.randn(base.shape, generator=noise)).to(torch_dtype)
    step = 0.05 * 2.0 ** (-8 if name == "BF16" else -11)
    deviations = step * (spread * torch.randn(len(base), 1, generator=noise)).exp()  # rows differ by orders of magnitude
    missed = deviations * torch.randn(base.shape, generator=noise)
    measured = float(((fine.double() + missed).to(torch_dtype).double() - fine.double()).square().sum())
    counts = ulp_counts(base.view(torch.int16).numpy().reshape(-1).view(np.uint16), BY_NAME[name])
    foreseen = rounded_error(missed.double().square().sum(1).numpy(), base.shape[1], counts)
    assert foreseen == pytest.approx(measured, rel=0.02)


def test_rows_that_miss_nothing_have_no_error() -> None:
    assert rounded_error(np.zeros(3), 10, {-10: 30}) == 0.0


def test_a_dtype_without_counts_is_not_rounded() -> None:
    assert rounded_error(np.array([1.0, 2.0]), 10, {}) == 3.0
