"""The plan of an adapter from a full fine-tune, from names and shapes alone: low-rank weights, and the rest.

The rest is what B A cannot hold: norms, embeddings, heads, biases, grown vocabularies, bare parameters. A module whose
tensors all fit the adapter goes to PEFT's `modules_to_save`. Biases of low-rank modules go to `lora_bias` if all of these
modules have one. What is left goes into a sparse delta beside the adapter. Nothing is left out."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peru_cli.checkpoints.architectures import (
    experts_are_in_out,
    has_tied_embeddings,
    is_conv1d,
    is_embedding,
    is_grouped_convolution,
    is_output,
    is_tied,
)
from peru_cli.checkpoints.checks.unpaired import judge
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.module import CONVOLUTION, LINEAR, PARAMETER
from peru_cli.checkpoints.names.loaded_names import names_in_memory
from peru_cli.checkpoints.pairing import Pair, Pairing, pair_checkpoints
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import plural
from peru_cli.errors import Mismatch, UsageError


@dataclass(frozen=True)
class Weight:
    """A weight that becomes a pair of factors.

    `name` is the module or parameter that PEFT targets. `rows` and `columns` are d_out and d_in (a kernel is flattened).
    `transposed` says that the tensor is stored as (in, out)."""

    name: str
    pair: Pair
    kind: str
    rows: int
    columns: int
    blocks: int = 1
    transposed: bool = False

    @property
    def tensor(self) -> str:
        """The fine-tune's name of the tensor."""
        return self.pair.fine.name

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of one block in the tensor."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    @property
    def largest_rank(self) -> int:
        """At a larger rank the factors are no smaller than the matrix."""
        return (self.rows * self.columns - 1) // (self.rows + self.columns)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B."""
        if self.kind == CONVOLUTION:
            kernel = self.pair.fine.shape[2:]
            return (rank, *self.pair.fine.shape[1:]), (self.rows, rank, *(1 for _ in kernel))
        return (rank * self.blocks, self.columns), (self.rows, rank * self.blocks)


@dataclass
class Rest:
    """What the factors do not hold: modules saved whole with their tensors, biases, and the content of the delta."""

    modules: dict[str, list[TensorInfo]] = field(default_factory=dict)
    biases: list[Pair] = field(default_factory=list)  # of every low-rank module, if any of them changed
    delta: list[TensorInfo] = field(default_factory=list)

    @property
    def saved(self) -> list[TensorInfo]:
        """Tensors of all saved modules."""
        return [info for infos in self.modules.values() for info in infos]


@dataclass
class Extraction:
    """A fine-tune, its base, and how its tensors are stored."""

    name: str
    fine: Checkpoint
    base: Checkpoint
    pairing: Pairing
    weights: list[Weight] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # names in memory that differ from the checkpoint's
    warnings: list[str] = field(default_factory=list)

    def in_memory(self, name: str) -> str:
        """The name that transformers, and so PEFT, gives to one of the fine-tune's tensors."""
        return self.renamed.get(name, name)

    def module_of(self, name: str) -> str:
        """The module in memory that has one of the fine-tune's tensors."""
        return self.in_memory(name).rpartition(".")[0]

    @property
    def config(self) -> dict[str, Any]:
        """The fine-tune's config.json, or the base's."""
        return self.fine.config() or self.base.config()


def plan_extraction(name: str, fine: Checkpoint, base: Checkpoint, per_task: str | None, for_peft: bool = True) -> Extraction:
    """Pair the checkpoints and find the weights that become factors.

    `for_peft` asks transformers, which takes seconds to import, for the names of modules in memory. Raises Mismatch and
    UsageError as `pair_checkpoints` does, and UsageError if there is no weight."""
    pairing = pair_checkpoints(fine, base, per_task)
    try:
        said = judge(fine, base, pairing, re.compile(per_task) if per_task is not None else None, allowed=False)
    except Mismatch as error:
        hint = "is this the base? --per-task REGEX names what is stored whole; for other names, `peru prune --rename REGEX=NEW`"
        raise Mismatch(error.message, hint) from error
    plan = Extraction(name, fine, base, pairing)
    _say_what_stays(plan)
    plan.warnings += [said] if said is not None else []
    plan.renamed, problem = names_in_memory(plan.config, len(base.tensors)) if for_peft else ({}, None)
    if problem is not None:
        plan.warnings.append(f"{fine.label}: {problem}; modules keep the names of the checkpoint")
    found = (weight_of(plan.in_memory(pair.fine.name), pair, plan.config) for pair in pairing.pairs)
    plan.weights = [weight for weight in found if weight is not None and weight.largest_rank]
    if not plan.weights:
        raise UsageError(f"{fine.label} and {base.label} share no weight matrix that an adapter could hold")
    return plan


