"""Measurements before a pack is written: inner products of the task vectors, which determine steps, scale and errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from peru_cli.methods.compact.superpose import Quality, best_scale, default_precision, predict, predicted_products, step_exponent
from peru_cli.pack.passes import Doubles, Gather
from peru_cli.pack.plan import PackPlan
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import TilePlan
from peru_cli.vectors.family import StreamSettings


@dataclass
class Measured:
    """Inner products of the unmoved task vectors: over all sums, and over those in which tasks are moved apart; (T, T)."""

    everything: Doubles
    apart: Doubles
    tables: dict[str, Doubles]

    def without(self, t: int) -> Measured:
        """The same with one task left out."""

        def cut(table: Doubles) -> Doubles:
            return np.delete(np.delete(table, t, 0), t, 1)

        return Measured(cut(self.everything), cut(self.apart), {name: cut(table) for name, table in self.tables.items()})


def measure(plan: PackPlan, how: StreamSettings) -> Measured:
    """One pass over all task vectors."""
    gather = Gather(plan, how)
    run(gather, TilePlan([t.info.entries for t in plan.sums], how.tile_entries), how.threads, how.advance, how.elsewhere)
    apart = np.zeros((len(plan.vectors),) * 2)
    everything = np.zeros_like(apart)
    for tensor in plan.sums:
        table = gather.tables[tensor.info.name]
        everything += table
        if tensor.is_target and plan.decorrelates:
            apart += table
    return Measured(everything, apart, gather.tables)


def settle_steps(plan: PackPlan, measured: Measured, precision: int | None) -> int:
    """Set each tensor's step, one for each group, unless the pack has them already. Returns the number of bits."""
    if plan.old is not None:
        return int(plan.metadata["peru.precision"])
    tasks = len(plan.vectors)
    bits = default_precision(tasks) if precision is None else precision
    grouped = {name: group.members for group in plan.arrangement.groups for name in group.members}
    # A tensor that no task has changed yet may be changed by a task that is added later: it gets the step of the whole.
    overall = float(np.trace(measured.everything)) / max(tasks * plan.entries, 1)
    for tensor in plan.sums:
        members = grouped.get(tensor.info.name, (tensor.info.name,))
        square = sum(float(np.trace(measured.tables[name])) for name in members)
        tensor.exponent = step_exponent(square / (tasks * len(members) * tensor.info.entries) if square else overall, bits)
    return bits


def predicted_scale(plan: PackPlan, measured: Measured) -> float:
    """The scale with the least predicted squared error over all tasks, to four digits (`--scale auto`)."""
    plain = measured.everything - measured.apart
    rounding = _rounding(plan, measured)
    return float(f"{best_scale(*predicted_products(measured.apart, plain, rounding)):.4g}") or 1.0


def _rounding(plan: PackPlan, measured: Measured) -> float:
    """What rounding one task adds to the squared distance."""
    changed = [tensor for tensor in plan.sums if np.trace(measured.tables[tensor.info.name])]
    return sum(tensor.info.entries * 4.0**tensor.exponent for tensor in changed) / 12


def predict_errors(plan: PackPlan, measured: Measured, scale: float) -> list[Quality]:
    """Predicted retrieval errors. Tasks that are already in the pack count with their norms, as independent of the new ones."""
    tasks = len(plan.vectors)
    rounding = _rounding(plan, measured)
    apart, everything = measured.apart, measured.everything
    if plan.old is not None:
        others = [float(task.norm) ** 2 for task in plan.old.index.tasks]
        size = tasks + len(others)
        apart, everything = np.zeros((size, size)), np.zeros((size, size))
        apart[:tasks, :tasks], everything[:tasks, :tasks] = measured.apart, measured.everything
        apart[range(tasks, size), range(tasks, size)] = everything[range(tasks, size), range(tasks, size)] = others
    return predict(apart, everything - apart, rounding, scale)[:tasks]
