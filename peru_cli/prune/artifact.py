"""An unfinished artifact of `peru prune`: kept entries, tensors stored whole, side files, metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from peru_cli.artifacts.container import seal_of
from peru_cli.artifacts.index import EXACT, FROM_BASE, ROUNDED, SIGN, STORED, Mode, SideFile, Stream, TensorRecord
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.artifacts.sparse_delta import SparseDeltaWriter, short_digest
from peru_cli.checkpoints.base_name import BaseName
from peru_cli.checkpoints.digests import SHORT, TensorDigest, checkpoint_digest, leaves
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.atomic import PartialFile
from peru_cli.checkpoints.local.journal import Journal
from peru_cli.checkpoints.names.renamed import record_rules
from peru_cli.checkpoints.pairing import Pair
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile
from peru_cli.methods.compact.magnitude import key_value
from peru_cli.prune.gates import Gate
from peru_cli.prune.journal import written_blocks
from peru_cli.vectors.family import TaskVector
from peru_cli.vectors.selection import Select, Sink

SEALED = "sealed"  # in a journal: digests of finished artifacts by file name, before any of them is renamed into place


@dataclass(frozen=True)
class PruneOptions:
    """What to keep. `density` None keeps every changed entry (lossless)."""

    density: Fraction | None
    scope: str = "global"  # or "tensor", or "sign" (each sign of each tensor)
    values: str = "auto"  # or "exact", "bf16", "log2", "sign"
    per_task: str | None = None
    base_name: BaseName | None = None
    allow_unpaired: bool = False  # store tensors without a partner whole, however large they are
    codes: bool = False  # store differences of codes byte by byte: both models' codes are kept as they are
    gates: tuple[Gate, ...] = ()  # that the finished artifacts must pass
    about: tuple[tuple[str, str], ...] = ()  # metadata that the artifacts carry besides

    @property
    def bundled(self) -> bool:
        """Whether small tensors may share a tile: unless each tensor has its own threshold or scale."""
        return not self.by_tensor and self.values != "sign"

    @property
    def by_tensor(self) -> bool:
        """Whether each tensor has its own threshold."""
        return self.density is not None and self.scope != "global"

    def coding(self, dtype: Dtype) -> int:
        """How kept entries of a dtype are stored. `auto` is exact for 16 bits and if lossless, `bf16` is exact for 16 bits."""
        if self.values in ("log2", "sign"):
            return SIGN if self.values == "sign" else ROUNDED
        if dtype.bits == 16 or self.values == "exact":
            return EXACT
        return ROUNDED if self.values == "bf16" or self.density is not None else EXACT


@dataclass
class PruneTask:
    """One fine-tune to compress into `target`."""

    vector: TaskVector
    target: Path
    density: Fraction | None
    unpaired: str | None = None  # a message about tensors without a partner
    in_place: bool = False  # finished by an earlier run of this command, if its journal belongs to this command

    @property
    def entries(self) -> int:
        """n: floating entries of all paired tensors."""
        return self.vector.pairing.float_entries


@dataclass
class PruneResult:
    """The result for one task."""

    task: str
    path: Path
    entries: int
    changed: int
    kept: int
    file_bytes: int
    delta_bytes: int  # file_bytes without tensors stored whole and side files: what bits a parameter count
    whole_bytes: int
    side_bytes: int
    fine_bytes: int
    not_finite: int
    largest_error: float
    relative_error: float  # norm of what is lost over the norm of the task vector
    whole: list[TensorInfo] = field(default_factory=list)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the delta for each paired floating entry."""
        return 8 * self.delta_bytes / max(self.entries, 1)


