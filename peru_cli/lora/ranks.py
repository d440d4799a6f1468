"""Choose ranks and report on modules, for resizing and for extracting adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.errors import UsageError
from peru_cli.methods.compact.budget import ranks_for_bytes

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Wanted:
    """The size that the command line asks for: exactly one of rank, energy and max_bytes."""

    rank: int | None = None
    energy: float | None = None
    max_bytes: int | None = None
    dtype: Dtype | None = None
    uniform: bool = False
    exact: bool = False

    def words(self) -> str:
        """The option as it would be typed."""
        parts = [f"--{name} {value:g}" for name, value in (("rank", self.rank), ("energy", self.energy)) if value is not None]
        parts += [f"--max-bytes {self.max_bytes}"] if self.max_bytes is not None else []
        parts += [f"--dtype {self.dtype.torch_name}"] if self.dtype is not None else []
        return " ".join([*parts, *(["--uniform-rank"] if self.uniform else []), *(["--exact"] if self.exact else [])])


@dataclass(slots=True)
class ModuleReport:
    """The result for one module: squared norms of the whole update and of what the stored factors lose."""

    name: str
    rows: int
    columns: int
    blocks: int
    rank_before: int | None  # None for a full fine-tune
    rank: int
    bytes: int
    squared: float = 0.0
    squared_error: float = 0.0
    energy: float = 1.0  # kept share of the squared singular values

    @property
    def error(self) -> float:
        """||update - stored|| / ||update||, Frobenius, measured."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0

    @property
    def numbers(self) -> int:
        """Numbers stored: q (d_out + d_in)."""
        return self.blocks * self.rank * (self.rows + self.columns)

    @property
    def papers_count(self) -> int:
        """The paper's count, which stores the singular values separately: q (d_out + d_in + 1)."""
        return self.numbers + self.blocks * self.rank

    def json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "name": self.name,
            "shape": [*([self.blocks] if self.blocks > 1 else []), self.rows, self.columns],
            "rank_before": self.rank_before,
            "rank": self.rank,
            "relative_error": self.error,
            "energy": self.energy,
            "bytes": self.bytes,
            "parameters": self.numbers,
            "papers_count": self.papers_count,
        }


@dataclass
class AdapterReport:
    """The result for one adapter."""

    name: str
    path: Path
    file_bytes: int
    modules: list[ModuleReport]
    bytes_before: int
    kept_bytes: int = 0  # of tensors that the adapter holds whole
    rest_bytes: int = 0  # of the delta beside it
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes needed besides the base to rebuild the fine-tune: the adapter and the delta beside it."""
        return self.file_bytes + self.rest_bytes

    @property
    def error(self) -> float:
        """Error of all modules together."""
        squared = sum(module.squared for module in self.modules)
        return math.sqrt(sum(module.squared_error for module in self.modules) / squared) if squared else 0.0


def choose_ranks(wanted: Wanted, energies: Sequence[Array], costs: Sequence[int], fixed_bytes: int, what: str) -> list[int]:
    """The rank of each module, by energy or by bytes.

    Args:
        energies: squared singular values of each module, descending.
        costs: bytes of one rank of each module.
        fixed_bytes: bytes of the file that do not depend on ranks.
        what: how messages name the adapter."""
    if wanted.energy is not None:
        return [_rank_for_energy(values, wanted.energy) for values in energies]
    assert wanted.max_bytes is not None
    least = fixed_bytes + sum(costs)
    if wanted.max_bytes < least:
        raise UsageError(f"{what} needs at least {least:,} bytes at rank 1, but --max-bytes is {wanted.max_bytes:,}", "allow more bytes")
    room = wanted.max_bytes - fixed_bytes
    if wanted.uniform:
        return [max(1, min(room // sum(costs), max(len(values) for values in energies)))] * len(energies)
    return ranks_for_bytes(energies, costs, room)


def _rank_for_energy(energies: Array, share: float) -> int:
    """The smallest rank, at least 1, that keeps this share of the squared singular values."""
    total = np.cumsum(energies)
    if not len(total) or not total[-1]:
        return 1
    return min(int(np.searchsorted(total, share * total[-1])) + 1, len(total))
