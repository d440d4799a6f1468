"""`peru prune --max-bytes|--bits|--min-quality`: decompose once, search the multiplier, write, measure the result."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peru_cli.artifacts.container import header_room
from peru_cli.artifacts.index import STORED, Mode
from peru_cli.artifacts.mixed.index import MixedRecord
from peru_cli.artifacts.mixed.writer import KIND, MixedWriter
from peru_cli.checkpoints.base_name import BaseName
from peru_cli.checkpoints.digests import SHORT, checkpoint_digest
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.renamed import record_rules
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import si_bytes
from peru_cli.errors import UsageError
from peru_cli.prune.artifact import PruneTask, shared_digest, side_files_of
from peru_cli.prune.gates import Gate, check
from peru_cli.prune.mixed.decompose import Spill, decompose, items_of
from peru_cli.prune.mixed.goal import Goal
from peru_cli.prune.mixed.represent import Frame, Price, estimate, represent, size_of, try_out
from peru_cli.prune.mixed.search import Found, approach
from peru_cli.prune.mixed.write import Final, store_rest
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings

if TYPE_CHECKING:
    from peru_cli.inference.task_models import Running
    from peru_cli.prune.mixed.with_data import Gain

_FIRST_RANK = 16  # least number of directions to compute
_BITS_A_DIRECTION = 3.0  # approximate bits for an entry of a factor
_WIDER = 8.0  # a tensor may get this many times the mean number of directions before it is decomposed again
_TOLERANCE = 0.004  # relative distance below the limit of bytes
_TRIALS = 14


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
    gain: Gain | None = None
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


class _Family:
    """Everything that stays the same while multipliers are tried."""

    def __init__(
        self, base: Checkpoint, tasks: Sequence[PruneTask], goal: Goal, base_name: BaseName | None, spill: Spill, how: StreamSettings,
        running: Running | None = None,
    ) -> None:  # fmt: skip
        self.base, self.tasks, self.goal, self.spill, self.how, self.base_name = base, tasks, goal, spill, how, base_name
        self.running = running
        self.gains: dict[str, Gain] = {}
        self.items = items_of([task.vector for task in tasks])
        self.frames = [self._frame(task) for task in tasks]

    def _frame(self, task: PruneTask) -> Frame:
        vector = task.vector
        pairs = {pair.fine.name: pair for pair in vector.pairing.pairs}
        records = []
        for name in sorted(vector.fine.tensors):
            info, pair = vector.fine.tensors[name], pairs.get(name)
            if pair is not None and pair.is_delta:
                rows = pair.base.shape[0] if pair.grown else 0
                records.append(MixedRecord(info, Mode.DELTA, base_dtype=pair.base.dtype, base_rows=rows))
            elif pair is not None and (digest := shared_digest(vector.fine, self.base, pair)) is not None:
                records.append(MixedRecord(info, Mode.COPY, base_dtype=pair.base.dtype, base_digest=digest))
            else:
                records.append(MixedRecord(info, Mode.WHOLE))
        files = [file for file, _ in side_files_of(vector.fine, self.base)]
        return Frame(
            records,
            files,
            header_room({"peru.format": "1", "peru.kind": KIND, **self.metadata(task, None)}),
            sum(record.whole_bytes for record in records),
            sum(file.size for file in files if file.origin == STORED),
        )

    def metadata(self, task: PruneTask, measured: dict[str, str] | None) -> dict[str, str]:
        """Metadata of an artifact. Without measured values, the longest that it can become."""
        if measured is None:
            measured = {"peru.energy": "9" * 26, "peru.error": "9" * 26, "peru.result": "0" * 64}
            measured |= {"peru.data": "9" * 140} if self.running is not None else {}
        named = self.base_name.metadata() if self.base_name is not None else {}
        return {
            "peru.task": task.vector.name,
            "peru.prefix": task.vector.pairing.prefix.encode(),
            "peru.entries": str(task.entries),
            "peru.goal": self.goal.encode(),
            **named,
            **record_rules([task.vector.fine]),
            **({"peru.data": gain.encode()} if (gain := self.gains.get(task.vector.name)) is not None else {}),
            **measured,
        }

    @property
    def rest_bytes(self) -> int:
        """Bytes of tensors stored whole and side files of all tasks."""
        return sum(frame.whole_bytes + frame.side_bytes for frame in self.frames)

    @property
    def entries(self) -> int:
        """Entries of all tasks."""
        return sum(task.entries for task in self.tasks)

    @property
    def energy(self) -> float:
        """Energy of all task vectors together."""
        return sum(item.squared for item in self.items)

    def limit(self) -> int | None:
        """Bytes that the goal allows for all artifacts together."""
        if self.goal.kind == "quality":
            return None
        return int(self.goal.value) if self.goal.kind == "bytes" else int(self.goal.value * self.entries / 8) + self.rest_bytes

    def decompose(self, numbers: Sequence[int]) -> None:
        decompose(self.base, [task.vector for task in self.tasks], self.items, numbers, self.spill, self.how)

    def try_out(self, price: Price) -> tuple[int, float]:
        return try_out(self.items, self.frames, self.spill, price, self.how)

    def price(self, log: float) -> Price:
        """The price for a logarithm of the multiplier. For a goal of energy, errors count as they are in the weights."""
        return Price(math.exp(log), self.goal.kind != "quality")


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
        family = _Family(base, tasks, goal, base_name, spill, how, running)
        limit = family.limit()
        least = try_out([], family.frames, spill, family.price(0.0), how)[0]
        if limit is not None and least > limit:
            rest = f", {si_bytes(family.rest_bytes)} of it for tensors stored whole and side files" if family.rest_bytes else ""
            raise UsageError(f"the limit is {limit:,} bytes, but an artifact without changes takes {least:,}{rest}", "allow more bytes")
        note("decomposing")
        _first_ranks(family, limit)
        family.decompose(range(len(family.items)))
        target = 1 - goal.value if goal.kind == "quality" else None
        for _ in range(4):
            note("searching")
            if limit is not None:
                price = _tuned(family, limit, least, note, say) if running is not None else _search_bytes(family, limit, least, say)
            else:
                price = _search_quality(family, target or 0.0)
            note("writing")
            results = _write(family, price, sync, target is None or goal.value, limit, gates, say)
            if results is not None:
                return results
            assert target is not None
            target *= 0.99
        raise AssertionError("the measured quality stays below the predicted one")


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
        family = _Family(base, [task], Goal("bits", max(budgets)), None, spill, how)
        least = try_out([], family.frames, spill, family.price(0.0), how)[0]
        _first_ranks(family, family.limit())
        family.decompose(range(len(family.items)))
        for bits in sorted(budgets, reverse=True):
            room = int(bits * family.entries / 8) + family.rest_bytes - least
            if room <= 0 or not family.energy:
                break
            nbytes, error, _ = estimate(family.items, spill, family.price(_estimated(family, True, room)))
            size = least + int(nbytes)
            relative = math.sqrt(min(error / family.energy, 1.0))
            found.append(Foreseen(bits, size, 8 * (size - family.rest_bytes) / family.entries, relative))
    return found[::-1]


def _first_ranks(family: _Family, limit: int | None) -> None:
    """How many directions to compute at first: several times what the budget pays for on average."""
    for item in family.items:
        if not item.columns:
            continue
        rows, columns = item.pair.entries // item.columns, item.columns
        if limit is None:
            item.rank = min(4 * _FIRST_RANK, item.most)
            continue
        share = 8 * max(limit - family.rest_bytes, 0) / family.entries
        mean = share * rows * columns / (rows + columns) / _BITS_A_DIRECTION
        item.rank = min(max(int(_WIDER * mean), _FIRST_RANK), item.most)


def _estimated(family: _Family, by_bytes: bool, target: float) -> float:
    """The logarithm of the multiplier at which an estimate meets the target. Decomposes further if directions run out."""
    start = math.log(max(family.energy, 1e-300) / max(family.entries, 1) / 0.3)
    short: list[int] = []

    def measure(log: float) -> float:
        nbytes, error, wanting = estimate(family.items, family.spill, family.price(log))
        short[:] = wanting
        return nbytes if by_bytes else error

    while True:
        found = approach(measure, target, start, -1.0 if by_bytes else 0.3, 0.02, 40)
        if found is None:
            return start
        measure(found.at)
        if not short:
            return found.at
        for number in short:
            family.items[number].rank = min(2 * family.items[number].rank, family.items[number].most)
        family.decompose(list(short))
        start = found.at


def _search_bytes(family: _Family, limit: int, least: int, say: Callable[[str], None]) -> Price:
    if not family.energy:
        return family.price(0.0)
    room, tolerance = limit - least, int(_TOLERANCE * limit)
    tried: dict[float, int] = {}

    def measure(at: float) -> int:
        tried[at] = family.try_out(family.price(at))[0] - least
        return tried[at]

    log = _estimated(family, True, max(room, 1))
    found = approach(measure, max(room, 1e-9), log, -1.0, tolerance / max(room, 1), _TRIALS)
    if found is None:
        found = Found(700.0, 0.0)
    price, taken = family.price(found.at), int(found.value)
    over = [at for at, nbytes in tried.items() if nbytes > room]
    if taken < room - tolerance and over:
        price, taken = _between(family, replace(price, lower=math.exp(max(over))), taken, room, least, tolerance)
    if not taken:
        say(f"no change fits into {limit:,} bytes: the artifact would equal the base; allow more")
    elif taken + least < 0.99 * limit:
        say(f"the artifact takes {taken + least:,} of {limit:,} bytes: more would not help, or the next step would exceed the limit")
    return price


def _tuned(family: _Family, limit: int, least: int, note: Callable[[str], None], say: Callable[[str], None]) -> Price:
    """The price without data; every task's items are fixed at moved integers where those are better for its bytes."""
    from peru_cli.prune.mixed.with_data import START, tune_task

    assert family.running is not None
    price = _search_bytes(family, limit, least, say)
    start = _search_bytes(family, least + int(START * (limit - least)), least, lambda text: None)
    by_task = [[item for item in family.items if item.task == number] for number in range(len(family.tasks))]
    found = [{item.name: represent(item, family.spill, price)[0] for item in items} for items in by_task]
    sizes = [size_of(frame, items, parts) for frame, items, parts in zip(family.frames, by_task, found, strict=True)]
    for number, task in enumerate(family.tasks):
        note(f"tuning {task.vector.name}")
        allowed = limit * sizes[number] // sum(sizes)
        gain = tune_task(
            family.base, task, by_task[number], family.frames[number], family.spill, found[number], start, family.running, allowed
        )
        say(str(gain))
        if gain.kept:
            family.gains[task.vector.name] = gain
    return price


