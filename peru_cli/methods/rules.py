"""What every merge method is to the engine: statistics that it wants first, and a pure function on tiles.

    gather     exact thresholds of the task vectors (`trims`), sign counts (`wants_signs`) or inner products
               (`wants_products`); all of them add up over tiles, so tiles and threads change nothing
    decide     `decide(products)`, from those
    apply      `merge(tile)`: entries of all tasks in, merged entries out

All tensors are 1-D runs of one checkpoint tensor's entries, float32 (float64 where a checkpoint is).
Products are rounded before they are added (no fused multiply-add), so every processor gives the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch

Value = Fraction | float | int | str | bool


@dataclass(frozen=True)
class Parameters:
    """Effective options of one merge: task names and weights in the order of the command line, and the rest."""

    tasks: tuple[str, ...]
    weights: tuple[float, ...]
    values: Mapping[str, Value] = field(default_factory=dict)

    def number(self, name: str) -> float:
        """An option's value as a float."""
        value = self.values[name]
        assert not isinstance(value, str)
        return float(value)

    def share(self, name: str) -> Fraction:
        """An exact share of the entries."""
        value = self.values[name]
        assert isinstance(value, Fraction)
        return value

    def text(self, name: str) -> str:
        """An option's value as a word."""
        value = self.values[name]
        assert isinstance(value, str)
        return value


class Scratch:
    """Reused room of one thread: tensors by name, (entries,), cut to a tile's length."""

    def __init__(self, entries: int, device: torch.device, kind: torch.dtype) -> None:
        self._entries, self._device, self._kind = entries, device, kind
        self._rooms: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, n: int) -> torch.Tensor:
        """Room for n entries; what was in it is anything. (n,)"""
        if name not in self._rooms:
            self._rooms[name] = torch.empty(self._entries, dtype=self._kind, device=self._device)
        return self._rooms[name][:n]


@dataclass
class Tile:
    """What a rule sees of one tile; every tensor is (n,).

    `base` is None for rules that do not read it. `inputs(t)` is task t's difference from the base, or its
    weights for rules on whole weights; without `holds_all` it is valid until the next call. `kept(t, i)` is
    1.0 where trim i keeps an entry of task t, else 0.0, valid until the next call.
    """

    name: str  # the tensor's name in the output
    slot: int  # its number in canonical order
    start: int  # flat index of the first entry
    n: int
    tasks: int
    base: torch.Tensor | None
    inputs: Callable[[int], torch.Tensor]
    kept: Callable[[int, int], torch.Tensor]
    room: Scratch
    majority: int = 0  # sign of the sum of elected signs over everything, where `wants_signs`


class Rule(ABC):
    """A method with its parameters set."""

    on_vectors = True  # works on differences from a base; else on whole weights
    holds_all = False  # needs the inputs of all tasks at once
    trims: Sequence[Fraction] = ()  # shares of largest entries whose exact thresholds are wanted
    scope = "global"  # of the trims: "global" or "tensor"
    wants_signs = False  # `elect` is called on all tiles first, and its sum's sign becomes `Tile.majority`
    wants_products = False  # inner products of all inputs, for each tensor

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def elect(self, tile: Tile) -> int:
        """Sum of this tile's signs, for `wants_signs`; a rule that sets it must have its own."""
        raise TypeError(f"{type(self).__name__} wants signs and does not say how to elect them")

    def decide(self, products: Mapping[int, Sequence[Sequence[float]]]) -> None:
        """Take the inner products of each slot, for `wants_products`: a table (tasks, tasks). As with `elect`."""
        raise TypeError(f"{type(self).__name__} wants products and does not say what to decide from them")

    @abstractmethod
    def merge(self, tile: Tile) -> torch.Tensor:
        """Merged weights of a tile; (n,), valid until the room's next use."""


def weighted_sum(tile: Tile, weights: Sequence[float], out: torch.Tensor) -> torch.Tensor:
    """out = sum over tasks of weight * input, in the order of the tasks; (n,)."""
    for number, weight in enumerate(weights):
        value = tile.inputs(number)
        if number == 0:
            torch.mul(value, weight, out=out) if weight != 1.0 else out.copy_(value)
        else:
            out.add_(scaled(value, weight, tile))
    return out


def scaled(value: torch.Tensor, weight: float, tile: Tile) -> torch.Tensor:
    """weight * value in room of its own, the value itself for weight 1; (n,)."""
    return value if weight == 1.0 else torch.mul(value, weight, out=tile.room("scaled", tile.n))


def onto_base(tile: Tile, vector: torch.Tensor, scale: float) -> torch.Tensor:
    """base + scale * vector, in the vector's memory; (n,)."""
    assert tile.base is not None
    if scale != 1.0:
        vector.mul_(scale)
    return vector.add_(tile.base)
