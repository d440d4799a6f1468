"""Singular values and fits of small matrices of one shape, many at once: each gets the bits that it would get alone.

What works entry by entry runs on the whole stack. Sums and products run matrix by matrix, since a library may add up a batch in
another order than a single matrix. MKL's loops also depend on where an array begins (Intel's guide to oneMKL, "Conditional Numerical
Reproducibility"), so every matrix of a stack begins where a new array would: at a multiple of 64 bytes.

Everything is float64. `n` is the number of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ALIGNED = 64  # bytes: torch's allocator on the CPU
_WORDS = _ALIGNED // 8

Round = Callable[[torch.Tensor], torch.Tensor]  # float64 -> float64, rounded to the stored dtype, in any shape


def solve(function: Callable[..., tuple[torch.Tensor, ...]], *arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A decomposition on its arguments' device, or on the CPU if a GPU's solver fails."""
    try:
        return tuple(function(*arguments))
    except RuntimeError:  # torch.linalg.LinAlgError and a GPU's lack of memory are both RuntimeErrors
        device = arguments[0].device
        if device.type == "cpu":
            raise
    return tuple(part.to(device) for part in function(*(argument.cpu() for argument in arguments)))


@dataclass(frozen=True)
class Spectra:
    """Singular values, descending (n, k), and vectors on one side (n, columns or rows, k). `squared` has the squared Frobenius norms."""

    values: torch.Tensor
    vectors: torch.Tensor
    on_columns: bool
    squared: list[float]


@dataclass(frozen=True)
class Fits:
    """left (n, rows, q) @ right (n, q, columns) as they will be stored, and their measured errors."""

    left: torch.Tensor
    right: torch.Tensor
    squared: list[float]
    squared_error: list[float]


def products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left[i] @ right[i]; (n, p, q) and (n, q, r) to (n, p, r), each contiguous."""
    out = _room(len(left), left.shape[1], right.shape[2], left)
    for a, b, c in zip(left.unbind(), right.unbind(), out.unbind(), strict=True):
        torch.mm(a, b, out=c)
    return out


def grams(stack: torch.Tensor) -> torch.Tensor:
    """The Gram matrices of the smaller side; (n, rows, columns), float32 or float64, to (n, s, s)."""
    wide = _apart(stack)
    return products(wide.mT, wide) if stack.shape[2] <= stack.shape[1] else products(wide, wide.mT)


def decomposed(totals: torch.Tensor, on_columns: bool) -> Spectra:
    """All singular values and vectors from Gram matrices (n, s, s)."""
    squared = _sums(totals.diagonal(dim1=1, dim2=2))
    values, vectors = _eigh(totals)
    return Spectra(values.flip(1).clamp_(min=0).sqrt(), vectors.flip(2), on_columns, squared)


def scaled(spectra: Spectra, rank: int, stored: Round) -> torch.Tensor:
    """The factors on the side of the vectors: vectors times the roots of the values, rounded; (n, columns or rows, rank)."""
    return _apart(stored((spectra.vectors[:, :, :rank] * spectra.values[:, :rank].sqrt().unsqueeze(1)).contiguous()))


def images(stack: torch.Tensor, factors: torch.Tensor, on_columns: bool) -> torch.Tensor:
    """M @ factor, or M^T @ factor; (n, rows, columns) and (n, columns or rows, q) to (n, rows or columns, q)."""
    wide = _apart(stack)
    return products(wide if on_columns else wide.mT, factors)


def fitted(factors: torch.Tensor, image: torch.Tensor, on_columns: bool, squared: list[float], stored: Round) -> Fits:
    """The least-squares solutions for rounded factors (n, columns or rows, q), given M @ factor or M^T @ factor, and the errors of both."""
    inner = products(factors.mT, factors)
    other = _apart(stored(products(image, _inverse(inner))))
    with_image = _sums((image * other).contiguous())
    with_inner = _sums((products(other.mT, other) * inner).contiguous())
    errors = [max(norm - 2 * a + b, 0.0) for norm, a, b in zip(squared, with_image, with_inner, strict=True)]
    left, right = (other, factors.mT) if on_columns else (factors, other.mT)
    return Fits(left, right, squared, errors)


def _inverse(inner: torch.Tensor) -> torch.Tensor:
    """The (pseudo-)inverses of Gram matrices; (n, q, q) -> (n, q, q)."""
    values, vectors = _eigh(inner)
    keep = values > values[:, -1:] * 1e-14
    if bool(keep.all()):
        vectors = _apart(vectors)
        return products(_apart(vectors / values.unsqueeze(1)), vectors.mT)
    out = _room(len(inner), inner.shape[1], inner.shape[2], inner)
    for w, v, k, result in zip(values.unbind(), vectors.unbind(), keep.unbind(), out.unbind(), strict=True):
        torch.mm(v[:, k] / w[k], v[:, k].T, out=result)
    return out


def _eigh(matrices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending (n, s), and vectors (n, s, s)."""
    n, side, _ = matrices.shape
    step = _WORDS // math.gcd(side * side, _WORDS)  # every step-th of a batch, which has no gaps, begins at an aligned address
    if n == 1 or side == 1 or step == 1 or matrices.device.type != "cpu":
        values, vectors = solve(torch.linalg.eigh, matrices)
        return values, vectors
    if step == 2:
        between = matrices.new_zeros(n, step, side, side)
        between[:, 0] = matrices
        values, vectors = solve(torch.linalg.eigh, between)
        return values[:, 0], vectors[:, 0]
    each = [solve(torch.linalg.eigh, matrix) for matrix in matrices.unbind()]
    return torch.stack([values for values, _ in each]), torch.stack([vectors for _, vectors in each])


def _sums(stack: torch.Tensor) -> list[float]:
    """The sum of each matrix."""
    return [float(one.sum()) for one in stack.unbind()]


def _room(n: int, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised stack (n, rows, columns), float64, each matrix aligned."""
    size = rows * columns
    room = torch.empty(n, -(-size // _WORDS) * _WORDS, dtype=torch.float64, device=like.device)
    return room[:, :size].view(n, rows, columns)


def _apart(stack: torch.Tensor) -> torch.Tensor:
    """The stack in float64, each matrix contiguous and aligned; itself if it is one already."""
    n, rows, columns = stack.shape
    if stack.dtype == torch.float64 and stack.is_contiguous() and (n == 1 or rows * columns % _WORDS == 0):
        return stack
    return _room(n, rows, columns, stack).copy_(stack)
