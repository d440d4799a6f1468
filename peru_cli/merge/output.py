"""The output of a merge: a file, a folder with heads and model card, or merge and artifacts together (PERU-FFT)."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from peru_cli.checkpoints.architectures import is_output, is_tied
from peru_cli.checkpoints.base_name import hub_repo
from peru_cli.checkpoints.digests import digest_of_lines
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import PartialDirectory, partial_path, remove
from peru_cli.checkpoints.local.checkpoint import SafetensorsCheckpoint, open_directory
from peru_cli.checkpoints.local.writer import CheckpointWriter, DirectoryWriter, FileWriter
from peru_cli.checkpoints.lora.tied import is_untied, with_settings
from peru_cli.checkpoints.quantized.requantize import RequantizingWriter
from peru_cli.checkpoints.sidefiles import config_with_dtype
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import PeruError
from peru_cli.finetunes.adapter import AdapterOnBase, as_unpacked
from peru_cli.finetunes.head import HEADS, head_metadata
from peru_cli.merge.passes.run import merge
from peru_cli.merge.plan import MergePlan
from peru_cli.methods.parameters import Value
from peru_cli.methods.rules import Rule
from peru_cli.vectors.family import StreamSettings
from peru_cli.version import __version__

if TYPE_CHECKING:
    from peru_cli.prune.run import PruneResult

_KEY = ".peru-merge-key"
RECIPE_FILE = "mergekit_config.yml"

Note = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """The record of a merge: everything besides the inputs that determines its bytes. Contains no path."""

    method: str
    paper: str
    tasks: tuple[str, ...]
    weights: tuple[Value, ...] | None  # None if the method has none; text if they differ by tensor
    values: dict[str, Value]
    base_name: str | None
    extra: tuple[str, ...] = ()  # further options of the command line, as words
    max_shard_bytes: int = 5 * 10**9
    statistics: tuple[str, ...] = ()  # keys of the statistics that methods with data collected, by task
    searched: str = ""  # what was searched on what
    chosen_by: str = "accuracy"  # what is best in a search
    own: tuple[tuple[str, str, str], ...] = ()  # options of single tasks: option, task, value
    document: str = ""  # the text of the recipe file, if one was merged

    def words(self) -> dict[str, str]:
        """Effective options as they would be typed."""
        shown = {}
        for name, value in self.values.items():
            shown[name] = ("yes" if value else "no") if isinstance(value, bool) else show(value)
        if self.weights is not None:
            shown |= {f"weight {task}": show(weight) for task, weight in zip(self.tasks, self.weights, strict=True)}
        return shown | {f"{option} {task}": text for option, task, text in self.own}

    def command(self) -> str:
        """The command line with every option spelled out and local paths reduced to the tasks' names."""
        if self.document:
            return shlex.join(["peru", "merge", RECIPE_FILE, "-o", "merged/", *self.extra])
        parts = ["peru", "merge", *self.tasks, *(["--base", self.base_name] if self.base_name else [])]
        parts += ["-o", "merged/", "--method", self.method]
        for name, value in self.values.items():
            parts += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", show(value)]
        if self.weights is not None:
            for task, weight in zip(self.tasks, self.weights, strict=True):
                parts += ["--weight", f"{task}={show(weight)}"]
        parts += [word for option, task, text in self.own for word in (f"--{option}", f"{task}={text}")]
        return shlex.join([*parts, *self.extra])

    def metadata(self) -> dict[str, str]:
        """Metadata of the output's safetensors files."""
        return {
            "peru.merge.method": self.method,
            "peru.merge.tasks": json.dumps(list(self.tasks)),
            "peru.merge.options": json.dumps(self.words(), sort_keys=True),
            "peru.merge.version": __version__,
        } | ({"peru.merge.statistics": json.dumps(list(self.statistics))} if self.statistics else {}) | (
            {"peru.merge.searched": self.searched} if self.searched else {}
        )  # fmt: skip

    def card(self, plan: MergePlan, side_files: list[str]) -> str:
        """The model card."""
        from peru_cli.publish.card import PERU, as_text, front_matter, link

        models = [vector.fine.public_name for vector in plan.vectors]
        sources = [name for name in (self.base_name, *models) if name is not None]
        head = front_matter(sources, "merge", "transformers" if "config.json" in side_files else None, ["merge", "peru"])
        nbytes = sum(info.nbytes for info in plan.written)
        heads = {task: sum(info.nbytes for info in infos) for task, infos in plan.heads.items() if infos}
        held = [f"{len(plan.written)} tensors, {nbytes:,} bytes."]
        if heads:
            held.append(
                "Tensors that belong to one task are in files of their own: "
                + ", ".join(f"`heads/{t}.safetensors` ({n:,} bytes)" for t, n in heads.items())
                + "."
            )
        named = [f"- {task}: {link(name)}" for task, name in zip(self.tasks, models, strict=True) if name is not None]
        options = [f"| {name} | {value} |" for name, value in self.words().items()]
        written = ["````yaml", *self.document.rstrip().splitlines(), "````", ""] if self.document else []
        chosen = [f"Chosen by {self.chosen_by}: {self.searched}.", ""] if self.searched else []
        body = [
            "# Merged model", "",
            f"Merged by {PERU} with the method [{self.method}]({self.paper}) from {', '.join(self.tasks)}.", *held, "",
            *([f"Base: {link(self.base_name)}", "", *named, ""] if self.base_name and hub_repo(self.base_name) else named),
            "```sh", self.command(), "```", "", *written, *chosen, "| option | value |", "| --- | --- |", *options, "",
        ]  # fmt: skip
        return as_text(head + body)


