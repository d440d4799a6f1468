"""`peru demo`: the real commands on the shipped family, and their cost in accuracy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from peru_cli import demo
from peru_cli.inference.eval_model import open_eval_model
from peru_cli.inference.inputs import class_logits
from peru_cli.inference.prepare import Settings, load
from peru_cli.inference.reading import read_examples

BATCH = 250  # images per batch
PROCESSOR = "preprocessor_config.json"  # how pixels become inputs
NAMES = {"digits": "digits", "fashion_mnist": "fashion", "notmnist": "letters", "sign_digits": "signs"}

Command = Callable[[list[str]], None]  # runs one peru command line; raises if it fails


@dataclass(frozen=True)
class Way:
    """One way to store all tasks: the command that writes it, and where `unpack` finds a task in it.

    `source` and `base` contain `{}` in place of the task. `task` says that one source holds all tasks."""

    method: str
    command: str  # before the models: `prune`; after them: its options
    options: str
    source: str
    base: str = "base"
    task: bool = False

    @property
    def folder(self) -> str:
        """Where its models are rebuilt."""
        return self.source.split("/")[0].removesuffix(".safetensors")


# All tasks have ten classes: only `--per-task classifier` tells peru that their heads differ.
HEAD = "--base base --per-task classifier"
WAYS = (
    Way("Post-Pruning, 5%", "prune", "--base base -o pruned/ --keep 5%", "pruned/{}.safetensors"),
    Way("mixed, 0.7 bits", "prune", "--base base -o mixed/ --bits 0.7", "mixed/{}.safetensors"),
    Way("low-rank residual, rank 16", "svd-lora", "--base base -o lora/ --rank 16", "lora/{}"),
    Way("Task-Arithmetic, 0.3", "merge", f"{HEAD} -o merged/ -m task-arithmetic --scale 0.3", "merged", "", task=True),
    Way("STA + Shuffle", "shuffle-pack", f"{HEAD} -o pack.safetensors --scale 0.5", "pack.safetensors", task=True),
    Way("TALL-masks", "shuffle-pack", f"{HEAD} -o masks.safetensors --method tall-masks", "masks.safetensors", task=True),
    Way("PERU-FFT, 5%", "merge", f"{HEAD} -o fft/ -m task-arithmetic --scale 0.3 --compress 5%", "fft/{}.safetensors", "fft/merged"),
)
MODELS = 2 + len(WAYS)  # rows of the table


@dataclass
class Row:
    """One way to store all tasks: its name, bytes for all of them, accuracy of each (0 to 1)."""

    method: str
    nbytes: int
    delta_bytes: int  # nbytes without heads and side files: what bits a parameter count
    parameters: int  # encoder parameters of all tasks together: the divisor of bits a parameter
    accuracies: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean accuracy over tasks."""
        return sum(self.accuracies.values()) / len(self.accuracies)

    @property
    def bits_per_parameter(self) -> float:
        """Bits for each encoder parameter of each task."""
        return 8 * self.delta_bytes / self.parameters

    def normalised(self, fine_tuned: Row) -> float:
        """Mean over tasks of accuracy / accuracy of the fine-tune."""
        return sum(self.accuracies[t] / fine_tuned.accuracies[t] for t in self.accuracies) / len(self.accuracies)


def run_demo(work: Path, command: Command, advance: Callable[[int], None]) -> Iterator[Row]:
    """Compress the family in a folder, rebuild it and classify all test images. Yields rows as they are measured.

    Changes to the folder, so that command lines are short, and changes back. `advance` is called for each tested model."""
    torch.set_num_threads(1)  # the models are small: threads that wait for each other are slower
    here = Path.cwd()
    os.chdir(work)
    try:
        yield from _rows(command, advance)
    finally:
        os.chdir(here)


def _rows(command: Command, advance: Callable[[int], None]) -> Iterator[Row]:
    Path("base").symlink_to(demo.BASE)
    tasks = {NAMES[folder]: demo.fine_tune(folder) for folder in demo.tasks()}
    images = {NAMES[folder]: demo.images(folder) for folder in demo.tasks()}
    for task, folder in tasks.items():
        Path(task).symlink_to(folder)
    parameters = len(tasks) * sum(tensor.numel() for tensor in load_file("base/model.safetensors").values())

    def row(method: str, files: set[Path], folders: dict[str, Path]) -> Row:
        found = {}
        for task, folder in folders.items():
            found[task] = accuracy(folder, images[task])
            advance(1)
        return Row(method, sum(file.stat().st_size for file in files), sum(map(_delta_bytes, files)), parameters, found)

    yield row("base, each task's head", set(), {task: _under_head(task, Path("untrained") / task) for task in tasks})
    yield row("fine-tunes", {folder / "model.safetensors" for folder in tasks.values()}, dict(tasks))
    for way in WAYS:
        command([way.command, *tasks, *way.options.split()])
        folders = {}
        for task in tasks:
            folders[task] = Path("restored") / way.folder / task
            folders[task].parent.mkdir(parents=True, exist_ok=True)
            more = [*(["--task", task] if way.task else []), *(["--base", way.base] if way.base else [])]
            command(["unpack", way.source.format(task), *more, "-o", str(folders[task])])
            if not (folders[task] / PROCESSOR).exists():  # the base has none that a merge could copy
                shutil.copy(Path(task) / PROCESSOR, folders[task])
        yield row(way.method, _files(way, list(tasks)), folders)


def accuracy(model: Path, images: Path) -> float:
    """Share of test images that a classifier in a folder gets right. It computes in float32, whatever the dtype of its weights."""
    loaded = load(open_eval_model(str(model), "", None), examples := read_examples(str(images)), [], Settings())
    labels = examples.class_numbers(loaded.model.config)
    assert labels is not None
    return float((class_logits(loaded.model, loaded.inputs, BATCH).argmax(-1) == labels).mean())


def _files(way: Way, tasks: Sequence[str]) -> set[Path]:
    """Files needed besides the base: artifacts, and a merged base that comes with them."""
    places = {Path(way.source.format(task)) for task in tasks} | ({Path(way.base)} if way.base not in ("", "base") else set())
    files = {file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()}
    if way.base not in ("", "base"):  # the artifacts hold the heads too
        files = {file for file in files if "heads" not in file.parts}
    return files


def _delta_bytes(file: Path) -> int:
    """Bytes of a file without heads and side files. Artifacts have them in roles of their own."""
    if file.suffix != ".safetensors":
        return 0
    whole = (tensor.nbytes for name, tensor in load_file(file).items() if name in ("whole", "files") or "classifier." in name)
    return file.stat().st_size - sum(whole)


def _under_head(task: str, folder: Path) -> Path:
    """A checkpoint with the base's encoder and everything else from the task's fine-tune."""
    folder.mkdir(parents=True)
    for name in ("config.json", PROCESSOR):
        shutil.copy(Path(task) / name, folder)
    encoder = {demo.PREFIX + name: tensor for name, tensor in load_file("base/model.safetensors").items()}
    # written by Python, so that a full disk is an OSError
    (folder / "model.safetensors").write_bytes(save(load_file(f"{task}/model.safetensors") | encoder, {"format": "pt"}))
    return folder
