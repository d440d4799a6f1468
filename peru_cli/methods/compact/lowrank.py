"""Best low-rank approximations: PERU-LoRA of thin factors, and low-rank residuals of matrices read in panels.

PERU-LoRA (PERU paper, section 3.2): A B^T = U S V^T, keep the q largest singular values. With QR(A) = Qa Ra and
QR(B) = Qb Rb, SVD(Ra Rb^T) gives all of it without the product. By Eckart and Young the error of rank q is the
norm of the dropped singular values. For a full fine-tune the matrix is the task vector of one weight, read in panels. It is
decomposed through the Gram matrix of its smaller side (exact, the whole spectrum), or by a randomised range finder with
power iterations (Halko, Martinsson and Tropp 2011, https://arxiv.org/abs/0909.4061) that stops when it gains nothing.

Everything is float64, except the products of the range finder, which use the panels' dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from peru_cli.kernels.random import words
from peru_cli.methods.compact import stacks
from peru_cli.methods.compact.stacks import Round as Round
from peru_cli.methods.compact.stacks import solve
from peru_cli.methods.philox import stream_key

OVERSAMPLING = 16  # the range finder adds at least this many directions, or half of those wanted if that is more
GAIN = 3e-3  # stop when an iteration gains less than this share of the squared error
MAX_ITERATIONS = 12
_CACHED = 1 << 16  # entries widened at once when only their norm is wanted
GRAM_SIDE = 512  # up to this smaller side the Gram matrix is both exact and cheap

# -- thin factors ---------------------------------------------------------------------------------------


class Svd(ABC):
    """A singular value decomposition: `values`, descending, float64 (k,), and the factors of its truncations."""

    values: torch.Tensor

    @abstractmethod
    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The best approximation at a rank as left (m, rank) @ right (rank, n), with the square root of S in each."""


