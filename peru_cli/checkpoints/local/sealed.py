"""Digests in plain files that peru writes (merges, heads, adapters, statistics), checked whenever peru reads them.

Three entries of the safetensors metadata, which every reader skips (docs/format.md, "Sealed files"):

peru.sealed   "1", the version of this.
peru.digests  64 hexadecimal digits, BLAKE3("peru file 1" 0x00, the file's header in which these 64 digits are zeros), then for each
              tensor by name 32 digits, the first half of its digest (digests.py).
peru.files    JSON: the files that were written beside the weights but README.md, each with the first half of its BLAKE3.

So every byte of such a file is covered. A file without these entries was not written by peru, and is read without checks."""

from __future__ import annotations

import json
import threading
from binascii import hexlify
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from blake3 import blake3

from peru_cli.checkpoints.digests import CHUNK, SHORT, TensorDigest, digest_of_all, digest_of_leaves, leaves
from peru_cli.checkpoints.header import Header, TensorInfo
from peru_cli.errors import BadFile

SEALED, DIGESTS, FILES = "peru.sealed", "peru.digests", "peru.files"
VERSION = "1"
_SEAL = 64  # hexadecimal digits
_EACH = 2 * SHORT
_PIECE = 64 * CHUNK  # entries read at once
AGAIN = "fetch or make it again"


_lock = threading.Lock()  # for all tensors' pieces


