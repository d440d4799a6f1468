"""`peru prune --max-bytes|--bits|--min-quality`: decompose once, search the multiplier, write, measure the result."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peru_cli.artifacts.index import Mode
from peru_cli.artifacts.mixed.index import MixedRecord
from peru_cli.artifacts.mixed.writer import MixedWriter
from peru_cli.checkpoints.base_name import BaseName
from peru_cli.checkpoints.digests import SHORT, checkpoint_digest
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import si_bytes
from peru_cli.errors import UsageError
from peru_cli.prune.artifact import PruneTask, side_files_of
from peru_cli.prune.gates import Gate, check
from peru_cli.prune.mixed.decompose import Spill
from peru_cli.prune.mixed.family import Family, Measured
from peru_cli.prune.mixed.goal import Goal
from peru_cli.prune.mixed.price import estimated, first_ranks, search_bytes, search_quality
from peru_cli.prune.mixed.represent import Price, choose, estimate, size_of, try_out
from peru_cli.prune.mixed.write import Final, store_rest
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings

if TYPE_CHECKING:
    from peru_cli.inference.task_models import Running

_FIRST_BITS = 0.05  # a parameter, where the search for agreement starts


@dataclass
class MixedResult:
    """The result for one task. Energies are squared norms of task vectors."""

    task: str
    path: Path
    entries: int
    file_bytes: int
    whole_bytes: int
    side_bytes: int
    fine_bytes: int
    energy: float
    error: float
    predicted_error: float
    gain: Measured | None = None
    whole: list[TensorInfo] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)

    @property
    def delta_bytes(self) -> int:
        """Bytes without tensors stored whole and side files: what bits a parameter count."""
        return self.file_bytes - self.whole_bytes - self.side_bytes

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the delta for each paired floating entry."""
        return 8 * self.delta_bytes / max(self.entries, 1)

    @property
    def relative_error(self) -> float:
        """Norm of what is lost over the norm of the task vector."""
        return math.sqrt(self.error / self.energy) if self.energy else 0.0

    @property
    def quality(self) -> float:
        """Kept share of the task vector's energy: 1 - |result - fine-tune|^2 / |fine-tune - base|^2."""
        return 1 - self.error / self.energy if self.energy else 1.0


def prune_mixed(
    base: Checkpoint,
    tasks: list[PruneTask],
    goal: Goal,
    base_name: BaseName | None,
    how: StreamSettings,
    sync: bool,
    note: Callable[[str], None] = lambda text: None,
    say: Callable[[str], None] = lambda text: None,
    gates: Sequence[Gate] = (),
    running: Running | None = None,
) -> list[MixedResult]:
    """Write the artifacts, tuned on examples if there are some; all of them appear, or none.

    UsageError if the limit is below what no choice can undercut; GateMissed if what came out does not pass the gates.
    """
    with Spill(tasks[0].target.parent) as spill:
        family = Family(base, tasks, goal, base_name, spill, how, running)
        limit = family.limit()
        least = try_out([], family.frames, spill, family.price(0.0), how)[0]
        if limit is not None and least > limit:
            rest = f", {si_bytes(family.rest_bytes)} of it for tensors stored whole and side files" if family.rest_bytes else ""
            raise UsageError(f"the limit is {limit:,} bytes, but an artifact without changes takes {least:,}{rest}", "allow more bytes")
        note("decomposing")
        first_ranks(family, limit)
        family.decompose(range(len(family.items)))
        target = 1 - goal.value if goal.kind == "quality" else None
        for _ in range(4):
            note("searching")
            if limit is not None:
                price = _tuned(family, limit, least, note, say) if running is not None else search_bytes(family, limit, least, say)
            elif goal.kind == "agreement":
                price = _agreeing(family, note, say)
            else:
                price = search_quality(family, target or 0.0)
            note("writing")
            results = _write(family, price, sync, target is None or goal.value, limit, gates, say)
            if results is not None:
                return results
            assert target is not None
            target *= 0.99
        raise AssertionError("the measured quality stays below the predicted one")


def _agreeing(family: Family, note: Callable[[str], None], say: Callable[[str], None]) -> Price:
    """Every task's items are fixed at the fewest bytes that keep the goal's share of its answers; the price is the first that was tried."""
    from peru_cli.prune.mixed.with_quality import keep_answers

    start = estimated(family, True, _FIRST_BITS * family.entries / 8)
    for number, task in enumerate(family.tasks):
        found = keep_answers(family, number, family.goal.value, start, note)
        say(str(found))
        family.gains[task.vector.name] = found
    return family.price(start)


@dataclass
class Foreseen:
    """The predicted result of `--bits`: bytes of the artifact, and norm of the error over the norm of the task vector."""

    bits: float
    file_bytes: int
    bits_per_parameter: float
    relative_error: float


