"""The interface of merge methods: the statistics that a method needs first, and a pure function on tiles.

    gather     exact thresholds of the task vectors (`trims`), sign counts (`wants_signs`) or inner products
               (`wants_products`); all of them add up over tiles, so tiles and threads change nothing
    decide     `decide(products)`, from those; or from `statistics` that were collected with data (methods/statistics.py)
    apply      `merge(tile)`: entries of all tasks in, merged entries out

All arrays are 1-D runs of one checkpoint tensor's entries, float32 (float64 if a checkpoint is). `tile.xp` is the namespace
that computes with them (streaming/arrays.py): NumPy, or torch on a GPU.
Products are rounded before they are added (no fused multiply-add), so every processor gives the same bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from peru_cli.kernels.compiling.build import Kernel
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.statistics import Statistics
from peru_cli.streaming.arrays import Array, Arrays


class Scratch:
    """Per-thread scratch buffers: arrays by name, (entries,), cut to a tile's length."""

    def __init__(self, xp: Arrays, entries: int, kind: str) -> None:
        self._xp, self._entries, self._kind = xp, entries, kind
        self._rooms: dict[str, Array] = {}

    def __call__(self, name: str, n: int) -> Array:
        """A buffer of n entries with arbitrary contents. (n,)"""
        if name not in self._rooms:
            self._rooms[name] = self._xp.empty(self._entries, self._kind)
        return self._rooms[name][:n]


@dataclass(frozen=True)
class Kept:
    """Entries that a task keeps: magnitudes with patterns from `low` to `high` (None: all above); of these the flagged ones, bools (n,)."""

    low: int = 0
    high: int | None = None
    flags: Array | None = None


@dataclass
class RuleInput:
    """What a rule sees of one tile; every array is (n,).

    `base()` is the base's weights, for rules that read it. `inputs(t)` is task t's difference from the base, or its weights for
    rules on whole weights. A rule may overwrite it; without `holds_all` it is valid until the call after the next.
    `add(total, t, flags, first, second)` is total + inputs(t) * flags * first * second in one pass, rounded step by step. A total
    of None is 0, flags of None keep all. `kept(t, i)` is what trim i keeps of task t, `flags(t, kept)` its bools; None for all.
    `elected(kept, before)` is the number of entries that elect + minus the number that elect -, as in `Election`.
    For rules that are `entrywise` the tile may lie in several small tensors: `parts` has them."""

    name: str  # the tensor's name in the output
    slot: int  # its index in canonical order
    start: int  # flat index of the first entry
    parts: Sequence[tuple[str, int, int]]  # the tensors that contain the tile: name, flat index of the first entry, number of entries
    n: int
    tasks: int
    xp: Arrays
    base: Callable[[], Array]
    inputs: Callable[[int], Array]
    add: Callable[[Array | None, int, Array | None, float, float], Array]
    kept: Callable[[int, int], Kept]
    flags: Callable[[int, Kept], Array | None]
    elected: Callable[[Sequence[Kept], Sequence[tuple[float, float]]], int]
    room: Scratch
    shape: tuple[int, ...] = ()  # of the whole tensor
    majority: int = 0  # sign of the total of `elect` over all tiles, if `wants_signs`


@dataclass(frozen=True)
class Election:
    """TIES' election and disjoint merge. Votes are input * both factors of `before` where kept; those with the elected sign are merged.

    `after` has the factor of each task's entries after the election. With `shares` the sum is divided by their sum over the tasks that
    agree (by 1 if that is 0). A sum of 0 elects -1 if `strict`, otherwise +1."""

    kept: Sequence[Kept]
    before: Sequence[tuple[float, float]]
    after: Sequence[float]
    shares: Sequence[float] | None
    strict: bool


@dataclass(frozen=True)
class Result:
    """Merged weights of a tile that are not computed yet: a vector, an election, or a sum of parts, as for `RuleInput.add`; times `factor`.

    With `scale` it is a task vector: base + scale * vector. What computes it can round it in the same loop (kernels/rounding.py)."""

    parts: Sequence[tuple[int, Array | None, float, float]] = ()
    vector: Array | None = None
    election: Election | None = None
    factor: float = 1.0
    scale: float | None = None

    @property
    def copies(self) -> bool:
        """Whether the first task's weights are the result."""
        return list(self.parts) == [(0, None, 1.0, 1.0)] and self.factor == 1.0 and self.scale is None

    def compute(self, tile: RuleInput) -> Array:
        """The merged weights; (n,)."""
        total = self.vector
        if (chosen := self.election) is not None:
            inputs = [tile.inputs(number) for number in range(tile.tasks)]
            flags = [tile.flags(number, kept) for number, kept in enumerate(chosen.kept)]
            out = tile.room("sum", tile.n)
            total = tile.xp.disjoint(inputs, flags, chosen.before, chosen.after, chosen.shares, chosen.strict, out)
        for part in self.parts:
            total = tile.add(total, *part)
        if self.factor != 1.0:
            total = tile.xp.multiply(total, self.factor, out=total)
        return total if self.scale is None else tile.xp.onto_base(total, tile.base(), self.scale)