def _say_what_stays(plan: Extraction) -> None:
    """An adapter cannot remove anything from its base: note what the fine-tune lacks. UsageError for a tied head."""
    heads = [info.name for info in plan.pairing.base_only if is_output(info.name)]
    if heads and is_tied(plan.config):
        raise UsageError(
            f"{plan.base.label} stores {heads[0]}, and {plan.fine.label} ties it to its embedding: an adapter would leave the base's there",
            "name a base that was saved without it, or use `peru prune`",
        )
    reshaped = {other.name for _, other in plan.pairing.reshaped}
    if left := [info.name for info in plan.pairing.base_only if info.name not in reshaped]:
        plan.warnings.append(
            f"{plan.fine.label} lacks {plural(len(left), 'tensor')} of the base, kept as in the base: {', '.join(left[:3])}"
        )


def weight_of(name: str, pair: Pair, config: Mapping[str, Any]) -> Weight | None:
    """How a pair's difference becomes factors, under the name in memory. None if it does not."""
    shape = pair.fine.shape
    if pair.grown or not pair.is_delta or len(shape) < 2 or not pair.entries:
        return None
    module, _, leaf = name.rpartition(".")
    if leaf != "weight":
        if len(shape) == 3 and "experts" in module.split("."):
            turned = experts_are_in_out(config)
            rows, columns = (shape[2], shape[1]) if turned else (shape[1], shape[2])
            return Weight(name, pair, PARAMETER, rows, columns, shape[0], turned)
        return None
    if len(shape) == 2:
        if is_embedding(module):
            return None
        turned = is_conv1d(module, config)
        return Weight(module, pair, LINEAR, shape[1] if turned else shape[0], shape[0] if turned else shape[1], transposed=turned)
    if len(shape) > 5 or is_grouped_convolution(shape, config):
        return None
    return Weight(module, pair, CONVOLUTION, shape[0], math.prod(shape[1:]))


def plan_rest(plan: Extraction, weights: Iterable[Weight], changed: Iterable[str], in_modules: bool) -> Rest:
    """Decide where to store everything else that changed.

    Args:
        weights: those that become factors.
        changed: the fine-tune's tensors that differ from the base's or that the base lacks.
        in_modules: whether `modules_to_save` and `lora_bias` may be used: PEFT loads them, other programs do not."""
    rest = Rest()
    weights = list(weights)
    low_rank = {weight.tensor for weight in weights}
    wanted = sorted(set(changed) - low_rank)
    if not in_modules:
        rest.delta = [plan.fine.tensors[name] for name in wanted]
        return rest
    by_module: dict[str, list[str]] = defaultdict(list)
    for name in plan.fine.tensors:
        by_module[plan.module_of(name)].append(name)
    pairs = {pair.fine.name: pair for pair in plan.pairing.pairs}
    biases = _biases(weights, {plan.in_memory(name): pair for name, pair in pairs.items()}, set(wanted))
    saved = {plan.module_of(name) for name in wanted}
    saved = {module for module in saved if _can_be_saved(plan, module, by_module, low_rank, pairs)}
    while clashing := {module for module in saved if _clashes(module, by_module, saved)}:
        saved -= clashing
    rest.modules = {module: [plan.fine.tensors[name] for name in sorted(by_module[module])] for module in sorted(saved)}
    rest.biases = biases
    held = {info.name for info in rest.saved} | {pair.fine.name for pair in biases}
    rest.delta = [plan.fine.tensors[name] for name in wanted if name not in held]
    return rest


def _biases(weights: Iterable[Weight], pairs: Mapping[str, Pair], wanted: set[str]) -> list[Pair]:
    """The biases of all low-rank modules, if each has one and any of them changed: PEFT's `lora_bias` covers all or none."""
    found = []
    for weight in weights:
        pair = pairs.get(f"{weight.name}.bias")
        if weight.kind == PARAMETER or pair is None or not pair.is_delta or pair.fine.shape != (weight.rows,):
            return []
        found.append(pair)
    return found if any(pair.fine.name in wanted for pair in found) else []


def _can_be_saved(plan: Extraction, module: str, by_module: Mapping[str, list[str]], low_rank: set[str], pairs: Mapping[str, Pair]) -> bool:
    """Whether PEFT can replace the whole module: it has a name, no children, no factors, and no more rows than the base's."""
    if not module or any(other.startswith(module + ".") for other in by_module):
        return False
    for name in by_module[module]:
        if name in low_rank or (name in pairs and pairs[name].grown):
            return False
    if is_embedding(module):
        return not has_tied_embeddings(plan.config, plan.fine.tensors[by_module[module][0]].shape, plan.fine.tensors.values())
    return True


def _clashes(module: str, by_module: Iterable[str], saved: set[str]) -> bool:
    """Whether PEFT, which matches the ends of names, would mistake another module for this one."""
    return any(other.endswith(module) and other not in saved for other in by_module)