def foresee(base: Checkpoint, task: PruneTask, budgets: Sequence[float], how: StreamSettings) -> list[Foreseen]:
    """Predict artifacts at several budgets, in bits a parameter, after one decomposition. Nothing is rounded or written.

    A budget that does not pay for header and index is left out."""
    found = []
    with Spill(Path(tempfile.gettempdir())) as spill:
        family = Family(base, [task], Goal("bits", max(budgets)), None, spill, how)
        least = try_out([], family.frames, spill, family.price(0.0), how)[0]
        first_ranks(family, family.limit())
        family.decompose(range(len(family.items)))
        for bits in sorted(budgets, reverse=True):
            room = int(bits * family.entries / 8) + family.rest_bytes - least
            if room <= 0 or not family.energy:
                break
            nbytes, error, _ = estimate(family.items, spill, family.price(estimated(family, True, room)))
            size = least + int(nbytes)
            relative = math.sqrt(min(error / family.energy, 1.0))
            found.append(Foreseen(bits, size, 8 * (size - family.rest_bytes) / family.entries, relative))
    return found[::-1]


def _tuned(family: Family, limit: int, least: int, note: Callable[[str], None], say: Callable[[str], None]) -> Price:
    """The price without data; every task's items are fixed at moved integers where those are better for its bytes."""
    from peru_cli.prune.mixed.with_data import START, tune_task

    assert family.running is not None
    price = search_bytes(family, limit, least, say)
    start = search_bytes(family, least + int(START * (limit - least)), least, lambda text: None)
    by_task = [[item for item in family.items if item.task == number] for number in range(len(family.tasks))]
    found = [choose(items, family.spill, price, family.how) for items in by_task]
    sizes = [size_of(frame, items, parts) for frame, items, parts in zip(family.frames, by_task, found, strict=True)]
    for number, task in enumerate(family.tasks):
        note(f"tuning {task.vector.name}")
        allowed = limit * sizes[number] // sum(sizes)
        gain = tune_task(
            family.base,
            task,
            by_task[number],
            family.frames[number],
            found[number],
            choose(by_task[number], family.spill, start, family.how),
            family.running,
            allowed,
        )
        say(str(gain))
        if gain.kept:
            family.gains[task.vector.name] = gain
    return price


def _write(
    family: Family, price: Price, sync: bool, quality: float | bool, limit: int | None, gates: Sequence[Gate], say: Callable[[str], None]
) -> list[MixedResult] | None:
    """Write all artifacts. Returns None, and leaves nothing, if the measured quality is too low."""
    items, tasks = family.items, family.tasks
    with ExitStack() as stack:
        writers = [stack.enter_context(MixedWriter(task.target, family.metadata(task, None), sync)) for task in tasks]
        records = [frame.copies() for frame in family.frames]
        final = Final(family.base, [task.vector for task in tasks], items, records, writers, family.spill, price)
        run(final, [Tile(i, i, 0, item.pair.entries) for i, item in enumerate(items)], family.how.threads, family.how.advance)
        energy = family.energy
        if quality is not True and energy and 1 - sum(final.errors) / energy < quality:
            return None
        results = [_seal(family, number, final, records[number], writers[number]) for number in range(len(tasks))]
        if limit is not None and sum(result.file_bytes for result in results) > limit:
            raise AssertionError("the artifacts became larger than was counted")
        for line in check(gates, results):
            say(line)
        for writer in writers:
            writer.container.commit()
        return results


def _seal(family: Family, number: int, final: Final, records: list[MixedRecord], writer: MixedWriter) -> MixedResult:
    task, frame = family.tasks[number], family.frames[number]
    index = writer.flush(records, frame.files)
    digests = dict(final.digests[number])
    whole = []
    for record, known in zip(records, frame.records, strict=True):
        if record.mode == Mode.COPY:
            digests[record.info.name] = known.base_digest
            record.base_digest = known.base_digest[:SHORT]
        elif record.mode == Mode.WHOLE or record.base_rows:
            digest = store_rest(task.vector.fine, record, writer.append_whole)
            record.whole_digest = digest[:SHORT]
            if record.mode == Mode.WHOLE:
                digests[record.info.name] = digest
                whole.append(record.info)
    energy = sum(item.squared for item in family.items if item.task == number)
    measured = {
        "peru.energy": repr(float(energy)),
        "peru.error": repr(float(final.errors[number])),
        "peru.result": checkpoint_digest(digests).hex(),
    }
    files = list(side_files_of(task.vector.fine, family.base))
    size = writer.seal(family.metadata(task, measured), index, files)
    return MixedResult(
        task.vector.name, task.target, task.entries, size, frame.whole_bytes, frame.side_bytes, task.vector.fine.nbytes,
        energy, final.errors[number], final.predicted[number], family.gains.get(task.vector.name), whole,
        {r.info.name: r.rank for r in records if r.rank},
    )  # fmt: skip
