"""Read artifacts of kind `sparse-delta`; every byte is checked before it is used."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

from peru_cli.artifacts.container import Container, opening
from peru_cli.artifacts.index import DELTA, STORED, WHOLE, SideFile, Stream, TensorRecord, decode_index
from peru_cli.artifacts.kept import KeptEntries
from peru_cli.artifacts.sparse_delta import KIND, Array, Entries, check_metadata, short_digest
from peru_cli.checkpoints.digests import SHORT, TensorDigest, leaves
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Prefix
from peru_cli.checkpoints.places import Place
from peru_cli.errors import BadFile
from peru_cli.streaming.tiles import CHUNK


class SparseDelta:
    """An opened sparse-delta artifact. Safe from many threads."""

    def __init__(self, path: Place) -> None:
        self.container = Container(path)
        with opening(path, self.close):
            self._open()
        self.lock = threading.Lock()

    def _open(self) -> None:
        self.path, self.metadata = self.container.path, self.container.metadata
        if (kind := self.metadata.get("peru.kind")) != KIND:
            raise BadFile(f"an artifact of kind {kind!r}, unknown to this version of peru", "pip install -U peru-cli")
        check_metadata(self.metadata)
        self.index = decode_index(self.container.index)
        deltas = [record for record in self.index.tensors if record.mode == DELTA]
        for key, counted in (("peru.entries", sum(r.base_entries for r in deltas)), ("peru.kept", sum(r.kept for r in deltas))):
            if int(self.metadata[key]) != counted:
                raise BadFile(f"its metadata has {key!r} as {self.metadata[key]}, its index has {counted}")
        self.prefix = Prefix.decode(self.metadata.get("peru.prefix", ""))
        self.records = {record.info.name: record for record in self.index.tensors}
        self._whole_at: dict[str, int] = {}
        whole = 0
        for record in self.index.tensors:
            self._whole_at[record.info.name] = whole
            whole += record.whole_bytes
        index = self.index
        self._kept = KeptEntries(self.path, index.tensors, index.streams, index.blocks, partial(self.container.read, "blocks"))
        files = sum(file.size for file in self.index.files if file.origin == STORED)
        for role, size in (("blocks", self._kept.nbytes), ("whole", whole), ("files", files)):
            if self.container.sizes[role] != size:
                raise BadFile(f"its role {role!r} has {self.container.sizes[role]} bytes, the index accounts for {size}")

    @property
    def result_digest(self) -> bytes:
        """Digest of the checkpoint that unpacking gives; 32 bytes."""
        return bytes.fromhex(self.metadata["peru.result"])

    def base_name(self, record: TensorRecord) -> str:
        """The base's name for a tensor that is not stored whole."""
        name = self.prefix.base_name(record.info.name)
        if name is None:
            raise BadFile(f"{self.path}: tensor {record.info.name!r} does not fit its own prefix {self.prefix}")
        return name

    def tensors(self) -> list[TensorInfo]:
        """The fine-tune's tensors in canonical order."""
        return [record.info for record in self.index.tensors]

    def entries(self, record: TensorRecord, start: int, stop: int) -> tuple[Stream | None, Entries]:
        """Kept entries of a tensor from entry `start` to `stop`; positions count from `start`."""
        return self._kept.entries(record, start, stop)

    def values_of(self, number: int) -> Iterator[Array]:
        """Decoded values of a stream, block by block; those of entries kept apart are markers."""
        return self._kept.values_of(number)

    # -- tensors stored whole, side files -------------------------------------------------------------

    def read_whole(self, record: TensorRecord, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes that the artifact stores whole, from byte `offset` of the tensor on."""
        skipped = record.info.dtype.nbytes(record.base_entries)
        self.container.read_into("whole", self._whole_at[record.info.name] + offset - skipped, buffer)

    def verify_whole(self, record: TensorRecord) -> None:
        """Check the digest of what is stored whole of a tensor; BadFile if it was altered."""
        if record.mode != WHOLE and not record.base_rows:
            return
        offset = record.info.dtype.nbytes(record.base_entries)
        digest = TensorDigest(record.info.dtype, whole_shape(record))
        room = bytearray(min(record.info.dtype.nbytes(16 * CHUNK), record.whole_bytes))
        for at in range(0, record.whole_bytes, max(len(room), 1)):
            part = memoryview(room)[: record.whole_bytes - at]
            self.read_whole(record, offset + at, part)
            digest.add(leaves(part, record.info.dtype))
        if digest.digest()[:SHORT] != record.whole_digest:
            raise BadFile(f"{self.path}: tensor {record.info.name!r}, stored whole, was altered", "fetch or make it again")

    def side_file(self, file: SideFile) -> bytes:
        """Contents of a side file that the artifact stores; BadFile if it was altered."""
        at = 0
        for other in self.index.files:
            if other is file:
                break
            at += other.size if other.origin == STORED else 0
        data = self.container.read("files", at, file.size)
        if short_digest(data) != file.digest:
            raise BadFile(f"{self.path}: the side file {file.name!r} was altered", "fetch or make it again")
        return data

    def close(self) -> None:
        """Release the file."""
        self.container.close()

    def __enter__(self) -> SparseDelta:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def whole_shape(record: TensorRecord) -> tuple[int, ...]:
    """Shape of the part of a tensor that is stored whole."""
    shape = record.info.shape
    return (shape[0] - record.base_rows, *shape[1:]) if record.base_rows else shape
