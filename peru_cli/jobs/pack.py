"""`peru shuffle-pack`: many fine-tunes superposed in one file; tasks added to it and removed from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from peru_cli.artifacts.index import FROM_BASE, STORED, SideFile
from peru_cli.artifacts.pack import PackWriter
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.artifacts.superposed import COPY, UNKNOWN, BlockGroup, PackIndex, TaskRecord, TaskTensor
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch
from peru_cli.jobs.packbase import MergeBase, NewBase
from peru_cli.jobs.packmeasure import Measured, measure, predict_errors, settle_steps
from peru_cli.jobs.packpass import Doubles, Superpose
from peru_cli.jobs.packplan import PackPlan, refuse_pack_base
from peru_cli.jobs.prune import stream_digest
from peru_cli.jobs.taskvectors import How
from peru_cli.methods.superpose import Quality, best_scale, choose, quality
from peru_cli.streaming.digests import SHORT, checkpoint_digest
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import CHUNK, TilePlan

_ROOM = 1 << 20  # entries of all tasks' tiles together, so that memory does not grow with their number


def default_tile(tasks: int) -> int:
    """Entries of a tile."""
    return max(_ROOM // (tasks + 2) // CHUNK, 1) * CHUNK


@dataclass
class PackedTask:
    """What became of a task that was packed."""

    name: str
    norm: float
    predicted: Quality
    measured: Quality
    rounding: float  # what rounding to steps changed, against the norm
    whole_bytes: int


@dataclass
class PackResult:
    """What was written. `left_out` are tasks that would miss too much, with what they were predicted to miss."""

    path: Path
    tasks: list[PackedTask]
    all_tasks: list[str]
    left_out: dict[str, float]
    file_bytes: int
    sums_bytes: int
    entries: int
    precision: int
    scale: float
    best_scale: float | None

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the sums for each of them."""
        return 8 * self.sums_bytes / max(self.entries, 1)


