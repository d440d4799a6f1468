"""Coordinates in which the updates of several LoRAs are aligned before they are merged, and the way back to two factors.

Updates of one module are Delta_t = B_t A_t with a small rank. In common coordinates they are small matrices M_t with
Delta_t = left M_t right, exactly; any method merges the M_t, and left (merged M) right is again of low rank.

    knots  [Delta_1 ... Delta_T] = U S V^T:  left = U, M_t = U^T Delta_t (the paper's S V_t^T), right = identity
    core   [B_1 ... B_T] = U S V^T, [A_1; ...; A_T] = X Y Z^T:  left = U, M_t = U^T B_t A_t Z, right = Z^T

Sources: Stoica et al., KnOTS (2024), https://arxiv.org/abs/2410.19735, section 4; Panariello et al., Accurate and Efficient
Low-Rank Model Merging in Core Space (2025), https://arxiv.org/abs/2509.17786, section 3. No (rows, columns) product is ever
made: all decompositions are of triangles of QR, whose sides are sums of ranks. Everything is float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from peru_cli.methods.compact.lowrank import move_scale
from peru_cli.methods.compact.stacks import solve

_NOISE = 1e-12  # of the largest singular value: directions below are rounding

Factors = tuple[torch.Tensor, torch.Tensor]  # B with the scale in it (rows, r), A (r, columns); float64


@dataclass(frozen=True)
class Coordinates:
    """left (rows, k); right (n, columns), None for the identity; and each update's M_t as a product (k, r) @ (r, n)."""

    left: torch.Tensor
    right: torch.Tensor | None
    parts: list[Factors]

    def factors(self, merged: torch.Tensor) -> Factors:
        """left @ merged @ right as B (rows, q) and A (q, columns), with the smallest q; entries of both of similar size."""
        right = self.right if self.right is not None else torch.eye(merged.shape[1], dtype=merged.dtype)
        if merged.shape[0] <= merged.shape[1]:
            return move_scale(self.left, merged @ right if self.right is not None else merged, 1.0)
        return move_scale(self.left @ merged, right, 1.0)


def knots(updates: Sequence[Factors]) -> Coordinates:
    """KnOTS' coordinates: k = min(sum of ranks, rows), n = columns."""
    basis, lefts = _common([left for left, _ in updates])
    triangles = [_triangle(right.T) for _, right in updates]
    stacked = torch.cat([left @ triangle.T for left, triangle in zip(lefts, triangles, strict=True)], dim=1)
    u, s, _ = solve(lambda matrix: torch.linalg.svd(matrix, full_matrices=False), stacked)
    there = (s > _NOISE * s[:1]).to(s)[:, None]
    return Coordinates(basis @ u, None, [(there * (u.T @ left), right) for left, (_, right) in zip(lefts, updates, strict=True)])


def core(updates: Sequence[Factors]) -> Coordinates:
    """Core Space's coordinates: k = min(sum of ranks, rows), n = min(sum of ranks, columns)."""
    left, lefts = _aligned([left for left, _ in updates])
    right, rights = _aligned([right.T for _, right in updates])
    return Coordinates(left, right.T, [(a, b.T) for a, b in zip(lefts, rights, strict=True)])


FUNCTIONS: Mapping[str, Callable[[Sequence[Factors]], Coordinates]] = {"knots": knots, "core-space": core}


def side(space: str, ranks: Sequence[int], rows: int, columns: int) -> tuple[int, int]:
    """The shape (k, n) of a module's matrices in a space."""
    if space == "knots":
        return min(sum(min(rank, columns) for rank in ranks), rows), columns
    return min(sum(ranks), rows), min(sum(ranks), columns)


def _common(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An orthonormal basis of all columns (m, k), and each part in it, (k, r), for parts (m, r)."""
    basis, triangle = solve(torch.linalg.qr, torch.cat(list(parts), dim=1))
    return basis, list(torch.split(triangle, [part.shape[1] for part in parts], dim=1))


def _aligned(parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """As `_common`, with the left singular vectors of all columns for a basis."""
    basis, within = _common(parts)
    u, _, _ = solve(lambda matrix: torch.linalg.svd(matrix, full_matrices=False), torch.cat(within, dim=1))
    return basis @ u, [u.T @ part for part in within]


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """R of the QR decomposition of (m, r): (min(m, r), r)."""
    return solve(lambda part: torch.linalg.qr(part, mode="r"), matrix)[1]
