"""`peru demo`: the real commands on the shipped family, and what they cost in accuracy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from peru_cli import demo
from peru_cli.inference.data import read_examples
from peru_cli.inference.eval_model import open_eval_model
from peru_cli.inference.inputs import class_logits
from peru_cli.inference.prepare import Settings, load

BATCH = 250  # images
DENSITIES = ("1%", "5%", "10%")
RANKS = ("4", "16")
HEAD = "classifier"  # all tasks have ten classes: only their names say that the heads are different
FFT = ["--method", "task-arithmetic", "--scale", "0.3"]  # what PERU-FFT's deltas are taken against
# Superposition without and with blocks that change places; masks, with thresholds by reconstruction error.
PACKS = {
    "STA 0.5": ["--scale", "0.5", "--decorrelate", "none"],
    "STA + Shuffle 0.5": ["--scale", "0.5"],
    "TALL-masks": ["--method", "tall-masks"],
}

Command = Callable[[list[str]], None]  # runs one peru command line; raises if it fails


@dataclass
class Row:
    """One way of keeping all tasks: what it is called, bytes for all of them, accuracy of each (0 to 1)."""

    method: str
    nbytes: int
    parameters: int  # encoder parameters of all tasks together: what bits a parameter count
    accuracies: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean accuracy over tasks."""
        return sum(self.accuracies.values()) / len(self.accuracies)

    @property
    def bits_per_parameter(self) -> float:
        """Bits for each encoder parameter of each task, heads and all else included."""
        return 8 * self.nbytes / self.parameters

    def normalised(self, fine_tuned: Row) -> float:
        """Mean over tasks of accuracy / accuracy of the fine-tune."""
        return sum(self.accuracies[t] / fine_tuned.accuracies[t] for t in self.accuracies) / len(self.accuracies)


def run_demo(work: Path, command: Command) -> Iterator[Row]:
    """Compress the family in a folder, give it back, classify all test images; yields rows as they come."""
    torch.set_num_threads(1)  # the models are small: threads that wait for each other take longer
    names = demo.tasks()
    parameters = len(names) * sum(tensor.numel() for tensor in load_file(demo.BASE / "model.safetensors").values())
    based = {task: _with_base(task, work / "base" / task) for task in names}
    yield Row("base, each task's head", 0, parameters, {t: accuracy(based[t], demo.images(t)) for t in names})
    originals = {task: demo.fine_tune(task) for task in names}
    size = sum((folder / "model.safetensors").stat().st_size for folder in originals.values())
    yield Row("fine-tunes", size, parameters, {t: accuracy(originals[t], demo.images(t)) for t in names})
    for density in DENSITIES:
        folder = work / f"pruned-{density.rstrip('%')}"
        arguments = [f"{task}={path}" for task, path in originals.items()]
        command(["prune", *arguments, "--base", str(demo.BASE), "-o", f"{folder}/", "--keep", density])
        yield _restored(f"Post-Pruning {density}", folder, demo.BASE, parameters, work, command)
    for rank in RANKS:
        folder = work / f"rank-{rank}"
        arguments = [f"{task}={path}" for task, path in originals.items()]
        command(["svd-lora", *arguments, "--base", str(demo.BASE), "-o", f"{folder}/", "--rank", rank])
        yield _restored(f"low-rank residual, rank {rank}", folder, demo.BASE, parameters, work, command)
    models = [*(f"{task}={path}" for task, path in originals.items()), "--base", str(demo.BASE), "--per-task", HEAD]
    for name, method in (("Task-Arithmetic 0.3", FFT), ("TIES 20%", ["--method", "ties"])):
        merged = work / method[1]
        command(["merge", *models, "-o", str(merged), *method])
        yield _merged(name, merged, parameters, work)
    for number, (name, options) in enumerate(PACKS.items()):
        pack = work / f"pack-{number}.safetensors"
        command(["shuffle-pack", *models, "-o", str(pack), *options])
        yield _packed(name, pack, parameters, work, command)
    for density in DENSITIES:
        folder = work / f"fft-{density.rstrip('%')}"
        command(["merge", *models, "-o", str(folder), *FFT, "--compress", density])
        yield _restored(f"PERU-FFT {density}", folder, folder / "merged", parameters, work, command)


def accuracy(model: Path, images: Path) -> float:
    """Share of test images that a classifier in a folder gets right; it computes in float32 whatever its weights."""
    loaded = load(open_eval_model(str(model), "", None), examples := read_examples(str(images)), [], Settings())
    labels = examples.class_numbers(loaded.model.config)
    assert labels is not None
    return float((class_logits(loaded.model, loaded.inputs, BATCH).argmax(-1) == labels).mean())


def _restored(method: str, artifacts: Path, base: Path, parameters: int, work: Path, command: Command) -> Row:
    """Accuracy of what artifacts or adapters give back; their bytes, and those of a base that comes with them."""
    found = {}
    for task in demo.tasks():
        restored = work / "restored" / artifacts.name / task
        restored.parent.mkdir(parents=True, exist_ok=True)
        artifact = artifacts / f"{task}.safetensors"
        command(["unpack", str(artifact if artifact.exists() else artifacts / task), "--base", str(base), "-o", str(restored)])
        found[task] = accuracy(restored, demo.images(task))
    folders = [artifacts, *(artifacts / task for task in demo.tasks() if (artifacts / task).is_dir())]
    size = sum(path.stat().st_size for folder in folders for path in folder.iterdir() if path.is_file())
    if base.parent == artifacts:  # the heads stand in the artifacts too: the merged weights are what is needed
        size += (base / "model.safetensors").stat().st_size
    return Row(method, size, parameters, found)


def _packed(method: str, pack: Path, parameters: int, work: Path, command: Command) -> Row:
    """Accuracy of every task of a pack."""
    found = {}
    for task in demo.tasks():
        restored = work / "restored" / pack.stem / task
        restored.parent.mkdir(parents=True, exist_ok=True)
        command(["unpack", str(pack), "--task", task, "--base", str(demo.BASE), "-o", str(restored)])
        found[task] = accuracy(restored, demo.images(task))
    return Row(method, pack.stat().st_size, parameters, found)


def _merged(method: str, merged: Path, parameters: int, work: Path) -> Row:
    """One merged encoder under each task's head."""
    found = {}
    for task in demo.tasks():
        folder = _under_head(load_file(merged / "model.safetensors"), task, merged / "heads" / f"{task}.safetensors", work / method / task)
        found[task] = accuracy(folder, demo.images(task))
    size = (merged / "model.safetensors").stat().st_size + sum(path.stat().st_size for path in (merged / "heads").iterdir())
    return Row(method, size, parameters, found)


def _with_base(task: str, folder: Path) -> Path:
    """A checkpoint of the base's encoder under a task's head."""
    return _under_head(load_file(demo.BASE / "model.safetensors"), task, demo.fine_tune(task) / "model.safetensors", folder)


def _under_head(encoder: dict[str, torch.Tensor], task: str, head: Path, folder: Path) -> Path:
    """A checkpoint of an encoder and of all else that a file holds."""
    folder.mkdir(parents=True)
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(demo.fine_tune(task) / name, folder)
    tensors = load_file(head) | {demo.PREFIX + name: tensor for name, tensor in encoder.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
