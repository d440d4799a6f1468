"""What a worker of a cluster opens for `peru shuffle-pack`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peru_cli.errors import UsageError
from peru_cli.finetunes.nodes import There
from peru_cli.pack.orders import Step
from peru_cli.pack.passes import Gather, Superpose
from peru_cli.pack.plan import PackOptions, PackPlan, plan_pack
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import StreamSettings


def check_spread(method: str, **others: object) -> None:
    """UsageError for what is computed on one machine."""
    for option in [f"--method {method}"] * (method != "superpose") + [
        f"--{name.replace('_', '-')}" for name, value in others.items() if value
    ]:
        raise UsageError(f"{option} is computed on one machine", "leave --executor out")


@dataclass
class PackStation:
    """A worker's plan and passes."""

    plan: PackPlan
    how: StreamSettings
    room: Any = field(default=None, init=False)  # the buffers of the pass that was asked for last
    _key: object = field(default=None, init=False)
    _step: Any = field(default=None, init=False)

    def gather(self) -> Gather:
        """The pass that measures."""
        if self._key != "gather":
            self._key, self._step = "gather", Gather(self.plan, self.how)
            self.room = self._step.buffers()
        found: Gather = self._step
        return found

    def superpose(self, tasks: Sequence[str], exponents: Sequence[int]) -> Step:
        """The pass that adds up these tasks, which notes digests."""
        key = tuple(tasks), tuple(exponents)
        if self._key != key:
            plan = self.plan
            for vector in self.plan.vectors:
                if vector.name not in tasks:
                    plan = plan.without(vector.name)
            for tensor, exponent in zip(plan.sums, exponents, strict=True):
                tensor.exponent = exponent
            self._key, self._step = key, Superpose(plan, self.how, None)
            self.room = self._step.buffers()
        found: Step = self._step
        return found


@dataclass(frozen=True)
class PackSources:
    """The models, and how they are packed."""

    there: There
    names: tuple[str, ...]  # the tasks'
    options: PackOptions
    tile_entries: int

    def open(self) -> PackStation:
        """A worker's plan."""
        models = self.there.open()
        assert models.base is not None
        plan = plan_pack(models.base, list(zip(self.names, models.fines, strict=True)), self.options)
        return PackStation(plan, StreamSettings(CPU, 1, self.tile_entries))
