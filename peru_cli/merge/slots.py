"""The tensors that a merge makes, and what each is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import overload

from peru_cli.checkpoints.header import TensorInfo


@dataclass(frozen=True, slots=True)
class Slot:
    """One merged tensor: the output, each task's tensor, and the base's.

    `tasks` are the indices of the tasks that the inputs belong to. None: all of them."""

    info: TensorInfo
    inputs: tuple[TensorInfo, ...]
    base: TensorInfo
    tasks: tuple[int, ...] | None = None

    def task(self, number: int) -> int:
        """The task of an input."""
        return number if self.tasks is None else self.tasks[number]

    def of(self, task: int) -> TensorInfo | None:
        """A task's tensor. None if it is not among the inputs."""
        if self.tasks is None:
            return self.inputs[task]
        return self.inputs[self.tasks.index(task)] if task in self.tasks else None


class Slots(Sequence[Slot]):
    """Slots in canonical order, by columns: there may be a hundred thousand, and as objects they would take five times the memory."""

    def __init__(self, slots: Iterable[Slot] = ()) -> None:
        self._infos: list[TensorInfo] = []
        self._bases: list[TensorInfo] = []
        self._tasks: list[tuple[int, ...] | None] = []
        self._inputs: list[list[TensorInfo | None]] = []  # by their numbers; None beyond a slot's last
        for slot in slots:
            self.append(slot)

    def append(self, slot: Slot) -> None:
        """Add the next one."""
        while len(self._inputs) < len(slot.inputs):
            self._inputs.append([None] * len(self))
        for column, info in zip_longest(self._inputs, slot.inputs):
            column.append(info)
        self._infos.append(slot.info)
        self._bases.append(slot.base)
        self._tasks.append(slot.tasks)

    def __len__(self) -> int:
        return len(self._infos)

    @overload
    def __getitem__(self, index: int) -> Slot: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Slot]: ...
    def __getitem__(self, index: int | slice) -> Slot | Sequence[Slot]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        inputs = tuple([info for column in self._inputs if (info := column[index]) is not None])
        return Slot(self._infos[index], inputs, self._bases[index], self._tasks[index])

    def __iter__(self) -> Iterator[Slot]:
        return map(self.__getitem__, range(len(self)))

    @property
    def outputs(self) -> Sequence[TensorInfo]:
        """The merged tensors."""
        return self._infos

    @property
    def bases(self) -> Sequence[TensorInfo]:
        """The base's tensors."""
        return self._bases
