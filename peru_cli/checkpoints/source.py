"""The interface of all checkpoints: named tensors whose bytes can be read from any offset."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from peru_cli.checkpoints.bundle import Bundle, pieces_of
from peru_cli.checkpoints.digests import CHUNK, SHORT, TensorDigest, digest_of_lines, leaves
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place, fingerprint, sha256
from peru_cli.errors import BadFile

AGAIN = "run the command again when nothing changes its inputs any more"
PIECE = 16 * CHUNK  # entries read at once to copy, digest or compare a tensor


def pieces(info: TensorInfo, read: Callable[[int, memoryview], None], first: int = 0) -> Iterator[tuple[int, memoryview]]:
    """A tensor's bytes from an entry on, in pieces that share one buffer: each piece's offset in bytes, and the piece.

    `read` fills a buffer with the tensor's bytes from an offset on."""
    room = memoryview(bytearray(info.dtype.nbytes(min(PIECE, info.entries))))
    for start in range(first, info.entries, PIECE):
        piece = room[: info.dtype.nbytes(min(PIECE, info.entries - start))]
        read(info.dtype.nbytes(start), piece)
        yield info.dtype.nbytes(start), piece


def digest_of(info: TensorInfo, parts: Iterable[tuple[int, memoryview]], use: Callable[[memoryview], object] = lambda data: None) -> bytes:
    """The digest of a tensor from all its pieces, which are also passed to `use`; 32 bytes."""
    tree = TensorDigest(info.dtype, info.shape)
    for _, piece in parts:
        tree.add(leaves(piece, info.dtype))
        use(piece)
    return tree.digest()


class Checkpoint(ABC):
    """Named tensors, metadata and side files.

    `label` is its name in messages. `kind` says in words what the argument is. `side_files` maps plain file names (config.json,
    tokenizer.json, ...) to their places. `warnings` are shown to the user once. `files` hold the bytes. `expanded` says that the
    tensors were computed (an adapter, an artifact), so that nobody chose their dtype. `part` distinguishes checkpoints from the
    same files (a pack's tasks)."""

    label: str
    kind: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    side_files: Mapping[str, Place]
    warnings: list[str]
    files: Sequence[Place] = ()
    expanded = False
    part: str | None = None
    public_name: str | None = None  # where everybody can find it: org/name@commit for what was read from the Hub

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

        Thread-safe. Raises BadFile if the file ends too early, OSError if reading fails."""

    def read_bundle(self, info: Bundle, start: int, buffer: memoryview) -> None:
        """Fill a buffer with entries of a bundle of these tensors, from `start` on; like `read_into`."""
        for member, first, piece in pieces_of(info, start, buffer):
            self.read_into(member.name, member.dtype.nbytes(first), piece)

    def view(self, name: str, offset: int, nbytes: int) -> memoryview | None:
        """The same bytes without a copy, if they are in memory, read-only. None otherwise."""
        return None

    ranged = False  # whether bytes come over the network, so that announcing reads pays

    def expect(self, ranges: Iterable[tuple[str, int, int]], keep: bool = False) -> None:  # noqa: B027 - a disk needs no telling
        """Announce what will be read next: tensor, offset and bytes, each once and in this order.

        `keep` holds it for later passes, until `forget`. Between passes only."""

    def echo(self) -> None:  # noqa: B027
        """Announce that an adapter or artifact on these tensors reads each range again right after the pass has."""

    def forget(self) -> None:  # noqa: B027
        """Drop what was kept."""

    def close(self) -> None:  # noqa: B027 - not every source holds handles
        """Release file handles. The checkpoint cannot be read afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> bytes:
        """All bytes of one tensor; for small ones."""
        data = bytearray(self.tensors[name].nbytes)
        if data:
            self.read_into(name, 0, memoryview(data))
        return bytes(data)

    def pieces(self, name: str, first: int = 0) -> Iterator[tuple[int, memoryview]]:
        """A tensor's bytes from an entry on, in pieces (see `pieces`). Between passes only."""
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
        """Digest of a tensor from an entry on, as a tensor of that shape; 32 bytes. Every piece is also passed to `use`."""
        info = self.tensors[name]
        return digest_of(info if shape is None else TensorInfo(name, info.dtype, shape), self.pieces(name, first), use)

    def identity(self) -> str:
        """A digest that changes when the files do: sizes, modification times, all headers. It contains no path."""
        forms = {info.shape: str(info.shape) for info in self.tensors.values()}
        infos = (self.tensors[name] for name in sorted(self.tensors))
        tensors = digest_of_lines(f"{info.name}\0{info.dtype.name} {forms[info.shape]} {info.begin}" for info in infos)
        parts = [[fingerprint(file) for file in self.files], tensors, sorted(self.metadata.items()), self.part]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def file_digests(self) -> list[str]:
        """SHA-256 of each weight file, in ascending order: what the Hub publishes of them."""
        with ThreadPoolExecutor() as pool:
            return sorted(pool.map(sha256, self.files))

    def config(self) -> dict[str, Any]:
        """The model's config.json as a table. Empty if it is missing or unreadable."""
        path = self.side_files.get("config.json")
        if path is None:
            return {}
        try:
            parsed = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return parsed if isinstance(parsed, dict) else {}


class Over(Checkpoint):
    """A checkpoint whose bytes come from another one, `below`, with other names, forms or values. It is that one in everything else."""

    def __init__(self, below: Checkpoint, what: str) -> None:
        """`what` says in words what is different."""
        self.below = below
        self.label, self.kind = below.label, f"{below.kind}{what}"
        self.metadata, self.warnings, self.side_files = below.metadata, below.warnings, below.side_files
        self.expanded, self.ranged, self.files = below.expanded, below.ranged, below.files
        self.part, self.public_name = below.part, below.public_name

    def echo(self) -> None:
        self.below.echo()

    def forget(self) -> None:
        self.below.forget()

    def close(self) -> None:
        self.below.close()
