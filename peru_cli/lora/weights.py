"""The weights of a fine-tune as matrices: large ones in panels, small ones of one form in stacks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from peru_cli.checkpoints.bundle import MOST, bundle
from peru_cli.checkpoints.pairing import Pair
from peru_cli.lora.extract_plan import Extraction, Weight
from peru_cli.lora.ranks import Wanted
from peru_cli.methods.compact import stacks
from peru_cli.methods.compact.lowrank import GRAM_SIDE, DenseSvd, Subspace, find_range, fit, gram
from peru_cli.methods.compact.stacks import Fits, Round, Spectra
from peru_cli.vectors.family import StreamSettings
from peru_cli.vectors.task_matrix import TaskMatrix

_ALONE = 1024  # Gram matrices beyond this side are decomposed one at a time, to save memory


def grouped(weights: Sequence[Weight], numbers: Sequence[int], ranks: Sequence[int]) -> list[list[int]]:
    """Split numbers of weights into groups that are decomposed together: small weights of one form and rank, ascending.

    `ranks` are those of all weights."""
    alike: dict[object, list[int]] = {}
    groups: list[list[int]] = []
    for number in numbers:
        weight = weights[number]
        form = (weight.kind, weight.pair.fine.shape, weight.transposed)
        group = alike.get(kind := (form, weight.pair.fine.dtype, weight.pair.base.dtype, ranks[number]))
        if group is None or (len(group) + 1) * weight.pair.entries > MOST:
            groups.append(group := [])
            alike[kind] = group
        group.append(number)
    return groups


@dataclass(frozen=True)
class Part:
    """Some blocks of each weight of a group: `entries` is a stack (n, rows, columns), or one matrix read in panels.

    n counts all blocks of the first weight, then those of the second."""

    entries: torch.Tensor | TaskMatrix
    name: str  # of the first weight


class Weights:
    """The weights of a fine-tune, and their leading singular values."""

    def __init__(self, plan: Extraction, weights: Sequence[Weight], wanted: Wanted, how: StreamSettings) -> None:
        self.plan, self.weights, self.wanted, self.device = plan, weights, wanted, torch.device(how.xp.name)
        self._alone = threading.Lock()

    def parts(self, group: Sequence[int]) -> Iterator[Part]:
        """All matrices of a group, as they are stored."""
        several = [self.weights[number] for number in group]
        first = several[0]
        rows, columns = first.stored_shape
        fine, base = self.plan.fine, self.plan.base
        if first.pair.entries <= MOST:
            pair = first.pair
            if len(several) > 1:
                pair = Pair(bundle([weight.pair.fine for weight in several]), bundle([weight.pair.base for weight in several]))
            n = len(several) * first.blocks
            matrix = TaskMatrix(fine, base, pair, n * rows, columns, 0, self.device)
            [(_, panel)] = matrix.row_panels()
            yield Part(panel.view(n, rows, columns), first.name)
            return
        for start in range(0, first.blocks * rows * columns, rows * columns):
            yield Part(TaskMatrix(fine, base, first.pair, rows, columns, start, self.device), first.name)

    def leading(self, part: Part, rank: int) -> Spectra:
        """At least `rank` singular values and their vectors of each matrix, by the cheapest route that is accurate enough."""
        if self.wanted.exact:
            return _exact(part.entries)
        if isinstance(part.entries, torch.Tensor):  # small: all of them
            return stacks.decomposed(stacks.grams(part.entries), part.entries.shape[2] <= part.entries.shape[1])
        matrix = part.entries
        side = min(matrix.rows, matrix.columns)
        if side <= GRAM_SIDE or 4 * rank > side:
            if side <= _ALONE:
                return _one(gram(matrix))
            with self._alone:
                return _one(gram(matrix))
        return _one(find_range(matrix, rank, part.name))

    @staticmethod
    def fit(part: Part, found: Spectra, rank: int, stored: Round) -> Fits:
        """The best stored factors of each matrix, at a rank or what is there of it."""
        rank = min(rank, found.values.shape[1])
        if isinstance(part.entries, torch.Tensor):
            factors = stacks.scaled(found, rank, stored)
            image = stacks.images(part.entries, factors, found.on_columns)
            return stacks.fitted(factors, image, found.on_columns, found.squared, stored)
        one = fit(part.entries, Subspace(found.values[0], found.vectors[0], found.on_columns, found.squared[0]), rank, stored)
        return Fits(one.left.unsqueeze(0), one.right.unsqueeze(0), [one.squared], [one.squared_error])


def _one(found: Subspace) -> Spectra:
    return Spectra(found.values.unsqueeze(0), found.vectors.unsqueeze(0), found.on_columns, [found.squared])


def _exact(entries: torch.Tensor | TaskMatrix) -> Spectra:
    """By dense singular value decompositions, one after another."""
    if isinstance(entries, TaskMatrix):
        whole = torch.empty(1, entries.rows, entries.columns, dtype=torch.float64, device=entries.device)
        for start, panel in entries.row_panels():
            whole[0, start : start + len(panel)] = panel
    else:
        whole = entries
    found = [DenseSvd(matrix) for matrix in whole.unbind()]
    values, vectors = torch.stack([svd.values for svd in found]), torch.stack([svd.vt.T for svd in found])
    return Spectra(values, vectors, True, [float(svd.values.square().sum()) for svd in found])
