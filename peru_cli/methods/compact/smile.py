"""SMILE: every linear layer of the base, plus low-rank experts of several fine-tunes with a router that needs no data.

Source: Tang et al. 2024, https://arxiv.org/abs/2408.10174. For one layer and the task vectors tau_i = U_i S_i V_i^T of its weight:

    r_i = || V_i[:, :gate]^T x ||_2                                     how much of the input lies where task i changed the layer
    p   = softmax(r)
    y   = W_0 x + b_0 + sum over the top tasks  w_i (U_i S_i V_i^T x + db_i),    w = p / (sum of the top p)

Each token chooses for itself. U_i, S_i, V_i are cut to `rank`; db_i is the difference of the biases."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from peru_cli.methods.compact.lowrank import GRAM_SIDE, Matrix, Round, Subspace, find_range, fit, gram
from peru_cli.methods.compact.stacks import solve

_ALONE = 1024  # Gram matrices beyond this side are decomposed one at a time, to save memory
_alone = threading.Lock()
_RELATIVE = 1e-7  # singular values below this share of the largest are rounding


@dataclass(frozen=True)
class ExpertFactors:
    """left (out, r) @ right (r, in) as they will be stored, float64; the rows of `right` are orthonormal up to rounding.

    Both numbers are squared Frobenius norms: of the task vector, and of its difference from the product."""

    left: torch.Tensor
    right: torch.Tensor
    squared: float
    squared_error: float


def expert_factors(matrix: Matrix, rank: int, transposed: bool, stored: Round, name: str) -> ExpertFactors:
    """The best factors of one task vector at a rank, with unit rows on the side of the inputs.

    The right factor is rounded first; the left one is the least-squares solution for it. A task vector of lower rank gets
    fewer rows, one of zeros none.

    Args:
        matrix: the task vector as it is stored: (out, in), or (in, out) if `transposed`.
        stored: rounds to the dtype of the artifact.
        name: seeds the range finder, which serves large matrices."""
    found = _leading(matrix, rank, name)
    kept = int((found.values[:rank] > found.values[:1] * _RELATIVE).sum()) if found.squared else 0
    wanted = not transposed  # the side of the inputs: columns, or rows
    vectors = found.vectors[:, :kept]
    if found.on_columns != wanted and kept:
        vectors = solve(torch.linalg.qr, _image(matrix, found.on_columns, vectors) / found.values[:kept])[0]
    fitted = fit(matrix, Subspace(torch.ones(kept, dtype=torch.float64), vectors, wanted, found.squared), kept, stored) if kept else None
    if fitted is None:
        rows, columns = (matrix.columns, matrix.rows) if transposed else (matrix.rows, matrix.columns)
        return ExpertFactors(torch.zeros(rows, 0), torch.zeros(0, columns), found.squared, found.squared)
    left, right = (fitted.right.T, fitted.left.T) if transposed else (fitted.left, fitted.right)
    return ExpertFactors(left, right, fitted.squared, fitted.squared_error)


def _leading(matrix: Matrix, rank: int, name: str) -> Subspace:
    side = min(matrix.rows, matrix.columns)
    if side > GRAM_SIDE and 4 * rank <= side:
        return find_range(matrix, rank, name)
    if side <= _ALONE:
        return gram(matrix)
    with _alone:
        return gram(matrix)


def _image(matrix: Matrix, on_columns: bool, vectors: torch.Tensor) -> torch.Tensor:
    """M @ vectors (columns, k), or M^T @ vectors (rows, k); float64."""
    image = vectors.new_zeros(matrix.rows if on_columns else matrix.columns, vectors.shape[1])
    for start, panel in matrix.row_panels():
        if on_columns:
            image[start : start + len(panel)] = panel.double() @ vectors
        else:
            image += panel.double().T @ vectors[start : start + len(panel)]
    return image


# -- the layer --------------------------------------------------------------------------------------------


@dataclass
class Expert:
    """One task's part of a layer: left (out, r), right (r, in), bias (out,) or None."""

    left: torch.Tensor
    right: torch.Tensor
    bias: torch.Tensor | None


def stack_gates(experts: Sequence[Expert], gate: int) -> torch.Tensor:
    """The routers' directions, (tasks, gate, in). Those that an expert lacks are zeros, which add nothing to its norm."""
    stacked = experts[0].right.new_zeros(len(experts), gate, experts[0].right.shape[1])
    for number, expert in enumerate(experts):
        directions = expert.right[:gate]
        stacked[number, : len(directions)] = directions
    return stacked


def probabilities(inputs: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """softmax over tasks of the norms of the projected inputs; (n, in), (tasks, gate, in) -> float32 or float64 (n, tasks)."""
    tasks, gate, width = gates.shape
    projected = torch.nn.functional.linear(inputs, gates.view(tasks * gate, width)).view(-1, tasks, gate)
    wide = projected if projected.dtype == torch.float64 else projected.float()
    shares: torch.Tensor = torch.linalg.vector_norm(wide, dim=2).softmax(dim=1)
    return shares


def correction(inputs: torch.Tensor, experts: Sequence[Expert], shares: torch.Tensor, top: int, out: int) -> torch.Tensor:
    """What the chosen experts add to the base's output; (n, in), shares (n, tasks) -> (n, out)."""
    weights, chosen = shares.topk(top, dim=1)
    weights = (weights / weights.sum(dim=1, keepdim=True)).to(inputs.dtype)
    added = inputs.new_zeros(len(inputs), out)
    counts = torch.bincount(chosen.flatten(), minlength=len(experts)).tolist()
    for number in (number for number, count in enumerate(counts) if count):  # one short input chooses few of many tasks
        expert = experts[number]
        rows, place = torch.where(chosen == number)
        product = (inputs[rows] @ expert.right.T) @ expert.left.T
        if expert.bias is not None:
            product = product + expert.bias
        added.index_add_(0, rows, product * weights[rows, place, None])
    return added
