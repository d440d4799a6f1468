"""`peru merge recipe.yml`: read the recipe, plan everything from headers, merge its documents one after the other."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.hub.session import current_session
from peru_cli.checkpoints.local import atomic
from peru_cli.checkpoints.local.checkpoint import open_directory
from peru_cli.checkpoints.places import is_on_hub, locate, size_of, why_not_here
from peru_cli.checkpoints.resolve import default_task
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import console, plural, si_bytes
from peru_cli.errors import BadFile, UsageError
from peru_cli.finetunes.verify import verify_expanded
from peru_cli.merge import output as out
from peru_cli.merge.cautions import cautions, idle
from peru_cli.merge.passes.run import DEFAULT_TILE, check_trims
from peru_cli.merge.plan import check_same
from peru_cli.merge.recipe.document import BLOCK, MAX_BYTES, Complaints, read_documents
from peru_cli.merge.recipe.parts import ModelName, Recipe
from peru_cli.merge.recipe.plan import Forthcoming, Stage, Wanted, open_all, plan_stage, read_all
from peru_cli.merge.recipe.show import effective, print_plan, say
from peru_cli.merge.recipe.write import check_path, write_text
from peru_cli.merge.search.asked import Examples, Searching
from peru_cli.merge.search.leaves import Leaves
from peru_cli.merge.search.space import Point, Range
from peru_cli.options import Running, dtype_word
from peru_cli.streaming.engine import available_threads
from peru_cli.vectors.settings import streaming

if TYPE_CHECKING:
    from peru_cli.merge.search.run import Found


@dataclass(frozen=True)
class Asked:
    """What the command line says besides the recipe."""

    output: str
    dtype: Dtype | None
    wanted: Wanted
    max_shard_bytes: int
    strict: bool
    run: Running
    searching: Searching = field(default_factory=Searching)
    ranges: Sequence[Range] = ()
    examples: Examples | None = None  # for the search
    write_recipe: str | None = None

    @property
    def extra(self) -> tuple[str, ...]:
        """The words of the command line that determine what is merged."""
        wanted = self.wanted
        words = [*(["--per-task", wanted.per_task] if wanted.per_task else []), *(["--merge-heads"] if wanted.merge_heads else [])]
        return (
            *words,
            *(["--config", wanted.config] if wanted.config else []),
            *(["--dtype", dtype_word(self.dtype)] if self.dtype is not None else []),
        )


def merge_recipe(name: str, asked: Asked) -> dict[str, object]:
    """Merge all documents of a recipe. Returns what `--json` says of it.

    Raises UsageError with all problems of the recipe, with lines, before any tensor is read."""
    place = locate(name)
    if not place.is_file():
        raise UsageError(*why_not_here(name))
    if size_of(place) > MAX_BYTES:
        raise BadFile(f"{name} has {size_of(place):,} bytes; a recipe can have at most {MAX_BYTES:,}")
    try:
        text = place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadFile(f"{name} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    complaints = Complaints(name, asked.strict)
    recipes = read_all(read_documents(text, name), complaints)
    leaves = Leaves(text, name, recipes[-1], asked.ranges) if asked.ranges else None
    target = Path(asked.output)
    atomic.check_target(target, asked.run.force or asked.run.dry_run)
    if asked.write_recipe is not None:
        check_path(Path(asked.write_recipe), asked.run.force)
    with _headers_first(recipes):
        stages = _plan_all(recipes, asked, complaints, {})
    for warning in complaints.warnings:
        console.warn(f"{name}: {warning}")
    _check(stages, target)
    said: set[str] = set()
    for stage in stages:
        say(stage, name)
        _caution(idle(stage.parameters) + cautions(stage.plan, stage.rule), said)
    threads = asked.run.threads or available_threads()
    if asked.run.dry_run:
        shown = [print_plan(stage, threads, asked.run.tile_entries or DEFAULT_TILE) for stage in stages]
        return {"output": str(target), "documents": shown, "warnings": complaints.warnings}
    running = _Run(name, text, recipes, asked, target, said)
    running.merge_earlier()
    report: dict[str, object] = {}
    if leaves is not None:
        found = running.search(leaves)
        if asked.write_recipe is not None:
            write_text(Path(asked.write_recipe), leaves.text(found.point))
    last = running.finish()
    if leaves is not None:
        from peru_cli.merge.search.show import as_json, show_search

        show_search(found)
        report["search"] = as_json(found)
    console.line(f"{target}: {plural(len(last.plan.outputs), 'tensor')}, {si_bytes(sum(i.nbytes for i in last.plan.outputs))}")
    return {
        "output": str(target), "method": last.method.name, "tasks": [task for task, _ in last.layout.tasks],
        "merged": len(last.plan.slots), "entries": last.plan.entries, "documents": len(stages),
        "bytes": sum(info.nbytes for info in last.plan.outputs), "warnings": complaints.warnings,
    } | report  # fmt: skip


@contextlib.contextmanager
def _headers_first(recipes: list[Recipe]) -> Iterator[None]:
    """Read only headers while a recipe is checked: Hub files are not downloaded for a recipe that cannot be merged."""
    session = current_session()
    before = session.stream
    if not any(is_on_hub(model.model) for recipe in recipes for model in recipe.models()):
        yield
        return
    session.stream = True
    try:
        yield
    finally:
        session.stream = before


def _caution(warnings: list[str], said: set[str]) -> None:
    """Print warnings that were not printed yet."""
    for warning in warnings:
        if warning not in said:
            console.warn(warning)
    said |= set(warnings)


def _plan_all(recipes: list[Recipe], asked: Asked, complaints: Complaints, merged: dict[str, Checkpoint]) -> list[Stage]:
    """Plan all documents. The future output of an earlier document stands in for it until it is merged."""
    stages: list[Stage] = []
    models = dict(merged)
    for recipe in recipes:
        if recipe.name in merged:
            continue
        stage = _plan(recipe, asked, complaints, models)
        stages.append(stage)
        if recipe.name is not None:
            models[recipe.name] = Forthcoming(recipe.name, stage.plan)
    return stages


def _plan(recipe: Recipe, asked: Asked, complaints: Complaints, models: dict[str, Checkpoint]) -> Stage:
    return _planned(recipe, open_all(recipe, models, complaints), asked, complaints)


def _planned(recipe: Recipe, opened: dict[ModelName, Checkpoint], asked: Asked, complaints: Complaints) -> Stage:
    if asked.dtype is not None:
        recipe = replace(recipe, out_dtype=asked.dtype)
    stage = plan_stage(recipe, opened, asked.wanted, complaints)
    complaints.settle()
    return stage


def _check(stages: list[Stage], target: Path) -> None:
    """Check what the command line's own merge checks too: something is kept, the disk has space, a single file has no heads."""
    for stage in stages:
        check_trims(stage.plan, stage.rule)
    if target.suffix == ".safetensors" and any(stages[-1].plan.heads.values()):
        raise UsageError("a single file cannot hold per-task tensors", "write a folder with -o OUT/: they go to OUT/heads/TASK.safetensors")
    if not atomic.partial_path(target).exists():
        atomic.check_room(target, sum(info.nbytes for stage in stages for info in stage.plan.outputs))


