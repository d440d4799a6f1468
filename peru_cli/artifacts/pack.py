"""Packs as files: written block by block, and read with every byte checked before it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.codecs import PCO, decode, encode
from peru_cli.artifacts.container import FORMAT, Container, ContainerWriter, opening
from peru_cli.artifacts.index import SideFile
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.artifacts.superposed import (
    BLOCK_ENTRIES,
    COPY,
    KIND,
    TARGET,
    PackedTensor,
    PackIndex,
    SumBlock,
    TaskRecord,
    TaskTensor,
    check_metadata,
    decode_index,
    encode_index,
)
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place
from peru_cli.errors import BadFile, UsageError
from peru_cli.methods.superpose import Arrangement, Group
from peru_cli.streaming.digests import SHORT, TensorDigest, leaves
from peru_cli.streaming.engine import available_threads
from peru_cli.streaming.tiles import CHUNK

Sums = np.ndarray[Any, np.dtype[Any]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
_CACHED_BLOCKS = 16
_I32 = BY_NAME["I32"]


def sums_digest(info: TensorInfo) -> TensorDigest:
    """Takes the leaves of a tensor's sums, 32-bit integers."""
    return TensorDigest(_I32, info.shape)


def sum_leaves(sums: Sums) -> bytes:
    """Leaves of sums that begin at a chunk's boundary."""
    little = np.ascontiguousarray(sums, "<i4")
    return leaves(little.data.cast("B") if len(little) else memoryview(b""), _I32)


class PackWriter:
    """Writes one pack. `add` in canonical order; `write` for what it returns, from any thread; then `finish`."""

    def __init__(
        self, target: Path, largest_metadata: Mapping[str, str], sync: bool, kind: str = KIND,
        encode_index: Callable[[PackIndex], bytes] = encode_index,
    ) -> None:  # fmt: skip
        self._fixed, self._encode_index = {"peru.format": FORMAT, "peru.kind": kind}, encode_index
        self._container = ContainerWriter(target, {**self._fixed, **largest_metadata}, sync)
        self._waiting: list[Sums] = []
        self._tickets = 0
        self._encoded: dict[int, list[bytes]] = {}
        self._lock = threading.Lock()
        self.blocks: list[SumBlock] = []

    def add(self, sums: Sums) -> list[tuple[int, Sums]]:
        """Append sums; returns the blocks that are full now, with their numbers."""
        self._waiting.append(sums)
        full = []
        while sum(map(len, self._waiting)) >= BLOCK_ENTRIES:
            joined = np.concatenate(self._waiting)
            full.append(self._block(joined[:BLOCK_ENTRIES]))
            self._waiting = [joined[BLOCK_ENTRIES:]]
        return full

    def rest(self) -> list[tuple[int, Sums]]:
        """The last block, which need not be full."""
        joined, self._waiting = np.concatenate([np.empty(0, np.int32), *self._waiting]), []
        return [self._block(joined)] if len(joined) else []

    def _block(self, sums: Sums) -> tuple[int, Sums]:
        self._tickets += 1
        return self._tickets - 1, sums

    def write(self, block: tuple[int, Sums], more: Sequence[bytes] = ()) -> None:
        """Encode a block and write it when its turn has come, and after it `more`."""
        data = encode(np.ascontiguousarray(block[1]), PCO)
        with self._lock:
            self._encoded[block[0]] = [data, *more]
            while (ready := self._encoded.pop(len(self.blocks), None)) is not None:
                self.blocks.append(SumBlock(len(ready[0]), short_digest(ready[0])))
                for part in ready:
                    self._container.append("blocks", part)

    def append_whole(self, data: memoryview) -> None:
        """Append bytes of tasks' own tensors, in the index's order."""
        self._container.append("whole", data)

    def finish(
        self, metadata: Mapping[str, str], index: PackIndex, contents: Sequence[bytes], before: Callable[[], None] = lambda: None
    ) -> int:
        """Write side files, index and header, call `before`, and put the pack in place; returns its size in bytes."""
        assert not self._encoded, "a block was never written"
        index.blocks = self.blocks
        for content in contents:
            self._container.append("files", content)
        return self._container.finish({**self._fixed, **metadata}, self._encode_index(index), before)

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._container.__exit__(*exc)