class Job:
    """One unfinished artifact."""

    journal: Journal | None = None

    def __init__(
        self, number: int, base: Checkpoint, task: PruneTask, options: PruneOptions, sync: bool, file: PartialFile | None = None
    ) -> None:
        """With `file`, it is written there, and not to the task's target."""
        self._number, self._base, self._task, self.options = number, base, task, options
        self._in_place = False
        pairs = task.vector.pairs.values()
        dtypes = sorted({pair.fine.dtype.code: pair.fine.dtype for pair in pairs}.items())
        streams = [Stream(dtype, options.coding(dtype)) for _, dtype in dtypes]
        self.writer = SparseDeltaWriter(task.target, streams, self._metadata(None), sync, resume=True, file=file)
        self.sink = Sink(self.writer, streams, octaves=options.values == "log2")

    def holds(self, journal: Journal) -> bool:
        """Whether the unfinished file has all that a journal tells of, unaltered, or the finished one is in its place."""
        self._in_place = is_in_place(self._task.target, journal.notes)
        if self._in_place:
            return True
        container, at = self.writer.container, 0
        noted = sum(value[1] for key, value in journal.notes.items() if key.startswith(self._key("")))
        blocks = [(block, block.nbytes(self.sink.streams[block.stream].dtype)) for block in written_blocks(journal, self._number)]
        if not container.holds(sum(nbytes for _, nbytes in blocks) + noted):
            return False
        for block, nbytes in blocks:
            if short_digest(container.read_first(at, nbytes)) != block.digest:
                return False
            at += nbytes
        return True

    def _key(self, name: str) -> str:
        return f"whole {self._number} {name}"

    def _once(self, what: str, make: Callable[[], bytes | None], stored: TensorInfo | None = None) -> bytes | None:
        """A digest that an earlier run recorded, or else the result of `make`, recorded. `stored` counts the bytes that either appended."""
        key, container = self._key(what), self.writer.container
        if self.journal is None:
            return make()
        if key in self.journal.notes:
            digest, nbytes = self.journal.notes[key]
            known = bytes.fromhex(digest) if digest else None
            if stored is None or self._in_place or container.digest_next(stored) == known:
                container.skip("whole", nbytes)
                return known
        made = make()
        self.journal.note(key, [made.hex() if made else "", stored.nbytes if stored is not None else 0])
        return made

    def _metadata(self, measured: dict[str, str] | None) -> dict[str, str]:
        """Metadata of the artifact. Without measured values, the longest that it can become."""
        task, options = self._task, self.options
        metadata = {
            "peru.task": task.vector.name,
            "peru.prefix": task.vector.pairing.prefix.encode(),
            "peru.density": str(options.density) if options.density is not None else "lossless",
            "peru.entries": str(task.entries),
        }
        if options.density is not None:
            metadata["peru.scope"] = options.scope
        if options.base_name is not None:
            metadata |= options.base_name.metadata()
        metadata |= record_rules([task.vector.fine]) | dict(options.about)
        if measured is None:
            measured = dict.fromkeys(("peru.kept", "peru.changed"), "9" * 19)
            measured |= {"peru.threshold": "9" * 26, "peru.largest_error": "9" * 26, "peru.result": "0" * 64}
            measured |= {"peru.format": "1", "peru.kind": "sparse-delta"}
        return metadata | measured

    def seal(self, select: Select) -> tuple[PruneResult, str]:
        """Write last blocks, tensors stored whole, side files, index and header. Also returns the digest in the header."""
        sink, task, fine = self.sink, self._task, self._task.vector.fine
        for block in self.writer.rest():
            self.writer.write(block)
        results = sink.result.all(sink.kept)
        records, whole = self._records(select, results)
        scales = dict(zip(select.slots, sink.scales, strict=True)) if sink.scales else {}
        scales = {pair.fine.name: scales[name] for name, pair in task.vector.pairs.items() if name in scales}
        for stream in sink.streams:
            signed = stream.values == SIGN
            stream.scales = [scales[r.info.name] for r in records if signed and r.kept and r.info.dtype is stream.dtype]
        if self.options.density is None:  # otherwise the result is not the fine-tune's own tensors
            fine.agree(results)
        files = list(side_files_of(fine, self._base))
        kept = sum(sink.kept.values())
        changed = kept if self.options.density is None else sink.changed
        measured = {
            "peru.kept": str(kept),
            "peru.changed": str(changed),
            "peru.result": checkpoint_digest(results).hex(),
        }
        if self.options.scope == "global" and sink.thresholds[0].equals is not None:
            measured["peru.threshold"] = repr(key_value(sink.thresholds[0].key, task.vector.wide))
        if any(stream.values != EXACT for stream in sink.streams):
            measured["peru.largest_error"] = repr(sink.largest_error)
        size, digest = self.writer.seal(self._metadata(measured), records, files)
        whole_bytes = sum(record.whole_bytes for record in records)
        side = sum(file.size for file, _ in files if file.origin == STORED)
        result = PruneResult(
            task.vector.name, task.target, task.entries, changed, kept, size, size - whole_bytes - side, whole_bytes, side,
            fine.nbytes, sink.not_finite, sink.largest_error, sink.relative_error, whole,
        )  # fmt: skip
        return result, digest

    def commit(self) -> None:
        """Rename the sealed artifact into place, unless an earlier run has."""
        if not (self._in_place and self.journal is not None and self.journal.notes):
            self.writer.container.commit()

    def _records(self, select: Select, results: dict[str, bytes]) -> tuple[list[TensorRecord], list[TensorInfo]]:
        """Index records in canonical order. Copies what is stored whole into the artifact."""
        vector = self._task.vector
        pairs = {pair.fine.name: pair for pair in vector.pairing.pairs}
        records, whole = [], []
        for name in sorted(vector.fine.tensors):
            info = vector.fine.tensors[name]
            pair = pairs.get(name)
            if pair is not None and pair.is_delta:
                record = TensorRecord(info, Mode.DELTA, base_dtype=pair.base.dtype, kept=self.sink.kept[name])
                digest = select.base_digest(pair.base.name)
                self._base.agree({pair.base.name: digest})
                record.base_digest = digest[:SHORT]
                if pair.grown:
                    record.base_rows = pair.base.shape[0]
                    record.whole_digest = self._store(info, pair.entries)[:SHORT]
            elif pair is not None and (shared := self._shared(pair)) is not None:
                record = TensorRecord(info, Mode.COPY, base_dtype=pair.base.dtype, base_digest=shared[:SHORT])
                results[name] = shared
            else:
                results[name] = self._store(info, 0)
                record = TensorRecord(info, Mode.WHOLE, results[name][:SHORT])
                whole.append(info)
            records.append(record)
        return records, whole

    def _store(self, info: TensorInfo, first: int) -> bytes:
        """Copy a tensor from entry `first` on into the artifact. Returns its digest, as a tensor of those rows."""
        fine = self._task.vector.fine
        rows = first // max(info.entries // info.shape[0], 1) if first else 0
        shape = (info.shape[0] - rows, *info.shape[1:]) if first else info.shape
        use = self.writer.append_whole
        stored = TensorInfo(info.name, info.dtype, shape)
        digest = self._once(info.name, lambda: fine.digest(info.name, use, first, shape), stored)
        assert digest is not None
        return digest

    def _shared(self, pair: Pair) -> bytes | None:
        """The digest of a tensor that is equal in both. None if they differ."""
        return self._once(f"{pair.fine.name} alike", lambda: shared_digest(self._task.vector.fine, self._base, pair))


