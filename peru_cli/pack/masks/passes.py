"""The passes of masking: measure what every threshold would keep, then add the task vectors and write the masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peru_cli.artifacts.packs.masks import Block, MaskWriter, as_mask, mask_leaves
from peru_cli.artifacts.packs.pack import Sums
from peru_cli.checkpoints.digests import Digests
from peru_cli.methods.compact.masking import Flags, Overlap
from peru_cli.methods.compact.masks.table import MaskMethod
from peru_cli.pack.passes import PIECE, Added, Doubles, Gather, PackBuffers, Superpose
from peru_cli.pack.plan import PackPlan
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings


@dataclass(frozen=True)
class Cut:
    """How to make one task's mask: the threshold (a magnitude for magnitude masks), and how many equals of it are kept."""

    threshold: float
    equals: int = 0


def _pieces(n: int) -> list[slice]:
    """Fixed pieces of a tile, so that sums over them do not depend on the tile. They fit the CPU's cache."""
    return [slice(start, start + PIECE) for start in range(0, n, PIECE)]


def _overlap(total: Doubles, vector: Doubles, mask: Flags) -> tuple[float, float, int]:
    """For one piece: ||m total||^2, <m total, vector> and the number kept."""
    kept = total * mask
    return float(np.dot(kept, kept)), float(np.dot(kept, vector)), int(np.count_nonzero(mask))


class MaskGather:
    """Inner products as in Gather. For each task, candidate cut and tensor also what its mask would keep."""

    def __init__(
        self, plan: PackPlan, how: StreamSettings, method: MaskMethod, candidates: Sequence[Sequence[Cut]], scaled: bool = False
    ) -> None:
        self.inner = Gather(plan, how, wide=True)
        self._method, self._candidates, self._sums, self._scaled = method, candidates, plan.sums, scaled
        size = len(candidates), max(map(len, candidates)), 3
        self.overlaps = {tensor.info.name: np.zeros(size) for tensor in plan.sums}
        self.lengths = np.zeros((len(candidates), 2))  # if `scaled`: sum |tau_t| and sum |m_t u|

    def buffers(self) -> PackBuffers:
        return self.inner.buffers()

    def apply(self, tile: Tile, room: PackBuffers) -> tuple[list[Doubles], Doubles, Doubles]:
        tables = self.inner.apply(tile, room)
        lengths = np.zeros((len(tables), *self.lengths.shape))
        found = np.zeros((len(tables), *self.overlaps[self._sums[tile.tensor].info.name].shape))
        vectors = room.rows[:-1, : tile.stop - tile.start]
        for piece, part in enumerate(_pieces(tile.stop - tile.start)):
            rows = vectors[:, part]
            total = self._method.shared(rows)
            for task, cuts in enumerate(self._candidates):
                parts = self._method.parts(rows[task], total)
                for number, cut in enumerate(cuts):
                    mask = self._method.mask(parts, cut.threshold, True)
                    found[piece, task, number] = _overlap(total, rows[task], mask)
                if self._scaled:
                    lengths[piece, task] = np.abs(rows[task]).sum(), np.abs(total * mask).sum()
        return tables, found, lengths

    def commit(self, tile: Tile, result: tuple[list[Doubles], Doubles, Doubles]) -> None:
        tables, found, lengths = result
        self.inner.commit(tile, tables)
        overlaps = self.overlaps[self._sums[tile.tensor].info.name]
        for piece in found:
            overlaps += piece
        for piece in lengths:
            self.lengths += piece

    def finish(self, tile: Tile, committed: None, buffers: PackBuffers) -> None:
        pass


@dataclass
class Masked:
    """A tile's sums, its masks (tasks, n), which entries equal a threshold, and what is needed to measure a mask again."""

    added: Added
    masks: Flags
    equals: dict[int, Flags]  # by task
    overlaps: Doubles  # (tasks, pieces, 3)
    rows: Doubles

    def measure(self, task: int) -> None:
        """Measure what a task's mask keeps of the sums."""
        for piece, part in enumerate(_pieces(self.masks.shape[1])):
            self.overlaps[task, piece] = _overlap(self.rows[-1, part], self.rows[task, part], self.masks[task, part])


