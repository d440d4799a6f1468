"""What all artifacts of one fine-tune share: tensors, tensors stored whole, side files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Self, TypeVar

from peru_cli.artifacts.container import Container, opening
from peru_cli.artifacts.index import STORED, Mode, SideFile, TensorRecord
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.digests import SHORT
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.files import BytesFile
from peru_cli.checkpoints.pairing import Prefix
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.source import digest_of, pieces
from peru_cli.errors import BadFile

R = TypeVar("R", bound=TensorRecord)


class SingleArtifact(ABC, Generic[R]):
    """An opened artifact of one fine-tune. Thread-safe."""

    records: dict[str, R]  # by the fine-tune's names, in canonical order

    def __init__(self, source: Place | BytesFile) -> None:
        self.container = Container(source)
        self.path, self.metadata = self.container.path, self.container.metadata
        with opening(self.path, self.close):
            self._open()

    @abstractmethod
    def _open(self) -> None:
        """Decode the index and pass it to `_settle`. BadFile if it is invalid."""

    def _settle(self, tensors: Sequence[R], files: Sequence[SideFile], block_bytes: int) -> None:
        """Take over the index's contents. BadFile if the roles have other sizes."""
        self.prefix = Prefix.decode(self.metadata.get("peru.prefix", ""))
        self.records = {record.info.name: record for record in tensors}
        self.infos = {record.info.name: record.info for record in tensors}
        inputs.remember(self.infos)
        self._files = files
        self._whole_at: dict[str, int] = {}
        whole = 0
        for record in tensors:
            if nbytes := record.whole_bytes:
                self._whole_at[record.info.name] = whole
                whole += nbytes
        stored = sum(file.size for file in files if file.origin == STORED)
        for role, size in (("blocks", block_bytes), ("whole", whole), ("files", stored)):
            if self.container.sizes[role] != size:
                raise BadFile(f"its role {role!r} has {self.container.sizes[role]} bytes, the index accounts for {size}")

    @property
    def result_digest(self) -> bytes:
        """Digest of the checkpoint that unpacking produces; 32 bytes."""
        return bytes.fromhex(self.metadata["peru.result"])

    def base_name(self, record: R) -> str:
        """The base's name of a tensor that is not stored whole."""
        name = self.prefix.base_name(record.info.name)
        if name is None:
            raise BadFile(f"{self.path}: tensor {record.info.name!r} does not fit its own prefix {self.prefix}")
        return name

    def tensors(self) -> list[TensorInfo]:
        """The fine-tune's tensors in canonical order."""
        return list(self.infos.values())

    def read_whole(self, record: R, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes stored whole, from byte `offset` of the tensor on."""
        skipped = record.info.dtype.nbytes(record.base_entries)
        self.container.read_into("whole", self._whole_at[record.info.name] + offset - skipped, buffer)

    def verify_whole(self, record: R) -> None:
        """Check the digest of a tensor's bytes stored whole. BadFile if they were altered."""
        if record.mode != Mode.WHOLE and not record.base_rows:
            return
        skipped = record.info.dtype.nbytes(record.base_entries)
        stored = TensorInfo(record.info.name, record.info.dtype, whole_shape(record))
        found = digest_of(stored, pieces(stored, lambda at, buffer: self.read_whole(record, skipped + at, buffer)))
        if found[:SHORT] != record.whole_digest:
            raise BadFile(f"{self.path}: tensor {record.info.name!r}, stored whole, was altered", "fetch or make it again")

    def side_file(self, file: SideFile) -> bytes:
        """Contents of a side file stored in the artifact. BadFile if it was altered."""
        before = self._files[: self._files.index(file)]
        data = self.container.read("files", sum(other.size for other in before if other.origin == STORED), file.size)
        if short_digest(data) != file.digest:
            raise BadFile(f"{self.path}: the side file {file.name!r} was altered", "fetch or make it again")
        return data

    def close(self) -> None:
        """Release the file."""
        self.container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def whole_shape(record: TensorRecord) -> tuple[int, ...]:
    """Shape of the part of a tensor that is stored whole."""
    shape = record.info.shape
    return (shape[0] - record.base_rows, *shape[1:]) if record.base_rows else shape
