"""The first pass: decompose every tensor's task vector into singular vectors or plain values, which are stored on disk."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from peru_cli.artifacts.mixed.writer import Represented
from peru_cli.checkpoints.pairing import Pair
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.methods.compact.delta import cast_bits
from peru_cli.methods.compact.lowrank import GRAM_SIDE, find_range, gram
from peru_cli.methods.compact.stacks import solve
from peru_cli.methods.mixed.directions import Spectrum
from peru_cli.methods.mixed.sums import ulp_counts
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings, TaskVector
from peru_cli.vectors.task_matrix import TaskMatrix

SMALLEST = 4096  # entries from which singular vectors are worthwhile for a matrix
_PIECE = 1 << 19  # entries counted at once
_ENOUGH = 0.8  # share of a matrix's rows: if fewer changed, the changed rows are listed
Array = np.ndarray[Any, np.dtype[Any]]


class _Held(NamedTuple):
    offset: int
    shape: tuple[int, ...]
    kind: str


class Spill:
    """Arrays on disk, beside the output, in an unnamed file. One writer, any number of readers."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".peru-spill-", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._at = 0

    def put(self, array: Array) -> _Held:
        """Write an array."""
        held = _Held(self._at, array.shape, array.dtype.str)
        self._file.seek(self._at)
        view = np.ascontiguousarray(array).data.cast("B") if array.size else memoryview(b"")
        while len(view):
            view = view[self._file.write(view) :]
        self._at += array.nbytes
        return held

    def get(self, held: _Held) -> Array:
        """Read an array back."""
        room = np.empty(held.shape, held.kind)
        view, at = room.reshape(-1).data.cast("B"), held.offset
        while len(view):
            got = os.preadv(self._file.fileno(), [view], at)
            view, at = view[got:], at + got
        return room

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


@dataclass
class Item:
    """One tensor of one task; `number` counts through all of them.

    `held` is left, values, right, rows and squared norms of these rows of a matrix; of any other tensor the values, and the base's bits
    in the fine-tune's dtype."""

    number: int
    task: int
    pair: Pair
    columns: int  # 0: not a matrix
    squared: float = 0.0  # squared norm of the difference
    ulps: dict[int, int] = field(default_factory=dict)
    held: tuple[_Held, ...] = ()
    rank: int = 0  # number of directions held
    most: int = 0  # number of directions that exist
    fixed: Represented | None = None  # its parts, once they are chosen whatever the price

    @property
    def name(self) -> str:
        """The fine-tune's name of the tensor."""
        return self.pair.fine.name


def items_of(tasks: Sequence[TaskVector]) -> list[Item]:
    """All tensors with a difference, task by task, in canonical order."""
    items: list[Item] = []
    for number, task in enumerate(tasks):
        for pair in sorted(task.pairs.values(), key=lambda pair: pair.fine.name):
            shape = pair.fine.shape
            columns = (shape[-1] if len(shape) != 4 else math.prod(shape[1:])) if len(shape) > 1 and pair.entries >= SMALLEST else 0
            rows = pair.entries // columns if columns else 0
            items.append(Item(len(items), number, pair, columns if min(rows, columns) > 1 else 0, most=min(rows, columns)))
    return items


