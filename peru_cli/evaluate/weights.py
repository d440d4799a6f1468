"""Compare two models' weights by what each changed in their base. Streams tiles, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from peru_cli.checkpoints.pairing import pair_checkpoints
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch
from peru_cli.finetunes.verify import verify_expanded
from peru_cli.streaming.aligned import read_bits
from peru_cli.streaming.arrays import Host
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import Buffers, Family, StreamSettings, TaskVector


@dataclass
class Closeness:
    """Sums over entries, in float64, of our change of the base and theirs. Entries that are not finite are left out."""

    name: str
    entries: int = 0
    not_finite: int = 0
    ours: float = 0.0  # sum of squares of our change
    theirs: float = 0.0
    product: float = 0.0
    missed: float = 0.0  # sum of squares of ours - theirs
    changed: int = 0  # entries that they changed
    same_sign: int = 0  # of these, entries that we changed in the same direction

    @property
    def error(self) -> float:
        """||ours - theirs|| / ||theirs - base||; 0 if all are equal."""
        return math.sqrt(self.missed / self.theirs) if self.theirs else math.inf if self.missed else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the two changes: NaN if only one is zero, 1 if both are."""
        norms = math.sqrt(self.ours * self.theirs)
        return self.product / norms if norms else 1.0 if self.ours == self.theirs else math.nan

    @property
    def sign(self) -> float:
        """Share of their changed entries that we changed in the same direction; 1 if there are none."""
        return self.same_sign / self.changed if self.changed else 1.0

    def add(self, other: Closeness) -> None:
        """Add another's sums."""
        for key in ("entries", "not_finite", "ours", "theirs", "product", "missed", "changed", "same_sign"):
            setattr(self, key, getattr(self, key) + getattr(other, key))


@dataclass
class WeightsReport:
    """Closeness by tensor (the base's names) and in total. `heads` are tensors that the base lacks, and whether they are equal."""

    tensors: list[Closeness]
    total: Closeness
    heads: dict[str, bool] = field(default_factory=dict)


class _Measure:
    """The pass: both changes of a tile, and their sums."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self.found = [Closeness(slot.name) for slot in family.slots]

    def buffers(self) -> Buffers:
        return self._family.buffers()

    def apply(self, tile: Tile, buffers: Buffers) -> Closeness:
        family, slot = self._family, self._family.slots[tile.tensor]
        xp, info = family.how.xp, self._family.base.tensors[slot.name]
        _, base_bits = read_bits(family.base, info, tile, buffers.base)
        n = len(base_bits)
        base = xp.download(xp.widen(base_bits, info.dtype, xp.empty(n, "f8"))).copy()
        changes: list[Host] = []
        for aligned in family.each(slot, tile, base_bits, buffers, [0, 1]):
            values = xp.download(xp.widen(aligned.fine, aligned.pair.fine.dtype, xp.empty(len(aligned.fine), "f8")))
            changes.append(np.subtract(values, base))
        if not n or len(changes) < 2:
            return Closeness(slot.name)
        return _sums(slot.name, *changes)

    def commit(self, tile: Tile, result: Closeness) -> None:
        self.found[tile.tensor].add(result)

    def finish(self, tile: Tile, committed: None, buffers: Buffers) -> None:
        pass


def _sums(name: str, ours: Host, theirs: Host) -> Closeness:
    found = Closeness(name, len(ours))
    missed = ours - theirs
    if not np.isfinite(missed.sum()):
        usable = np.isfinite(ours) & np.isfinite(theirs)
        found.not_finite = int(len(usable) - np.count_nonzero(usable))
        ours, theirs, missed = ours[usable], theirs[usable], missed[usable]
    found.ours, found.theirs = float(np.dot(ours, ours)), float(np.dot(theirs, theirs))
    found.product, found.missed = float(np.dot(ours, theirs)), float(np.dot(missed, missed))
    found.changed = int(np.count_nonzero(theirs))
    found.same_sign = int(np.count_nonzero((ours < 0) & (theirs < 0)) + np.count_nonzero((ours > 0) & (theirs > 0)))
    return found


class Weights:
    """A planned comparison: the pairs are known, no tensor is read yet."""

    def __init__(self, ours: Checkpoint, theirs: Checkpoint, base: Checkpoint) -> None:
        """Raises Mismatch if either is not a fine-tune of the base, or no tensor is in both."""
        self.base, self.models = base, (ours, theirs)
        self.vectors = [TaskVector(model.label, model, pair_checkpoints(model, base)) for model in self.models]
        common = self.vectors[0].pairs.keys() & self.vectors[1].pairs.keys()
        if not common:
            raise Mismatch(f"{ours.label} and {theirs.label} share no tensor of {base.label}")
        for vector in self.vectors:
            vector.pairs = {name: pair for name, pair in vector.pairs.items() if name in common}
        self.entries = sum(pair.entries for pair in self.vectors[0].pairs.values())

    def measure(self, how: StreamSettings) -> WeightsReport:
        """Read both models and the base once (an artifact twice: it is verified first)."""
        verify_expanded(self.models, how)
        family = Family(self.base, self.vectors, how)
        step = _Measure(family)
        run(step, family.plan(), how.threads, how.advance)
        total = Closeness("total")
        for tensor in step.found:
            total.add(tensor)
        return WeightsReport(step.found, total, self._heads())

    def _heads(self) -> dict[str, bool]:
        """Tensors that the base lacks, and whether their bytes are equal."""
        ours, theirs = ({info.name for info in vector.pairing.whole} for vector in self.vectors)
        return {name: self.models[0].read(name) == self.models[1].read(name) for name in sorted(ours & theirs)}