class Rule(ABC):
    """A method with its parameters set."""

    on_vectors = True  # works on differences from a base; otherwise on whole weights
    holds_all = False  # needs the inputs of all tasks at once
    trims: Sequence[Sequence[Fraction]] = ()  # for each trim, the share of largest entries that each task keeps
    scope = "global"  # of the trims: "global" or "tensor"
    isotropic = False  # all singular values of what it merges are equal, so that its singular vectors are any
    entrywise = False  # an entry depends only on the inputs' entries at its place (and on `RuleInput.parts`): small tensors may share tiles
    suffers_from_norms = True  # on vectors: one that is much longer than the others outweighs them
    wants_signs = False  # `elect` is called on all tiles first, and the sign of its total becomes `RuleInput.majority`
    wants_products = False  # wants inner products of all inputs, for each tensor
    studies = 0  # passes over each tensor before it is merged, of rules on matrices (methods/matrices.py)
    statistics: Sequence[Statistics] = ()  # of each task, for methods with data; set before the first tile

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def keeps(self, trim: int, task: int, n: int, slot: int) -> int:
        """How many of n entries a trim leaves a task: of the whole model, or of one tensor (`slot`) if that is the scope."""
        return self.parameters.count(self.trims[trim][task], n)

    def at(self, slot: int) -> Rule:
        """The rule of a tensor (by its index in canonical order), if tensors have different rules."""
        return self

    def elect(self, tile: RuleInput) -> int:
        """Sum of this tile's signs. A rule that sets `wants_signs` must override it."""
        raise TypeError(f"{type(self).__name__} wants signs and does not say how to elect them")

    def decide(self, products: Mapping[int, Sequence[Sequence[float]]]) -> None:
        """Take the inner products of each slot, a table (tasks, tasks). A rule that sets `wants_products` must override it."""
        raise TypeError(f"{type(self).__name__} wants products and does not say what to decide from them")

    def loops(self, dtype: str) -> Sequence[Kernel]:
        """Loops of its own that are worth compiling beside each other, for tensors of a dtype: BF16, F16 or F32."""
        return ()

    @abstractmethod
    def merge(self, tile: RuleInput) -> Array | Result:
        """Merged weights of a tile; (n,), valid until the buffers are used again."""


def weighted_sum(weights: Sequence[float]) -> Result:
    """Sum over tasks of weight * input, in the order of the tasks."""
    return Result([(number, None, weight, 1.0) for number, weight in enumerate(weights)])


def sum_of_parts(parts: Iterable[tuple[int, Array | None, float, float]]) -> Result:
    """Sum of tasks' kept inputs times two factors, in order: (task, bools or None, factor, factor)."""
    return Result(list(parts))


def add_up(tile: RuleInput, parts: Iterable[Array]) -> Array:
    """Sum of arrays in order; (n,). A part must stay valid while the next one is computed; the sum of one is that part itself."""
    total: Array | None = None
    for part in parts:
        total = part if total is None else tile.xp.add(total, part, out=tile.room("sum", tile.n))
    return total


def times(result: Result, factor: float) -> Result:
    """factor * a result that has no factor yet."""
    return replace(result, factor=factor)


def scaled(value: Array, weight: float, tile: RuleInput) -> Array:
    """weight * value, in the memory of `value`; (n,)."""
    return value if weight == 1.0 else tile.xp.multiply(value, weight, out=value)


def masked(value: Array, flags: Array | None, tile: RuleInput) -> Array:
    """`value` where the bools are true (None: everywhere), else 0, in the memory of `value`; (n,)."""
    if flags is None:
        return value
    return tile.xp.multiply(value, tile.xp.copy(flags, tile.room("ones", tile.n)), out=value)


def onto_base(vector: Array | Result, scale: float) -> Result:
    """base + scale * vector; the vector's memory is overwritten."""
    return replace(vector if isinstance(vector, Result) else Result(vector=vector), scale=scale)
