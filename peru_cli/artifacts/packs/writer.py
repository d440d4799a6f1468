"""Write packs block by block. Written blocks can be read again before the pack is finished."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from peru_cli.artifacts.codecs import PCO, encode
from peru_cli.artifacts.container import FORMAT, ContainerWriter
from peru_cli.artifacts.packs.pack import Pack, Sums
from peru_cli.artifacts.packs.superposed import BLOCK_ENTRIES, KIND, PackIndex, SumBlock, encode_index
from peru_cli.artifacts.sparse_delta import short_digest


def encode_sums(sums: Sums) -> bytes:
    """The bytes of a block."""
    return encode(np.ascontiguousarray(sums), PCO)


class PackWriter:
    """Writes one pack: `add` in canonical order, `write` each returned block from any thread, then `finish`."""

    def __init__(
        self, target: Path, largest_metadata: Mapping[str, str], sync: bool, kind: str = KIND,
        encode_index: Callable[[PackIndex], bytes] = encode_index,
    ) -> None:  # fmt: skip
        self._fixed, self._encode_index = {"peru.format": FORMAT, "peru.kind": kind}, encode_index
        self._container = ContainerWriter(target, {**self._fixed, **largest_metadata}, sync)
        self.target = target
        self._waiting: list[Sums] = []
        self._tickets = 0
        self._encoded: dict[int, list[bytes]] = {}
        self._lock = threading.Lock()
        self.blocks: list[SumBlock] = []

    def add(self, sums: Sums) -> list[tuple[int, Sums]]:
        """Append sums. Returns the blocks that are now full, with their indices."""
        self._waiting.append(sums)
        full = []
        while sum(map(len, self._waiting)) >= BLOCK_ENTRIES:
            joined = np.concatenate(self._waiting)
            full.append(self._block(joined[:BLOCK_ENTRIES]))
            self._waiting = [joined[BLOCK_ENTRIES:]]
        return full

    def rest(self) -> list[tuple[int, Sums]]:
        """The last block, which may be shorter."""
        joined, self._waiting = np.concatenate([np.empty(0, np.int32), *self._waiting]), []
        return [self._block(joined)] if len(joined) else []

    def _block(self, sums: Sums) -> tuple[int, Sums]:
        self._tickets += 1
        return self._tickets - 1, sums

    def write(self, block: tuple[int, Sums], more: Sequence[bytes] = ()) -> None:
        """Encode a block, and write it and then `more` when its turn comes."""
        self._put(block[0], [encode_sums(block[1]), *more])

    def splice(self, head: Sums, blocks: Sequence[bytes], tail: Sums) -> None:
        """Append sums of which another machine has encoded the full blocks: `head` completes the one that has begun, `tail` begins one."""
        for block in self.add(head):
            self.write(block)
        for data in blocks:
            assert not sum(map(len, self._waiting))
            self._put(self._block(tail)[0], [data])
        self._waiting.append(tail)

    def _put(self, ticket: int, parts: list[bytes]) -> None:
        """Write the parts of a block when its turn comes."""
        with self._lock:
            self._encoded[ticket] = parts
            while (ready := self._encoded.pop(len(self.blocks), None)) is not None:
                self.blocks.append(SumBlock(len(ready[0]), short_digest(ready[0])))
                for part in ready:
                    self._container.append("blocks", part)

    def append_residual(self, data: bytes) -> None:
        """Append a block of a residual, after all sums."""
        self._container.append("blocks", data)

    def read_block(self, offset: int, nbytes: int) -> bytes:
        """Read bytes of blocks that are already written."""
        return self._container.read_first(offset, nbytes)

    def append_whole(self, data: memoryview) -> None:
        """Append bytes of tasks' own tensors, in index order."""
        self._container.append("whole", data)

    def finish(
        self, metadata: Mapping[str, str], index: PackIndex, contents: Sequence[bytes], before: Callable[[], None] = lambda: None
    ) -> int:
        """Write side files, index and header, call `before`, and rename the pack into place. Returns its size in bytes."""
        assert not self._encoded, "a block was never written"
        index.blocks = self.blocks
        for content in contents:
            self._container.append("files", content)
        return self._container.finish({**self._fixed, **metadata}, self._encode_index(index), before)

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._container.__exit__(*exc)


class UnfinishedPack(Pack):
    """A pack whose sums are written but whose index is not."""

    def __init__(self, target: Path, metadata: Mapping[str, str], index: PackIndex, writer: PackWriter) -> None:
        self.path, self.metadata, self.index = target, dict(metadata), index
        self._find_parts(writer.read_block)

    def close(self) -> None:
        """Nothing to close."""
