"""The modules of several adapters, side by side, from headers alone: what is merged with what, and what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.lora.adapter import REST, Adapter, find_adapters, is_lora_file
from peru_cli.checkpoints.lora.bound import BASE_TENSORS
from peru_cli.checkpoints.lora.config import check_can_be_added
from peru_cli.checkpoints.lora.module import LoraModule
from peru_cli.checkpoints.places import locate
from peru_cli.errors import Mismatch, UsageError
from peru_cli.methods.lora.spaces import FUNCTIONS, Coordinates, Factors, side
from peru_cli.shown import listed

_SHOWN = 12  # problems listed


@dataclass(frozen=True)
class Module:
    """One module: its pair of factors in each adapter, None where an adapter lacks it. `like` is the first pair."""

    path: str
    pairs: tuple[LoraModule | None, ...]

    @property
    def like(self) -> LoraModule:
        return next(pair for pair in self.pairs if pair is not None)

    @property
    def owner(self) -> int:
        """The number of the first adapter that has it."""
        return next(number for number, pair in enumerate(self.pairs) if pair is not None)

    @property
    def ranks(self) -> list[int]:
        """Ranks in the adapters that have it."""
        return [pair.rank for pair in self.pairs if pair is not None]

    @property
    def names(self) -> list[str]:
        """The names of its matrices in coordinates, one for each block (expert)."""
        return [self.path] if self.like.blocks == 1 else [f"{self.path}.{block}" for block in range(self.like.blocks)]

    @property
    def entries(self) -> int:
        """Entries of all factors."""
        return sum(pair.down.entries + pair.up.entries for pair in self.pairs if pair is not None)

    def shape(self, space: str) -> tuple[int, int]:
        """(k, n) of its matrices in a space."""
        return side(space, self.ranks, self.like.rows, self.like.columns)

    def rank(self, space: str) -> int:
        """The rank of what is written."""
        return min(self.shape(space))


@dataclass(frozen=True)
class Family:
    """Adapters by task, their modules in canonical order, and the space they are merged in."""

    names: tuple[str, ...]
    adapters: list[Adapter]
    modules: list[Module]
    space: str

    @property
    def layout(self) -> str:
        return self.adapters[0].layout

    @property
    def by_task(self) -> bool:
        """Whether an adapter holds tensors that cannot be merged (a classifier), so that each task gets an adapter of its own."""
        return any(adapter.whole for adapter in self.adapters)

    def dtype(self, module: Module, wanted: Dtype | None) -> Dtype:
        """Dtype of a module's factors: the requested one, or that of lora_A in the first adapter that has it."""
        return wanted or module.like.down.dtype

    def coordinates(self, module: Module) -> list[tuple[Coordinates, list[int]]]:
        """For each block: the coordinates, and which tasks its parts belong to."""
        having = [task for task, pair in enumerate(module.pairs) if pair is not None]
        stacks: list[list[Factors]] = [[] for _ in range(module.like.blocks)]
        for task in having:
            pair = module.pairs[task]
            assert pair is not None
            for stack, (left, right) in zip(stacks, self.adapters[task].factors(pair), strict=True):
                stack.append((left.double() * pair.scale, right.double()))
        return [(FUNCTIONS[self.space](stack), having) for stack in stacks]

    def close(self) -> None:
        """Release the files."""
        for adapter in self.adapters:
            adapter.close()


def open_family(models: Sequence[tuple[str, str]], space: str, say: Callable[[str], None]) -> Family:
    """Open the adapters (task, model), and pair their modules.

    Raises UsageError for what is no plain LoRA adapter, Mismatch with all modules that do not fit."""
    adapters: list[Adapter] = []
    try:
        for _, model in models:
            adapters.append(_open(model))
        names = tuple(name for name, _ in models)
        modules = _paired(names, adapters)
        family = Family(names, adapters, modules, space)
        for task, (name, adapter) in enumerate(zip(names, adapters, strict=True)):
            lacking = [module.path for module in modules if module.pairs[task] is None]
            more = f"; it lacks {len(lacking)} modules that others have, and counts as 0 there" if lacking else ""
            say(f"{name}: {adapter.label}, {adapter.kind}{more}")
        return family
    except BaseException:
        for adapter in adapters:
            adapter.close()
        raise


