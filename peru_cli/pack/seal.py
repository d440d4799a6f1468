"""Finish a pack after its sums: residuals, tasks' own tensors, side files, index, header, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from peru_cli.artifacts.index import FROM_BASE, STORED, SideFile
from peru_cli.artifacts.packs.superposed import UNKNOWN, BlockGroup, PackIndex, PackMode, TaskRecord, TaskTensor
from peru_cli.artifacts.packs.writer import PackWriter
from peru_cli.artifacts.sparse_delta import short_digest
from peru_cli.checkpoints.digests import SHORT, checkpoint_digest
from peru_cli.checkpoints.source import Checkpoint, pieces
from peru_cli.errors import Mismatch
from peru_cli.finetunes.fine_tune import refuse_base
from peru_cli.methods.compact.superpose import Quality, best_scale, quality
from peru_cli.pack.base import NewBase
from peru_cli.pack.measure import Measured
from peru_cli.pack.passes import Doubles, Superpose
from peru_cli.pack.plan import PackPlan
from peru_cli.pack.residual import write_residuals
from peru_cli.vectors.family import StreamSettings


@dataclass
class PackedTask:
    """The result for one packed task."""

    name: str
    norm: float
    predicted: Quality
    measured: Quality
    rounding: float  # error of rounding to steps, relative to the norm
    whole_bytes: int
    residual_error: float | None = None  # error with the residual, relative to the norm
    residual_bytes: int = 0


@dataclass
class PackResult:
    """What was written. `left_out` are the tasks whose predicted error was too large, with that error."""

    path: Path
    tasks: list[PackedTask]
    all_tasks: list[str]
    left_out: dict[str, float]
    file_bytes: int
    sums_bytes: int
    delta_bytes: int  # file_bytes without tasks' own tensors and side files: what bits a parameter count
    entries: int
    precision: int
    scale: float
    best_scale: float | None

    @property
    def bits_per_parameter(self) -> float:
        """Bits of all tasks' deltas together for each paired floating entry of the base."""
        return 8 * self.delta_bytes / max(self.entries, 1)


