"""Statistics for merges with data: how they are collected, and how a method reads them.

A method with data names a `Collector` in the table. It is given tasks' models in memory with examples, and returns arrays
by role and tensor name; merge/data/statistics.py keeps them in a safetensors file for each task (`ROLE/TENSOR`), under a key
made of the model's digest, the examples' digest and the options named in the table, so that they are collected once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from peru_cli.streaming.arrays import Host

if TYPE_CHECKING:
    import torch

    from peru_cli.methods.parameters import Parameters

Found = dict[str, "torch.Tensor"]  # by ROLE/TENSOR, with the tensor's name in the task's own checkpoint


class Statistics(Protocol):
    """One task's statistics, by the name of the merged tensor."""

    def shape(self, role: str, name: str) -> tuple[int, ...] | None:
        """The shape of what was collected of a tensor; None if nothing was."""
        ...

    def entries(self, role: str, name: str, start: int, n: int) -> Host:
        """Flat entries from `start` on, as they were collected; (n,)."""
        ...


def whole(statistics: Statistics, role: str, name: str) -> Host | None:
    """All that was collected of a tensor, in its shape; None if nothing was."""
    shape = statistics.shape(role, name)
    if shape is None:
        return None
    n = 1
    for side in shape:
        n *= side
    return statistics.entries(role, name, 0, n).reshape(shape)


class Examples(Protocol):
    """Examples as a model's keyword arguments (inference/inputs.py has them)."""

    def __len__(self) -> int: ...

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Any, Mapping[str, torch.Tensor]]]:
        """Batches: which examples (numbers), and the model's arguments."""
        ...

    def make(self, numbers: Any) -> Mapping[str, torch.Tensor]:
        """One batch of these examples."""
        ...


@dataclass
class TaskModel:
    """One task in memory.

    `model` is a transformers model in float32 and evaluation mode, without gradients. `names` has for its parameters (by
    their names in the model) the tensors' names in the task's checkpoint. `base(parameter)` is the base's tensor where
    the parameter is merged, else None; only `together` collectors may ask for it.
    """

    task: str
    model: Any
    examples: Examples
    names: Mapping[str, str]
    base: Callable[[str], torch.Tensor | None]
    batch_size: int
    advance: Callable[[int], None] = lambda examples: None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]


class Collector(ABC):
    """Collects statistics from models and unlabelled examples."""

    together = False  # whether all tasks are looked at at once

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def check(self, model: TaskModel) -> None:  # noqa: B027 - most models are fine
        """Refuse a model that the method cannot work with; UsageError."""

    def work(self, model: TaskModel) -> int:
        """How many examples will be reported to `advance`."""
        return len(model.examples)

    @abstractmethod
    def collect(self, models: Sequence[TaskModel]) -> list[Found]:
        """Statistics of each model: one of them, or, if `together`, all."""