def _open(model: str) -> Adapter:
    path = locate(model)
    found = {"": path} if is_lora_file(path) else find_adapters(path) if path.is_dir() else {}
    if len(found) != 1:
        several = f"holds several adapters: {listed(str(folder) for folder in found.values())}" if found else "is not a LoRA adapter"
        raise UsageError(f"{model} {several}", "name one of them" if found else "leave --lora out: models are merged into a model")
    adapter = Adapter(next(iter(found.values())), model)
    try:
        odd = [
            *(["DoRA's magnitudes"] if any(module.magnitude is not None for module in adapter.modules) else []),
            *(["biases of lora_B (lora_bias)"] if any(module.bias is not None for module in adapter.modules) else []),
            *(["differences of whole tensors"] if adapter.deltas else []),
            *(["LoHa or LoKr products"] if adapter.products else []),
            *([f"tensors without a known meaning, such as {adapter.unknown[0]}"] if adapter.unknown else []),
            *([f"changes that only {REST} beside it holds"] if (adapter.path / REST).is_file() else []),
        ]
        if adapter.foreign or odd or not adapter.modules:
            raise UsageError(
                f"{model}: {adapter.kind}: --lora merges pairs of factors only{f', and this adapter has {listed(odd)}' if odd else ''}",
                "leave --lora out and give --base BASE: the adapters are then merged into a model",
            )
        check_can_be_added(adapter.config, model)
    except BaseException:
        adapter.close()
        raise
    return adapter


def _paired(names: Sequence[str], adapters: Sequence[Adapter]) -> list[Module]:
    problems = []
    if len(layouts := {adapter.layout for adapter in adapters}) > 1:
        raise UsageError(
            f"the adapters have different layouts: {', '.join(sorted(layouts))}", "merge adapters of one layout, or leave --lora out"
        )
    tables = [{module.path: module for module in adapter.modules} for adapter in adapters]
    everywhere = [path for path in tables[0] if all(path in table for table in tables)]
    if not everywhere:
        one, other = tables[0], next(table for table in tables if not set(table) & set(tables[0]) or table is tables[-1])
        raise Mismatch(
            f"the adapters have no module in common: {next(iter(one))} in {names[0]}, {next(iter(other))} elsewhere",
            "they were made for different models",
        )
    modules = []
    for path in sorted({path for table in tables for path in table}):
        module = Module(path, tuple(table.get(path) for table in tables))
        seen = {(pair.rows, pair.columns, pair.blocks, pair.kind, pair.down.shape[1:], pair.up.shape[2:]) for pair in module.pairs if pair}
        if len(seen) > 1:
            sizes = [
                f"{pair.rows} x {pair.columns} ({pair.kind}) in {name}" for name, pair in zip(names, module.pairs, strict=True) if pair
            ]
            problems.append(f"{path}: {', '.join(sizes)}")
        modules.append(module)
    problems += _other_bases(names, adapters)
    if problems:
        rest = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise Mismatch("these adapters cannot be merged:\n  " + "\n  ".join([*problems[:_SHOWN], *rest]))
    return modules


def bases_of(adapter: Adapter) -> Mapping[str, object]:
    """Digests of the base's tensors that peru recorded, by module. Empty for adapters of other programs."""
    told = adapter.file.metadata.get(BASE_TENSORS)
    try:
        table = json.loads(told) if told is not None else {}
    except ValueError:
        return {}
    return table if isinstance(table, dict) else {}


def _other_bases(names: Sequence[str], adapters: Sequence[Adapter]) -> list[str]:
    """Adapters that record different bases."""
    first = bases_of(adapters[0])
    found = []
    for name, adapter in zip(names[1:], adapters[1:], strict=True):
        other = bases_of(adapter)
        if differing := [module for module in first if module in other and other[module] != first[module]]:
            found.append(f"{names[0]} and {name} were made from different bases: {differing[0]} has other weights in them")
    return found