class Pack:
    """An opened pack. Safe from many threads."""

    kind = KIND

    def __init__(self, path: Place) -> None:
        self.container = Container(path)
        with opening(path, self.close):
            self._open()
        self._cache: BlockCache[Sums] = BlockCache(_CACHED_BLOCKS)
        self._loaded: list[Sums] = []

    def load(self) -> Pack:
        """Hold all sums in memory, decoded: 2 bytes each (4 where they are large). Tasks are then swapped in a moment."""
        if not self._loaded:
            with ThreadPoolExecutor(available_threads()) as pool:
                self._loaded = list(pool.map(lambda number: _narrow(self._decode(number)), range(len(self.index.blocks))))
        return self

    def _open(self) -> None:
        self.path, self.metadata = self.container.path, self.container.metadata
        if (kind := self.metadata.get("peru.kind")) != self.kind:
            raise BadFile(f"an artifact of kind {kind!r}, where a pack is meant", "`peru shuffle-pack` makes packs")
        self._read_index()
        if int(self.metadata["peru.entries"]) != self.index.entries:
            raise BadFile(f"its metadata has 'peru.entries' as {self.metadata['peru.entries']}, its index has {self.index.entries}")
        self.records = {record.info.name: record for record in self.index.tensors}
        self.tasks = {task.name: task for task in self.index.tasks}
        self.scale = float(self.metadata["peru.scale"])
        self._first: dict[str, int] = {}
        at = 0
        for record in self.index.tensors:
            self._first[record.info.name] = at
            at += record.info.entries if record.is_sum else 0
        self._block_at: list[int] = []
        blocks = self._lay_out()
        self._whole_at: dict[tuple[str, str], int] = {}
        whole = 0
        for task in self.index.tasks:
            for tensor in task.tensors:
                self._whole_at[task.name, tensor.info.name] = whole
                whole += tensor.info.nbytes
        for role, size in (("blocks", blocks), ("whole", whole), ("files", sum(size for size, _ in self.index.contents))):
            if self.container.sizes[role] != size:
                raise BadFile(f"its role {role!r} has {self.container.sizes[role]} bytes, the index accounts for {size}")

    def _read_index(self) -> None:
        check_metadata(self.metadata)
        self.index: PackIndex = decode_index(self.container.index)

    def _lay_out(self) -> int:
        """Find where each block begins; the bytes of all."""
        at = 0
        for block in self.index.blocks:
            self._block_at.append(at)
            at += block.nbytes
        return at

    @property
    def has_own_base(self) -> bool:
        """Whether the plain sums are in the base (`--merge-base`): of floating tensors, only these are the base's bytes."""
        return any(record.mode == COPY and record.info.dtype.compressible for record in self.index.tensors)

    @property
    def arrangement(self) -> Arrangement:
        """How tasks were moved apart."""
        members: list[list[PackedTensor]] = [[] for _ in self.index.groups]
        for record in self.index.tensors:
            if record.mode == TARGET:
                members[record.group].append(record)
        groups = [
            Group(group.prefix, tuple(t.info.name for t in sorted(found, key=lambda t: t.place)))
            for group, found in zip(self.index.groups, members, strict=True)
        ]
        return Arrangement(groups, int(self.metadata["peru.seed"]), self.metadata["peru.decorrelate"], self.metadata["peru.signs"] == "yes")

    def task(self, name: str | None) -> TaskRecord:
        """The record of a task; the only one without a name. UsageError lists those there are."""
        if name is None and len(self.tasks) == 1:
            return self.index.tasks[0]
        if name not in self.tasks:
            has = f"{self.path} holds {', '.join(self.tasks)}"
            raise UsageError(f"{has}: say which" if name is None else f"{has}, and no {name!r}", "--task NAME")
        return self.tasks[name]

    def sums(self, record: PackedTensor, start: int, stop: int) -> Sums:
        """Sums of a tensor from entry `start` to `stop`; integers (n,), int32 if not loaded, not to be written to."""
        low = self._first[record.info.name] + start
        high, size = low + stop - start, self.index.block_entries
        parts = []
        for number in range(low // size, -(-high // size)):
            block = self._loaded[number] if self._loaded else self._cache.get(number, partial(self._decode, number))
            parts.append(block[max(low - number * size, 0) : high - number * size])
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.int32), *parts])

    def mask(self, task: str, record: PackedTensor, start: int, stop: int) -> Flags | None:
        """Which sums from entry `start` to `stop` a task has, the others counting as 0; None: all."""
        return None

    def _decode(self, number: int) -> Sums:
        block, size = self.index.blocks[number], self.index.block_entries
        data = self.container.read("blocks", self._block_at[number], block.nbytes)
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
        """Check the digest of a task's own tensor; BadFile if it was altered."""
        digest = TensorDigest(tensor.info.dtype, tensor.info.shape)
        step = tensor.info.dtype.nbytes(16 * CHUNK)
        for at in range(0, tensor.info.nbytes, step):
            part = memoryview(bytearray(min(step, tensor.info.nbytes - at)))
            self.read_whole(task, tensor, at, part)
            digest.add(leaves(part, tensor.info.dtype))
        if digest.digest()[:SHORT] != tensor.digest:
            raise BadFile(f"{self.path}: tensor {tensor.info.name!r} of task {task.name} was altered", "fetch or make it again")

    def content(self, size: int, digest: bytes) -> bytes:
        """A side file that the pack stores; BadFile if it was altered."""
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
        """Contents of a task's side file that the pack stores."""
        return self.content(file.size, file.digest)

    def close(self) -> None:
        """Release the file."""
        self.container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _narrow(sums: Sums) -> Sums:
    """The same in 16 bits, where they fit."""
    fits = not len(sums) or (sums.min() >= -(1 << 15) and sums.max() < 1 << 15)
    return sums.astype(np.int16) if fits else sums