def _recorded(text: str, name: str, recipes: list[Recipe]) -> str:
    """The recipe as it is stored with the weights: local folders are reduced to their last name."""
    if name.lower().endswith(".md"):
        text = next((m.group(2) for m in BLOCK.finditer(text) if "merge_method" in m.group(2)), text)
    names = {part for recipe in recipes for model in recipe.models() for part in (model.model, model.lora) if part is not None}
    for path in sorted((part for part in names if Path(part).exists()), key=len, reverse=True):
        text = text.replace(path, default_task(path))
    return text if text.endswith("\n") else text + "\n"


class _Run:
    """Merges the documents. Earlier ones go into a hidden folder beside the output, which is removed at the end."""

    def __init__(self, name: str, text: str, recipes: list[Recipe], asked: Asked, target: Path, said: set[str]) -> None:
        self._said = said  # warnings so far
        self._name, self._text, self._recipes, self._asked, self._target = name, text, recipes, asked, target
        self._found: Found | None = None
        self._folder = target.absolute().parent / f".{target.name}.peru-documents"
        self._merged: dict[str, Checkpoint] = {}

    def merge_earlier(self) -> None:
        """Merge the documents that others use."""
        if self._asked.run.force and self._folder.exists():
            atomic.remove(self._folder)
        for recipe in self._recipes[:-1]:
            stage = _plan(recipe, self._asked, Complaints(self._name), self._merged)
            assert recipe.name is not None
            self._merged[recipe.name] = self._earlier(recipe.name, stage)

    def search(self, leaves: Leaves) -> Found:
        """Search numbers of the result, which then is the recipe with the best ones."""
        from peru_cli.merge.search.recipe import search_recipe

        asked = self._asked
        assert asked.examples is not None
        first = _plan(leaves.recipes(leaves.start)[-1], asked, Complaints(self._name), self._merged)
        opened = dict(zip(first.opened, first.models, strict=True))

        def plan_at(point: Point) -> Stage:
            return _planned(leaves.recipes(point)[-1], opened, asked, Complaints(self._name))

        def write(point: Point, folder: Path) -> None:
            self._text = leaves.text(point)
            self._write(plan_at(point), folder, False, False)

        lowest = plan_at(leaves.lowest)
        check_trims(lowest.plan, lowest.rule)
        self._text = leaves.text(leaves.start)
        identity = out.resume_key(first.plan, self._record(first))
        with streaming(asked.run.device, asked.run.threads, asked.run.tile_entries or DEFAULT_TILE, lambda entries: None) as how:
            verify_expanded(list(first.models), how, lambda text: None)
            self._found = search_recipe(
                asked.searching,
                leaves,
                asked.examples,
                first,
                asked.run.device,
                plan_at,
                write,
                identity,
                how,
                self._target.absolute().parent,
            )
        self._text, self._recipes = leaves.text(self._found.point), leaves.recipes(self._found.point)
        return self._found

    def finish(self) -> Stage:
        """Merge the result, and remove what only it needed."""
        stage = _plan(self._recipes[-1], self._asked, Complaints(self._name), self._merged)
        self._write(stage, self._target, self._asked.run.sync, self._asked.run.force)
        for model in self._merged.values():
            model.close()
        if self._folder.exists():
            atomic.remove(self._folder)
        return stage

    def _earlier(self, name: str, stage: Stage) -> Checkpoint:
        """A document that later ones use: merged, or reused from a killed run."""
        self._folder.mkdir(exist_ok=True)
        path = self._folder / hashlib.sha256(name.encode()).hexdigest()[:16]
        key = out.resume_key(stage.plan, self._record(stage))
        marker = path.with_suffix(".key")
        if path.exists() and (not marker.is_file() or marker.read_text("ascii") != key):
            atomic.remove(path)
        if path.exists():
            console.note(f"document {name}: merged by an earlier run")
        else:
            self._write(stage, path, False, False)
            marker.write_text(key, "ascii")
        opened = open_directory(path, name)
        opened.kind = "document of this recipe"
        return opened

    def _record(self, stage: Stage) -> out.Recipe:
        values, weights = effective(stage)
        base = stage.layout.base
        base_name = None
        if base is not None and stage.plan.base is not None:
            base_name = base.public_name or default_task(base.label)
        tasks = tuple(name for name, _ in stage.layout.tasks)
        return out.Recipe(
            stage.method.name, stage.method.paper, tasks, weights, dict(values), base_name, self._asked.extra,
            self._asked.max_shard_bytes, document=_recorded(self._text, self._name, self._recipes),
            searched=self._found.words() if self._found is not None else "",
            chosen_by=self._found.chosen_by() if self._found is not None else "",
        )  # fmt: skip

    def _write(self, stage: Stage, target: Path, sync: bool, force: bool) -> None:
        asked, plan, rule = self._asked, stage.plan, stage.rule
        _caution(cautions(plan, rule) + check_same(plan), self._said)  # remote inputs, or those not merged before, can be checked now
        total = (3 if rule.trims else 1) * plan.entries
        with (
            console.progress(total, stage.recipe.name or "merge") as progress,
            streaming(asked.run.device, asked.run.threads, asked.run.tile_entries or DEFAULT_TILE, progress.advance) as how,
        ):
            verify_expanded(list(stage.models), how, progress.step)
            where = out.Where(target, sync, force, progress.step, console.note)
            write = out.write_file if target.suffix == ".safetensors" else out.write_directory
            write(plan, rule, self._record(stage), where, how)
