"""Warnings before anything is written: weights of 0, equal inputs, very different norms, different chat templates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.sidefiles import chat_template
from peru_cli.merge.plan import MergePlan
from peru_cli.merge.slots import Slot
from peru_cli.methods.compact.delta import Bits, cast_bits
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule
from peru_cli.streaming.aligned import read_entries
from peru_cli.streaming.arrays import CPU, doubles

_RUNS, _RUN = 64, 1 << 12  # sampled runs of entries, at most one for each tensor
_WHOLE = 256 << 20  # bytes read to check whether models that look equal are equal
_APART = 5.0  # warn if weighted norms of task vectors differ by more than this factor

Doubles = np.ndarray[Any, np.dtype[np.float64]]


def idle(parameters: Iterable[Parameters]) -> list[str]:
    """Warnings about weights and scales that are 0 in all these parameters. Needs no model."""
    listed = list(parameters)
    weights: dict[str, float] = {}
    for each in listed:
        for task, weight in zip(each.tasks, each.weights, strict=True):
            weights[task] = weights.get(task, 0.0) + abs(weight)
    found = [f"the weight of {task} is 0: it takes no part in the merge" for task, weight in weights.items() if not weight]
    if listed and all(each.has_base and each.values.get("scale") == 0 for each in listed):
        found.append("the scale is 0: the result is the base")
    return found


def cautions(plan: MergePlan, rule: Rule) -> list[str]:
    """Warnings about the inputs. Reads a sample of the entries of local files, and more only if two models look equal.

    Remote models are not sampled: reading them over the network costs more than the warning is worth."""
    models = [vector.fine for vector in plan.vectors] + ([plan.base] if plan.base is not None else [])
    return _templates(plan) + ([] if any(model.ranged for model in models) else _sampled(plan, rule))


def _templates(plan: MergePlan) -> list[str]:
    """A warning if models have different chat templates."""
    holders: dict[str, list[str]] = {}
    for vector in plan.vectors:
        if text := chat_template(vector.fine.side_files):
            holders.setdefault(text.strip(), []).append(vector.name)
    if len(holders) < 2:
        return []
    written = chat_template({**plan.reference.side_files, **plan.overrides})
    groups = " and ".join(", ".join(names) for names in holders.values())
    whose = "no chat template is written"
    if written is not None:
        names = holders.get(written.strip())
        whose = f"that of {', '.join(names)} is written" if names else "one that none of them has is written"
    return [f"the chat templates of {groups} differ: {whose}"]


def _sampled(plan: MergePlan, rule: Rule) -> list[str]:
    names = [vector.name for vector in plan.vectors]
    tasks = range(len(names))
    squares = [0.0] * len(names)  # of weighted task vectors
    changed = [False] * len(names)
    differ = {(i, j): False for i in tasks for j in range(i)}
    for number, start in _sample(plan):
        slot = plan.slots[number]
        n = min(_RUN, slot.info.entries - start)
        bits = {slot.task(own): read_entries(plan.vectors[slot.task(own)].fine, info, start, n) for own, info in enumerate(slot.inputs)}
        for i, j in differ:
            differ[i, j] |= _differ(slot, bits, i, j)
        if plan.base is None:
            continue
        base = read_entries(plan.base, slot.base, start, n)
        weights = rule.at(number).parameters.weights
        for own, info in enumerate(slot.inputs):
            task = slot.task(own)
            changes = _changes(bits[task], info, base, slot.base)
            changed[task] |= bool(changes.any())
            squares[task] += (weights[own] if own < len(weights) else 1.0) ** 2 * float(changes @ changes)
    found = [
        f"{names[j]} and {names[i]} {'are equal' if sure else 'look equal: no sampled weight differs'}"
        for (i, j), seen in differ.items()
        if not seen and (sure := _equal(plan, i, j)) is not None
    ]
    if plan.base is None:
        return found
    for task in tasks:
        if not changed[task] and (sure := _equal(plan, task, None)) is not None:
            found.append(f"{names[task]} " + ("is equal to the base" if sure else "looks equal to the base: no sampled weight differs"))
    return found + _norms(names, squares, rule)


def _norms(names: Sequence[str], squares: Sequence[float], rule: Rule) -> list[str]:
    sizes = {name: math.sqrt(square) for name, square in zip(names, squares, strict=True) if square > 0}
    if not (rule.on_vectors and rule.suffers_from_norms) or len(sizes) < 2:
        return []
    large, small = max(sizes, key=lambda name: sizes[name]), min(sizes, key=lambda name: sizes[name])
    ratio = sizes[large] / sizes[small]
    if not ratio > _APART:
        return []
    return [
        f"the task vector of {large} is about {ratio:.0f} times as long as that of {small}, and will outweigh it: "
        f"a smaller weight for {large} makes up for it, in methods that take weights"
    ]


def _sample(plan: MergePlan) -> Iterator[tuple[int, int]]:
    """Slots and first entries of the runs, taken from the middle of each tensor."""
    step = max(1, -(-len(plan.slots) // _RUNS))
    for number in range(0, len(plan.slots), step):
        entries = plan.slots[number].info.entries
        if entries:
            yield number, max(0, (entries - _RUN) // 2)


def _changes(fine: Bits, info: TensorInfo, base: Bits, base_info: TensorInfo) -> Doubles:
    """Fine-tune minus base in float64, 0 if that is not finite; (n,)."""
    cast = cast_bits(CPU, base, base_info.dtype, info.dtype)
    ours, theirs = doubles(fine, info.dtype), doubles(cast, info.dtype)
    with np.errstate(invalid="ignore"):
        changes: Doubles = ours - theirs
    changes[~np.isfinite(changes) | (fine == cast)] = 0
    return changes


def _differ(slot: Slot, bits: dict[int, Bits], i: int, j: int) -> bool:
    one, other = slot.of(i), slot.of(j)
    if one is None or other is None:
        return one is not other
    return one.dtype is not other.dtype or not np.array_equal(bits[i], bits[j])


def _equal(plan: MergePlan, task: int, other: int | None) -> bool | None:
    """Compare a task's tensors with another task's, or (None) the base's. True if equal, False if equal up to the reading
    limit, None if not."""
    left = _WHOLE
    for slot in plan.slots:
        mine = slot.of(task)
        theirs = slot.base if other is None else slot.of(other)
        if mine is None or theirs is None:
            continue
        left -= mine.nbytes + theirs.nbytes
        if left < 0:
            return False
        source = plan.base if other is None else plan.vectors[other].fine
        assert source is not None
        ours, own = (read_entries(model, info, 0, info.entries) for model, info in ((plan.vectors[task].fine, mine), (source, theirs)))
        if not np.array_equal(ours, own if theirs.dtype is mine.dtype else cast_bits(CPU, own, theirs.dtype, mine.dtype)):
            return None
    return True
