"""`shuffle-pack --residual`: keep the largest errors of superposition for each task, as a sparse delta.

This is Post-Pruning (methods/compact/magnitude.py) with the retrieved task as the base. It keeps the largest entries of
theta_t - theta_t^ by magnitude, exactly the requested number, ties in canonical order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np

from peru_cli.artifacts.index import EXACT, ROUNDED, Stream
from peru_cli.artifacts.packs.residual import Residual
from peru_cli.artifacts.packs.superposed import PackIndex, TaskRecord
from peru_cli.artifacts.packs.writer import PackWriter, UnfinishedPack
from peru_cli.artifacts.sparse_delta import BlockWriter, FilledBlock
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pair, Pairing
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.finetunes.pack_task import TaskOfPack
from peru_cli.methods.compact.delta import Bits, cast_bits
from peru_cli.pack.passes import PIECE
from peru_cli.pack.plan import PackPlan
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.candidates import Candidates
from peru_cli.vectors.family import Buffers, Family, StreamSettings, TaskVector
from peru_cli.vectors.selection import Select, Sink
from peru_cli.vectors.thresholds import find_thresholds


class _Cast(Checkpoint):
    """A fine-tune in the dtypes of the retrieved task."""

    def __init__(self, fine: Checkpoint, wanted: Mapping[str, TensorInfo]) -> None:
        self.label = self.kind = fine.label
        self.tensors, self.metadata, self.side_files, self.warnings, self._fine = wanted, {}, {}, [], fine

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        had, dtype = self._fine.tensors[name].dtype, self.tensors[name].dtype
        start, n = (at * 8 // dtype.bits for at in (offset, len(buffer)))
        bits: Bits = np.empty(n, BITS[had.bits])
        self._fine.read_into(name, had.nbytes(start), bits.data.cast("B"))
        np.copyto(np.frombuffer(buffer, BITS[dtype.bits]), cast_bits(CPU, bits, had, dtype))


def check_residual(plan: PackPlan, density: Fraction) -> None:
    """UsageError for a density that keeps nothing."""
    if not int(density * plan.entries):
        raise UsageError(f"--residual {float(density):g} of {plan.entries:,} entries keeps nothing", "keep more")


class _Measure:
    """The selecting pass. Also sums squared errors with the residual, over fixed pieces."""

    def __init__(self, select: Select) -> None:
        self._select = select
        self._squares: dict[int, list[float]] = {}  # by tile

    @property
    def missed(self) -> float:
        """The sum over all pieces, in order: the same for all tiles and threads."""
        return sum(square for _, squares in sorted(self._squares.items()) for square in squares)

    def buffers(self) -> Buffers:
        return self._select.buffers()

    def apply(self, tile: Tile, buffers: Buffers) -> list[Candidates]:
        return self._select.apply(tile, buffers)

    def commit(self, tile: Tile, result: list[Candidates]) -> list[tuple[Candidates, list[FilledBlock]]]:
        return self._select.commit(tile, result)

    def finish(self, tile: Tile, committed: list[tuple[Candidates, list[FilledBlock]]], buffers: Buffers) -> None:
        self._select.finish(tile, committed, buffers)
        for c, _ in committed:
            dtype = c.aligned.pair.fine.dtype
            fine, back = (CPU.widen(bits, dtype, np.empty(len(bits))) for bits in (c.aligned.fine, c.result))
            missed = fine - back
            pieces = (missed[at : at + PIECE] for at in range(0, len(missed), PIECE))
            self._squares[tile.number] = [float(np.dot(piece, piece)) for piece in pieces]


def write_residuals(
    plan: PackPlan, base: Checkpoint, index: PackIndex, energies: Mapping[str, float], writer: PackWriter, density: Fraction,
    how: StreamSettings, note: Callable[[str], None],
) -> list[Residual]:  # fmt: skip
    """Append each task's residual to a pack whose sums are written, in order of tasks.

    Args:
        base: the pack's base.
        index: the pack's index so far.
        energies: squared norms of the task vectors, by task."""
    pack = UnfinishedPack(writer.target, plan.metadata, index, writer)
    residuals = []
    for vector in sorted(plan.vectors, key=lambda vector: vector.name):
        note(f"residual of {vector.name}")
        residuals.append(_write(pack, pack.tasks[vector.name], vector.fine, base, energies[vector.name], writer, density, how))
    return residuals


def _write(
    pack: UnfinishedPack, task: TaskRecord, fine: Checkpoint, base: Checkpoint, energy: float, writer: PackWriter, density: Fraction,
    how: StreamSettings,
) -> Residual:  # fmt: skip
    infos = pack.index.floating
    back = TaskOfPack(pack, task.name, "what comes back", base)
    wanted = {name: back.tensors[name] for name in (task.fine_name(info.name) for info in infos)}
    pairs = [Pair(info, info) for info in wanted.values()]
    vector = TaskVector(task.name, _Cast(fine, wanted), Pairing(task.prefix, pairs))
    family = Family(back, [vector], how)
    entries = sum(info.entries for info in infos)
    streams = [
        Stream(dtype, ROUNDED if dtype.bits > 16 and density < 1 else EXACT)
        for _, dtype in sorted({info.dtype.code: info.dtype for info in infos}.items())
    ]
    blocks = BlockWriter(streams, writer.append_residual)
    sink = Sink(blocks, streams)
    sink.add_threshold(find_thresholds(family, range(len(family.slots)), {0: int(density * entries)})[0].threshold)
    step = _Measure(Select(family, [sink]))
    run(step, family.plan(), how.threads, how.advance)
    for block in blocks.rest():
        blocks.write(block)
    error = math.sqrt(step.missed / energy) if energy else 0.0
    kept = [sink.kept[task.fine_name(info.name)] for info in infos]
    return Residual(density, repr(float(f"{error:.4g}")), kept, *blocks.written())
