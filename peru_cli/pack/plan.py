"""The plan of a pack, from headers alone: which tensors are superposed, which are summed, which belong to one task."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.superposed import PackedTensor, PackMode
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pair, pair_checkpoints
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import plural
from peru_cli.errors import Mismatch, UsageError
from peru_cli.finetunes.fine_tune import check_base
from peru_cli.finetunes.pack_task import base_of_pack
from peru_cli.merge.plan import MergePlan, Options, check_same, plan_merge
from peru_cli.methods.compact.superpose import MOST_TASKS, Arrangement, Group, find_groups, free_shift
from peru_cli.shown import listed
from peru_cli.vectors.family import TaskVector

_SHOWN = 5


@dataclass(frozen=True)
class PackOptions:
    """How to superpose. `dtype` is that of retrieved tasks; without it, they keep their own."""

    seed: int = 0
    decorrelate: str = "shuffle"
    signs: bool = True
    skip: int = 1
    scale: float | None = 1.0  # None: the least-squares scale that is predicted
    precision: int | None = None
    target: re.Pattern[str] | None = None
    exclude: re.Pattern[str] | None = None
    per_task: str | None = None
    dtype: Dtype | None = None
    whole_weights: bool = False


@dataclass
class PackPlan:
    """Tasks that a pack is made of, or that are added to or removed from `old`. All lists are sorted by name."""

    base: Checkpoint
    vectors: list[TaskVector]
    tensors: list[PackedTensor]
    arrangement: Arrangement
    shifts: dict[str, int]
    heads: dict[str, list[TensorInfo]]  # by task
    same: dict[str, list[Pair]]  # tensors equal in all models, by task
    metadata: dict[str, str]
    old: Pack | None = None
    removing: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def sums(self) -> list[PackedTensor]:
        """Tensors with entries in the stream of sums, in canonical order."""
        return [tensor for tensor in self.tensors if tensor.is_sum]

    @property
    def entries(self) -> int:
        """Number of sums."""
        return sum(tensor.info.entries for tensor in self.sums)

    @property
    def decorrelates(self) -> bool:
        """Whether targets are decorrelated at all. Otherwise the pack is task arithmetic."""
        return self.arrangement.signs or self.arrangement.decorrelate != "none"

    def without(self, task: str) -> PackPlan:
        """The same with one task left out."""
        shifts = dict(zip((v.name for v in self.vectors if v.name != task), sorted(self.shifts.values()), strict=False))
        left = [vector for vector in self.vectors if vector.name != task]
        return PackPlan(self.base, left, self.tensors, self.arrangement, shifts, self.heads, self.same, self.metadata, self.old)


def plan_pack(base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], options: PackOptions) -> PackPlan:
    """Plan a new pack. Mismatch reports all problems at once; UsageError for impossible options."""
    if len(tasks) > MOST_TASKS:
        raise UsageError(f"{len(tasks)} tasks are too many: a pack holds at most {MOST_TASKS}")
    tasks = sorted(tasks)
    merged = plan_merge(base, tasks, True, Options(options.per_task, dtype=options.dtype, verb="packed"))
    groups = find_groups([slot.base for slot in merged.slots], options.target, options.exclude, options.skip)
    for name, pattern in (("--target", options.target), ("--exclude", options.exclude)):
        if pattern is not None and not any(pattern.search(slot.base.name) for slot in merged.slots):
            raise UsageError(f"{name} {pattern.pattern!r} matches no tensor that all tasks have", "`peru inspect` lists the names")
    tensors = []
    where = {name: (number, place) for number, group in enumerate(groups) for place, name in enumerate(group.members)}
    for slot in merged.slots:
        given = [info.dtype for info, (_, model) in zip(slot.inputs, tasks, strict=True) if not model.expanded]
        dtype = options.dtype or (given or [slot.base.dtype])[0]
        info = TensorInfo(slot.base.name, dtype, slot.base.shape)
        target = PackMode.WEIGHTS if options.whole_weights else PackMode.TARGET
        record = PackedTensor(info, target if info.name in where else PackMode.SUM, slot.base.dtype)
        record.group, record.place = where.get(info.name, (0, 0))
        tensors.append(record)
    shifts = {name: number if options.decorrelate == "shift" else 0 for number, (name, _) in enumerate(tasks)}
    arrangement = Arrangement(groups, options.seed, options.decorrelate, options.signs)
    plan = _plan(base, merged, tensors, arrangement, shifts)
    plan.metadata = {
        "peru.seed": str(options.seed),
        "peru.decorrelate": options.decorrelate,
        "peru.signs": "yes" if options.signs else "no",
        "peru.scale": "auto" if options.scale is None else repr(options.scale),
        "peru.entries": str(plan.entries),
    }
    return plan


def _plan(base: Checkpoint, merged: MergePlan, sums: list[PackedTensor], arrangement: Arrangement, shifts: dict[str, int]) -> PackPlan:
    """The parts common to all plans. Adds the tensors that are equal in all models."""
    shared = [pair.base for pairs in merged.same.values() for pair in pairs]
    copies = {base.name: PackedTensor(base, PackMode.BASE, base.dtype) for base in shared}
    tensors = sorted([*sums, *copies.values()], key=lambda tensor: tensor.info.name)
    same = {vector.name: merged.same.get(vector.name, []) for vector in merged.vectors}
    plan = PackPlan(base, merged.vectors, tensors, arrangement, shifts, merged.heads, same, {})
    plan.warnings = check_same(merged)
    return plan


def plan_change(pack: Pack, base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]], removing: bool) -> PackPlan:
    """Plan adding tasks to a pack, or removing them. Errors as for `plan_pack`."""
    if pack.has_own_base:
        raise UsageError(
            f"tasks cannot be added to or removed from {pack.path}: its plain sums are in its base (--merge-base)",
            "make a new pack, or change the one that was made without --merge-base",
        )
    names = {name.lower(): name for name in pack.tasks}
    for name, _ in tasks:
        if not removing and name.lower() in names:
            raise UsageError(f"{pack.path} already has a task {names[name.lower()]}", "give the new one another name: NAME=MODEL")
        if removing and name not in pack.tasks:
            raise UsageError(f"{pack.path} has no task {name!r}", f"it holds {listed(pack.tasks)}")
    after = len(pack.tasks) + (-len(tasks) if removing else len(tasks))
    if not 0 < after <= MOST_TASKS:
        raise UsageError(f"{pack.path} would hold {after} tasks", f"a pack holds 1 to {MOST_TASKS}")
    check_base(base_of_pack(pack), pack, base)
    tasks = sorted(tasks)
    merged = plan_merge(base, tasks, True, Options(_strangers(pack, base, tasks), verb="packed"))
    sums = {record.info.name for record in pack.index.tensors if record.is_sum}
    problems = [f"{name}: in the pack, but not in the models" for name in sorted(sums - {slot.base.name for slot in merged.slots})]
    for slot in merged.slots:
        for info, (name, model) in zip(slot.inputs, tasks, strict=True):
            wanted = pack.records[slot.base.name].info.dtype
            if info.dtype is not wanted and not model.expanded and not removing:
                problems.append(f"{info.name}: {info.dtype.name} in {name}, {wanted.name} in the pack")
    if problems:
        shown = "\n  ".join(problems[:_SHOWN])
        raise Mismatch(f"these models do not fit {pack.path}: {plural(len(problems), 'tensor')}\n  {shown}", "make a pack of their own")
    shifts: dict[str, int] = {}
    for name, _ in tasks:
        taken = [task.shift for task in pack.index.tasks] + list(shifts.values())
        free = free_shift(taken) if pack.metadata["peru.decorrelate"] == "shift" else 0
        shifts[name] = pack.tasks[name].shift if removing else free
    plan = _plan(base, merged, [record for record in pack.index.tensors if record.is_sum], pack.arrangement, shifts)
    plan.tensors, plan.metadata, plan.old, plan.removing = pack.index.tensors, dict(pack.metadata), pack, removing
    if pack.index.residuals:
        plan.warnings.append(f"the residuals of {listed(pack.tasks)} are left out: they fit the sums of {pack.path} only")
    return plan


def _strangers(pack: Pack, base: Checkpoint, tasks: Sequence[tuple[str, Checkpoint]]) -> str | None:
    """A regular expression for the models' tensors that the base has and the pack lacks: they belong to the task."""
    names = set()
    for _, model in tasks:
        names |= {pair.fine.name for pair in pair_checkpoints(model, base).pairs if pair.base.name not in pack.records}
    return "^(" + "|".join(map(re.escape, sorted(names))) + ")$" if names else None


def describe_groups(tensors: Sequence[PackedTensor], groups: Sequence[Group]) -> list[list[str]]:
    """Table rows: pattern, shape, number of blocks, entries."""
    infos = {tensor.info.name: tensor.info for tensor in tensors}
    rows = []
    for group in groups:
        info = infos[group.members[0]]
        after = re.sub(r"^\d+", "*", info.name.removeprefix(group.prefix))
        rows.append([group.prefix + after, "x".join(map(str, info.shape)), str(group.depth), f"{group.depth * info.entries:,}"])
    return rows
