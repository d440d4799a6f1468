"""Statistics for merges with data: how they are collected, and how a method reads them.

A method with data names a `Collector` in the table. It gets the tasks' models in memory and examples, and returns arrays
by role and tensor name. merge/data/statistics.py stores them in a safetensors file for each task (`ROLE/TENSOR`), under a key
made of the model's digest, the examples' digest and the options named in the table, so that they are collected only once."""

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
        """The shape of a tensor's statistics. None if there are none."""
        ...

    def entries(self, role: str, name: str, start: int, n: int) -> Host:
        """Flat entries from `start` on; (n,)."""
        ...


def whole(statistics: Statistics, role: str, name: str) -> Host | None:
    """All statistics of a tensor, in their shape. None if there are none."""
    shape = statistics.shape(role, name)
    if shape is None:
        return None
    n = 1
    for side in shape:
        n *= side
    return statistics.entries(role, name, 0, n).reshape(shape)


class Examples(Protocol):
    """Examples as keyword arguments of a model (inference/inputs.py implements it)."""

    def __len__(self) -> int: ...

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Any, Mapping[str, torch.Tensor]]]:
        """Batches: the indices of the examples, and the model's arguments."""
        ...

    def make(self, numbers: Any) -> Mapping[str, torch.Tensor]:
        """One batch of the given examples."""
        ...


@dataclass
class TaskModel:
    """One task in memory.

    `model` is a transformers model in float32 and evaluation mode, without gradients. `names` maps its parameters' names to the
    tensors' names in the task's checkpoint. `base(parameter)` is the base's tensor if the parameter is merged, otherwise None;
    only `together` collectors may call it."""

    task: str
    model: Any
    examples: Examples
    names: Mapping[str, str]
    base: Callable[[str], torch.Tensor | None]
    batch_size: int
    advance: Callable[[int], None] = lambda examples: None

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]


class Collector(ABC):
    """Collects statistics from models and unlabelled examples."""

    together = False  # whether it sees all tasks at once

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def check(self, model: TaskModel) -> None:  # noqa: B027 - most models are fine
        """UsageError for a model that the method cannot work with."""

    def work(self, model: TaskModel) -> int:
        """The number of examples that will be reported to `advance`."""
        return len(model.examples)

    @abstractmethod
    def collect(self, models: Sequence[TaskModel]) -> list[Found]:
        """Statistics of each model: one model at a time, or all of them if `together`."""
