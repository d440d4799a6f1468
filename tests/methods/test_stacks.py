"""Stacks of small matrices: beside NumPy's decompositions, and each matrix beside itself alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peru_cli.methods.compact import stacks

RANK = 3


def decompose(entries: torch.Tensor, rank: int, dtype: torch.dtype) -> tuple[stacks.Spectra, stacks.Fits]:
    on_columns = entries.shape[2] <= entries.shape[1]
    found = stacks.decomposed(stacks.grams(entries), on_columns)

    def stored(factor: torch.Tensor) -> torch.Tensor:
        return factor.to(dtype).double()

    factors = stacks.scaled(found, rank, stored)
    image = stacks.images(entries, factors, on_columns)
    return found, stacks.fitted(factors, image, on_columns, found.squared, stored)


@pytest.mark.parametrize("shape", [(8, 8), (6, 9), (5, 4), (3, 20), (33, 31)], ids=str)
def test_a_stack_is_the_best_of_each_matrix_and_what_each_gets_alone(shape: tuple[int, int]) -> None:
    noise = np.random.default_rng(0)
    entries = torch.from_numpy(noise.standard_normal((9, *shape), np.float32))
    entries[4] = 0
    entries[5] = torch.outer(entries[5, :, 0], entries[5, 0])  # of rank 1: its Gram matrix of factors is singular
    found, fitted = decompose(entries, RANK, torch.float64)
    values = np.linalg.svd(entries.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found.values.numpy(), values, rtol=1e-7, atol=3e-7)
    np.testing.assert_allclose(found.squared, np.square(values).sum(1), rtol=1e-12)
    np.testing.assert_allclose(fitted.squared_error, np.square(values[:, RANK:]).sum(1), rtol=1e-8, atol=1e-10)
    error = (entries.double() - fitted.left @ fitted.right).square().sum((1, 2))
    np.testing.assert_allclose(error.numpy(), np.square(values[:, RANK:]).sum(1), rtol=1e-8, atol=1e-10)
    _, rounded = decompose(entries, RANK, torch.bfloat16)
    for i in range(len(entries)):
        one, alone = decompose(entries[i : i + 1].clone(), RANK, torch.bfloat16)
        assert torch.equal(one.values[0], found.values[i])
        assert torch.equal(alone.left[0], rounded.left[i]) and torch.equal(alone.right[0], rounded.right[i])
        assert alone.squared_error == [rounded.squared_error[i]]
