"""The plan of a merge, from headers alone: which tensors are merged, which are copied, which belong to one task.

All problems that show in headers are collected and reported at once, before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from peru_cli.checkpoints.architectures import is_output, tied_embedding
from peru_cli.checkpoints.bundle import bundle, members
from peru_cli.checkpoints.checks.buffers import is_buffer, is_statistic
from peru_cli.checkpoints.checks.configs import describe
from peru_cli.checkpoints.checks.unpaired import judge, lost
from peru_cli.checkpoints.checks.vocabulary import disagreements
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.tied import is_untied
from peru_cli.checkpoints.pairing import MIN_VOCABULARY_ROWS, Pair, Pairing, pair_checkpoints
from peru_cli.checkpoints.places import same_as
from peru_cli.checkpoints.quantized.requantize import FLOAT, Requantized
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import plural
from peru_cli.errors import Mismatch, UsageError
from peru_cli.merge.slots import Slot, Slots
from peru_cli.methods.compact.delta import cast_bits
from peru_cli.methods.then.table import Pass
from peru_cli.shown import listed
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.vectors.family import Family, StreamSettings, TaskVector

_SHOWN = 12  # problems listed
_TOKENS = 6  # tokens listed


@dataclass(frozen=True)
class Options:
    """Options of the command line about tensors. `dtype` replaces that of floating tensors."""

    per_task: str | None = None
    merge_heads: bool = False
    dtype: Dtype | None = None
    fp8: Requantized | None = None  # weights that it has are merged as float32 and written as FP8
    verb: str = "merged"  # the verb for the models in messages
    config: str | None = None  # whose config.json is written: a task's, or "base"; without it, the configs must agree
    absent: frozenset[tuple[str, str]] = frozenset()  # (task, reference's tensor) that are missing by design


@dataclass
class MergePlan:
    """All output tensors. `reference` gives names and copied tensors: the base, or the first model if there is no base."""

    base: Checkpoint | None
    reference: Checkpoint
    vectors: list[TaskVector]
    dtype: Dtype | None
    fp8: Requantized | None = None
    config: Checkpoint | None = None  # whose config.json is written; None: the reference's
    slots: Slots = field(default_factory=Slots)
    family: Family | None = None  # with the same slots, if they are bundles of small tensors
    copied: list[TensorInfo] = field(default_factory=list)
    averaged: list[Slot] = field(default_factory=list)  # running means and variances: the models' weighted mean
    same: dict[str, list[Pair]] = field(default_factory=dict)  # by task, integers and the like: copied, and equal in all models
    warnings: list[str] = field(default_factory=list)
    heads: dict[str, list[TensorInfo]] = field(default_factory=dict)  # by task
    then: Pass | None = None  # a pass over merged matrices
    overrides: dict[str, bytes] = field(default_factory=dict)  # side files that differ from the reference's

    @property
    def entries(self) -> int:
        """n: entries of all merged tensors."""
        return sum(info.entries for info in self.slots.outputs)

    @property
    def outputs(self) -> list[TensorInfo]:
        """All tensors that the merge makes, except heads."""
        averaged = [slot.info for slot in self.averaged]
        return [*self.slots.outputs, *averaged, *(in_dtype(info, self.dtype) for info in self.copied)]

    @property
    def written(self) -> list[TensorInfo]:
        """All tensors that are written, except heads: the outputs, or their codes and scales with `--dtype fp8`."""
        return self.outputs if self.fp8 is None else self.fp8.stored(self.outputs)


def in_bundles(plan: MergePlan, family: Family) -> MergePlan:
    """The same plan with the family's slots: the same tensors in the same order."""
    slots, bundled = iter(plan.slots), Slots()
    for base in family.slots:
        own = list(islice(slots, len(members(base))))
        assert own[-1].base.name == members(base)[-1].name
        inputs = tuple(bundle([slot.inputs[number] for slot in own]) for number in range(len(own[0].inputs)))
        bundled.append(Slot(bundle([slot.info for slot in own]), inputs, base, own[0].tasks))
    return replace(plan, slots=bundled, family=family)


