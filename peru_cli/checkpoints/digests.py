"""Digests of tensors, as docs/format.md defines them: a tree over fixed chunks, so that tiles do not matter.

leaf i  = BLAKE3(bytes of entries [i * 2^14, (i + 1) * 2^14))
tensor  = BLAKE3("peru tensor 1" 0x00, dtype, 0x00, shape as decimals joined by ",", 0x00, all leaves)
model   = BLAKE3("peru checkpoint 1" 0x00, for each tensor by name: length of the name as u32, the name, tensor digest)
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

from blake3 import blake3

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo

CHUNK = 1 << 14  # entries; tiles are multiples of it
SHORT = 16  # bytes of a tensor's digest that the index of an artifact keeps


def leaves(data: memoryview, dtype: Dtype) -> bytes:
    """Digests of the chunks in `data`, which begins at a chunk's boundary; 32 bytes a chunk."""
    size = dtype.nbytes(CHUNK)
    return b"".join(blake3(data[i : i + size]).digest() for i in range(0, len(data), size))


class TensorDigest:
    """Collects a tensor's leaves; `add` in order, `add_at` from any thread in any order."""

    def __init__(self, dtype: Dtype, shape: tuple[int, ...]) -> None:
        self._hash = blake3(b"peru tensor 1\0" + dtype.name.encode() + b"\0" + ",".join(map(str, shape)).encode() + b"\0")
        self._lock = threading.Lock()
        self._next = 0
        self._waiting: dict[int, bytes] = {}

    def add(self, chunk_leaves: bytes) -> None:
        """Append the leaves of the next chunks."""
        self._hash.update(chunk_leaves)

    def add_at(self, start: int, chunk_leaves: bytes) -> None:
        """Give the leaves of the chunks from entry `start` on; early ones wait for those before them."""
        with self._lock:
            self._waiting[start] = chunk_leaves
            while (ready := self._waiting.pop(self._next, None)) is not None:
                self._hash.update(ready)
                self._next += len(ready) // blake3.digest_size * CHUNK

    def digest(self) -> bytes:
        """32 bytes."""
        assert not self._waiting, "leaves are missing"
        return self._hash.digest()


class KnownDigest(TensorDigest):
    """The digest of a tensor that an earlier run has read."""

    def __init__(self, digest: bytes) -> None:
        self._known = digest

    def digest(self) -> bytes:
        return self._known


def tensor_digest(info: TensorInfo, data: bytes | memoryview) -> bytes:
    """The digest of a tensor whose bytes are at hand."""
    tree = TensorDigest(info.dtype, info.shape)
    tree.add(leaves(memoryview(data), info.dtype))
    return tree.digest()


def checkpoint_digest(digests: Mapping[str, bytes]) -> bytes:
    """The digest of a whole checkpoint from its tensors' 32-byte digests; 32 bytes."""
    total = blake3(b"peru checkpoint 1\0")
    for name in sorted(digests):
        encoded = name.encode("utf-8")
        total.update(len(encoded).to_bytes(4, "little") + encoded + digests[name])
    return total.digest()
