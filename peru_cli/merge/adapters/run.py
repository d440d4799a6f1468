"""`peru merge --lora`: find coordinates, merge in them as models are merged, write one adapter.

Adapters that hold tensors of their own (a classifier in `modules_to_save`) become one adapter for each task: the merged
factors and the task's own tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.atomic import PartialDirectory, check_room
from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.local.writer import FileWriter
from peru_cli.checkpoints.lora.adapter import Adapter
from peru_cli.checkpoints.lora.bound import BASE_TENSORS
from peru_cli.checkpoints.lora.config import resized_config
from peru_cli.checkpoints.lora.expand import LoraCheckpoint
from peru_cli.checkpoints.lora.keys import PEFT
from peru_cli.checkpoints.lora.writer import adapter_writer, as_bytes, factor_names, resized_metadata
from peru_cli.checkpoints.resolve import open_model
from peru_cli.checkpoints.sidefiles import find_side_files
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError
from peru_cli.merge.adapters.cores import Cores, Lift, Spool, core_tensors, spooled
from peru_cli.merge.adapters.modules import Family, bases_of, open_family
from peru_cli.merge.cautions import cautions, idle
from peru_cli.merge.given import Given, build_by_tensor
from peru_cli.merge.output import Recipe
from peru_cli.merge.passes.matrices import check_memory
from peru_cli.merge.passes.run import DEFAULT_TILE, check_trims, merge
from peru_cli.merge.passes.then import check_memory as check_room_for
from peru_cli.merge.plan import MergePlan, Options, plan_merge
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule
from peru_cli.methods.table import Method
from peru_cli.methods.then.table import build_pass
from peru_cli.options import Running
from peru_cli.streaming.engine import run
from peru_cli.vectors.family import StreamSettings
from peru_cli.vectors.settings import streaming


@dataclass(frozen=True)
class Asked:
    """What the command line says. `models` are (task, model)."""

    models: Sequence[tuple[str, str]]
    space: str
    method: Method
    parameters: Parameters
    varied: Given
    then: str | None
    base: str | None
    dtype: Dtype | None
    output: Path
    run: Running


def merge_adapters(asked: Asked, recipe: Recipe) -> dict[str, object]:
    """Merge adapters into one. Returns what `--json` says of it.

    Raises UsageError, Mismatch and BadFile as `open_family` does, before any tensor is read."""
    family = open_family(asked.models, asked.space, console.note)
    with contextlib.closing(family):
        _check(family, asked)
        tensors = {task: _tensors(family, adapter, asked.dtype) for task, adapter in zip(family.names, family.adapters, strict=True)}
        ranks = sorted({module.rank(family.space) for module in family.modules})
        shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        console.note(f"{plural(len(family.modules), 'module')} in {asked.space}, rank {shown}")
        console.note(
            f"{asked.method.name} ({asked.method.paper}): " + ", ".join(f"{name} {value}" for name, value in recipe.words().items())
        )
        summary: dict[str, object] = {
            "output": str(asked.output), "method": asked.method.name, "lora": asked.space, "tasks": list(family.names),
            "options": recipe.words(), "modules": len(family.modules), "ranks": ranks, "by_task": family.by_task,
            "bytes": sum(info.nbytes for each in ([*tensors.values()] if family.by_task else [tensors[family.names[0]]]) for info in each),
        }  # fmt: skip
        if asked.run.dry_run:
            _plan(family, asked, [None] * len(family.names))
            return summary
        entries = sum(module.entries for module in family.modules)
        merged_entries = sum(info.entries for info in core_tensors(family))
        with (
            console.progress(2 * entries + merged_entries, "merge") as progress,
            streaming(asked.run.device, asked.run.threads, asked.run.tile_entries or DEFAULT_TILE, progress.advance) as how,
            PartialDirectory(asked.output.with_name(f"{asked.output.name}.coordinates"), sync=False) as scratch,
        ):
            progress.step("finding coordinates")
            files = _spool(family, scratch.path, how)
            plan, rule = _plan(family, asked, files)
            for warning in [*(() if asked.varied.by_tensor else idle([rule.parameters])), *cautions(plan, rule)]:
                console.warn(warning)
            middle = scratch.path / "merged.safetensors"
            with FileWriter(middle, plan.written, False) as writer:
                merge(plan, rule, writer, how, progress.step)
                writer.commit()
            for vector in plan.vectors:
                vector.fine.close()
            progress.step("writing factors")
            with open_file(middle, "merged") as merged:
                _write(family, asked, merged, tensors, recipe, how)
        nbytes = summary["bytes"]
        assert isinstance(nbytes, int)
        numbers = sum(info.entries for info in tensors[family.names[0]])
        many = f"an adapter for each of {plural(len(family.names), 'task')}" if family.by_task else "one adapter"
        console.line(f"{asked.output}: {many}, rank {shown}, {count(numbers)} numbers, {si_bytes(nbytes)}")
        return summary


def _check(family: Family, asked: Asked) -> None:
    """UsageError for an output of another form than the adapters', Mismatch for a base that they do not fit."""
    as_file = asked.output.suffix == ".safetensors"
    if as_file and (family.layout == PEFT or family.by_task):
        raise UsageError(f"-o {asked.output}: a PEFT adapter is a folder", f"write -o {asked.output.with_suffix('')}/")
    if asked.base is not None:
        with open_model(asked.base) as base:
            for adapter in family.adapters:
                LoraCheckpoint(adapter.path if adapter.config else adapter.weights, adapter.label, base).close()
    named = {str(adapter.config.get("base_model_name_or_path")) for adapter in family.adapters if adapter.config}
    if len(named) > 1:
        console.warn(f"the adapters name different bases: {', '.join(sorted(named))}; the first one's is written")
    factors = sum(info.nbytes for task in range(len(family.names)) for info in spooled(family, task))
    check_room(asked.output, factors + sum(info.nbytes for info in core_tensors(family)))


