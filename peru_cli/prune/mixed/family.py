"""What stays the same while prices are tried: tensors, what artifacts hold besides them, and the goal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from peru_cli.artifacts.container import header_room
from peru_cli.artifacts.index import STORED, Mode
from peru_cli.artifacts.mixed.index import MixedRecord
from peru_cli.artifacts.mixed.writer import KIND
from peru_cli.checkpoints.base_name import BaseName
from peru_cli.checkpoints.names.renamed import record_rules
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.prune.artifact import PruneTask, shared_digest, side_files_of
from peru_cli.prune.mixed.decompose import Spill, decompose, items_of
from peru_cli.prune.mixed.goal import Goal
from peru_cli.prune.mixed.represent import Frame, Price, try_out
from peru_cli.vectors.family import StreamSettings

if TYPE_CHECKING:
    from peru_cli.inference.task_models import Running


class Measured(Protocol):
    """What was measured on a task's examples."""

    def encode(self) -> str:
        """As the artifact records it."""
        ...

    def figures(self) -> dict[str, object]:
        """For --json."""
        ...


class Family:
    """Everything that stays the same while prices are tried."""

    def __init__(
        self, base: Checkpoint, tasks: Sequence[PruneTask], goal: Goal, base_name: BaseName | None, spill: Spill, how: StreamSettings,
        running: Running | None = None,
    ) -> None:  # fmt: skip
        self.base, self.tasks, self.goal, self.spill, self.how, self.base_name = base, tasks, goal, spill, how, base_name
        self.running = running
        self.gains: dict[str, Measured] = {}
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
        if self.goal.kind in ("quality", "agreement"):
            return None
        return int(self.goal.value) if self.goal.kind == "bytes" else int(self.goal.value * self.entries / 8) + self.rest_bytes

    def decompose(self, numbers: Sequence[int]) -> None:
        decompose(self.base, [task.vector for task in self.tasks], self.items, numbers, self.spill, self.how)

    def try_out(self, price: Price) -> tuple[int, float]:
        return try_out(self.items, self.frames, self.spill, price, self.how)

    def price(self, log: float) -> Price:
        """The price for a logarithm of the multiplier. For a goal of energy, errors count as they are in the weights."""
        return Price(math.exp(log), self.goal.kind != "quality")
