"""DARE: drop entries of the task vectors at random, rescale the rest by 1 / density, then add or elect.

Source: Yu et al., Language Models are Super Mario (2024), https://arxiv.org/abs/2311.03099, section 3.1.

Entry i of a tensor is kept if word(i) < floor(density * 2^32), with word from methods/philox.py. Every machine drops the same
entries for the same seed, task name and tensor name.

`dare` adds the kept entries (task arithmetic). `dare-ties` elects signs as TIES does and sums the entries that agree, like
mergekit: weights before the election, a sum of 0 elects +. `--reduce mean` divides by the agreeing weights.

`--rescale l1`, mergekit's option, multiplies the kept entries by the ratio of the tensor's L1 norms before and after. This
needs another pass (methods/entries/sampled.py)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from peru_cli.kernels.random import below
from peru_cli.methods.entries.sampled import Sampled
from peru_cli.methods.entries.ties import elect_and_merge
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.philox import stream_key
from peru_cli.methods.rules import Kept, Result, Rule, RuleInput, onto_base, sum_of_parts
from peru_cli.streaming.arrays import Array


def survivors(tile: RuleInput, seed: int, task: str, density: Fraction) -> Array | None:
    """Which entries are kept; bool (n,), None if all are."""
    limit = int(density * 2**32)
    if limit == 2**32:
        return None
    found = [below(stream_key(seed, task, name), start, n, limit) for name, start, n in tile.parts]
    return tile.xp.upload(found[0] if len(found) == 1 else np.concatenate(found))


class Dare(Rule):
    """See the module."""

    entrywise = True

    def __init__(self, parameters: Parameters) -> None:
        super().__init__(parameters)
        self._densities = [parameters.share("keep", task) for task in range(len(parameters.tasks))]
        self._rescales = parameters.text("rescale") == "density"

    def _stays(self, tile: RuleInput, number: int) -> Array | None:
        """Which entries of a task's vector are kept. None if all are."""
        seed, task = int(self.parameters.number("seed")), self.parameters.tasks[number]
        return survivors(tile, seed, task, self._densities[number])

    def _factors(self, number: int) -> tuple[float, float]:
        """The rescaling factor of a task's vector, and its weight."""
        return float(1 / self._densities[number]) if self._rescales else 1.0, self.parameters.weights[number]

    def merge(self, tile: RuleInput) -> Result:
        parts = ((number, self._stays(tile, number), *self._factors(number)) for number in range(tile.tasks))
        return onto_base(sum_of_parts(parts), self.parameters.number("scale"))


class DareTies(Dare):
    """See the module."""

    holds_all = True

    def merge(self, tile: RuleInput) -> Result:
        stays = [Kept(flags=self._stays(tile, number)) for number in range(tile.tasks)]
        shares = self.parameters.weights if self.parameters.text("reduce") == "mean" else None
        factors = [self._factors(number) for number in range(tile.tasks)]
        vector = elect_and_merge(stays, factors, [1.0] * tile.tasks, shares)
        return onto_base(vector, self.parameters.number("scale"))


class DareByNorm(Sampled):
    """DARE rescaled by L1 norms."""

    elects = False

    def chance(self, task: int) -> float:
        return self.parameters.number("keep", task)

    def _reduces(self) -> str:
        return "sum"  # `dare` has no --reduce


class DareTiesByNorm(DareByNorm):
    """The same with an election."""

    elects = True

    def _reduces(self) -> str:
        return self.parameters.text("reduce")


def dare(parameters: Parameters) -> Rule:
    """The rule of `dare`."""
    return (DareByNorm if parameters.text("rescale") == "l1" else Dare)(parameters)


def dare_ties(parameters: Parameters) -> Rule:
    """The rule of `dare-ties`."""
    return (DareTiesByNorm if parameters.text("rescale") == "l1" else DareTies)(parameters)