def _plan(family: Family, asked: Asked, files: Sequence[Path | None]) -> tuple[MergePlan, Rule]:
    """The merge of the tasks' matrices onto a base of zeros."""
    tensors = core_tensors(family)
    base = Cores(tensors, "zero", "no change")
    tasks = [
        (name, Cores(tensors, adapter.label, f"{adapter.kind}, in {asked.space}", file))
        for name, adapter, file in zip(family.names, family.adapters, files, strict=True)
    ]
    rule = asked.method.build(asked.parameters)
    plan = plan_merge(base, tasks, rule.on_vectors, Options(merge_heads=True))
    if asked.varied.by_tensor:
        rule = build_by_tensor(asked.method, asked.varied, asked.parameters, [slot.info.name for slot in plan.slots])
    check_trims(plan, rule)
    check_memory(plan, rule)
    if asked.then is not None:
        plan.then = build_pass(asked.then)
        check_room_for(plan, plan.then)
    return plan, rule


def _spool(family: Family, folder: Path, how: StreamSettings) -> list[Path | None]:
    """Write every task's small factors. Returns their files."""
    files: list[Path | None] = []
    with contextlib.ExitStack() as stack:
        writers = []
        for task, name in enumerate(family.names):
            file = folder / f"{name}.safetensors"
            writers.append(stack.enter_context(FileWriter(file, spooled(family, task), False)))
            files.append(file)
        step = Spool(family, writers)
        run(step, step.tiles(), how.threads, how.advance)
        for writer in writers:
            writer.commit()
    return files


def _tensors(family: Family, adapter: Adapter, wanted: Dtype | None) -> list[TensorInfo]:
    """All tensors of one adapter that is written: the merged factors, and what `adapter` holds whole."""
    found = []
    for module in family.modules:
        shapes, dtype = module.like.shapes(module.rank(family.space)), family.dtype(module, wanted)
        found += [TensorInfo(name, dtype, shape) for name, shape in zip(factor_names(module.like, family.layout), shapes, strict=True)]
        if module.like.alpha is not None:
            info = family.adapters[module.owner].file.tensors[module.like.alpha]
            found.append(TensorInfo(info.name, info.dtype, info.shape))
    return found + [TensorInfo(name, adapter.file.tensors[name].dtype, adapter.file.tensors[name].shape) for name in adapter.whole.values()]


