"""Read artifacts of kind `sparse-delta`. Every byte is checked before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from peru_cli.artifacts.index import STORED, Mode, Stream, TensorRecord, decode_index
from peru_cli.artifacts.kept import Ints, KeptEntries
from peru_cli.artifacts.single import SingleArtifact
from peru_cli.artifacts.sparse_delta import KIND, Array, Entries, check_metadata
from peru_cli.checkpoints.digests import CHUNK
from peru_cli.errors import BadFile

_PIECE = 16 * CHUNK  # entries decoded at once


class SparseDelta(SingleArtifact[TensorRecord]):
    """An opened sparse-delta artifact. Thread-safe."""

    def _open(self) -> None:
        if (kind := self.metadata.get("peru.kind")) != KIND:
            raise BadFile(f"an artifact of kind {kind!r}, unknown to this version of peru", "pip install -U peru-cli")
        check_metadata(self.metadata)
        self.index = index = decode_index(self.container.index)
        deltas = [record for record in index.tensors if record.mode == Mode.DELTA]
        for key, counted in (("peru.entries", sum(r.base_entries for r in deltas)), ("peru.kept", sum(r.kept for r in deltas))):
            if int(self.metadata[key]) != counted:
                raise BadFile(f"its metadata has {key!r} as {self.metadata[key]}, its index has {counted}")
        self._kept = KeptEntries(self.path, index.tensors, index.streams, index.blocks, partial(self.container.read, "blocks"))
        self._settle(index.tensors, index.files, self._kept.nbytes)

    def entries(self, record: TensorRecord, start: int, stop: int) -> tuple[Stream | None, Entries]:
        """Kept entries of a tensor from entry `start` to `stop`; positions count from `start`."""
        return self._kept.entries(record, start, stop)

    def together(self, records: Sequence[TensorRecord], begins: Ints) -> tuple[Stream | None, Entries, Ints] | None:
        """Kept entries of several whole tensors at once: see KeptEntries.together."""
        return self._kept.together(records, begins)

    def verify(self) -> None:
        """Read all of it and compare it with its digests: everything that needs no base. BadFile if it was altered."""
        for record in self.index.tensors:
            self.verify_whole(record)
            for start in range(0, record.base_entries if record.kept else 0, _PIECE):
                self.entries(record, start, min(start + _PIECE, record.base_entries))
        for file in self.index.files:
            if file.origin == STORED:
                self.side_file(file)

    def values_of(self, number: int) -> Iterator[Array]:
        """Decoded values of a stream, block by block. Entries stored apart appear as markers."""
        return self._kept.values_of(number)
