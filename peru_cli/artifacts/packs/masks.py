"""Artifacts of kind `masks`: a plain sum of task vectors, and one entropy-coded mask for each task.

Byte layout: docs/masks.md. Sums, tasks, tasks' own tensors and side files are stored as in a pack (artifacts/packs/superposed.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.codecs import PCO, decode, encode
from peru_cli.artifacts.container import artifact_kind
from peru_cli.artifacts.packs.pack import Pack, Sums
from peru_cli.artifacts.packs.superposed import KIND as SUPERPOSED
from peru_cli.artifacts.packs.superposed import METADATA as PACK_METADATA
from peru_cli.artifacts.packs.superposed import PackedTensor, PackIndex, TaskRecord, check_metadata, decimal, decode_index, encode_index
from peru_cli.artifacts.packs.writer import PackWriter
from peru_cli.artifacts.sparse_delta import METADATA as SPARSE_METADATA
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.digests import SHORT, leaves
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place
from peru_cli.errors import BadFile
from peru_cli.methods.compact.masks.table import MASKS
from peru_cli.methods.compact.superpose import Arrangement
from peru_cli.streaming.engine import available_threads

KIND = "masks"
KINDS = (SUPERPOSED, KIND)  # kinds with several tasks: what `open_pack` opens
INDEX_VERSION = 1
_STREAM_SLACK = 1 << 16
_CACHED_BLOCKS = 16
_BOOL = BY_NAME["BOOL"]
_DECIMAL = SPARSE_METADATA["peru.threshold"].removeprefix("inf|")
_SUMS = ("peru.format", "peru.scale", "peru.precision", "peru.entries", "peru.sums", "peru.base", "peru.base.files")

METADATA = {key: PACK_METADATA[key] for key in _SUMS} | {
    "peru.kind": KIND,
    "peru.method": "|".join(MASKS),
    "peru.scales": f"({_DECIMAL})(,({_DECIMAL}))*",
    "peru.density": SPARSE_METADATA["peru.density"].removeprefix("lossless|"),
}
OPTIONAL = {"peru.scales", "peru.density", "peru.base", "peru.base.files"}
Flags = np.ndarray[Any, np.dtype[np.bool_]]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def as_mask(info: TensorInfo) -> TensorInfo:
    """The tensor that a tensor's mask is digested as: bytes 0 and 1."""
    return TensorInfo(info.name, _BOOL, info.shape)


def mask_leaves(mask: Flags) -> bytes:
    """Leaves of a mask that begins at a chunk boundary."""
    return leaves(np.ascontiguousarray(mask).view(np.uint8).data if len(mask) else memoryview(b""), _BOOL)


@dataclass
class MaskBlock:
    """Entries of a mask that decode on their own; `kept` of them are 1."""

    kept: int
    nbytes: int
    digest: bytes