class ThinSvd(Svd):
    """SVD of left (m, r) @ right (r, n) by QR of both factors, without the (m, n) product."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        self._left = solve(torch.geqrf, left.double())
        self._right = solve(torch.geqrf, right.double().T.contiguous())
        core = _triangle(self._left[0]) @ _triangle(self._right[0]).T
        self._u, self.values, self._vt = solve(_svd, core)

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        root = self.values[:rank].sqrt()
        left = _apply_q(self._left, self._u[:, :rank] * root)
        return left, _apply_q(self._right, self._vt[:rank].T * root).T


class DenseSvd(Svd):
    """SVD of a matrix (m, n)."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.u, self.values, self.vt = solve(_svd, matrix.double())

    def factors(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        root = self.values[:rank].sqrt()
        return self.u[:, :rank] * root, self.vt[:rank] * root[:, None]


def thin_values(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Only the singular values of left (m, r) @ right (r, n), descending; float64 (min(m, n, r),)."""
    a, b = solve(torch.geqrf, left.double())[0], solve(torch.geqrf, right.double().T.contiguous())[0]
    return solve(_svd, _triangle(a) @ _triangle(b).T)[1]


def _svd(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(torch.linalg.svd(matrix, full_matrices=False))


def _triangle(packed: torch.Tensor) -> torch.Tensor:
    """R of a packed QR decomposition; (m, r) -> (min(m, r), r)."""
    return torch.triu(packed[: packed.shape[1]])


def _apply_q(packed: tuple[torch.Tensor, ...], vectors: torch.Tensor) -> torch.Tensor:
    """Q @ vectors, for Q of a packed QR decomposition of (m, r); (min(m, r), q) -> (m, q)."""
    padded = vectors.new_zeros(packed[0].shape[0], vectors.shape[1])
    padded[: len(vectors)] = vectors
    return torch.ormqr(packed[0], packed[1], padded)


def thin_inner(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> float:
    """<a_left @ a_right, b_left @ b_right> in float64, without the products; factors (m, r), (r, n) and (m, s), (s, n)."""
    left = a[0].double().T @ b[0].double()
    right = a[1].double() @ b[1].double().T
    return float((left * right).sum())


def squared_distance(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], squared: float) -> float:
    """The squared Frobenius norm of the difference of two products of thin factors; `squared` is that of the first."""
    return max(squared - 2 * thin_inner(a, b) + thin_inner(b, b), 0.0)


def move_scale(left: torch.Tensor, right: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of scale * left @ right with largest entries of similar size. Powers of two are moved, which rounds nothing.

    Only the rest of the scale beyond a power of two changes mantissas, those of `left`."""
    largest = float(left.abs().max()), float(right.abs().max())
    if not scale or not all(largest):
        return left * scale, right
    shift = round((np.log2(largest[0] * abs(scale)) - np.log2(largest[1])) / 2)
    return left * (scale * 2.0**-shift), right * 2.0**shift


# -- matrices in panels ---------------------------------------------------------------------------------


class Matrix(ABC):
    """A matrix (rows, columns) that is read in panels, as often as needed, and never as a whole."""

    rows: int
    columns: int

    @abstractmethod
    def row_panels(self) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and entries (some rows, columns) of each panel, in order; valid until the next one."""

    @abstractmethod
    def column_panels(self) -> Iterator[tuple[int, torch.Tensor]]:
        """First column and entries (rows, some columns) of each panel, in order; valid until the next one."""


@dataclass(frozen=True)
class Subspace:
    """Computed singular values, descending (k,), and their vectors on one side, (columns or rows, k); float64."""

    values: torch.Tensor
    vectors: torch.Tensor
    on_columns: bool
    squared: float  # squared Frobenius norm of the whole matrix


@dataclass(frozen=True)
class Fit:
    """left (rows, q) @ right (q, columns) as they will be stored, float64, and their measured error."""

    left: torch.Tensor
    right: torch.Tensor
    squared: float
    squared_error: float


def gram(matrix: Matrix) -> Subspace:
    """All singular values and vectors from the Gram matrix of the smaller side. Values are exact to 1e-8 of the largest."""
    on_columns = matrix.columns <= matrix.rows
    total: torch.Tensor | None = None
    for _, panel in matrix.row_panels() if on_columns else matrix.column_panels():
        wide = panel.double()
        part = wide.T @ wide if on_columns else wide @ wide.T
        total = part if total is None else total.add_(part)
    assert total is not None
    found = stacks.decomposed(total.unsqueeze(0), on_columns)
    return Subspace(found.values[0], found.vectors[0], on_columns, found.squared[0])


def find_range(matrix: Matrix, rank: int, seed: str) -> Subspace:
    """The leading `rank` singular values and right vectors, approximately, by power iterations on random signs.

    Each iteration reads the matrix once and squares the spectrum. It stops when the captured energy grew by less than
    GAIN of the missing energy. The returned vectors are half an iteration ahead of the values."""
    width = min(rank + max(OVERSAMPLING, rank // 2), matrix.rows, matrix.columns)
    bits = words(stream_key(0, "svd-lora", seed), 0, -(-matrix.columns * width // 32))
    signs = np.unpackbits(bits.view(np.uint8), count=matrix.columns * width).astype(np.float32) * 2 - 1
    basis = torch.from_numpy(signs.reshape(matrix.columns, width))
    squared, captured = -1.0, 0.0
    for iteration in range(MAX_ITERATIONS):
        image, ritz, norm = _iterate(matrix, basis, first=iteration == 0)
        if iteration == 0:
            squared = norm
            if not squared:
                return Subspace(ritz.new_zeros(0), ritz.new_zeros(matrix.columns, 0), True, 0.0)
        else:
            energies, rotation = (part.flip(-1) for part in solve(torch.linalg.eigh, ritz))
            gained, captured = float(energies[:rank].sum()) - captured, float(energies[:rank].sum())
            if iteration > 1 and gained <= GAIN * (squared - captured):
                break
        basis = _orthonormal(image)
    vectors = _orthonormal(image.double() @ rotation[:, :rank])
    return Subspace(energies[:rank].clamp(min=0).sqrt(), vectors, True, squared)


def _iterate(matrix: Matrix, basis: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """M^T M basis; (M basis)^T (M basis), float64; the squared norm of M if `first`. basis (columns, l)."""
    image: torch.Tensor | None = None
    ritz = torch.zeros(())
    squared = 0.0
    for _, panel in matrix.row_panels():
        if image is None:
            basis = basis.to(panel)
            image = torch.zeros_like(basis)
            ritz = torch.zeros(basis.shape[1], basis.shape[1], dtype=torch.float64, device=panel.device)
        if first:
            squared += _squared_norm(panel)
        part = panel @ basis
        image.addmm_(panel.T, part)
        if not first:
            wide = part.double()
            ritz.addmm_(wide.T, wide)
    assert image is not None
    return image, ritz, squared


def _squared_norm(panel: torch.Tensor) -> float:
    """Squared norm of all entries, in float64."""
    flat, total = panel.reshape(-1), 0.0
    for start in range(0, len(flat), _CACHED):
        wide = flat[start : start + _CACHED].double()
        total += float(torch.dot(wide, wide))
    return total


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns, float64; (n, l) -> (n, l)."""
    return solve(torch.linalg.qr, vectors.double())[0]


def fit(matrix: Matrix, subspace: Subspace, rank: int, stored: Round) -> Fit:
    """The best stored factors of a rank in a subspace, and their error.

    One factor is the vectors times the square root of the values, rounded. The other is the least-squares solution for it, which
    needs one pass. The same pass measures the error of both as rounded."""
    spectra = stacks.Spectra(subspace.values.unsqueeze(0), subspace.vectors.unsqueeze(0), subspace.on_columns, [subspace.squared])
    scaled = stacks.scaled(spectra, rank, stored)[0]  # (columns or rows, rank)
    if subspace.on_columns:
        image = scaled.new_empty(matrix.rows, scaled.shape[1])
        for start, panel in matrix.row_panels():
            image[start : start + len(panel)] = panel.double() @ scaled
    else:
        image = scaled.new_empty(matrix.columns, scaled.shape[1])
        for start, panel in matrix.column_panels():
            image[start : start + panel.shape[1]] = panel.double().T @ scaled
    found = stacks.fitted(scaled.unsqueeze(0), image.unsqueeze(0), subspace.on_columns, [subspace.squared], stored)
    return Fit(found.left[0], found.right[0], subspace.squared, found.squared_error[0])
