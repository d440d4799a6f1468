"""Packs as files: written block by block, and read with every byte checked before it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.codecs import decode
from peru_cli.artifacts.container import Container, opening
from peru_cli.artifacts.index import SideFile, TensorRecord
from peru_cli.artifacts.kept import KeptEntries
from peru_cli.artifacts.packs.superposed import (
    KIND,
    PackedTensor,
    PackIndex,
    PackMode,
    TaskRecord,
    TaskTensor,
    check_metadata,
    decode_index,
)
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.digests import SHORT, leaves
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.source import digest_of, pieces
from peru_cli.errors import BadFile, UsageError
from peru_cli.methods.compact.superpose import Arrangement, Group
from peru_cli.shown import listed
from peru_cli.streaming.engine import available_threads

Sums = np.ndarray[Any, np.dtype[Any]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
_CACHED_BLOCKS = 16
_I32 = BY_NAME["I32"]


def as_sums(info: TensorInfo) -> TensorInfo:
    """The tensor that a tensor's sums are digested as: 32-bit integers."""
    return TensorInfo(info.name, _I32, info.shape)


def sum_leaves(sums: Sums) -> bytes:
    """Leaves of sums that begin at a chunk boundary."""
    little = np.ascontiguousarray(sums, "<i4")
    return leaves(little.data.cast("B") if len(little) else memoryview(b""), _I32)


@dataclass(frozen=True)
class Corrections:
    """A task's residual: `records` (by base name) count the corrected entries of each tensor, `entries` holds them."""

    records: Mapping[str, TensorRecord]
    entries: KeptEntries


