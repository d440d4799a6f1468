"""Singular directions from Gram matrices, in float64: exact for singular values above 1e-6 of the largest.

Smaller ones count as 0 and have no direction, instead of an arbitrary one. All tensors are torch's; (rows, columns)."""

from __future__ import annotations

import torch

_ZERO = 1e-6  # of the largest singular value
_DEPENDENT = 1e-10  # of the largest eigenvalue of an inner Gram matrix


def top_directions(matrix: torch.Tensor, count: int, size: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values with their vectors: U (rows, count), S (count,) descending, V (columns, count).

    If there are fewer than `count`, the remaining values and vectors are 0. Values below 1e-6 of `size` are also treated as
    rounding: pass it if the matrix is the remainder of a larger one."""
    if matrix.shape[1] > matrix.shape[0]:
        v, s, u = top_directions(matrix.T, count, size)
        return u, s, v
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    s = squares.flip(0)[:count].clamp(min=0).sqrt()
    right = vectors.flip(1)[:, :count]
    there = (s > _ZERO * s[:1].clamp(min=size)).to(s)
    left = (matrix @ right) * (there / torch.where(there > 0, s, torch.ones_like(s)))
    return left, s * there, right * there


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """The closest matrix with orthonormal columns (or rows): U V^T of the SVD, without directions of zero singular values."""
    if matrix.shape[1] > matrix.shape[0]:
        return polar(matrix.T).T
    squares, vectors = torch.linalg.eigh(matrix.T @ matrix)
    there = squares > _DEPENDENT * squares[-1:]
    inverse = torch.where(there, squares, torch.ones_like(squares)).rsqrt() * there
    nearest: torch.Tensor = matrix @ ((vectors * inverse) @ vectors.T)
    return nearest


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All min(rows, columns) of them, descending."""
    inner = matrix.T @ matrix if matrix.shape[1] <= matrix.shape[0] else matrix @ matrix.T
    values: torch.Tensor = torch.linalg.eigvalsh(inner).flip(0).clamp(min=0).sqrt()
    return values
