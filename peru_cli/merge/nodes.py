"""What a worker of a cluster opens for `peru merge`, and what runs there: methods that work tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from peru_cli.errors import UsageError
from peru_cli.finetunes.nodes import Current, There
from peru_cli.merge.given import Given, build_by_tensor
from peru_cli.merge.passes.matrices import taken
from peru_cli.merge.passes.run import searched, together
from peru_cli.merge.passes.tiles import Elect, Merge, Products
from peru_cli.merge.passes.walk import Decided, MergeBuffers, Walk
from peru_cli.merge.plan import MergePlan, Options, plan_merge
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule
from peru_cli.methods.table import find_method
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import Station, StreamSettings

_WALKS: dict[str, type[Elect | Products | Merge]] = {kind.__name__: kind for kind in (Elect, Products, Merge)}


def check_spread(plan: MergePlan, rule: Rule, method: str) -> None:
    """UsageError for a method that does not work tile by tile."""
    if taken(plan, rule):
        raise UsageError(f"--executor ray merges tile by tile, and {method} takes rows or whole matrices", "leave --executor out")


@dataclass(frozen=True)
class MergeStation(Station):
    """Where tiles are merged one after another. `family` and `buffers` are those of the search for thresholds."""

    plan: MergePlan = field(kw_only=True)
    rule: Rule = field(kw_only=True)
    how: StreamSettings = field(kw_only=True)
    current: Current = field(default_factory=Current, init=False)

    def walk(self, kind: str, decided: Decided, slots: Sequence[int]) -> Walk:
        """A walk of this kind over these slots; the same one until another is asked for."""

        def make() -> Walk:
            if self.rule.wants_products and kind == "Merge":
                self.rule.decide(decided.products)
            return _WALKS[kind](self.plan, self.rule, self.how, decided, slots)

        found: Walk = self.current.get((kind, tuple(slots)), make)
        return found

    def room(self, walk: Walk) -> MergeBuffers:
        """The buffers of the walk that was asked for last."""
        assert walk is self.current.step
        found: MergeBuffers = self.current.room
        return found


@dataclass(frozen=True)
class MergeSources:
    """The models, and how they are merged."""

    there: There
    names: tuple[str, ...]  # the tasks'
    method: str
    varied: Given
    parameters: Parameters
    options: Options
    tile_entries: int

    def open(self) -> MergeStation:
        """A worker's plan and rule."""
        models, how, method = self.there.open(), StreamSettings(CPU, 1, self.tile_entries), find_method(self.method)
        rule = method.build(self.parameters)
        plan = plan_merge(models.base, list(zip(self.names, models.fines, strict=True)), rule.on_vectors, self.options)
        if self.varied.by_tensor:
            rule = build_by_tensor(method, self.varied, self.parameters, [slot.info.name for slot in plan.slots])
        plan = together(plan, rule, how)
        family = searched(plan, how)
        return MergeStation(family, family.buffers(), plan=plan, rule=rule, how=how)
