"""Methods on whole matrices: one tensor of every task at a time, in its real shape.

A tile rule (methods/rules.py) sees runs of entries. A `MatrixRule` sees matrices: tensors of more than two dimensions as
(out, -1), vectors as one row. Tasks are read on request, so a rule that sums holds one at a time. `held` tells the engine
(merge/passes/matrices.py) how much memory a matrix takes. Rules that only look along rows set `by_rows`: they get panels of whole
rows, always the same ones, so memory does not grow with the matrix. What such a rule must know of the whole tensor first, it finds
in passes over its panels (`study`).

A rule returns the merged task vector, to which the engine adds the base, or merged weights if `on_vectors` is off.
Tensors that a rule does not take (`takes`) stream through `merge` in tiles, as with any other rule.
Values are finite: the engine refuses a NaN, naming the tensor, before a rule sees it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from peru_cli.errors import UsageError
from peru_cli.methods.rules import Result, Rule, RuleInput, onto_base, times, weighted_sum
from peru_cli.streaming.arrays import Host

if TYPE_CHECKING:
    import torch

    from peru_cli.methods.parameters import Parameters

T = TypeVar("T")
PANEL = 1 << 18  # entries of a panel of rows; results of `study` depend on it, so it never changes


class Matrices(ABC):
    """One tensor of all tasks, or a panel of its rows. Arrays are (rows, columns), float32, or float64 if a checkpoint is."""

    name: str  # of the tensor in the output
    shape: tuple[int, ...]  # of the whole tensor
    rows: int
    columns: int
    tasks: int
    number: int = 0  # of the panel in its tensor
    first: int = 0  # the panel's first row
    studied: Any = None  # the result of `study`

    @abstractmethod
    def __getitem__(self, task: int) -> Host:
        """A task's difference from the base, or its weights. The array is new: the rule may overwrite it."""

    @abstractmethod
    def base(self) -> Host:
        """The base's weights, for rules on vectors; a new array."""

    @abstractmethod
    def tensor(self, task: int) -> torch.Tensor:
        """`[task]` in float64 for linear algebra, on the computing device."""


class Panels(ABC):
    """One tensor of all tasks, panel by panel."""

    @abstractmethod
    def each(self, what: Callable[[Matrices], T], then: Callable[[T], None] | None = None) -> list[T]:
        """The result of a function for every panel, in order. Threads share the panels; results must be small.

        With `then` nothing is kept: it takes the results, one at a time and in order."""


class MatrixRule(Rule):
    """A method on matrices with its parameters set."""

    by_rows = False  # looks only along rows: it gets panels of whole rows

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor is merged as a matrix. Otherwise it goes through `merge`, tile by tile."""
        return len(shape) >= 2

    def held(self, rows: int, columns: int, tasks: int, itemsize: int) -> int:
        """The most bytes that `merge_matrix` holds at once. The default is all tasks and three more arrays."""
        return (tasks + 3) * rows * columns * itemsize

    def study(self, panels: Panels) -> Any:
        """What `merge_matrix` must know of the whole tensor. A rule that sets `studies`, its number of passes, must override it."""
        raise TypeError(f"{type(self).__name__} studies and does not say what")

    @abstractmethod
    def merge_matrix(self, matrices: Matrices) -> Any:
        """The merged task vector, or weights; (rows, columns), NumPy or torch, float32 or float64.

        Of rules on vectors also a `Result` with a scale: an election among the tasks' vectors, or a sum of them."""

    def merge(self, tile: RuleInput) -> Result:
        """Merge tensors that are not matrices: the weighted mean."""
        mean = times(weighted_sum(self.parameters.weights), 1.0 / len(self.parameters.weights))
        return onto_base(mean, 1.0) if self.on_vectors else mean


class SpectralRule(MatrixRule):
    """A method on the singular values of task vectors. Matrices that `--plain` names are averaged, like vectors."""

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        text = parameters.text("plain")
        try:
            self._plain = re.compile(text) if text else None
        except re.error as error:
            raise UsageError(f"--plain {text!r} is not a regular expression: {error}") from error

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        return super().takes(name, shape) and not (self._plain is not None and self._plain.search(name))

    def vector(self, matrices: Matrices, task: int) -> torch.Tensor:
        """A weighted task vector, float64 (rows, columns)."""
        found = matrices.tensor(task)
        return found if self.parameters.weights[task] == 1.0 else found.mul_(self.parameters.weights[task])