@dataclass(frozen=True)
class Where:
    """Where the output goes and how. `fresh` drops what a killed run left, `step` and `say` report to the user."""

    target: Path
    sync: bool
    fresh: bool
    step: Note
    say: Note


def show(value: Value) -> str:
    """A number as it would be typed: shares as percentages if those are short."""
    if isinstance(value, Fraction):
        percent = value * 100
        return f"{percent.numerator}%" if percent.denominator == 1 else repr(float(value))
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)
    return str(value)


def resume_key(plan: MergePlan, recipe: Recipe) -> str:
    """A digest of everything that determines the output's bytes."""
    parts = [
        __version__, recipe.command(), recipe.statistics, recipe.max_shard_bytes, plan.base.identity() if plan.base else None,
        [vector.fine.identity() for vector in plan.vectors],
        digest_of_lines(f"{t.name}\0{t.dtype.name} {t.shape}" for t in plan.written),
        {task: [t.name for t in heads] for task, heads in plan.heads.items()}, recipe.document,
        {name: hashlib.sha256(content).hexdigest() for name, content in sorted(plan.overrides.items())},
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def side_files(plan: MergePlan, dtype: Dtype | None) -> dict[str, bytes]:
    """Config, tokenizer and other side files of the base, or of the first model if there is no base."""
    contents = {name: path.read_bytes() for name, path in plan.reference.side_files.items()}
    if plan.config is not None and (chosen := plan.config.side_files.get("config.json")) is not None:
        contents["config.json"] = chosen.read_bytes()
    contents |= plan.overrides
    if dtype is not None and "config.json" in contents:
        contents["config.json"] = config_with_dtype(contents["config.json"], dtype)
    if plan.fp8 is not None and "config.json" in contents:
        contents["config.json"] = plan.fp8.config(contents["config.json"])
    return contents


def write_file(plan: MergePlan, rule: Rule, recipe: Recipe, where: Where, how: StreamSettings) -> None:
    """Write the merge as one safetensors file."""
    with FileWriter(where.target, plan.written, where.sync, recipe.metadata(), resume_key(plan, recipe), where.fresh, {}) as writer:
        _say_resumed(writer, where)
        merge(plan, rule, _through(writer, plan, where.target.absolute().parent), how, where.step)
        writer.commit()


def write_directory(plan: MergePlan, rule: Rule, recipe: Recipe, where: Where, how: StreamSettings) -> None:
    """Write the merge as a folder that transformers loads, with heads/TASK.safetensors and README.md."""
    contents = side_files(plan, plan.dtype)
    contents["README.md"] = recipe.card(plan, list(contents)).encode()
    if recipe.document:
        contents[RECIPE_FILE] = recipe.document.encode()
    key = resume_key(plan, recipe)
    shards, sync = recipe.max_shard_bytes, where.sync
    with DirectoryWriter(where.target, plan.written, contents, shards, sync, recipe.metadata(), key, where.fresh, True) as writer:
        _say_resumed(writer, where)
        merge(plan, rule, _through(writer, plan, writer.folder), how, where.step)
        _untie(writer, plan, contents)
        writer.seal()
        write_heads(plan, writer.folder / HEADS, sync, writer.model_digest)
        writer.commit()


def _through(writer: CheckpointWriter, plan: MergePlan, folder: Path) -> CheckpointWriter:
    """The writer, behind one that makes FP8 of what the plan wants in FP8; `folder` is on the output's disk."""
    return writer if plan.fp8 is None else RequantizingWriter(writer, plan.fp8, folder)


def _untie(writer: DirectoryWriter, plan: MergePlan, contents: Mapping[str, bytes]) -> None:
    """If head and embedding differ after the merge, say so in config.json: otherwise loaders would tie them again."""
    if "config.json" not in contents or not is_tied(plan.reference.config()) or not any(is_output(info.name) for info in plan.outputs):
        return
    writer.seal()
    with _opened(writer.folder) as written:
        if is_untied(written.config(), written.tensors, written.read_into):
            writer.amend("config.json", with_settings(contents["config.json"], tie_word_embeddings=False))


def _say_resumed(writer: CheckpointWriter, where: Where) -> None:
    if writer.journal is not None and writer.journal.done:
        where.say(f"continuing after {len(writer.journal.done)} tensors of an earlier run")


def write_heads(plan: MergePlan, folder: Path, sync: bool, merge_digest: str) -> None:
    """Write each task's own tensors under their own names, bit for bit, into TASK.safetensors, bound to the merged weights."""
    for vector in plan.vectors:
        heads = plan.heads[vector.name]
        if not heads:
            continue
        folder.mkdir(exist_ok=True)
        said = head_metadata(vector.name, vector.pairing.prefix, vector.fine, merge_digest)
        with FileWriter(folder / f"{vector.name}.safetensors", heads, sync, said, files={}) as writer:
            for info in heads:
                writer.copy(info.name, vector.fine, info.name)
            writer.commit()


def write_compressed(plan: MergePlan, rule: Rule, recipe: Recipe, where: Where, keep: Fraction, how: StreamSettings) -> list[PruneResult]:
    """PERU-FFT: write `merged/` and one artifact for each task against it. Everything appears at once."""
    from peru_cli.prune import run as pruning

    key = resume_key(plan, recipe)
    with PartialDirectory(where.target, where.sync, resume=True) as folder:
        marker, merged = folder.path / _KEY, folder.path / "merged"
        if where.fresh or not (marker.is_file() and marker.read_bytes() == _told(key, merged) and _is_sound(merged)):
            marker.unlink(missing_ok=True)
            _clear(folder.path)
            write_directory(plan, rule, recipe, replace(where, target=merged), how)
            marker.write_bytes(_told(key, merged))
        results = []
        with _opened(merged) as base:
            options = pruning.PruneOptions(keep)
            planned = []
            for vector in plan.vectors:
                fine = as_unpacked(vector.fine)
                ours = {name: ours for ours, name in fine.names.items()} if isinstance(fine, AdapterOnBase) else {}
                names = [ours.get(info.name, info.name) for info in plan.heads[vector.name]]
                own = "^(" + "|".join(map(re.escape, names)) + ")$" if names else None
                task = (vector.name, fine, folder.path / f"{vector.name}.safetensors")
                planned += pruning.plan_prune(base, [task], pruning.PruneOptions(keep, per_task=own, allow_unpaired=True), force=True)
            results = pruning.prune(base, planned, options, how, where.sync, where.step)
        marker.unlink()
        folder.commit()
    for result in results:
        result.path = where.target / result.path.name
    return results


def _clear(folder: Path) -> None:
    """Remove what another merge left, except an unfinished merged/, which has its own journal."""
    unfinished = partial_path(folder / "merged").name
    for path in folder.iterdir():
        if not path.name.startswith(unfinished):
            remove(path)


def _told(key: str, merged: Path) -> bytes:
    """A digest of the key, and of all files of a finished merge but its weights, which carry their own."""
    total = hashlib.sha256(key.encode())
    for path in sorted(path for path in merged.rglob("*") if path.is_file()):
        if path.parent != merged or path.suffix != ".safetensors":
            total.update(f"{path.relative_to(merged)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest().encode()


def _is_sound(merged: Path) -> bool:
    """Whether the weights of a finished merge are what was written."""
    try:
        with inputs.watching(), _opened(merged) as checkpoint:  # by a watch of its own: it may go
            if isinstance(checkpoint, SafetensorsCheckpoint):
                checkpoint.verify()
    except PeruError:
        return False
    return True


@contextmanager
def _opened(folder: Path) -> Iterator[Checkpoint]:
    checkpoint = open_directory(folder, "merged")
    try:
        yield checkpoint
    finally:
        checkpoint.close()
