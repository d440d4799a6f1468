"""The interface of all checkpoints: named tensors whose bytes can be read from any offset."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from peru_cli.checkpoints.digests import CHUNK, SHORT, TensorDigest, leaves
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place, fingerprint, sha256
from peru_cli.errors import BadFile

AGAIN = "run the command again when nothing changes its inputs any more"
PIECE = 16 * CHUNK  # entries read at once where a tensor is only copied, digested or compared


def pieces(info: TensorInfo, read: Callable[[int, memoryview], None], first: int = 0) -> Iterator[tuple[int, memoryview]]:
    """A tensor's bytes from an entry on, piece by piece, in one reused buffer: each piece's offset in bytes, and the piece.

    `read` fills a buffer with the tensor's bytes from an offset on.
    """
    room = memoryview(bytearray(info.dtype.nbytes(min(PIECE, info.entries))))
    for start in range(first, info.entries, PIECE):
        piece = room[: info.dtype.nbytes(min(PIECE, info.entries - start))]
        read(info.dtype.nbytes(start), piece)
        yield info.dtype.nbytes(start), piece


def digest_of(info: TensorInfo, parts: Iterable[tuple[int, memoryview]], use: Callable[[memoryview], object] = lambda data: None) -> bytes:
    """The digest of a tensor out of all its pieces, which go to `use`, too; 32 bytes."""
    tree = TensorDigest(info.dtype, info.shape)
    for _, piece in parts:
        tree.add(leaves(piece, info.dtype))
        use(piece)
    return tree.digest()


class Checkpoint(ABC):
    """Named tensors, metadata and side files.

    `label` is how messages name it. `kind` says in words what the argument was taken for. `side_files`
    maps plain file names (config.json, tokenizer.json, ...) to where they lie. `warnings` are things a
    user should hear once. `files` are where the bytes lie. `expanded` says that they were computed (an
    adapter, an artifact), so that the dtype is no choice of whoever made the model. `part` tells apart what
    comes out of the same files (a pack's task).
    """

    label: str
    kind: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    side_files: Mapping[str, Place]
    warnings: list[str]
    files: Sequence[Place] = ()
    expanded = False
    part: str | None = None
    public_name: str | None = None  # where everybody finds it: org/name@commit of what was read from the Hub

    def told_digest(self, name: str) -> bytes | None:
        """What a tensor's digest should be, 16 bytes, if its file says so."""
        return None

    def agree(self, found: Mapping[str, bytes]) -> None:
        """Compare digests that a pass took of tensors with those that their files tell, and that an earlier pass compared; BadFile."""
        if any(self.told_digest(name) not in (None, digest[:SHORT]) for name, digest in found.items()):
            raise BadFile(f"{self.label} was changed while it was being read: nothing was written", AGAIN)

    @abstractmethod
    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of tensor `name` from byte `offset` on.

        Safe from many threads. Raises BadFile if the file ends too early, OSError if reading fails.
        """

    def read_many(self, parts: Iterable[tuple[TensorInfo, int, memoryview]]) -> None:
        """Fill buffers with bytes of several tensors, from an offset on each; as `read_into`."""
        for info, offset, buffer in parts:
            self.read_into(info.name, offset, buffer)

    def view(self, name: str, offset: int, nbytes: int) -> memoryview | None:
        """The same bytes where they lie, if they lie in memory, to be read only; None elsewhere."""
        return None

    ranged = False  # whether bytes come over the network, so that it pays to say beforehand which

    def expect(self, ranges: Iterable[tuple[str, int, int]], keep: bool = False) -> None:  # noqa: B027 - a disk needs no telling
        """What will be read next: tensor, offset and bytes, each once and in this order.

        `keep` holds it for later passes, until `forget`. Between passes only.
        """

    def echo(self) -> None:  # noqa: B027
        """Say that what stands on these tensors, an adapter or an artifact, reads each range again right after the pass has."""

    def forget(self) -> None:  # noqa: B027
        """Drop what was kept."""

    def close(self) -> None:  # noqa: B027 - not every source holds handles
        """Release file handles; the checkpoint cannot be read afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> bytes:
        """All bytes of one tensor: for small ones."""
        data = bytearray(self.tensors[name].nbytes)
        if data:
            self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def pieces(self, name: str, first: int = 0) -> Iterator[tuple[int, memoryview]]:
        """A tensor's bytes from an entry on, piece by piece (see `pieces`). Between passes only."""
        info = self.tensors[name]
        if self.ranged and first < info.entries:
            self.expect([(name, info.dtype.nbytes(first), info.dtype.nbytes(info.entries - first))])
        yield from pieces(info, lambda offset, buffer: self.read_into(name, offset, buffer), first)

    def digest(
        self,
        name: str,
        use: Callable[[memoryview], object] = lambda data: None,
        first: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> bytes:
        """Digest of a tensor from an entry on, as a tensor of that shape; 32 bytes. Every piece that is read goes to `use`, too."""
        info = self.tensors[name]
        return digest_of(info if shape is None else TensorInfo(name, info.dtype, shape), self.pieces(name, first), use)

    def identity(self) -> str:
        """A digest that changes when the files do: sizes, times of change, all headers; no path is in it."""
        parts: list[object] = [[fingerprint(file) for file in self.files]]
        parts += [
            [(t.name, t.dtype.name, t.shape, t.begin) for _, t in sorted(self.tensors.items())],
            sorted(self.metadata.items()),
            self.part,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def file_digests(self) -> list[str]:
        """SHA-256 of each of the weight files, in ascending order: what the Hub publishes of them."""
        with ThreadPoolExecutor() as pool:
            return sorted(pool.map(sha256, self.files))

    def config(self) -> dict[str, Any]:
        """The model's config.json as a table; empty where there is none or it is unreadable."""
        path = self.side_files.get("config.json")
        if path is None:
            return {}
        try:
            parsed = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}
