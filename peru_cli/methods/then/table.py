"""The table of passes that follow a merge. A new one is one file in this folder and one entry here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from peru_cli.errors import UsageError

if TYPE_CHECKING:
    import torch

    from peru_cli.methods.matrices import Matrices


class Pass(ABC):
    """A pass over the merged task vector, tensor by tensor."""

    gathers = False  # `gather` is called for every tensor before `change` is for any

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor is changed; others stay as the merge made them."""
        return len(shape) >= 2 and min(shape) > 0

    @abstractmethod
    def held(self, rows: int, columns: int) -> int:
        """Bytes that `change` holds at once, at most."""

    def gather(self, merged: torch.Tensor, vectors: Matrices, counted: Sequence[int]) -> list[float]:
        """Numbers to sum over all tensors, for `gathers`; arguments as for `change`."""
        raise TypeError(f"{type(self).__name__} gathers and does not say what")

    def settle(self, sums: Sequence[float]) -> None:
        """Take the sums of what `gather` gave."""
        raise TypeError(f"{type(self).__name__} gathers and does not say what for")

    @abstractmethod
    def change(self, merged: torch.Tensor, vectors: Matrices, counted: Sequence[int], depth: float) -> torch.Tensor:
        """The merged task vector as it should be, from that as it is and each task's own; float64 (rows, columns).

        `counted` are the tasks whose weight is not 0. `depth` is l / (L - 1) in layer l of L, and 0 outside of layers.
        """


@dataclass(frozen=True)
class Listed:
    """One line of the table. `rule` is `module:class` in this folder, imported when the pass is used."""

    title: str
    paper: str
    rule: str
    spectral: bool = True  # looks at singular values, so it cannot follow a method that makes them all equal


PASSES: Mapping[str, Listed] = {
    "svc": Listed("shrink the singular values that several tasks add to", "https://arxiv.org/abs/2602.05536", "svc:Svc"),
    "lines": Listed("scale deep layers more than shallow ones", "https://arxiv.org/abs/2410.17146", "lines:Lines", spectral=False),
}


def find_pass(name: str) -> Listed:
    """The pass of a name; UsageError lists those there are."""
    if name not in PASSES:
        close = get_close_matches(name, PASSES, 1)
        raise UsageError(f"--then {name!r} is unknown", f"did you mean {close[0]}?" if close else f"there is {', '.join(PASSES)}")
    return PASSES[name]


def build_pass(name: str) -> Pass:
    """The pass of a name; UsageError as in `find_pass`."""
    module, member = find_pass(name).rule.split(":")
    built: Pass = getattr(import_module(f"peru_cli.methods.then.{module}"), member)()
    return built