def _write(
    family: Family, asked: Asked, merged: Checkpoint, tensors: Mapping[str, list[TensorInfo]], recipe: Recipe, how: StreamSettings
) -> None:
    """Write the merged factors once, and for each further task copy them."""
    if asked.output.suffix == ".safetensors":
        _lift(
            family,
            asked,
            merged,
            FileWriter(asked.output, tensors[family.names[0]], asked.run.sync, _metadata(family, recipe), files={}),
            how,
        )
        return
    with PartialDirectory(asked.output, asked.run.sync) as folder:
        if not family.by_task:
            _lift(family, asked, merged, _writer(family, 0, folder.path, tensors, recipe, asked.run.sync), how)
        else:
            first = _writer(family, 0, folder.path / family.names[0], tensors, recipe, asked.run.sync)
            _lift(family, asked, merged, first, how)
            weights = folder.path / family.names[0] / "adapter_model.safetensors"
            with open_file(weights, "merged") as done:
                shared = [name for module in family.modules for name in factor_names(module.like, family.layout)]
                for task in range(1, len(family.names)):
                    with _writer(family, task, folder.path / family.names[task], tensors, recipe, asked.run.sync) as writer:
                        for name in shared:
                            writer.copy(name, done, name)
                        _own(family, task, writer)
                        writer.commit()
        folder.commit()


def _lift(family: Family, asked: Asked, merged: Checkpoint, writer: FileWriter, how: StreamSettings) -> None:
    """Write the merged factors and the first task's own tensors."""
    with writer:
        step = Lift(family, merged, asked.dtype, writer)
        run(step, step.tiles(), how.threads, how.advance)
        _own(family, 0, writer)
        writer.commit()


def _own(family: Family, task: int, writer: FileWriter) -> None:
    """Write alphas equal to the ranks, and what one adapter holds whole."""
    import torch

    for module in family.modules:
        if module.like.alpha is not None:
            info = family.adapters[module.owner].file.tensors[module.like.alpha]
            alpha = torch.full(info.shape, float(module.rank(family.space))).to(getattr(torch, info.dtype.torch_name or ""))
            writer.write(info.name, 0, as_bytes(alpha))
    for name in family.adapters[task].whole.values():
        writer.copy(name, family.adapters[task].file, name)


def _writer(family: Family, task: int, folder: Path, tensors: Mapping[str, list[TensorInfo]], recipe: Recipe, sync: bool) -> FileWriter:
    """The writer of one adapter's weights, with its small files already in place."""
    adapter, mine = family.adapters[task], tensors[family.names[task]]
    if family.layout != PEFT:
        folder.mkdir(exist_ok=True, parents=True)
        return FileWriter(folder / adapter.weights.name, mine, sync, _metadata(family, recipe), files={})
    small = {name: path.read_bytes() for name, path in find_side_files(adapter.path).items()}
    return adapter_writer(folder, mine, _config(family, task), small, _metadata(family, recipe), sync)


def _config(family: Family, task: int) -> dict[str, Any]:
    """One adapter's config with the merged ranks. It names the modules one by one if this adapter lacks some of them."""
    config = dict(family.adapters[task].config)
    if any(module.pairs[task] is None for module in family.modules):
        parameters = {name for adapter in family.adapters for name in adapter.config.get("target_parameters") or []}
        modules = sorted(module.like.name for module in family.modules if module.like.parameter is None)
        config |= {
            "target_modules": modules, "target_parameters": sorted(parameters) or None, "exclude_modules": None,
            "layers_to_transform": None, "layers_pattern": None,
        }  # fmt: skip
    return resized_config(config, {module.like.target: module.rank(family.space) for module in family.modules})


def _metadata(family: Family, recipe: Recipe) -> dict[str, str]:
    """How the adapter was made, and which base it is for, if all adapters record the same one."""
    ranks = [module.rank(family.space) for module in family.modules]
    kept = resized_metadata(family.adapters[0], ranks, "")
    if any(bases_of(adapter) != bases_of(family.adapters[0]) for adapter in family.adapters):
        kept.pop(BASE_TENSORS, None)
    return {key: value for key, value in kept.items() if not key.startswith("peru.svd-lora.")} | recipe.metadata()