def _between(family: _Family, price: Price, taken: int, room: int, least: int, tolerance: int) -> tuple[Price, int]:
    """Give as many tensors as fit the lower multiplier, which is too low for all. Returns the price and its bytes."""
    fits, exceeds = 0, len(family.items)
    while exceeds - fits > 1 and taken < room - tolerance:
        mixed = replace(price, with_lower=(fits + exceeds) // 2)
        nbytes = family.try_out(mixed)[0] - least
        if nbytes > room:
            exceeds = mixed.with_lower
            continue
        fits = mixed.with_lower
        if nbytes >= taken:
            price, taken = mixed, nbytes
    return price, taken


def _search_quality(family: _Family, target: float) -> Price:
    if not family.energy:
        return family.price(0.0)
    log = _estimated(family, False, target * family.energy)
    found = approach(lambda at: family.try_out(family.price(at))[1], target * family.energy, log, 0.3, 0.01, _TRIALS)
    if found is None:
        raise UsageError(f"--min-quality {1 - target:.6g} is higher than quantised differences can reach", "use --lossless")
    return family.price(found.at)


def _write(
    family: _Family, price: Price, sync: bool, quality: float | bool, limit: int | None, gates: Sequence[Gate], say: Callable[[str], None]
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


def _seal(family: _Family, number: int, final: Final, records: list[MixedRecord], writer: MixedWriter) -> MixedResult:
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
