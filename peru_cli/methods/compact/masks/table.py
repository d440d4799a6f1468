"""The table of methods that make masks. A new one is one file in this folder and one entry here.

    tau_MT = sum_t tau_t        retrieve   theta_t^ = theta_0 + scale * m_t * tau_MT

A method says what m_t is, and may put another vector in the place of tau_MT. All arrays are 1-D runs of one tensor's entries,
float64, in the tensor's own units or in steps of it: masks must not depend on the unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peru_cli.methods.compact.masking import Doubles, Flags


class MaskMethod(ABC):
    """How a method masks. Entries that a task does not change must never be in its mask."""

    ranked = False  # the threshold is a magnitude in the order of the whole task vector; of its equals only some are kept
    compares = True  # masks depend on the shared vector

    def shared(self, rows: Doubles) -> Doubles:
        """The vector that all tasks share, of their task vectors; (tasks, n) -> (n,)."""
        from peru_cli.methods.compact.masking import add_up

        return add_up(rows)

    def stored(self, rows: Doubles) -> Doubles | None:
        """What is stored, from task vectors in steps, before it is rounded; None: the sum of the rounded task vectors."""
        return None

    def thresholds(self, given: float | None) -> Sequence[float]:
        """The thresholds of a task to choose from, by error; `given` is what was typed. Methods without thresholds have one, 0."""
        return (0.0,)

    @abstractmethod
    def parts(self, vector: Doubles, shared: Doubles | None) -> tuple[Doubles, ...]:
        """What `mask` looks at, made once for all thresholds. `shared` is None for methods that do not compare."""

    @abstractmethod
    def mask(self, parts: tuple[Doubles, ...], threshold: float, equals: bool) -> Flags:
        """The entries kept; bools (n,). `equals`: whether those at the threshold are, for methods that rank."""


@dataclass(frozen=True)
class Listed:
    """One line of the table. `rule` is `module:class` in this folder, `option` the method's own option: threshold or keep.

    `scaled`: each task has a scale of its own, sum |tau_t| / sum |m_t u| with the shared vector u."""

    title: str
    paper: str
    rule: str
    option: str | None = None
    scaled: bool = False


MASKS: Mapping[str, Listed] = {
    "tall-masks": Listed(
        "each task keeps the entries that it changes most, compared with the other tasks", "https://arxiv.org/abs/2405.07813",
        "tall:TallMasks", "threshold",
    ),
    "magnitude-masks": Listed(
        "each task keeps its largest entries", "https://arxiv.org/abs/2405.07813", "magnitude:MagnitudeMasks", "keep"
    ),
    "emr": Listed(
        "each task keeps the entries that have the elected sign, times a scale of its own", "https://arxiv.org/abs/2405.17461",
        "emr:Emr", scaled=True,
    ),
}  # fmt: skip


def with_option(option: str) -> str:
    """The names of the methods that have an option."""
    return " or ".join(name for name, listed in MASKS.items() if listed.option == option)


def build_masks(name: str) -> MaskMethod:
    """The method of a name in the table."""
    module, member = MASKS[name].rule.split(":")
    built: MaskMethod = getattr(import_module(f"peru_cli.methods.compact.masks.{module}"), member)()
    return built