class Collected:
    """A tensor's digest from pieces in any order, some of them repeated. Thread-safe."""

    __slots__ = ("_digest", "_next", "_tree", "_waiting", "info", "touched")

    def __init__(self, info: TensorInfo) -> None:
        self.info = info
        self._next = 0  # chunks that are in the digest
        # Created on demand: there may be a hundred thousand tensors, and most are read in one piece.
        self._tree: TensorDigest | None = None
        self._waiting: dict[int, bytes] | None = None
        self._digest: bytes | None = None  # once it is complete
        self.touched = False

    @property
    def complete(self) -> bool:
        """Whether every chunk has been read."""
        return self._next * CHUNK >= self.info.entries

    @property
    def next_entry(self) -> int:
        """The first entry that is not in the tree."""
        return self._next * CHUNK

    def saw(self, offset: int, data: memoryview) -> bool:
        """Add bytes from an offset on. Returns whether the tensor is now complete. Ignores partial chunks."""
        self.touched = True
        info = self.info
        dtype, total = info.dtype, info.nbytes
        size = dtype.nbytes(CHUNK)
        if self.complete or offset % size or (len(data) % size and offset + len(data) != total) or not len(data):
            return False
        first = offset // size
        if first + -(-len(data) // size) <= self._next or first in (self._waiting or ()):
            return False
        found = leaves(data, dtype)
        with _lock:
            if self.complete:
                return False
            if info.entries <= CHUNK:
                self._digest, self._next = digest_of_leaves(dtype, info.shape, found)[:SHORT], 1
                return True
            waiting = self._waiting if self._waiting is not None else {}
            waiting[first] = found
            self._settle(waiting)
            self._waiting = waiting or None
            return self.complete

    def _settle(self, waiting: dict[int, bytes]) -> None:
        width = blake3.digest_size
        tree = self._tree = self._tree or TensorDigest(self.info.dtype, self.info.shape)
        for first in sorted(waiting):
            if first > self._next:
                break
            ready = waiting.pop(first)[(self._next - first) * width :]
            tree.add(ready)
            self._next += len(ready) // width
        if self.complete:
            self._digest, self._tree = tree.digest()[:SHORT], None

    def digest(self) -> bytes:
        """The first half of the digest. Every chunk must have been added."""
        assert self.complete, self.info.name
        return self._digest if self._digest is not None else digest_of_leaves(self.info.dtype, self.info.shape, b"")[:SHORT]


def blank(tensors: Sequence[TensorInfo], files: Mapping[str, bytes]) -> dict[str, str]:
    """Blank entries for a file with these tensors, as long as the final ones.

    README.md, the card, is left out: people edit it, and no weight depends on it."""
    digests = {name: file_digest(content) for name, content in sorted(files.items()) if name != "README.md"}
    told = {FILES: json.dumps(digests)} if digests else {}
    return {SEALED: VERSION, DIGESTS: "0" * (_SEAL + _EACH * len(tensors)), **told}


def filled(header: bytes, digests: Mapping[str, bytes]) -> tuple[int, bytes]:
    """The value of a header's blank entry: its offset, and its bytes. Copies no header, which may have many megabytes."""
    at, end = _span(header)
    told = hexlify(b"".join(digests[name] for name in sorted(digests)))
    assert end - at == _SEAL + len(told)
    seal, rest = blake3(b"peru file 1\0"), memoryview(header)
    for part in (rest[: at + _SEAL], told, rest[end:]):
        seal.update(part)
    return at, seal.hexdigest().encode() + told


def blanked(header: bytes) -> bytes:
    """A header with its entry blank again."""
    at, end = _span(header)
    return header[:at] + b"0" * (end - at) + header[end:]


def _span(header: bytes) -> tuple[int, int]:
    """Where the value of the entry begins and ends. BadFile if it is not written as peru writes it."""
    key = f'"{DIGESTS}":"'.encode()
    at = header.find(key)
    end = header.find(b'"', at + len(key))
    if at < 0 or end < 0:
        raise BadFile(f"its entry {DIGESTS} was altered after it was written", AGAIN)
    return at + len(key), end


def _seal_of(header: bytes) -> str:
    return blake3(b"peru file 1\0" + header).hexdigest()


def is_sealed(metadata: Mapping[str, str]) -> bool:
    """Whether a file carries digests. One of the two entries is enough, so that damage to the other cannot hide it."""
    return DIGESTS in metadata or SEALED in metadata


def read_digests(header: Header, raw: bytes) -> dict[str, bytes]:
    """Digests of a sealed file's tensors. BadFile if its header, `raw`, was altered."""
    text = header.metadata.get(DIGESTS, "")
    if header.metadata.get(SEALED) not in (None, VERSION) and DIGESTS in header.metadata:
        raise BadFile(f"sealed in version {header.metadata[SEALED]!r}, this peru knows {VERSION}", "pip install -U peru-cli, or " + AGAIN)
    names = sorted(header.tensors)
    at, end = _span(raw)
    zeros = raw[:at] + b"0" * min(_SEAL, end - at) + raw[at + min(_SEAL, end - at) :]
    if SEALED not in header.metadata or len(text) != _SEAL + _EACH * len(names) or _seal_of(zeros) != text[:_SEAL]:
        hint = f"{AGAIN}; whoever changed it on purpose takes the entries {SEALED} and {DIGESTS} out of its metadata"
        raise BadFile("its header was altered after it was written", hint)
    told = bytes.fromhex(text[_SEAL:])
    return {name: told[i * SHORT : (i + 1) * SHORT] for i, name in enumerate(names)}


class Source(Protocol):
    """A source of tensors' bytes."""

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of a tensor."""
        ...


class Sealed:
    """One file's digests, and what has been read of it."""

    def __init__(self, path: Any, tensors: Mapping[str, TensorInfo], digests: Mapping[str, bytes], rest: Any) -> None:
        """`rest` is a context manager that opens the file's tensors again, for what a command did not read."""
        self._path, self._rest, self.digests = path, rest, digests
        self.tensors = {name: Collected(info) for name, info in tensors.items()}

    def saw(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes that were read. BadFile as soon as a tensor is complete and differs from what was written."""
        collected = self.tensors[name]
        if not collected.complete and collected.saw(offset, data):
            self._compare(name)

    def agree(self, name: str, digest: bytes) -> None:
        """Compare a tensor's digest that a pass has taken, here or on other machines. BadFile if it differs."""
        if digest[:SHORT] != self.digests[name]:
            if self.tensors[name].complete:  # an earlier pass read what was written
                raise BadFile(f"{self._path} was changed while it was being read: nothing was written", AGAIN)
            raise self._altered(name)
        self.tensors[name].touched = False  # nothing is left to read of it

    def _compare(self, name: str) -> None:
        if self.tensors[name].digest() != self.digests[name]:
            raise self._altered(name)

    def _altered(self, name: str) -> BadFile:
        return BadFile(f"{self._path}: tensor {name!r} was altered after it was written", AGAIN)

    def finish(self) -> None:
        """Read the rest of tensors that were read in part, or not by whole chunks, and compare."""
        self.verify([name for name, collected in self.tensors.items() if collected.touched])

    def verify(self, names: Iterable[str]) -> None:
        """Check these tensors, reading what has not been read. BadFile for the first that was altered."""
        left = [name for name in names if not self.tensors[name].complete]
        if not left:
            return
        with self._rest() as source:
            for name in left:
                complete(self.tensors[name], lambda offset, buffer, name=name: source.read_into(name, offset, buffer))
                self._compare(name)


def complete(collected: Collected, read: Any) -> None:
    """Add the rest of a tensor to its digest, with `read(offset, buffer)`."""
    if collected.complete:
        return
    info = collected.info
    room = bytearray(info.dtype.nbytes(min(_PIECE, info.entries)))
    while not collected.complete:
        start = collected.next_entry
        offset = info.dtype.nbytes(start)
        piece = memoryview(room)[: min(len(room), info.nbytes - offset)]
        read(offset, piece)
        collected.saw(offset, piece)


def model_digest(digests: Mapping[str, bytes]) -> str:
    """The content of all files of a model together, whatever the sharding; hexadecimal."""
    return digest_of_all(b"peru model 1\0", digests).hex()


def file_digest(content: bytes) -> str:
    """Digest of a small file beside the weights; hexadecimal."""
    return blake3(content).digest()[:SHORT].hex()


def told_files(metadata: Mapping[str, str]) -> dict[str, str]:
    """Recorded digests of the files beside sealed weights, by name."""
    try:
        table = json.loads(metadata.get(FILES, "{}"))
    except ValueError:
        return {}
    return {str(name): str(digest) for name, digest in table.items()} if isinstance(table, dict) else {}
