"""Digests of tensors, as docs/format.md defines them: a tree over fixed chunks, so that tiles do not matter.

leaf i  = BLAKE3(bytes of entries [i * 2^14, (i + 1) * 2^14))
tensor  = BLAKE3("peru tensor 1" 0x00, dtype, 0x00, shape as decimals joined by ",", 0x00, all leaves)
model   = BLAKE3("peru checkpoint 1" 0x00, for each tensor by name: length of the name as u32, the name, tensor digest)
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

from blake3 import blake3

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo

CHUNK = 1 << 14  # entries; tiles are multiples of it
SHORT = 16  # bytes of a tensor's digest that an artifact's index stores


def leaves(data: memoryview, dtype: Dtype) -> bytes:
    """Digests of the chunks in `data`, which begins at a chunk boundary; 32 bytes for each chunk."""
    size = dtype.nbytes(CHUNK)
    if 0 < len(data) <= size:
        return blake3(data).digest()
    hasher, found = blake3(), list[bytes]()
    for i in range(0, len(data), size):
        hasher.reset()  # a tenth faster than a new one
        found.append(hasher.update(data[i : i + size]).digest())
    return b"".join(found)


@lru_cache(1024)
def _head(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What precedes a tensor's leaves: the same for all tensors of a shape."""
    return b"peru tensor 1\0" + dtype.encode() + b"\0" + ",".join(map(str, shape)).encode() + b"\0"


def digest_of_leaves(dtype: Dtype, shape: tuple[int, ...], all_leaves: bytes) -> bytes:
    """A tensor's digest from the digests of all its chunks; 32 bytes."""
    digest: bytes = blake3(_head(dtype.name, shape) + all_leaves).digest()
    return digest


_lock = threading.Lock()  # for all tensors together: it is held for microseconds


class TensorDigest:
    """Collects a tensor's leaves: `add` in order, `add_at` from any thread in any order.

    What hashes takes 2 kB, and there may be a hundred thousand tensors: it lives from the first leaf to the last.
    """

    __slots__ = ("_digest", "_dtype", "_hash", "_left", "_next", "_shape", "_waiting")

    def __init__(self, dtype: Dtype, shape: tuple[int, ...]) -> None:
        self._dtype, self._shape = dtype, shape
        self._left = -(-math.prod(shape) // CHUNK)  # chunks
        self._hash: Any = None
        self._digest: bytes | None = None
        self._next = 0
        self._waiting: dict[int, bytes] | None = None

    def add(self, chunk_leaves: bytes) -> None:
        """Append the leaves of the next chunks."""
        if not chunk_leaves:
            return
        if self._hash is None:
            assert self._digest is None, "more leaves than the tensor has"
            if len(chunk_leaves) == self._left * blake3.digest_size:  # all of a small tensor
                self._digest, self._left = digest_of_leaves(self._dtype, self._shape, chunk_leaves), 0
                return
            self._hash = self._begun()
        self._hash.update(chunk_leaves)
        self._left -= len(chunk_leaves) // blake3.digest_size
        if not self._left:
            self._digest, self._hash = self._hash.digest(), None

    def _begun(self) -> Any:
        return blake3(_head(self._dtype.name, self._shape))

    def add_at(self, start: int, chunk_leaves: bytes) -> None:
        """Add the leaves of the chunks from entry `start` on. Early leaves wait for those before them."""
        with _lock:
            if start != self._next:
                self._waiting = self._waiting or {}
                self._waiting[start] = chunk_leaves
                return
            ready: bytes | None = chunk_leaves
            while ready is not None:
                self.add(ready)
                self._next += len(ready) // blake3.digest_size * CHUNK
                ready = self._waiting.pop(self._next, None) if self._waiting else None

    @property
    def complete(self) -> bool:
        """Whether all leaves were added."""
        return not self._left

    def digest(self) -> bytes:
        """The digest, 32 bytes."""
        assert not self._waiting, "leaves are missing"
        if self._digest is not None:
            return self._digest
        return (self._hash if self._hash is not None else self._begun()).digest()  # type: ignore[no-any-return]


class Digests:
    """The digests of many tensors, each from its leaves in any order. Thread-safe.

    Beside its digest, a tensor takes memory only from its first leaf to its last: there may be a hundred thousand."""

    def __init__(self, tensor: Callable[[str], TensorInfo | None]) -> None:
        """`tensor` finds a tensor by the name that its leaves come under."""
        self._tensor = tensor
        self._begun: dict[str, TensorDigest] = {}
        self.found: dict[str, bytes] = {}  # 32 bytes each; digests that an earlier run found can be put here

    def add_at(self, name: str, start: int, chunk_leaves: bytes) -> None:
        """Add the leaves of the chunks from entry `start` of a tensor on."""
        info = self._tensor(name)
        assert info is not None, name
        if len(chunk_leaves) * CHUNK >= info.entries * blake3.digest_size:  # all of it
            self.found[name] = digest_of_leaves(info.dtype, info.shape, chunk_leaves)
            return
        tree = self._begun.get(name) or self._begun.setdefault(name, TensorDigest(info.dtype, info.shape))
        tree.add_at(start, chunk_leaves)
        if tree.complete:
            self.found[name] = tree.digest()
            self._begun.pop(name, None)

    def digest(self, name: str) -> bytes:
        """The digest of a tensor whose leaves were all added; 32 bytes."""
        if (found := self.found.get(name)) is None:
            info = self._tensor(name)
            assert info is not None and not info.entries, f"leaves of {name} are missing"
            found = self.found[name] = digest_of_leaves(info.dtype, info.shape, b"")
        return found

    def take(self, name: str) -> bytes:
        """The digest of a tensor, which is then forgotten; 32 bytes."""
        digest = self.digest(name)
        del self.found[name]
        return digest

    def all(self, names: Collection[str]) -> dict[str, bytes]:
        """The digests of these tensors by name: a table of its own only if others were found, too."""
        for name in names:
            self.digest(name)
        return self.found if len(self.found) == len(names) else {name: self.found[name] for name in names}


def tensor_digest(info: TensorInfo, data: bytes | memoryview) -> bytes:
    """The digest of a tensor whose bytes are in memory."""
    tree = TensorDigest(info.dtype, info.shape)
    tree.add(leaves(memoryview(data), info.dtype))
    return tree.digest()


def checkpoint_digest(digests: Mapping[str, bytes]) -> bytes:
    """The digest of a whole checkpoint from its tensors' 32-byte digests; 32 bytes."""
    return digest_of_all(b"peru checkpoint 1\0", digests)


def digest_of_all(purpose: bytes, digests: Mapping[str, bytes]) -> bytes:
    """One digest of several by name; 32 bytes. `purpose` keeps digests of different things apart."""
    total = blake3(purpose)
    for name in sorted(digests):
        encoded = name.encode("utf-8")
        total.update(len(encoded).to_bytes(4, "little") + encoded + digests[name])
    return total.digest()


def digest_of_lines(lines: Iterable[str]) -> str:
    """One digest of lines, which are never held together; hexadecimal."""
    total = blake3(b"peru lines 1\0")
    for line in lines:
        total.update(f"{line}\n".encode())
    return total.hexdigest()
