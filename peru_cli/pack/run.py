"""`peru shuffle-pack`: many fine-tunes superposed in one file; tasks added to it and removed from it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path

from peru_cli.artifacts.packs.writer import PackWriter
from peru_cli.errors import Mismatch
from peru_cli.methods.compact.superpose import Quality, choose
from peru_cli.pack.base import MergeBase, NewBase
from peru_cli.pack.measure import Measured, measure, predict_errors, predicted_scale, settle_steps
from peru_cli.pack.passes import Superpose
from peru_cli.pack.plan import PackPlan
from peru_cli.pack.seal import PackResult, PackSealer
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import CHUNK, TilePlan
from peru_cli.vectors.family import StreamSettings

_ROOM = 1 << 20  # entries of all tasks' tiles together, so that memory does not grow with the number of tasks


def default_tile(tasks: int) -> int:
    """Entries of a tile."""
    return max(_ROOM // (tasks + 2) // CHUNK, 1) * CHUNK


def make_pack(
    plan: PackPlan,
    target: Path,
    how: StreamSettings,
    sync: bool,
    precision: int | None = None,
    max_error: float | None = None,
    merge_base: MergeBase | None = None,
    residual: Fraction | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> PackResult:
    """Write a new pack, or `plan.old` with tasks added or removed.

    Args:
        precision: bits of the step below the task vectors' RMS. The default is the fewest that do not change the error.
        max_error: leave out tasks with a larger predicted error, the worst first.
        merge_base: write the plain sums into a new base, which becomes the pack's base. Both appear, or neither.
        residual: the density of the kept errors of each task.

    Raises BadFile for values that cannot be packed, Mismatch for another base or if a removed fine-tune is not in the pack."""
    left_out: dict[str, float] = {}
    predicted: list[Quality] = []
    auto = plan.metadata["peru.scale"] == "auto"
    scale = 1.0 if auto else float(plan.metadata["peru.scale"])
    measured: Measured | None = None
    if not plan.removing:
        note("measuring")
        measured = measure(plan, how)
        while True:
            bits = settle_steps(plan, measured, precision)
            scale = predicted_scale(plan, measured) if auto else scale
            predicted = predict_errors(plan, measured, scale)
            errors = {vector.name: q.error for vector, q in zip(plan.vectors, predicted, strict=True)}
            worst = choose(errors, max_error) if max_error is not None else None
            if worst is None:
                break
            left_out[worst] = errors[worst]
            if len(plan.vectors) == 1:
                raise Mismatch(f"no task stays below --max-error {max_error:g}", f"the smallest relative error is {errors[worst]:.4g}")
            measured = measured.without([v.name for v in plan.vectors].index(worst))
            plan = plan.without(worst)
        plan.metadata |= {"peru.precision": str(bits), "peru.scale": repr(scale)}
    note("adding" if not plan.removing else "removing")
    if merge_base is not None:
        plan.metadata["peru.entries"] = str(sum(tensor.info.entries for tensor in plan.sums if tensor.is_target))
    with ExitStack() as stack:
        new_base = stack.enter_context(NewBase(plan, merge_base, sync)) if merge_base is not None else None
        largest = {**plan.metadata, "peru.sums": "0" * 64, **(new_base.largest_name() if new_base is not None else {})}
        writer = stack.enter_context(PackWriter(target, largest, sync))
        step = Superpose(plan, how, writer, new_base)
        run(step, TilePlan([t.info.entries for t in plan.sums], how.tile_entries), how.threads, how.advance, how.elsewhere)
        for block in writer.rest():
            writer.write(block)
        return PackSealer(plan, step, writer, measured, predicted, left_out, new_base, residual, how, note).finish(target, scale)