def make_pack(
    plan: PackPlan,
    target: Path,
    how: How,
    sync: bool,
    precision: int | None = None,
    max_error: float | None = None,
    merge_base: MergeBase | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> PackResult:
    """Write a new pack, or `plan.old` with tasks added or removed.

    Args:
        precision: bits of the step below the task vectors' RMS; the default is the fewest that do not show.
        max_error: leave out tasks for which more than this is predicted, the worst first.
        merge_base: write the plain sums into a new base, which the pack then is of; both appear, or none.

    Raises BadFile for values that cannot be packed, Mismatch for a base or a removed fine-tune that is not the pack's.
    """
    left_out: dict[str, float] = {}
    predicted: list[Quality] = []
    scale = float(plan.metadata["peru.scale"])
    measured: Measured | None = None
    if not plan.removing:
        note("measuring")
        measured = measure(plan, how)
        while True:
            bits = settle_steps(plan, measured, precision)
            predicted = predict_errors(plan, measured, scale)
            errors = {vector.name: q.error for vector, q in zip(plan.vectors, predicted, strict=True)}
            worst = choose(errors, max_error) if max_error is not None else None
            if worst is None:
                break
            left_out[worst] = errors[worst]
            if len(plan.vectors) == 1:
                raise Mismatch(f"no task stays below --max-error {max_error:g}", f"the best misses {errors[worst]:.4g}")
            measured = measured.without([v.name for v in plan.vectors].index(worst))
            plan = plan.without(worst)
        plan.metadata["peru.precision"] = str(bits)
    note("adding" if not plan.removing else "removing")
    if merge_base is not None:
        plan.metadata["peru.entries"] = str(sum(tensor.info.entries for tensor in plan.sums if tensor.is_target))
    with ExitStack() as stack:
        new_base = stack.enter_context(NewBase(plan, merge_base, sync)) if merge_base is not None else None
        largest = {**plan.metadata, "peru.sums": "0" * 64, **(new_base.largest_name() if new_base is not None else {})}
        writer = stack.enter_context(PackWriter(target, largest, sync))
        step = Superpose(plan, how, writer, new_base)
        run(step, TilePlan([t.info.entries for t in plan.sums], how.tile_entries), how.threads, how.advance)
        for block in writer.rest():
            writer.write(block)
        return Finish(plan, step, writer, measured, predicted, left_out, new_base).finish(target, scale)


class Finish:
    """What follows the sums: tasks' own tensors, side files, index, header."""

    def __init__(
        self, plan: PackPlan, step: Superpose, writer: PackWriter, measured: Measured | None,
        predicted: Sequence[Quality], left_out: dict[str, float], new_base: NewBase | None,
    ) -> None:  # fmt: skip
        self._plan, self._step, self._writer, self._new_base = plan, step, writer, new_base
        self._measured, self._predicted, self._left_out = measured, predicted, left_out
        self._contents: dict[bytes, bytes] = {}  # side files that are stored, by digest
        old = plan.old
        self._records = {task.name: task for task in (old.index.tasks if old is not None else [])}

    def finish(self, target: Path, scale: float) -> PackResult:
        plan, step = self._plan, self._step
        if self._new_base is None:
            self._digest_base()
        elif (name := self._new_base.settle()) is not None:
            plan.metadata |= name.metadata()
        reports = []
        for number, vector in enumerate(plan.vectors):
            if plan.removing:
                self._prove(number)
            else:
                self._records[vector.name], report = self._record(number, scale)
                reports.append(report)
        if plan.removing:
            for vector in plan.vectors:
                del self._records[vector.name]
            for record in self._records.values():
                for vector in plan.vectors:
                    record.cosines.pop(vector.name, None)
        tasks = [self._records[name] for name in sorted(self._records)]
        self._order_cosines(tasks)
        for task in tasks:
            self._store(task, plan)
        contents = sorted(self._contents.items())
        index = PackIndex(
            [BlockGroup(group.prefix, group.depth) for group in plan.arrangement.groups],
            plan.tensors,
            [],
            tasks,
            [(len(content), digest) for digest, content in contents],
        )
        sums = checkpoint_digest({tensor.info.name: step.sum_digests[tensor.info.name].digest() for tensor in plan.sums})
        before = self._new_base.commit if self._new_base is not None else lambda: None
        size = self._writer.finish(plan.metadata | {"peru.sums": sums.hex()}, index, [content for _, content in contents], before)
        square, products = float(step.products[-1, -1]), [float(x) for x in step.products[-1, :-1]]
        return PackResult(
            target, reports, [task.name for task in tasks], self._left_out, size, sum(block.nbytes for block in index.blocks),
            plan.entries, int(plan.metadata["peru.precision"]), scale, None if plan.removing else best_scale(products, square),
        )  # fmt: skip

    def _digest_base(self) -> None:
        """Digests of base tensors: recorded in a new pack, compared with those of an old one."""
        plan, problems = self._plan, []
        for tensor in plan.tensors:
            if tensor.mode == COPY:
                digest = stream_digest(plan.base, plan.base.tensors[tensor.info.name])[:SHORT]
            else:
                digest = self._step.base_digests[tensor.info.name].digest()[:SHORT]
            if plan.old is None:
                tensor.base_digest = digest
            elif tensor.base_digest != digest:
                problems.append(f"{tensor.info.name}: other contents in {plan.base.label}")
        if plan.old is not None:
            refuse_pack_base(problems, plan.old, plan.base.label)

    def _fine_digest(self, number: int, own: dict[str, bytes]) -> bytes:
        """Digest of a whole fine-tune, given those of its own tensors."""
        vector = self._plan.vectors[number]
        digests = {name: digest.digest() for name, digest in self._step.results[number].items()} | own
        for pair in self._plan.same[vector.name]:
            digests[pair.fine.name] = stream_digest(vector.fine, pair.fine)
        return checkpoint_digest(digests)

    def _prove(self, number: int) -> None:
        """Refuse a fine-tune that is not the one that was packed."""
        plan = self._plan
        vector = plan.vectors[number]
        assert plan.old is not None
        own = {info.name: stream_digest(vector.fine, info) for info in plan.heads[vector.name]}
        if self._fine_digest(number, own) != plan.old.tasks[vector.name].digest:
            raise Mismatch(
                f"{vector.fine.label} is not the checkpoint that was packed as {vector.name!r} in {plan.old.path}",
                "removing it needs the very same weights, bit for bit; nothing was changed",
            )

    def _record(self, number: int, scale: float) -> tuple[TaskRecord, PackedTask]:
        plan, vector, products = self._plan, self._plan.vectors[number], self._step.products
        own = {info.name: stream_digest(vector.fine, info) for info in plan.heads[vector.name]}
        energy = float(products[number, number])
        found = quality(energy, *self._step.came_back(number), scale)
        norm = energy**0.5
        rounding = float(self._step.rounding[number]) ** 0.5 / norm if norm else 0.0
        together = len(plan.vectors) + (len(plan.old.tasks) if plan.old is not None else 0)
        record = TaskRecord(
            vector.name, vector.pairing.prefix, plan.shifts[vector.name], self._fine_digest(number, own), together,
            _decimal(norm, 6), _decimal(found.error), _decimal(found.cosine), _decimal(rounding),
        )  # fmt: skip
        record.tensors = [TaskTensor(info, own[info.name][:SHORT]) for info in sorted(plan.heads[vector.name], key=lambda t: t.name)]
        record.files = [self._side_file(name, vector.fine) for name in sorted(vector.fine.side_files)]
        assert self._measured is not None
        for other in range(len(plan.vectors)):
            pair = [_cosine(table, number, other) for table in (self._measured.everything, products)]
            record.cosines[plan.vectors[other].name] = pair[0], pair[1]
        return record, PackedTask(vector.name, norm, self._predicted[number], found, rounding, record.whole_bytes)

    def _side_file(self, name: str, fine: Checkpoint) -> SideFile:
        content = fine.side_files[name].read_bytes()
        place = self._plan.base.side_files.get(name)
        other = self._new_base.files.get(name) if self._new_base is not None else place.read_bytes() if place is not None else None
        digest = short_digest(content)
        if other == content:
            return SideFile(name, FROM_BASE, len(content), digest)
        self._contents[digest] = content
        return SideFile(name, STORED, len(content), digest)

    @staticmethod
    def _order_cosines(tasks: Sequence[TaskRecord]) -> None:
        """Keep each pair's cosines with the task that comes later."""
        by_name = {task.name: task for task in tasks}
        known = {(task.name, other): pair for task in tasks for other, pair in task.cosines.items() if other in by_name}
        for number, task in enumerate(tasks):
            before = [other.name for other in tasks[:number]]
            task.cosines = {o: known.get((task.name, o)) or known.get((o, task.name)) or (UNKNOWN, UNKNOWN) for o in before}

    def _store(self, task: TaskRecord, plan: PackPlan) -> None:
        """Append a task's own tensors, from its fine-tune or the old pack, and keep the old pack's side files."""
        fines = {} if plan.removing else {vector.name: vector.fine for vector in plan.vectors}
        for tensor in task.tensors:
            if task.name in fines:
                stream_digest(fines[task.name], tensor.info, self._writer.append_whole)
                continue
            assert plan.old is not None
            plan.old.verify_whole(task, tensor)
            room = memoryview(bytearray(min(16 * CHUNK, tensor.info.nbytes)))
            for at in range(0, tensor.info.nbytes, max(len(room), 1)):
                part = room[: tensor.info.nbytes - at]
                plan.old.read_whole(task, tensor, at, part)
                self._writer.append_whole(part)
        if task.name not in fines and plan.old is not None:
            for file in task.files:
                if file.origin == STORED:
                    self._contents[file.digest] = plan.old.side_file(file)


def _decimal(value: float, digits: int = 4) -> str:
    """So many significant digits, as the format has decimals."""
    return repr(float(f"{value:.{digits}g}"))


def _cosine(table: Doubles, i: int, j: int) -> int:
    """In 1/10,000."""
    norms = float(table[i, i]) * float(table[j, j])
    return round(10_000 * float(table[i, j]) / norms**0.5) if norms > 0 else 0