class Decompose:
    """The pass. Each tile is one tensor."""

    def __init__(self, base: Checkpoint, tasks: Sequence[TaskVector], items: Sequence[Item], spill: Spill, device: str) -> None:
        self._base, self._tasks, self._items, self._spill = base, tasks, items, spill
        self._device = torch.device(device)

    def buffers(self) -> None:
        return None

    def apply(self, tile: Tile, buffers: None) -> tuple[Array, ...]:
        item = self._items[tile.tensor]
        if not item.ulps:
            self._count(item)
        columns = item.columns or item.pair.entries
        if not columns:
            return np.zeros(0), np.zeros(0, np.uint16)
        matrix = TaskMatrix(
            self._tasks[item.task].fine, self._base, item.pair, item.pair.entries // columns, columns, 0, self._device
        )  # fmt: skip
        if item.columns:
            return self._spectrum(matrix, item)
        values = np.concatenate([panel.double().cpu().numpy().reshape(-1) for _, panel in matrix.row_panels()])
        item.squared = float(np.square(values).sum())
        return values, np.concatenate(list(self._base_bits(item)))

    def _spectrum(self, matrix: TaskMatrix, item: Item) -> tuple[Array, ...]:
        side = min(matrix.rows, matrix.columns)
        wanted = min(max(item.rank, 1), side)
        found = gram(matrix) if side <= GRAM_SIDE or 4 * wanted > side else find_range(matrix, wanted, item.name)
        item.squared = found.squared
        wanted = min(wanted, len(found.values))
        vectors = found.vectors[:, :wanted]
        image = vectors.new_empty(matrix.rows if found.on_columns else matrix.columns, wanted)
        squares = vectors.new_zeros(matrix.rows)
        if found.on_columns:
            for start, panel in matrix.row_panels():
                wide = panel.double()
                image[start : start + len(panel)] = wide @ vectors
                squares[start : start + len(panel)] = wide.square().sum(1)
        else:
            for start, panel in matrix.column_panels():
                wide = panel.double()
                image[start : start + panel.shape[1]] = wide.T @ vectors
                squares += wide.square().sum(1)
        # Singular vectors of the subspace's content: those of the range finder are not exactly the matrix's own.
        energies, rotation = (part.flip(-1) for part in solve(torch.linalg.eigh, image.T @ image))
        values = energies.clamp(min=0).sqrt()
        kept = int((values > values[:1] * 1e-7).sum()) if found.squared else 0
        values, rotation = values[:kept], rotation[:, :kept]
        other, vectors = (image @ rotation) / values, vectors @ rotation
        left, right = (other, vectors) if found.on_columns else (vectors, other)
        left_, right_, squares_ = left.cpu().numpy(), right.cpu().numpy(), squares.cpu().numpy()
        rows = np.flatnonzero(np.abs(left_).max(1) > 1e-12) if kept else np.zeros(0, np.int64)
        if len(rows) < _ENOUGH * len(left_):
            left_, squares_ = left_[rows], squares_[rows]
        else:
            rows = np.zeros(0, np.int64)
        return left_.astype(np.float32), values.cpu().numpy(), right_.astype(np.float32), rows, squares_

    def _count(self, item: Item) -> None:
        dtype = item.pair.fine.dtype
        if dtype.bits != 16:
            return
        for bits in self._base_bits(item):
            for exponent, count in ulp_counts(bits, dtype).items():
                item.ulps[exponent] = item.ulps.get(exponent, 0) + count

    def _base_bits(self, item: Item) -> Iterator[Array]:
        """The base's entries as bits of the fine-tune's dtype, piece by piece."""
        base = item.pair.base
        for start in range(0, item.pair.entries, _PIECE):
            n = min(_PIECE, item.pair.entries - start)
            room = bytearray(base.dtype.nbytes(n))
            self._base.read_into(base.name, base.dtype.nbytes(start), memoryview(room))
            yield cast_bits(CPU, np.frombuffer(room, BITS[base.dtype.bits]), base.dtype, item.pair.fine.dtype)

    def commit(self, tile: Tile, result: tuple[Array, ...]) -> None:
        item = self._items[tile.tensor]
        item.held = tuple(self._spill.put(array) for array in result)
        if item.columns:
            found = len(result[1])
            if found < item.rank:
                item.most = found
            item.rank = found

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


def spectrum_of(item: Item, spill: Spill) -> tuple[Spectrum, Array | None]:
    """A matrix's leading singular values and vectors, and the rows of the left ones, None for all."""
    left, values, right, rows, squares = (spill.get(held) for held in item.held)
    spectrum = Spectrum(left.astype(np.float64), values, right.astype(np.float64), item.squared, squares)
    return spectrum, rows if len(rows) else None


def decompose(
    base: Checkpoint, tasks: Sequence[TaskVector], items: Sequence[Item], numbers: Sequence[int], spill: Spill, how: StreamSettings
) -> None:
    """Decompose some of the items, each up to its rank."""
    tiles = [Tile(i, number, 0, items[number].pair.entries) for i, number in enumerate(numbers)]
    run(Decompose(base, tasks, items, spill, how.xp.name), tiles, how.threads, how.advance)
