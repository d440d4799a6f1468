"""Singular value spectra: what each rank would keep and cost, for an adapter's modules or a fine-tune's task vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peru_cli.checkpoints.lora.adapter import Adapter
from peru_cli.lora.ranks import Array, Wanted
from peru_cli.streaming.engine import run
from peru_cli.vectors.family import StreamSettings

if TYPE_CHECKING:
    from peru_cli.lora.extract_plan import Extraction

RANKS = (4, 8, 16, 32, 64)


@dataclass
class Spectrum:
    """The spectrum of one matrix, or of a stack of experts. `energies` are the squared singular values found, descending."""

    name: str
    rows: int
    columns: int
    blocks: int
    rank: int | None  # of an adapter
    scale: float | None
    cost: int  # bytes of one rank
    most: int  # maximum in bytes: the size of the matrix itself, or of the adapter's factors
    energies: Array
    squared: float  # squared Frobenius norm

    @property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(self.squared)

    @property
    def effective_rank(self) -> float:
        """The stable rank, ||M||_F^2 / ||M||_2^2: the energy in units of the largest squared singular value."""
        return self.squared / float(self.energies[0]) if len(self.energies) and self.energies[0] else 0.0

    def dropped(self, rank: int) -> float:
        """The squared error of the best approximation at a rank; 0 if the matrix itself costs no more."""
        if rank * self.cost >= self.most:
            return 0.0
        return max(self.squared - float(self.energies[:rank].sum()), 0.0)

    def error(self, rank: int) -> float:
        """Error relative to the norm."""
        return math.sqrt(self.dropped(rank) / self.squared) if self.squared else 0.0

    def bytes_at(self, rank: int) -> int:
        """Bytes of both factors, or of the matrix itself."""
        return min(self.cost * rank, self.most)

    def json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "name": self.name,
            "shape": [*([self.blocks] if self.blocks > 1 else []), self.rows, self.columns],
            "rank": self.rank,
            "scale": self.scale,
            "norm": self.norm,
            "effective_rank": self.effective_rank,
            "singular_values": [math.sqrt(energy) for energy in self.energies],
            "errors": {str(rank): self.error(rank) for rank in RANKS},
        }


@dataclass
class RankPlan:
    """Cost and error of one rank for all matrices."""

    rank: int
    bytes: int
    error: float  # relative, all matrices together


def rank_plans(spectra: Sequence[Spectrum], ranks: Sequence[int] = RANKS) -> list[RankPlan]:
    """Cost and error by rank."""
    squared = sum(spectrum.squared for spectrum in spectra)
    plans = []
    for rank in ranks:
        dropped = sum(spectrum.dropped(rank) for spectrum in spectra)
        plans.append(RankPlan(rank, sum(s.bytes_at(rank) for s in spectra), math.sqrt(dropped / squared) if squared else 0.0))
    return plans


def adapter_spectra(adapter: Adapter, how: StreamSettings) -> list[Spectrum]:
    """The spectrum of every module, with its scale."""
    from peru_cli.lora.resize import Energies

    step = Energies(adapter, how)
    run(step, step.tiles(), how.threads, how.advance)
    found = []
    for module, energies in zip(adapter.modules, step.energies, strict=True):
        cost = module.nbytes // module.rank
        squared = float(np.sum(energies))
        shape = (module.rows, module.columns, module.blocks)
        found.append(Spectrum(module.target, *shape, module.rank, module.scale, cost, module.nbytes, energies, squared))
    return found


def task_spectra(plan: Extraction, how: StreamSettings) -> list[Spectrum]:
    """The leading singular values of every weight's task vector, as many as the largest of RANKS."""
    from peru_cli.lora.extract import Energies, factor_dtype

    step = Energies(plan, plan.weights, Wanted(), how, max(RANKS))
    run(step, step.tiles(), how.threads, how.advance)
    dtype = factor_dtype(plan, Wanted())
    found = []
    for weight, energies, squared in zip(plan.weights, step.energies, step.squared, strict=True):
        cost = dtype.nbytes(weight.blocks * (weight.rows + weight.columns))
        shape = (weight.rows, weight.columns, weight.blocks)
        found.append(Spectrum(weight.tensor, *shape, None, None, cost, weight.pair.fine.nbytes, energies, squared))
    return found