class PackSealer:
    """Writes what follows the sums: tasks' own tensors, side files, index, header."""

    def __init__(
        self, plan: PackPlan, step: Superpose, writer: PackWriter, measured: Measured | None,
        predicted: Sequence[Quality], left_out: dict[str, float], new_base: NewBase | None,
        residual: Fraction | None, how: StreamSettings, note: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self._plan, self._step, self._writer, self._new_base = plan, step, writer, new_base
        self._measured, self._predicted, self._left_out = measured, predicted, left_out
        self._residual, self._how, self._note = residual, how, note
        self._contents: dict[bytes, bytes] = {}  # stored side files, by digest
        old = plan.old
        self._records = {task.name: task for task in (old.index.tasks if old is not None else [])}

    def finish(self, target: Path, scale: float, factors: Sequence[float] = ()) -> PackResult:
        """Write everything, and rename the pack into place. `factors` are by task, on top of the scale."""
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
                self._records[vector.name], report = self._record(number, scale * (factors[number] if factors else 1.0))
                reports.append(report)
        if plan.removing:
            for vector in plan.vectors:
                del self._records[vector.name]
            for record in self._records.values():
                for vector in plan.vectors:
                    record.cosines.pop(vector.name, None)
        tasks = [self._records[name] for name in sorted(self._records)]
        self._order_cosines(tasks)
        index = PackIndex([BlockGroup(g.prefix, g.depth) for g in plan.arrangement.groups], plan.tensors, self._writer.blocks, tasks, [])
        if self._residual is not None:
            self._add_residuals(index, reports)
        for task in tasks:
            self._store(task, plan)
        contents = sorted(self._contents.items())
        index.contents = [(len(content), digest) for digest, content in contents]
        sums = checkpoint_digest({tensor.info.name: step.sum_digests.digest(tensor.info.name) for tensor in plan.sums})
        before = self._new_base.commit if self._new_base is not None else lambda: None
        size = self._writer.finish(plan.metadata | {"peru.sums": sums.hex()}, index, [content for _, content in contents], before)
        square, products = float(step.products[-1, -1]), [float(x) for x in step.products[-1, :-1]]
        apart = sum(task.whole_bytes for task in tasks) + sum(len(content) for _, content in contents)
        return PackResult(
            target, reports, [task.name for task in tasks], self._left_out, size, sum(block.nbytes for block in index.blocks),
            size - apart, plan.entries,
            int(plan.metadata["peru.precision"]), scale, None if plan.removing else best_scale(products, square),
        )  # fmt: skip

    def _add_residuals(self, index: PackIndex, reports: Sequence[PackedTask]) -> None:
        plan, products, density = self._plan, self._step.products, self._residual
        assert density is not None
        energies = {vector.name: float(products[number, number]) for number, vector in enumerate(plan.vectors)}
        with ExitStack() as stack:
            base = stack.enter_context(self._new_base.opened()) if self._new_base is not None else plan.base
            index.residuals = write_residuals(plan, base, index, energies, self._writer, density, self._how, self._note)
        found = {task.name: residual for task, residual in zip(index.tasks, index.residuals, strict=True)}
        for report in reports:
            report.residual_error, report.residual_bytes = float(found[report.name].error), found[report.name].nbytes

    def _digest_base(self) -> None:
        """Digests of base tensors: recorded in a new pack, compared with those of an old one."""
        plan, problems = self._plan, []
        for tensor in plan.tensors:
            if tensor.mode == PackMode.BASE:
                digest = plan.base.digest(tensor.info.name)[:SHORT]
            else:
                digest = self._step.base_digests.digest(tensor.info.name)[:SHORT]
            plan.base.agree({tensor.info.name: digest})
            if plan.old is None:
                tensor.base_digest = digest
            elif tensor.base_digest != digest:
                problems.append(f"{tensor.info.name}: different contents in {plan.base.label}")
        if plan.old is not None:
            refuse_base(problems, plan.old, plan.base.label)

    def _fine_digest(self, number: int, own: dict[str, bytes]) -> bytes:
        """Digest of a whole fine-tune, given the digests of its own tensors."""
        vector = self._plan.vectors[number]
        digests = self._step.results[number].all([pair.fine.name for pair in vector.pairs.values()]) | own
        for pair in self._plan.same[vector.name]:
            digests[pair.fine.name] = vector.fine.digest(pair.fine.name)
        return checkpoint_digest(digests)

    def _prove(self, number: int) -> None:
        """Mismatch if a fine-tune is not the one that was packed."""
        plan = self._plan
        vector = plan.vectors[number]
        assert plan.old is not None
        own = {info.name: vector.fine.digest(info.name) for info in plan.heads[vector.name]}
        if self._fine_digest(number, own) != plan.old.tasks[vector.name].digest:
            raise Mismatch(
                f"{vector.fine.label} is not the checkpoint that was packed as {vector.name!r} in {plan.old.path}",
                "removing a task needs the same weights, bit for bit; nothing was changed",
            )

    def _record(self, number: int, scale: float) -> tuple[TaskRecord, PackedTask]:
        plan, vector, products = self._plan, self._plan.vectors[number], self._step.products
        own = {info.name: vector.fine.digest(info.name) for info in plan.heads[vector.name]}
        energy = float(products[number, number])
        found = quality(energy, *self._step.came_back(number), scale)
        norm = energy**0.5
        rounding = float(self._step.rounding[number]) ** 0.5 / norm if norm else 0.0
        together = len(plan.vectors) + (len(plan.old.tasks) if plan.old is not None else 0)
        record = TaskRecord(
            vector.name, vector.pairing.prefix, plan.shifts[vector.name], self._fine_digest(number, own), together,
            decimal(norm, 6), decimal(found.error), decimal(found.cosine), decimal(rounding),
        )  # fmt: skip
        record.tensors = [TaskTensor(info, own[info.name][:SHORT]) for info in sorted(plan.heads[vector.name], key=lambda t: t.name)]
        record.files = [self._side_file(name, vector.fine) for name in sorted(vector.fine.side_files)]
        assert self._measured is not None
        for other in range(len(plan.vectors)):
            pair = [_cosine(table, number, other) for table in (self._measured.everything, products)]
            record.cosines[plan.vectors[other].name] = pair[0], pair[1]
        return record, PackedTask(vector.name, norm, self._predicted[number], found, rounding, record.whole_bytes)

    def _side_file(self, name: str, fine: Checkpoint) -> SideFile:
        place = self._plan.base.side_files.get(name)
        other = self._new_base.files.get(name) if self._new_base is not None else place.read_bytes() if place is not None else None
        return side_file(name, fine.side_files[name].read_bytes(), other, self._contents)

    @staticmethod
    def _order_cosines(tasks: Sequence[TaskRecord]) -> None:
        """Store each pair's cosines with the later task."""
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
                fines[task.name].digest(tensor.info.name, self._writer.append_whole)
                continue
            assert plan.old is not None
            plan.old.verify_whole(task, tensor)
            for _, piece in pieces(tensor.info, partial(plan.old.read_whole, task, tensor)):
                self._writer.append_whole(piece)
        if task.name not in fines and plan.old is not None:
            for file in task.files:
                if file.origin == STORED:
                    self._contents[file.digest] = plan.old.side_file(file)


def side_file(name: str, content: bytes, of_base: bytes | None, contents: dict[bytes, bytes]) -> SideFile:
    """The record of a task's side file. What the base does not have goes into `contents`, by digest."""
    digest = short_digest(content)
    if of_base == content:
        return SideFile(name, FROM_BASE, len(content), digest)
    contents[digest] = content
    return SideFile(name, STORED, len(content), digest)


def decimal(value: float, digits: int = 4) -> str:
    """A number with this many significant digits, in the format's decimal form."""
    return repr(float(f"{value:.{digits}g}"))


def _cosine(table: Doubles, i: int, j: int) -> int:
    """Cosine in 1/10,000."""
    norms = float(table[i, i]) * float(table[j, j])
    return round(10_000 * float(table[i, j]) / norms**0.5) if norms > 0 else 0
