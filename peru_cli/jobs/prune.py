"""`peru prune`: sparse deltas of one or several fine-tunes against a base that is read once for all.

Post-Pruning (PERU paper, section 4.1) is this with the pre-trained model as base, PERU-FFT with a merged one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np

from peru_cli.artifacts.index import COPY as COPY_OF_BASE
from peru_cli.artifacts.index import DELTA, EXACT, FROM_BASE, ROUNDED, STORED, WHOLE, SideFile, Stream, TensorRecord
from peru_cli.artifacts.sparse_delta import SparseDeltaWriter, short_digest
from peru_cli.checkpoints.atomic import check_room, check_target
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pair, pair_checkpoints
from peru_cli.checkpoints.places import size_of
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError
from peru_cli.jobs.basename import BaseName
from peru_cli.jobs.selection import Select, Sink
from peru_cli.jobs.taskvectors import Family, How, TaskVector, counted_bytes, find_thresholds
from peru_cli.methods.magnitude import ALL_CHANGED
from peru_cli.streaming.arrays import CPU
from peru_cli.streaming.digests import SHORT, TensorDigest, checkpoint_digest, leaves
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import CHUNK, DEFAULT_TILE

_PIECE = 16 * CHUNK  # entries read at once where a tensor is only copied or compared


@dataclass(frozen=True)
class PruneOptions:
    """What to keep. `density` None keeps every changed entry (lossless)."""

    density: Fraction | None
    scope: str = "global"  # or "tensor"
    values: str = "auto"  # or "exact", "bf16"
    per_task: str | None = None
    base_name: BaseName | None = None

    def rounds(self, dtype: Dtype) -> bool:
        """Whether kept entries of a dtype are rounded: `auto` is exact for 16 bits and when lossless."""
        if dtype.bits == 16 or self.values == "exact":
            return False
        return self.values == "bf16" or self.density is not None


@dataclass
class PruneTask:
    """One fine-tune to be compressed to `target`."""

    vector: TaskVector
    target: Path
    density: Fraction | None

    @property
    def entries(self) -> int:
        """n: floating entries of all paired tensors."""
        return self.vector.pairing.float_entries


@dataclass
class PruneResult:
    """What became of a task."""

    task: str
    path: Path
    entries: int
    changed: int
    kept: int
    file_bytes: int
    delta_bytes: int  # file_bytes less tensors stored whole and side files: what bits a parameter count
    whole_bytes: int
    side_bytes: int
    fine_bytes: int
    not_finite: int
    largest_error: float
    whole: list[TensorInfo] = field(default_factory=list)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the delta for each paired floating entry."""
        return 8 * self.delta_bytes / max(self.entries, 1)


def plan_prune(
    base: Checkpoint, tasks: list[tuple[str, Checkpoint, Path]], options: PruneOptions, force: bool, new_folder: bool = False
) -> list[PruneTask]:
    """Check everything that headers can show, before any tensor is read; every problem is an error.

    With `new_folder`, the folder of the targets may be made later.
    """
    planned = []
    for name, fine, target in tasks:
        pairing = pair_checkpoints(fine, base, options.per_task)
        task = PruneTask(TaskVector(name, fine, pairing), target, options.density)
        if not task.entries:
            raise UsageError(f"{fine.label} and {base.label} share no floating-point tensors: there is nothing to prune")
        if options.density is not None and int(options.density * task.entries) == 0:
            raise UsageError(f"--keep {float(options.density):g} of {task.entries:,} entries keeps nothing", "keep more")
        if options.values == "bf16" and options.density is None:
            raise UsageError("--lossless and --values bf16 contradict each other", "leave one out")
        check_target(target, force, new_folder)
        check_room(target, sum(info.nbytes for info in pairing.whole))
        planned.append(task)
    return planned


def prune(
    base: Checkpoint, tasks: list[PruneTask], options: PruneOptions, how: How, sync: bool, note: Callable[[str], None] = lambda text: None
) -> list[PruneResult]:
    """Write the artifacts; all of them appear, or none."""
    family = Family(base, [task.vector for task in tasks], how)
    with ExitStack() as stack:
        jobs = [_Job(base, task, options, sync) for task in tasks]
        for job in jobs:
            stack.enter_context(job.writer)
        select = Select(family, [job.sink for job in jobs])
        if options.density is None or options.scope == "global":
            note("finding thresholds" if options.density is not None else "comparing")
            _set_thresholds(family, jobs, range(len(family.slots)))
            note("selecting and encoding")
            run(select, family.plan(), how.threads, how.advance)
        else:
            # Tensor by tensor, so that what came over the network need not come twice.
            note("selecting and encoding")
            for slot in range(len(family.slots)):
                _set_thresholds(family, jobs, range(slot, slot + 1))
                run(select, family.tiles(slot), how.threads, how.advance)
                family.forget()
        family.forget()
        return [job.finish(select) for job in jobs]


