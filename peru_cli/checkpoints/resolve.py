"""Resolve a command-line argument: `[TASK=]MODEL`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peru_cli.checkpoints.checks.usable import usable
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.hub.names import parse_hub_name
from peru_cli.checkpoints.local.checkpoint import open_directory, open_file
from peru_cli.checkpoints.local.inputs import read_small
from peru_cli.checkpoints.lora.config import refuse_model_beside
from peru_cli.checkpoints.places import Place, is_on_hub, locate, why_not_here
from peru_cli.checkpoints.quantized.fp8 import Dequantized
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import UsageError

_TASK = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Argument:
    """One positional: the task's name, None if none was given, and the model."""

    task: str | None
    model: str


def check_task(name: str) -> str:
    """Return a task's name if it is valid. UsageError otherwise."""
    if not _TASK.fullmatch(name):
        raise UsageError(
            f"{name!r} is not a task name", "use letters, digits, '_', '-' and '.', at most 64, beginning with a letter or digit"
        )
    return name


def split_argument(text: str) -> Argument:
    """Split `[TASK=]MODEL`. An existing path, or text that begins with `./`, `/` or `hf://`, is never split."""
    if "=" not in text or Path(text).exists() or text.startswith(("./", "../", "/", "hf://")):
        return Argument(None, text)
    task, model = text.split("=", 1)
    if not model:
        raise UsageError(f"{text!r} names no model after the '='")
    return Argument(check_task(task), model)


def read_lists(texts: Sequence[str]) -> list[str]:
    """Arguments, with those from FILE in place of each `@FILE`: one a line, but for empty lines and those that begin with `#`.

    UsageError for a list that is missing, empty or no text."""
    found: list[str] = []
    for text in texts:
        if not text.startswith("@") or Path(text).exists():
            found.append(text)
            continue
        path = Path(text[1:])
        if not path.is_file():
            raise UsageError(f"{text}: there is no list {path}", "@FILE names a text file with one [TASK=]MODEL a line")
        try:
            lines = [line.strip() for line in read_small(path).decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise UsageError(f"{text}: not a text file in UTF-8", "@FILE names a text file with one [TASK=]MODEL a line") from error
        named = [line for line in lines if line and not line.startswith("#")]
        if not named:
            raise UsageError(f"{text}: the list names no model", "write one [TASK=]MODEL a line")
        found += named
    return found


def split_arguments(texts: list[str]) -> list[Argument]:
    """Split several. Every task gets a name (the model's last path component), unique without regard to case."""
    arguments = [split_argument(text) for text in texts]
    if len(arguments) > 1:
        arguments = [Argument(a.task or default_task(a.model), a.model) for a in arguments]
    seen: dict[str, str] = {}
    for argument in arguments:
        key = (argument.task or "").lower()
        if key and key in seen:
            raise UsageError(
                f"the task name {argument.task!r} stands for both {seen[key]} and {argument.model}",
                "give each its own name: a=MODEL b=MODEL",
            )
        seen[key] = argument.model
    return arguments


def default_task(model: str) -> str:
    """A task's name made from a path: its last component without suffix, with invalid characters replaced."""
    on_hub = parse_hub_name(model) if is_on_hub(model) else None
    path = Path((on_hub.path or on_hub.repo) if on_hub is not None else model)
    stem = path.resolve().name if path.name in ("", ".", "..") else path.name
    stem = re.sub(r"\.(safetensors|bin|pt|pth)$", "", stem)
    name = re.sub(r"[^\w.-]", "-", stem, flags=re.ASCII)[:64].lstrip("_.-")
    return name or "task"


def open_model(model: str, stored: bool = False) -> Checkpoint:
    """Open a model: a directory, a .safetensors or .bin file, or one of these on the Hub.

    FP8 weights are read as floats (checkpoints/checks/usable.py) unless `stored` asks for the tensors in the files."""
    path = locate(model)
    if path.is_dir() or path.is_file():
        if path.is_dir():
            refuse_model_beside(path)
        checkpoint = open_directory(path, model) if path.is_dir() else open_file(path, model)
        if "peru.format" in checkpoint.metadata:
            checkpoint.close()
            raise UsageError(
                f"{model} is a peru artifact, but a model is needed here", "unpack it first: peru unpack ARTIFACT -b BASE -o DIR"
            )
        _name(checkpoint, path)
        return usable(checkpoint, stored)
    raise UsageError(*why_not_here(model))


def open_recorded_base(model: str, dtypes: Mapping[str, Dtype]) -> Checkpoint:
    """Open the base of an artifact: the tensors of its files if these have the recorded dtypes, otherwise floats."""
    checkpoint = open_model(model, stored=True)
    return checkpoint if _has(checkpoint, dtypes) else usable(checkpoint)


def as_recorded(base: Checkpoint, dtypes: Mapping[str, Dtype]) -> Checkpoint:
    """The base of an artifact, given one opened as floats: the tensors of its files if these have the recorded dtypes."""
    return base.below if isinstance(base, Dequantized) and _has(base.below, dtypes) else base


def _has(checkpoint: Checkpoint, dtypes: Mapping[str, Dtype]) -> bool:
    return all(checkpoint.tensors[name].dtype is dtype for name, dtype in dtypes.items() if name in checkpoint.tensors)


def _name(checkpoint: Checkpoint, place: Place) -> None:
    """Set what a repo's commit tells about a checkpoint: its public name, and whether the repo has moved."""
    if isinstance(place, Path):
        return
    checkpoint.public_name = place.public_name
    checkpoint.kind += f" on the Hub, commit {place.repo.commit[:12]}"
    if place.repo.renamed_from:
        checkpoint.warnings.append(f"{place.repo.renamed_from} is now called {place.repo.name}")