def family_of(plan: MergePlan, how: StreamSettings) -> Family:
    """The task vectors that a plan merges, slot by slot."""
    return Family(plan.reference, plan.vectors, how) if plan.family is None else plan.family.streamed(how)


def in_dtype(info: TensorInfo, dtype: Dtype | None) -> TensorInfo:
    """A tensor in another float type, if it has one and another is asked for."""
    return TensorInfo(info.name, dtype, info.shape) if dtype is not None and info.dtype.compressible else info


def same_files(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two checkpoints are the same files, and the same part of them, under any names."""

    def files(checkpoint: Checkpoint) -> list[object]:
        return sorted((same_as(place) for place in checkpoint.files), key=repr)

    return bool(a.files) and a.part == b.part and files(a) == files(b)


def plan_merge(base: Checkpoint | None, tasks: Sequence[tuple[str, Checkpoint]], on_vectors: bool, options: Options) -> MergePlan:
    """Decide what happens to every tensor.

    Raises Mismatch with all problems at once, UsageError for impossible options."""
    try:
        own = re.compile(options.per_task) if options.per_task is not None else None
    except re.error as error:
        raise UsageError(f"--per-task {options.per_task!r} is not a regular expression: {error}") from error
    if own is not None and not any(own.search(name) for _, model in tasks for name in model.tensors):
        raise UsageError(f"--per-task {options.per_task!r} matches no tensor of any model", "`peru inspect` lists the names")
    problems = _twice(base, tasks, on_vectors)
    reference = base if base is not None else tasks[0][1]
    warnings = drop_tied_heads([*([] if base is None else [base]), *(model for _, model in tasks)])
    everyone = [*([] if base is None else [(base.label, base)]), *tasks]
    if clashes := disagreements(everyone):
        more = f", and {len(clashes) - _TOKENS} more" if len(clashes) > _TOKENS else ""
        hint = "; --tokenizer union, base or TASK brings rows together by token" if options.verb == "merged" else ""
        problems.append(f"tokenizers disagree: {'; '.join(clashes[:_TOKENS])}{more}{hint}")
    if options.config is None:
        named = [(name, model.config()) for name, model in everyone]
        found = [f"configs compute differently: {line}" for line in describe(named)]
        if options.verb == "merged":
            problems += [*found[:-1], f"{found[-1]} (choose whose config is written with --config TASK)"] if found else []
        else:
            warnings += [f"{line}; each task comes back with its own config" for line in found]
    pairings: dict[str, Pairing] = {}
    for name, model in tasks:
        matches = own is not None and any(own.search(n) for n in model.tensors)
        try:
            made = pair_checkpoints(model, reference, options.per_task if matches else None)
            pairings[name] = next((known for known in pairings.values() if known == made), made)  # most fine-tunes pair alike
        except Mismatch as error:
            problems.append(error.message)
            continue
        if base is not None and (said := lost(model, pairings[name], own)) is not None:
            problems.append(said)
        elif base is not None and (said := judge(model, reference, pairings[name], own, allowed=True)) is not None:
            warnings.append(said)
    plan = MergePlan(base, reference, [], options.dtype, options.fp8, warnings=warnings)
    plan.config = dict(tasks).get(options.config or "", base if options.config == "base" else None)
    if len(pairings) == len(tasks):
        planner = _Planner(plan, dict(tasks), pairings, own, options)
        planner.settle()
        problems += planner.problems
    if problems:
        rest = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise Mismatch(f"these models cannot be {options.verb}:\n  " + "\n  ".join([*problems[:_SHOWN], *rest]))
    chosen = {base.name for base in (*plan.slots.bases, *(slot.base for slot in plan.averaged))}
    merged: dict[int, Pairing] = {}
    for name, model in tasks:
        if (pairing := merged.get(id(pairings[name]))) is None:
            pairs = [pair for pair in pairings[name].pairs if pair.base.name in chosen]
            pairing = merged[id(pairings[name])] = Pairing(pairings[name].prefix, pairs)
        plan.vectors.append(TaskVector(name, model, pairing))
    wide = any(vector.wide for vector in plan.vectors)
    for vector in plan.vectors:
        vector.wide = wide
    return plan


def _twice(base: Checkpoint | None, tasks: Sequence[tuple[str, Checkpoint]], on_vectors: bool) -> list[str]:
    problems = []
    for i, (name, model) in enumerate(tasks):
        problems += [f"{other} and {name} are the same model: {model.label}" for other, m in tasks[:i] if same_files(m, model)]
        if base is not None and on_vectors and same_files(base, model):
            problems.append(f"{name} is the base itself: {model.label}")
    return problems


class _Planner:
    """Sorts the tensors of all models into the plan, and collects problems."""

    def __init__(
        self,
        plan: MergePlan,
        models: dict[str, Checkpoint],
        pairings: dict[str, Pairing],
        own: re.Pattern[str] | None,
        options: Options,
    ) -> None:
        self._plan, self._models, self._pairings, self._own, self._options = plan, models, pairings, own, options
        self._dtypes: dict[str, list[str]] = {}  # tensors by the models' different dtypes
        self.problems: list[str] = []

    def settle(self) -> None:
        plan = self._plan
        plan.heads = {task: [] for task in self._models}
        pairs = {task: {pair.base.name: pair for pair in pairing.pairs} for task, pairing in self._pairings.items()}
        reserved = self._sort_whole()

        def lacks(found: Mapping[str, Pair]) -> list[str]:
            return [task for task in self._models if task not in found] if len(found) < len(self._models) else []

        for name in sorted(plan.reference.tensors):
            found = {task: table[name] for task, table in pairs.items() if name in table}
            packed = self._options.verb != "merged" and plan.reference.tensors[name].dtype.compressible
            if name in reserved or not found or (packed and is_buffer(plan.reference.tensors[name])):
                for task, pair in found.items():
                    plan.heads[task].append(pair.fine)
                if plan.base is not None:
                    plan.copied.append(plan.reference.tensors[name])
            elif lacking := [t for t in lacks(found) if (t, name) not in self._options.absent]:
                self.problems.append(f"{name}: in {listed(found)}, not in {listed(lacking)}{self._keep(name)}")
            else:
                self._tensor(plan.reference.tensors[name], found)
        for kinds, names in self._dtypes.items():
            self.problems.append(f"{kinds} in {plural(len(names), 'tensor')}, such as {names[0]}: add --dtype to merge them")
        if plan.base is None and self._own is None and not self._options.merge_heads and (reason := self._doubtful_heads()):
            self.problems.append(f"{reason}: use --per-task REGEX to keep each task's head, or --merge-heads to average them")
        if (reason := self._reordered_heads()) is not None:
            self.problems.append(f"{reason}: use --per-task REGEX to keep each task's head")
        if not plan.slots and not self.problems:
            self.problems.append("no floating-point tensor is left to merge")
        for heads in plan.heads.values():
            heads.sort(key=lambda info: info.name)

    def _keep(self, name: str) -> str:
        return f" (--per-task '^{re.escape(name)}$' keeps it for each task)"

    def _sort_whole(self) -> set[str]:
        """Sort tensors of single tasks that have no partner. Returns the reference's names that no task merges."""
        plan = self._plan
        reserved: set[str] = set()
        for task, pairing in self._pairings.items():
            reshaped = {info.name: other for info, other in pairing.reshaped}
            for info in pairing.whole:
                base_name = pairing.prefix.base_name(info.name)
                if self._own is not None and self._own.search(info.name):
                    if base_name is not None and base_name in plan.reference.tensors:
                        reserved.add(base_name)
                elif info.name in reshaped:
                    other = reshaped[info.name]
                    if plan.base is None or not _is_head(info, other):
                        what = "vocabularies differ: " if _is_vocabulary(info, other) else ""
                        shapes = f"{list(info.shape)} in {task}, {list(other.shape)} in {plan.reference.label}"
                        self.problems.append(f"{what}{info.name}: {shapes}{self._keep(info.name)}")
                        continue
                    reserved.add(other.name)
                elif plan.base is None:
                    self.problems.append(f"{info.name}: in {task}, not in {plan.reference.label}{self._keep(info.name)}")
                    continue
                plan.heads[task].append(info)
        return reserved

    def _tensor(self, base: TensorInfo, found: dict[str, Pair]) -> None:
        plan, name = self._plan, base.name
        if any(pair.grown for pair in found.values()):
            grown = [f"{task} {pair.fine.shape[0]:,}" for task, pair in found.items() if pair.grown]
            self.problems.append(f"vocabularies differ: {name} has {listed(grown)} rows, {plan.reference.label} {base.shape[0]:,}")
            return
        infos = [pair.fine for pair in found.values()]
        kinds = {info.dtype.compressible for info in [*infos, base]}
        tasks = None
        if len(found) < len(self._models):
            tasks = tuple(number for number, task in enumerate(self._models) if task in found)
        if kinds == {True} and is_statistic(name):
            plan.averaged.append(Slot(in_dtype(base, self._options.dtype), tuple(infos), base, tasks))
        elif kinds == {True} and is_buffer(base):
            plan.copied.append(base)
            self._is_same(found)
        elif kinds == {True}:
            if self._options.dtype is None and any(info.dtype is not infos[0].dtype for info in infos):
                given = {task: pair.fine.dtype.name for task, pair in found.items() if not self._models[task].expanded}
                if len(set(given.values())) > 1:
                    text = "dtypes differ: " + listed(f"{task} {dtype}" for task, dtype in given.items())
                    self._dtypes.setdefault(text, []).append(name)
            codes = self._options.fp8 is not None and name in self._options.fp8.weights
            plan.slots.append(Slot(in_dtype(base, FLOAT if codes else self._options.dtype), tuple(infos), base, tasks))
        elif len(kinds) == 2 or len({info.dtype.name for info in [*infos, base]}) > 1:
            dtypes = listed(f"{task} {pair.fine.dtype.name}" for task, pair in found.items())
            self.problems.append(f"{name}: {dtypes}, {plan.reference.label} {base.dtype.name} cannot be merged{self._keep(name)}")
        elif base.dtype.name.startswith(("F8", "F6", "F4", "C")):
            self.problems.append(f"{name}: {base.dtype.name} cannot be merged: convert the models to bf16, fp16 or fp32 first")
        else:
            plan.copied.append(base)
            self._is_same(found)

    def _is_same(self, found: dict[str, Pair]) -> None:
        for task, pair in found.items():
            self._plan.same.setdefault(task, []).append(pair)

    def _reordered_heads(self) -> str | None:
        """A message if merged heads have the same classes in different orders. None otherwise."""
        orders: dict[str, list[str]] = {}
        base = {} if self._plan.base is None else {self._plan.base.label: self._plan.base}
        for task, model in (base | self._models).items():
            table = model.config().get("id2label")
            if isinstance(table, dict) and all(str(number).isdecimal() for number in table):
                orders[task] = [str(name).lower() for _, name in sorted(table.items(), key=lambda item: int(item[0]))]
        for task, order in orders.items():
            first, known = next(iter(orders.items()))
            heads = any(slot.info.shape[:1] == (len(order),) for slot in self._plan.slots)
            if heads and order != known and sorted(order) == sorted(known):
                return f"classes are in different orders: {', '.join(known[:6])} in {first}, {', '.join(order[:6])} in {task}"
        return None

    def _doubtful_heads(self) -> str | None:
        """A reason to suspect that heads of equal shape belong to different tasks. None if there is none."""
        labels, unnamed = [], False
        for model in self._models.values():
            config = model.config()
            architectures = config.get("architectures")
            first = architectures[0] if isinstance(architectures, list) and architectures else ""
            if isinstance(first, str) and re.search(r"For\w*(Classification|QuestionAnswering|MultipleChoice)", first):
                table = config.get("id2label")
                unnamed |= not isinstance(table, dict) or any(str(v).startswith("LABEL_") for v in table.values())
                labels.append(table)
        if labels and (unnamed or any(table != labels[0] for table in labels)):
            return "these are classifiers, but nothing shows that their heads have the same classes"
        return None


def _is_head(info: TensorInfo, other: TensorInfo) -> bool:
    """Whether a different number of classes explains two shapes."""
    return (
        bool(info.shape)
        and len(info.shape) == len(other.shape)
        and info.shape[1:] == other.shape[1:]
        and max(info.shape[0], other.shape[0]) < MIN_VOCABULARY_ROWS
    )


def _is_vocabulary(info: TensorInfo, other: TensorInfo) -> bool:
    return bool(info.shape) and info.shape[1:] == other.shape[1:] and max(info.shape[0], other.shape[0]) >= MIN_VOCABULARY_ROWS


def drop_tied_heads(models: Sequence[Checkpoint]) -> list[str]:
    """Drop output matrices that only some models store, if each repeats its model's embedding. Returns which.

    Nothing is dropped if the config does not tie the two, or they differ."""
    said = []
    names = {name for model in models for name in model.tensors if is_output(name)}
    for name in sorted(names):
        holders = [model for model in models if name in model.tensors]
        if len(holders) == len(models) or not all(_repeats(model, name) for model in holders):
            continue
        for model in holders:
            model.tensors = {n: info for n, info in model.tensors.items() if n != name}
        said.append(f"{name} repeats the embedding in {listed(model.label for model in holders)} and is left out")
    return said


def _repeats(model: Checkpoint, name: str) -> bool:
    """Whether an output matrix repeats the embedding, in a model that ties the two."""
    config = model.config() or {"tie_word_embeddings": True}  # a bare file has no config: then equal bytes decide
    return tied_embedding(config, model.tensors) is not None and not is_untied(
        config, {name: model.tensors[name]} | {n: info for n, info in model.tensors.items() if not is_output(n)}, model.read_into
    )


def _alike(fine: Checkpoint, base: Checkpoint, pair: Pair) -> bool:
    """Whether two tensors have equal contents: bytes, or floats in the narrower of the two types."""
    ours, theirs = fine.read(pair.fine.name), base.read(pair.base.name)
    one, other = pair.fine.dtype, pair.base.dtype
    if one is other or not (one.compressible and other.compressible):
        return ours == theirs
    narrow = min(one, other, key=lambda dtype: dtype.bits)
    a, b = (cast_bits(CPU, np.frombuffer(raw, BITS[d.bits]), d, narrow) for raw, d in ((ours, one), (theirs, other)))
    return bool((a == b).all())


def check_same(plan: MergePlan) -> list[str]:
    """Read tensors that are not floating-point and must be equal. Returns warnings for counters that differ.

    Raises Mismatch for a tensor that differs and cannot be merged."""
    warnings, problems = list(plan.warnings), []
    if plan.averaged:
        warnings.append(f"{len(plan.averaged)} running means and variances are averaged over the models: recompute them on data if you can")
    for vector in plan.vectors:
        for pair in plan.same.get(vector.name, []):
            if not _alike(vector.fine, plan.reference, pair):
                if pair.base.entries == 1 and not pair.base.dtype.compressible:
                    warnings.append(f"{pair.base.name} differs in {vector.name}; the one of {plan.reference.label} is written")
                else:
                    problems.append(f"{pair.base.name}: {pair.base.dtype.name}, differs in {vector.name}")
    if problems:
        raise Mismatch(
            "tensors that cannot be averaged differ:\n  " + "\n  ".join(problems[:_SHOWN]), "--per-task REGEX keeps them for each task"
        )
    return warnings