def _set_thresholds(family: Family, jobs: list[_Job], slots: range) -> None:
    """Find each task's threshold over some slots."""
    density = jobs[0].options.density
    if density is None:
        for job in jobs:
            job.sink.add_threshold(ALL_CHANGED)
        return
    names = [family.slots[slot].name for slot in slots]
    entries = [sum(pair.entries for name in names if (pair := task.pairs.get(name)) is not None) for task in family.tasks]
    found = find_thresholds(family, slots, {number: int(density * n) for number, n in enumerate(entries)})
    for number, job in enumerate(jobs):
        job.sink.add_threshold(found[number].threshold)
        job.changed += found[number].changed


def fetch_bytes(base: Checkpoint, tasks: list[PruneTask], options: PruneOptions) -> int:
    """Bytes that pruning will fetch over the network if the sample predicts the thresholds well; 0 if it reads files."""
    family = Family(base, [task.vector for task in tasks], How(CPU, 1, DEFAULT_TILE))
    twice = (
        []
        if options.density is None
        else [range(i, i + 1) for i in range(len(family.slots))]
        if options.scope == "tensor"
        else [range(len(family.slots))]
    )
    total = family.ranged_bytes(family.slots) + sum(
        counted_bytes(family, slots) for slots in twice if not family.fits([family.slots[i] for i in slots])
    )
    for task in tasks:
        fine, pairing = task.vector.fine, task.vector.pairing
        if fine.ranged:
            total += sum(info.nbytes for info in pairing.whole)
            total += sum(pair.fine.nbytes - pair.fine.dtype.nbytes(pair.entries) for pair in pairing.pairs if pair.grown)
        alike = [pair for pair in pairing.pairs if not pair.is_delta]
        total += sum(pair.fine.nbytes * fine.ranged + pair.base.nbytes * base.ranged for pair in alike)
        total += sum(size_of(file) for file in fine.side_files.values()) if fine.ranged else 0
        total += sum(size_of(base.side_files[name]) for name in fine.side_files if name in base.side_files) if base.ranged else 0
    return total