def shared_digest(fine: Checkpoint, base: Checkpoint, pair: Pair) -> bytes | None:
    """The digest of a tensor that is equal in both. None if they differ. Reads both once."""
    if pair.fine.dtype is not pair.base.dtype:
        return None
    digest = TensorDigest(pair.base.dtype, pair.base.shape)
    both = zip(base.pieces(pair.base.name), fine.pieces(pair.fine.name), strict=True)
    for (_, a), (_, b) in both:  # an adapter's bytes are computed from those just read from the base
        if a != b:
            return None
        digest.add(leaves(a, pair.base.dtype))
    return digest.digest()


def side_files_of(fine: Checkpoint, base: Checkpoint) -> Iterator[tuple[SideFile, bytes]]:
    """Side files of a fine-tune sorted by name, with their contents. Those equal to the base's are marked as the base's."""
    for name, path in sorted(fine.side_files.items()):
        content = path.read_bytes()
        other = base.side_files.get(name)
        same = other is not None and other.read_bytes() == content
        yield SideFile(name, FROM_BASE if same else STORED, len(content), short_digest(content)), content


def is_in_place(target: Path, notes: Mapping[str, Any]) -> bool:
    """Whether a target is the artifact that a journal records as finished, and nothing in it has changed since."""
    digest = notes.get(SEALED, {}).get(target.name)
    if digest is None or not target.is_file() or seal_of(target) != digest:
        return False
    try:
        with SparseDelta(target) as delta:
            delta.verify()
    except BadFile:
        return False
    return True