class _Sums(Superpose):
    """A plain sum, or the method's own vector, from which every task gets what its mask keeps."""

    method: MaskMethod

    def together(self, rows: Doubles, sums: Sums) -> Sums:
        stored = self.method.stored(rows)
        return sums if stored is None else np.rint(stored).astype(np.int32)

    def came_back(self, number: int) -> tuple[float, float]:
        return self.overlaps[number].square, self.overlaps[number].product

    overlaps: Sequence[Overlap] = ()


class WriteMasks:
    """Round and add the task vectors, mask the sums, digest and write both."""

    def __init__(self, plan: PackPlan, how: StreamSettings, writer: MaskWriter, method: MaskMethod, cuts: Sequence[Cut]) -> None:
        self.inner = _Sums(plan, how, writer.pack, wide=True)
        self.inner.method = method
        self._writer, self._method, self._cuts, self._sums = writer, method, cuts, plan.sums
        self._quotas = [cut.equals for cut in cuts]  # equals that may still be kept
        self._found = np.zeros((len(cuts), 3))
        masks = {t.info.name: as_mask(t.info) for t in plan.sums}
        self.mask_digests = [Digests(masks.get) for _ in cuts]

    def buffers(self) -> PackBuffers:
        return self.inner.buffers()

    def apply(self, tile: Tile, room: PackBuffers) -> Masked:
        added = self.inner.apply(tile, room)
        n, exponent = tile.stop - tile.start, self._sums[tile.tensor].exponent
        rows = room.rows[:, :n]  # task vectors in steps, not rounded; the last row has the sums
        pieces = _pieces(n)
        result = Masked(added, np.empty((len(self._cuts), n), np.bool_), {}, np.empty((len(self._cuts), len(pieces), 3)), rows)
        # Once no equals may be kept any more, that never changes: the entries need no check.
        some = [quota > 0 for quota in self._quotas]
        ranked = self._method.ranked
        levels = [float(np.ldexp(cut.threshold, -exponent)) if ranked else cut.threshold for cut in self._cuts]
        for part in pieces:
            shared = self._method.shared(rows[:-1, part]) if self._method.compares else None
            for task, level in enumerate(levels):
                result.masks[task, part] = self._method.mask(self._method.parts(rows[task, part], shared), level, some[task])
        for task, level in enumerate(levels):
            if ranked and some[task]:
                result.equals[task] = np.abs(rows[task]) == level
        for task in range(len(self._cuts)):
            result.measure(task)
        return result

    def commit(self, tile: Tile, result: Masked) -> tuple[Masked, list[Block]]:
        for task, equals in result.equals.items():
            positions = np.flatnonzero(equals)
            if len(positions) > self._quotas[task]:
                result.masks[task, positions[self._quotas[task] :]] = False
                result.measure(task)
            self._quotas[task] -= min(len(positions), self._quotas[task])
        area = 4.0 ** self._sums[tile.tensor].exponent
        for piece in range(result.overlaps.shape[1]):
            self._found += result.overlaps[:, piece] * [area, area, 1.0]
        self.inner.tally(result.added)
        return result, self._writer.add(result.added.sums, result.masks)

    def finish(self, tile: Tile, committed: tuple[Masked, list[Block]], buffers: PackBuffers) -> None:
        result, blocks = committed
        name = self._sums[tile.tensor].info.name
        for digests, mask in zip(self.mask_digests, result.masks, strict=True):
            digests.add_at(name, tile.start, mask_leaves(mask))
        for block in blocks:
            self._writer.write(block)

    def settle(self) -> list[Overlap]:
        """The results by task, once all tiles are done."""
        self.inner.overlaps = [Overlap(float(square), float(product), int(kept)) for square, product, kept in self._found]
        return list(self.inner.overlaps)