class Pack:
    """An opened pack. Thread-safe."""

    kind = KIND

    def __init__(self, path: Place) -> None:
        self.container = Container(path)
        with opening(path, self.close):
            self._open()

    def _open(self) -> None:
        self.path, self.metadata = self.container.path, self.container.metadata
        if (kind := self.metadata.get("peru.kind")) != self.kind:
            raise BadFile(f"an artifact of kind {kind!r}, but a pack is needed", "`peru shuffle-pack` makes packs")
        self._read_index()
        index = self.index
        if int(self.metadata.get("peru.entries", "0")) != index.entries:  # an artifact without sums does not have the key
            raise BadFile(f"its metadata has 'peru.entries' as {self.metadata['peru.entries']}, its index has {index.entries}")
        blocks, whole = self._find_parts(partial(self.container.read, "blocks"))
        for role, size in (("blocks", blocks), ("whole", whole), ("files", sum(size for size, _ in index.contents))):
            if self.container.sizes[role] != size:
                raise BadFile(f"its role {role!r} has {self.container.sizes[role]} bytes, the index accounts for {size}")

    def _read_index(self) -> None:
        check_metadata(self.metadata)
        self.index: PackIndex = decode_index(self.container.index)

    def _find_parts(self, read: Callable[[int, int], bytes]) -> tuple[int, int]:
        """Locate all parts; `read` returns bytes of the blocks. Returns the bytes of all blocks, and of all tasks' own tensors."""
        index, self._read = self.index, read
        self._cache: BlockCache[Sums] = BlockCache(_CACHED_BLOCKS)
        self._loaded: Sums | None = None
        self.records = {record.info.name: record for record in index.tensors}
        self.tasks = {task.name: task for task in index.tasks}
        self.scale = float(self.metadata.get("peru.scale", "1.0"))
        self._first: dict[str, int] = {}
        at = 0
        for record in index.tensors:
            self._first[record.info.name] = at
            at += record.info.entries if record.is_sum else 0
        self._block_at: list[int] = []
        blocks = self._lay_out()
        self._whole_at: dict[tuple[str, str], int] = {}
        whole = 0
        for task in index.tasks:
            for tensor in task.tensors:
                self._whole_at[task.name, tensor.info.name] = whole
                whole += tensor.info.nbytes
        self._corrections: dict[str, Corrections] = {}
        infos = index.floating
        for task, residual in zip(index.tasks, index.residuals, strict=False):
            records = residual.records(infos)
            kept = KeptEntries(self.path, records, residual.streams, residual.blocks, partial(_read_from, read, blocks))
            self._corrections[task.name] = Corrections({record.info.name: record for record in records}, kept)
            blocks += residual.nbytes
        return blocks, whole

    def _lay_out(self) -> int:
        """Locate each block of sums. Returns the bytes of all blocks."""
        at = 0
        for block in self.index.blocks:
            self._block_at.append(at)
            at += block.nbytes
        return at

    @property
    def delta_bytes(self) -> int:
        """Bytes of the file without tasks' own tensors and side files: what bits a parameter count."""
        return self.container.file_bytes - self.container.sizes["whole"] - self.container.sizes["files"]

    def own_bytes(self, task: TaskRecord) -> int:
        """Bytes of the file that only this task needs: its own tensors and its residual."""
        residuals = zip(self.index.tasks, self.index.residuals, strict=False)
        return task.whole_bytes + sum(residual.nbytes for other, residual in residuals if other is task)

    def load(self) -> Pack:
        """Hold everything decoded in memory, so that a swap is fast: see `load_sums`."""
        return self.load_sums()

    def load_sums(self) -> Self:
        """Hold all sums decoded in memory: 2 bytes each, or 4 if one is large."""
        if self._loaded is None:
            size, sums = self.index.block_entries, np.empty(self.index.entries, np.int16)

            def put(number: int) -> bool:
                block = self._decode(number)
                fits = block.min() >= -(1 << 15) and block.max() < 1 << 15
                if fits or sums.itemsize == 4:
                    sums[number * size : (number + 1) * size] = block
                return bool(fits)

            with ThreadPoolExecutor(available_threads()) as pool:
                large = [number for number, fits in enumerate(pool.map(put, range(len(self.index.blocks)))) if not fits]
                if large:
                    sums = sums.astype(np.int32)
                    list(pool.map(put, large))
            self._loaded = sums
        return self

    def factor(self, task: str) -> float:
        """What a task's sums are multiplied by."""
        return self.scale

    def corrections(self, task: TaskRecord) -> Corrections | None:
        """What a task's residual corrects; None if there is none."""
        return self._corrections.get(task.name)

    @property
    def has_own_base(self) -> bool:
        """Whether the base already contains the plain sums (`--merge-base`). Then only these are the base's bytes among the
        floating tensors."""
        return any(record.mode == PackMode.BASE and record.info.dtype.compressible for record in self.index.tensors)

    @property
    def arrangement(self) -> Arrangement:
        """How the tasks were moved apart."""
        members: list[list[PackedTensor]] = [[] for _ in self.index.groups]
        for record in self.index.tensors:
            if record.is_target:
                members[record.group].append(record)
        groups = [
            Group(group.prefix, tuple(t.info.name for t in sorted(found, key=lambda t: t.place)))
            for group, found in zip(self.index.groups, members, strict=True)
        ]
        return Arrangement(groups, int(self.metadata["peru.seed"]), self.metadata["peru.decorrelate"], self.metadata["peru.signs"] == "yes")

    def task(self, name: str | None) -> TaskRecord:
        """The record of a task. Without a name, the only one. UsageError lists the tasks of the pack."""
        if name is None and len(self.tasks) == 1:
            return self.index.tasks[0]
        if name not in self.tasks:
            has = f"{self.path} holds {listed(self.tasks)}"
            raise UsageError(f"{has}: choose one" if name is None else f"{has}, not {name!r}", "--task NAME")
        return self.tasks[name]

    def sums(self, record: PackedTensor, start: int, stop: int) -> Sums:
        """Sums of a tensor from entry `start` to `stop`; integers (n,), int32 unless loaded, read-only."""
        low = self._first[record.info.name] + start
        if self._loaded is not None:
            return self._loaded[low : low + stop - start]
        high, size = low + stop - start, self.index.block_entries
        parts = []
        for number in range(low // size, -(-high // size)):
            block = self._cache.get(number, partial(self._decode, number))
            parts.append(block[max(low - number * size, 0) : high - number * size])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])

    def mask(self, task: str, record: PackedTensor, start: int, stop: int) -> Flags | None:
        """Which sums from entry `start` to `stop` a task uses; the others count as 0. None for all."""
        return None

    def _decode(self, number: int) -> Sums:
        block, size = self.index.blocks[number], self.index.block_entries
        data = self._read(self._block_at[number], block.nbytes)
        if short_digest(data) != block.digest:
            raise BadFile(f"{self.path}: block {number} of its sums was altered", "fetch or make it again")
        try:
            return decode(data, self.index.codec, "int32", min(size, self.index.entries - number * size))
        except BadFile as error:
            raise BadFile(f"{self.path}: {error.message}", error.hint) from error

    def read_whole(self, task: TaskRecord, tensor: TaskTensor, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of a task's own tensor."""
        self.container.read_into("whole", self._whole_at[task.name, tensor.info.name] + offset, buffer)

    def verify_whole(self, task: TaskRecord, tensor: TaskTensor) -> None:
        """Check the digest of a task's own tensor. BadFile if it was altered."""
        found = digest_of(tensor.info, pieces(tensor.info, partial(self.read_whole, task, tensor)))
        if found[:SHORT] != tensor.digest:
            raise BadFile(f"{self.path}: tensor {tensor.info.name!r} of task {task.name} was altered", "fetch or make it again")

    def content(self, size: int, digest: bytes) -> bytes:
        """A side file stored in the pack. BadFile if it was altered."""
        at = 0
        for other in self.index.contents:
            if other == (size, digest):
                break
            at += other[0]
        data = self.container.read("files", at, size)
        if short_digest(data) != digest:
            raise BadFile(f"{self.path}: a side file was altered", "fetch or make it again")
        return data

    def side_file(self, file: SideFile) -> bytes:
        """Contents of a task's side file stored in the pack."""
        return self.content(file.size, file.digest)

    def close(self) -> None:
        """Release the file."""
        self.container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read_from(read: Callable[[int, int], bytes], begin: int, offset: int, nbytes: int) -> bytes:
    return read(begin + offset, nbytes)