class _Job:
    """One artifact in the making."""

    def __init__(self, base: Checkpoint, task: PruneTask, options: PruneOptions, sync: bool) -> None:
        self._base, self._task, self.options = base, task, options
        self.changed = 0  # entries, where thresholds were looked for
        pairs = task.vector.pairs.values()
        dtypes = sorted({pair.fine.dtype.code: pair.fine.dtype for pair in pairs}.items())
        streams = [Stream(dtype, ROUNDED if options.rounds(dtype) else EXACT) for _, dtype in dtypes]
        self.writer = SparseDeltaWriter(task.target, streams, self._metadata(None), sync)
        self.sink = Sink(self.writer, streams)

    def _metadata(self, measured: dict[str, str] | None) -> dict[str, str]:
        """Metadata of the artifact; without measured values, the longest that it can become."""
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
        if measured is None:
            measured = dict.fromkeys(("peru.kept", "peru.changed"), "9" * 19)
            measured |= {"peru.threshold": "9" * 26, "peru.largest_error": "9" * 26, "peru.result": "0" * 64}
            measured |= {"peru.format": "1", "peru.kind": "sparse-delta"}
        return metadata | measured

    def finish(self, select: Select) -> PruneResult:
        """Last blocks, tensors stored whole, side files, index, header."""
        sink, task, fine = self.sink, self._task, self._task.vector.fine
        for block in self.writer.rest():
            self.writer.write(block)
        results = {name: digest.digest() for name, digest in sink.result.items()}
        records, whole = self._records(select, results)
        files = list(_side_files(fine, self._base))
        kept = sum(sink.kept.values())
        changed = kept if self.options.density is None else self.changed
        measured = {
            "peru.kept": str(kept),
            "peru.changed": str(changed),
            "peru.result": checkpoint_digest(results).hex(),
        }
        if self.options.scope == "global" and not sink.thresholds[0].keeps_all:
            measured["peru.threshold"] = repr(key_value(sink.thresholds[0].key, task.vector.wide))
        if any(stream.values == ROUNDED for stream in sink.streams):
            measured["peru.largest_error"] = repr(sink.largest_error)
        size = self.writer.finish(self._metadata(measured), records, files)
        whole_bytes = sum(record.whole_bytes for record in records)
        side = sum(file.size for file, _ in files if file.origin == STORED)
        return PruneResult(
            task.vector.name, task.target, task.entries, changed, kept, size, size - whole_bytes - side, whole_bytes, side,
            fine.nbytes, sink.not_finite, sink.largest_error, whole,
        )  # fmt: skip

    def _records(self, select: Select, results: dict[str, bytes]) -> tuple[list[TensorRecord], list[TensorInfo]]:
        """Index records in canonical order; streams what is stored whole into the artifact."""
        vector = self._task.vector
        pairs = {pair.fine.name: pair for pair in vector.pairing.pairs}
        records, whole = [], []
        for name in sorted(vector.fine.tensors):
            info = vector.fine.tensors[name]
            pair = pairs.get(name)
            if pair is not None and pair.is_delta:
                record = TensorRecord(info, DELTA, base_dtype=pair.base.dtype, kept=self.sink.kept[name])
                record.base_digest = select.base_digests[pair.base.name].digest()[:SHORT]
                if pair.grown:
                    record.base_rows = pair.base.shape[0]
                    record.whole_digest = self._store(info, pair.entries)[:SHORT]
            elif pair is not None and (digest := _shared_digest(vector.fine, self._base, pair)) is not None:
                record = TensorRecord(info, COPY_OF_BASE, base_dtype=pair.base.dtype, base_digest=digest[:SHORT])
                results[name] = digest
            else:
                results[name] = self._store(info, 0)
                record = TensorRecord(info, WHOLE, results[name][:SHORT])
                whole.append(info)
            records.append(record)
        return records, whole

    def _store(self, info: TensorInfo, first: int) -> bytes:
        """Copy a tensor from entry `first` on into the artifact; its digest, as a tensor of those rows."""
        fine = self._task.vector.fine
        rows = first // max(info.entries // info.shape[0], 1) if first else 0
        shape = (info.shape[0] - rows, *info.shape[1:]) if first else info.shape
        return stream_digest(fine, info, self.writer.append_whole, first, shape)


def key_value(key: int, wide: bool) -> float:
    """The magnitude that a key stands for."""
    return float(np.int64(key).view(np.float64)) if wide else float(np.int32(key).view(np.float32))


def _pieces(source: Checkpoint, info: TensorInfo, first: int = 0) -> Iterator[memoryview]:
    """A tensor's bytes from an entry on, piece by piece, in one reused buffer."""
    if source.ranged and first < info.entries:
        source.expect([(info.name, info.dtype.nbytes(first), info.dtype.nbytes(info.entries - first))])
    room = bytearray(info.dtype.nbytes(min(_PIECE, info.entries)))
    for start in range(first, info.entries, _PIECE):
        view = memoryview(room)[: info.dtype.nbytes(min(_PIECE, info.entries - start))]
        source.read_into(info.name, info.dtype.nbytes(start), view)
        yield view


def stream_digest(
    source: Checkpoint,
    info: TensorInfo,
    use: Callable[[memoryview], None] = lambda data: None,
    first: int = 0,
    shape: tuple[int, ...] | None = None,
) -> bytes:
    """Digest of a tensor from an entry on, as a tensor of that shape; every piece that is read goes to `use`, too."""
    digest = TensorDigest(info.dtype, info.shape if shape is None else shape)
    for view in _pieces(source, info, first):
        digest.add(leaves(view, info.dtype))
        use(view)
    return digest.digest()


def _shared_digest(fine: Checkpoint, base: Checkpoint, pair: Pair) -> bytes | None:
    """The digest of a tensor that both have alike, None if they differ; reads both once."""
    if pair.fine.dtype is not pair.base.dtype:
        return None
    digest = TensorDigest(pair.base.dtype, pair.base.shape)
    for a, b in zip(_pieces(fine, pair.fine), _pieces(base, pair.base), strict=True):
        if a != b:
            return None
        digest.add(leaves(b, pair.base.dtype))
    return digest.digest()


def _side_files(fine: Checkpoint, base: Checkpoint) -> Iterator[tuple[SideFile, bytes]]:
    for name, path in sorted(fine.side_files.items()):
        content = path.read_bytes()
        other = base.side_files.get(name)
        same = other is not None and other.read_bytes() == content
        yield SideFile(name, FROM_BASE if same else STORED, len(content), short_digest(content)), content
