"""Statistics of merges with data: collected from models in memory, stored in one safetensors file per task, read in tiles.

A file is called METHOD-KEY.safetensors. The key is a digest of everything that determines its contents: the fine-tune's
tensors and side files, the examples (without labels), the options named in the table of methods, and, if all tasks are seen
together, the same of the other tasks and the base. So files of any merges can share a folder, and none is ever out of date."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3

from peru_cli.checkpoints.digests import checkpoint_digest
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import BeingWritten
from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.local.writer import FileWriter
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError
from peru_cli.inference.data import Examples
from peru_cli.inference.task_models import Running, digest_inputs, own_files, read_floats
from peru_cli.merge.data.task_models import TaskParts, load_task
from peru_cli.merge.plan import MergePlan
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.statistics import Collector, Found, TaskModel
from peru_cli.methods.table import Method
from peru_cli.shown import listed
from peru_cli.streaming.arrays import KIND, Host
from peru_cli.version import __version__

_WAIT = 0.1  # seconds
_DTYPE = {torch.float32: BY_NAME["F32"], torch.float64: BY_NAME["F64"]}


class Kept:
    """One task's statistics in a file, by the name of the merged tensor."""

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        """`names` maps the merge's names to the task's own."""
        self._file, self._names = open_file(path, str(path)), names
        inputs.forget(path)  # another process that uses the folder may write the same statistics again

    def _info(self, role: str, name: str) -> TensorInfo | None:
        return self._file.tensors.get(f"{role}/{self._names.get(name, '')}")

    def shape(self, role: str, name: str) -> tuple[int, ...] | None:
        info = self._info(role, name)
        return None if info is None else info.shape

    def entries(self, role: str, name: str, start: int, n: int) -> Host:
        info = self._info(role, name)
        assert info is not None
        found = np.empty(n, KIND[info.dtype.name])
        if n:
            self._file.read_into(info.name, info.dtype.nbytes(start), found.data.cast("B"))
        return found


def digest_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The digest of all tensors of a checkpoint, as in artifacts. Reads everything once."""
    return checkpoint_digest({name: checkpoint.digest(name) for name in checkpoint.tensors})


@dataclass
class Progress:
    """How collecting reports progress: a note for the user, more work to come, work done."""

    say: Callable[[str], None]
    expect: Callable[[int], None]
    advance: Callable[[int], None]


class Statistics:
    """The statistics that a method needs of all tasks of a merge: read from the folder, or collected."""

    def __init__(self, plan: MergePlan, method: Method, running: Running, folder: Path, progress: Progress) -> None:
        self._plan, self._method, self._running, self._folder, self._progress = plan, method, running, folder, progress
        self._sources = [self._digest(vector.fine) for vector in plan.vectors]
        self._base = digest_checkpoint(plan.base).hex() if plan.base is not None else ""

    def _digest(self, fine: Checkpoint) -> str:
        files = {name: blake3(content).hexdigest() for name, content in own_files(fine).items()}
        parts = [digest_checkpoint(fine).hex(), sorted(files.items())]
        return blake3(json.dumps(parts).encode()).hexdigest()

    def _examples(self, task: str, parameters: Parameters) -> Examples:
        return self._running.examples[task].head(int(parameters.number("max-samples")))

    def keys(self, parameters: Parameters) -> list[str]:
        """The key of each task's statistics; 32 hexadecimal digits."""
        options = {name: str(parameters.values[name]) for name in self._method.collected_by}
        together: list[str] = []
        sources = [s + digest_inputs(self._examples(t, parameters)) for t, s in zip(parameters.tasks, self._sources, strict=True)]
        if self._method.collector(parameters).together:
            options["batch-size"] = str(self._running.batch_size)
            together = [*parameters.tasks, *sources, self._base]
        parts = [["peru statistics 1", self._method.name, sorted(options.items()), source, together] for source in sources]
        return [blake3(json.dumps(part).encode()).hexdigest()[:32] for part in parts]

    def take(self, parameters: Parameters) -> list[Kept]:
        """The statistics of each task, in the order of the tasks."""
        collector = self._method.collector(parameters)
        paths = [self._folder / f"{self._method.name}-{key}.safetensors" for key in self.keys(parameters)]
        lacking = [number for number, path in enumerate(paths) if not path.exists()]
        for number in [] if collector.together else lacking:
            self._collect(collector, [number], paths)
        if collector.together and lacking:
            self._collect(collector, list(range(len(paths))), paths)
        kept = []
        for number, path in enumerate(paths):
            if number not in lacking:
                self._progress.say(f"{parameters.tasks[number]}: statistics are in {path}")
            try:
                kept.append(Kept(path, {slot.info.name: slot.inputs[number].name for slot in self._plan.slots}))
            except BadFile as error:
                raise BadFile(f"{path}: {error.message}", "remove it: peru will collect it again") from error
        return kept

    def _collect(self, collector: Collector, numbers: Sequence[int], paths: Sequence[Path]) -> None:
        models = [self._model(number, collector.parameters) for number in numbers]
        for model in models:
            collector.check(model)
        for model in models:
            self._progress.expect(collector.work(model))
        self._progress.say(f"collecting statistics of {listed(model.task for model in models)}")
        for number, model, found in zip(numbers, models, collector.collect(models), strict=True):
            self._write(paths[number], model, found)

    def _model(self, number: int, parameters: Parameters) -> TaskModel:
        vector = self._plan.vectors[number]
        parts = load_task(self._plan, vector, self._examples(vector.name, parameters), self._running.device)
        return TaskModel(
            vector.name, parts.loaded.model, parts.loaded.inputs, parts.own, lambda name: self._base_tensor(parts, name),
            self._running.batch_size, self._progress.advance,
        )  # fmt: skip

    def _base_tensor(self, parts: TaskParts, parameter: str) -> torch.Tensor | None:
        base = self._plan.base
        if base is None or parameter not in parts.merged:
            return None
        return read_floats(base, parts.merged[parameter])

    def _write(self, path: Path, model: TaskModel, found: Found) -> None:
        infos = [TensorInfo(name, _DTYPE[tensor.dtype], tuple(tensor.shape)) for name, tensor in found.items()]
        metadata = {
            "peru.statistics": self._method.name, "peru.task": model.task, "peru.examples": str(len(model.examples)),
            "peru.version": __version__,
        }  # fmt: skip
        while not path.exists():
            try:
                self._write_once(path, model, found, infos, metadata)
            except BeingWritten:  # by another peru, which collects the same
                time.sleep(_WAIT)

    def _write_once(self, path: Path, model: TaskModel, found: Found, infos: Sequence[TensorInfo], metadata: Mapping[str, str]) -> None:
        with FileWriter(path, infos, True, metadata, files={}) as writer:
            if path.exists():  # by another peru meanwhile: somebody may be reading it
                return
            for name, tensor in found.items():
                if not bool(torch.isfinite(tensor).all()):
                    raise BadFile(
                        f"{model.task}: the {self._method.name} statistics of {name.partition('/')[2]!r} are not finite",
                        "its outputs are NaN or infinite for some example: leave the model out, or repair it",
                    )
                writer.write(name, 0, tensor.cpu().contiguous().view(-1).numpy().data.cast("B"))
            writer.commit()


def open_folder(folder: Path) -> Path:
    """The folder of --stats, created if it does not exist."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--stats {folder} is a file", "name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
