"""What a worker of a cluster opens for `peru shuffle-pack`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peru_cli.errors import UsageError
from peru_cli.finetunes.nodes import Current, There
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
    current: Current = field(default_factory=Current, init=False)

    @property
    def room(self) -> Any:
        """The buffers of the pass that was asked for last."""
        return self.current.room

    def gather(self) -> Gather:
        """The pass that measures."""
        found: Gather = self.current.get("gather", lambda: Gather(self.plan, self.how))
        return found

    def superpose(self, tasks: Sequence[str], exponents: Sequence[int]) -> Step:
        """The pass that adds up these tasks, which notes digests."""

        def make() -> Superpose:
            plan = self.plan
            for vector in self.plan.vectors:
                if vector.name not in tasks:
                    plan = plan.without(vector.name)
            for tensor, exponent in zip(plan.sums, exponents, strict=True):
                tensor.exponent = exponent
            return Superpose(plan, self.how, None)

        found: Step = self.current.get((tuple(tasks), tuple(exponents)), make)
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