@dataclass
class MaskRecord:
    """One task's mask: its threshold, the number of entries kept, its digest (32 bytes), and blocks that match those of the sums."""

    threshold: str = "0.0"
    kept: int = 0
    digest: bytes = bytes(32)
    blocks: list[MaskBlock] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of its blocks."""
        return sum(block.nbytes for block in self.blocks)


def encode_mask(mask: Flags) -> tuple[MaskBlock, bytes]:
    """Encode a block as gaps between its ones. Their entropy is that of the mask."""
    positions = np.flatnonzero(mask)
    gaps = np.diff(positions, prepend=-1) - 1
    data = encode(gaps.astype(np.uint32), PCO) if len(gaps) else b""
    return MaskBlock(len(positions), len(data), short_digest(data)), data


def decode_mask(data: bytes, block: MaskBlock, entries: int, codec: int) -> Flags:
    """Inverse of `encode_mask`; bools (entries,). BadFile if a one lies beyond the end."""
    mask = np.zeros(entries, np.bool_)
    if block.kept:
        gaps = decode(data, codec, "uint32", block.kept)
        positions = np.cumsum(gaps, dtype=np.int64)
        positions += np.arange(block.kept)
        if positions[-1] >= entries:  # sums of at most 2^22 numbers below 2^32 cannot wrap
            raise BadFile("a block of a mask has trailing bytes")
        mask[positions] = True
    return mask


def encode_masks(index: PackIndex, masks: Sequence[MaskRecord]) -> bytes:
    """Serialise an index. Masks come in the order of the tasks."""
    sink = Sink()
    sink.byte(INDEX_VERSION)
    sink.text(encode_index(index))
    for mask in masks:
        sink.text(mask.threshold.encode("ascii"))
        sink.number(mask.kept)
        sink.data += mask.digest
        for block in mask.blocks:
            sink.number(block.kept)
            sink.number(block.nbytes)
            sink.data += block.digest
    return bytes(sink.data)


def decode_masks(data: bytes) -> tuple[PackIndex, list[MaskRecord]]:
    """Parse and check an index. BadFile if it is invalid."""
    cursor = Cursor(data)
    if (version := cursor.byte()) != INDEX_VERSION:
        raise BadFile(f"the index of masks has version {version}, this peru reads {INDEX_VERSION}", "pip install -U peru-cli")
    index = decode_index(cursor.take(cursor.count()))
    if index.groups or any(tensor.is_target for tensor in index.tensors):
        raise BadFile("the index of masks moves tensors, which only packs do")
    if index.residuals:
        raise BadFile("the index of masks has residuals, which only packs have")
    masks = []
    for _ in index.tasks:
        mask = MaskRecord(decimal(cursor), cursor.number(index.entries), cursor.take(32))
        for number in range(len(index.blocks)):
            kept = cursor.number(min(index.block_entries, index.entries - number * index.block_entries))
            mask.blocks.append(MaskBlock(kept, cursor.number(4 * kept + _STREAM_SLACK if kept else 0), cursor.take(SHORT)))
        if sum(block.kept for block in mask.blocks) != mask.kept:
            raise BadFile(f"a mask keeps {mask.kept} entries, its blocks keep others")
        masks.append(mask)
    if not cursor.done():
        raise BadFile("the index of masks has trailing bytes")
    return index, masks


Block = tuple[int, Sums, Flags]  # index; sums (n,); masks of all tasks (tasks, n)


class MaskWriter:
    """Cuts sums and masks into the same blocks and passes them to `pack`, a PackWriter, which writes the rest.

    The caller sets threshold, kept and digest of `masks`, one for each task in order of names, before it finishes the pack."""

    def __init__(self, target: Path, largest_metadata: Mapping[str, str], tasks: int, sync: bool) -> None:
        self.pack = PackWriter(target, largest_metadata, sync, KIND, self._encode_index)
        self.masks = [MaskRecord() for _ in range(tasks)]
        self._waiting = np.empty((tasks, 0), np.bool_)
        self._blocks: dict[int, list[MaskBlock]] = {}

    def add(self, sums: Sums, masks: Flags) -> list[Block]:
        """Append sums (n,) and masks (tasks, n) in canonical order. Returns the blocks that are now full."""
        self._waiting = np.concatenate((self._waiting, masks), axis=1)
        return [self._cut(*block) for block in self.pack.add(sums)]

    def rest(self) -> list[Block]:
        """The last block, which may be shorter."""
        return [self._cut(*block) for block in self.pack.rest()]

    def _cut(self, number: int, sums: Sums) -> Block:
        mine, self._waiting = self._waiting[:, : len(sums)], self._waiting[:, len(sums) :]
        return number, sums, mine

    def write(self, block: Block) -> None:
        """Encode a block, from any thread, and write it when its turn comes."""
        number, sums, masks = block
        encoded = [encode_mask(mask) for mask in masks]
        self._blocks[number] = [mask for mask, _ in encoded]
        self.pack.write((number, sums), [data for _, data in encoded])

    def _encode_index(self, index: PackIndex) -> bytes:
        for number in sorted(self._blocks):
            for mask, block in zip(self.masks, self._blocks[number], strict=True):
                mask.blocks.append(block)
        return encode_masks(index, self.masks)


class MaskPack(Pack):
    """An opened artifact of kind `masks`: a pack in which each task uses only some of the entries. Thread-safe."""

    kind = KIND

    def __init__(self, path: Place) -> None:
        self.masks: dict[str, MaskRecord] = {}
        self.scales: dict[str, float] = {}  # of tasks with a scale of their own
        self._mask_at: dict[str, list[int]] = {}
        self._mask_cache: BlockCache[Flags] = BlockCache(_CACHED_BLOCKS)
        self._loaded_masks: dict[str, list[Bytes]] = {}  # packed, eight entries to a byte
        super().__init__(path)

    def _read_index(self) -> None:
        check_metadata(self.metadata, METADATA, OPTIONAL)
        self.index, masks = decode_masks(self.container.index)
        self.masks = {task.name: mask for task, mask in zip(self.index.tasks, masks, strict=True)}
        scales = [float(text) for text in self.metadata["peru.scales"].split(",")] if "peru.scales" in self.metadata else []
        if len(scales) != (len(self.index.tasks) if MASKS[self.metadata["peru.method"]].scaled else 0):
            raise BadFile(f"its metadata has {len(scales)} scales for {len(self.index.tasks)} tasks")
        self.scales = dict(zip([task.name for task in self.index.tasks], scales, strict=False))

    def factor(self, task: str) -> float:
        return self.scale * self.scales.get(task, 1.0)

    def _lay_out(self) -> int:
        at = 0
        self._mask_at = {task: [] for task in self.masks}
        for number, block in enumerate(self.index.blocks):
            self._block_at.append(at)
            at += block.nbytes
            for task, mask in self.masks.items():
                self._mask_at[task].append(at)
                at += mask.blocks[number].nbytes
        return at

    @property
    def arrangement(self) -> Arrangement:
        """The arrangement of a pack in which nothing is moved or flipped."""
        return Arrangement([], 0, "none", False)

    def own_bytes(self, task: TaskRecord) -> int:
        """Bytes of the file that only this task needs: its own tensors and its mask."""
        return super().own_bytes(task) + self.masks[task.name].nbytes

    def load(self) -> MaskPack:
        """Hold all sums and masks decoded in memory: 2 bytes a sum (4 for large ones) and one bit for each entry and task."""
        self.load_sums()
        if not self._loaded_masks:
            with ThreadPoolExecutor(available_threads()) as pool:
                for task in self.masks:
                    decoded = pool.map(partial(self._decode_mask, task), range(len(self.index.blocks)))
                    self._loaded_masks[task] = list(map(np.packbits, decoded))
        return self

    def mask(self, task: str, record: PackedTensor, start: int, stop: int) -> Flags:
        """A task's mask of a tensor from entry `start` to `stop`; bools (n,), read-only."""
        low = self._first[record.info.name] + start
        high, size = low + stop - start, self.index.block_entries
        parts = [np.empty(0, np.bool_)]
        for number in range(low // size, -(-high // size)):
            a, b = max(low - number * size, 0), min(high - number * size, size)
            if self._loaded_masks:
                bits = np.unpackbits(self._loaded_masks[task][number][a // 8 : -(-b // 8)])
                parts.append(bits.view(np.bool_)[a % 8 : a % 8 + b - a])
            else:
                parts.append(self._mask_cache.get((task, number), partial(self._decode_mask, task, number))[a:b])
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def _decode_mask(self, task: str, number: int) -> Flags:
        block, size = self.masks[task].blocks[number], self.index.block_entries
        data = self.container.read("blocks", self._mask_at[task][number], block.nbytes)
        if short_digest(data) != block.digest:
            raise BadFile(f"{self.path}: block {number} of the mask of {task} was altered", "fetch or make it again")
        try:
            return decode_mask(data, block, min(size, self.index.entries - number * size), self.index.codec)
        except BadFile as error:
            raise BadFile(f"{self.path}: {error.message}", error.hint) from error


def open_pack(path: Place) -> Pack:
    """Open an artifact of several tasks, of either kind. BadFile if it is damaged or of another kind."""
    return MaskPack(path) if artifact_kind(path) == KIND else Pack(path)
