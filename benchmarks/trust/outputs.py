"""What the campaign damages: one of every output that peru writes, made from a small family; and the commands that write and read it."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from peru_cli import cli
from peru_cli.console import console
from peru_cli.vectors import threshold_journal
from tests.conftest import save
from tests.support import data_family
from tests.support.damage import files, run_and_kill

Command = list[object]
threshold_journal.EVERY = 0.0  # so that journals of small runs contain something


class Hangs(BaseException):
    """A command took longer than allowed."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise Hangs in a command that takes longer."""

    def late(*_: object) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def peru(*arguments: object) -> tuple[int, str]:
    """Run a command in this process: its exit code, and its messages."""
    console.quiet = console.json = console.data_on_stderr = False
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), limited(30):
        code = cli.run([str(argument) for argument in arguments])
    return code, said.getvalue()


def family(folder: Path, layers: int = 3, rows: int = 40, columns: int = 30) -> list[str]:
    """A base, and two fine-tunes with heads, in bfloat16; the tasks in command-line form."""
    noise = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(rows, columns, generator=noise).bfloat16() for i in range(layers)}
    base["norm"] = torch.ones(columns).bfloat16()
    save(base, folder / "base.safetensors")
    tasks = []
    for task, classes in (("a", 3), ("b", 5)):
        fine = {n: (t + 0.05 * torch.randn(t.shape, generator=noise)).bfloat16() for n, t in base.items()}
        fine["classifier.weight"] = torch.randn(classes, columns, generator=noise).bfloat16()
        (folder / task).mkdir()
        save(fine, folder / task / "model.safetensors")
        (folder / task / "config.json").write_text('{"model_type": "bert", "hidden_size": 30}')
        tasks.append(f"{task}={folder / task}")
    return tasks


def makers(folder: Path, tasks: list[str], out: Path, more: tuple[object, ...] = ()) -> dict[str, Command]:
    """By the name of an output: the command that writes it below `out`."""
    base = ["-b", folder / "base.safetensors", *more]
    whole: Command = ["--no-sync", "--threads", 1, *base]
    written = {
        "sparse.safetensors": ["prune", tasks[0], "--keep", "10%", *whole],
        "lossless.safetensors": ["prune", tasks[0], "--lossless", *whole],
        "mixed.safetensors": ["prune", tasks[0], "--bits", "3", *whole],
        "pack.safetensors": ["shuffle-pack", *tasks, "--residual", "5%", *whole],
        "masks.safetensors": ["shuffle-pack", *tasks, "--method", "tall-masks", *whole],
        "merged": ["merge", *tasks, "-m", "task-arithmetic", *whole],
        "ties": ["merge", *tasks, "-m", "ties", "--keep", "20%", "--compress", "10%", *whole],
        "adapter": ["svd-lora", tasks[0], "--rank", "2", *whole],
    }
    return {name: [*command, "-o", out / name] for name, command in written.items()}


def unpacking(folder: Path, made: Path, name: str, out: Path) -> Command:
    """The command that reads an output of `makers`."""
    command: Command = ["unpack", made / name, "--no-sync", "--threads", 1, "-o", out]
    if name == "ties":
        return [*command[:1], made / "ties" / "a.safetensors", *command[2:], "-b", made / "ties" / "merged"]
    if name in ("merged", "pack.safetensors", "masks.safetensors"):
        command += ["--task", "a"]
    return command if name == "merged" else [*command, "-b", folder / "base.safetensors"]


def content(path: Path) -> object:
    """A result's bytes. None if there is none."""
    return files(path) if path.is_dir() else path.read_bytes() if path.exists() else None


def clear(path: Path) -> None:
    """Remove a result."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@dataclass
class Victim:
    """A file to damage: how often (a share), the command that reads it, and where that command's result is."""

    name: str
    path: Path
    share: float
    command: Command
    result: Path
    prepare: Callable[[], None] = lambda: None  # before each command
    verified: Path | None = None  # the path for `peru verify`, if it must report any damage


def victims(folder: Path) -> list[Victim]:
    """Make one of every output below a folder, and list their files with their readers."""
    tasks, out, result = family(folder), folder / "out", folder / "read.safetensors"
    out.mkdir()
    found = []
    for name, command in makers(folder, tasks, out).items():
        code, said = peru(*command)
        assert code == 0, said
        whole = out / name
        for path in [whole] if whole.is_file() else sorted(path for path in whole.rglob("*") if path.is_file()):
            weights = path.suffix == ".safetensors"
            share = 8 if whole.is_file() else 4 if weights else 3 if path.name == "adapter_config.json" else 0.5
            reader = unpacking(folder, out, name, result)
            found.append(Victim(str(path.relative_to(out)), path, share, reader, result, verified=path if weights else None))
    return [*found, *_journals(folder, tasks), _statistics(folder)]


def _journals(folder: Path, tasks: list[str]) -> Iterator[Victim]:
    """What a killed prune and a killed merge leave; the command that continues reads it."""
    unfinished = folder / "unfinished"
    for name in ("sparse.safetensors", "merged"):
        place, kept = unfinished / name, folder / f"kept-{name}"
        place.mkdir(parents=True)
        command = makers(folder, tasks, place)[name]
        for event in range(20, 0, -1):  # the last one that leaves a journal, and nothing in place
            run_and_kill(event, [str(part) for part in command])
            if any("journal" in file for file in files(place)) and not (place / name).exists():
                break
            shutil.rmtree(place)
            place.mkdir()
        kept.mkdir()
        for file, data in files(place).items():
            (kept / file).parent.mkdir(exist_ok=True)
            (kept / file).write_bytes(data)
        journals = [path for path in kept.rglob("*") if "journal" in path.name]
        assert journals, f"no kill left a journal of {name}"
        for path in journals:

            def restore(place: Path = place, kept: Path = kept) -> None:
                for file, data in files(kept).items():
                    (place / file).parent.mkdir(exist_ok=True)
                    (place / file).write_bytes(data)

            yield Victim(f"journal of {name}", path, 2, command, place / name, restore)


def _statistics(folder: Path) -> Victim:
    """Statistics of a merge with data, read by the next merge."""
    place = folder / "data"
    place.mkdir()
    data_family.write_family(place, count=4)
    command = data_family.command(place, "regmean", "-o", place / "out", "--stats", place / "stats")
    assert peru(*command)[0] == 0
    clear(place / "out")
    return Victim("statistics", min((place / "stats").iterdir()), 0.2, command, place / "out")


def environment() -> None:
    """No Hub, and no thread that a fork would lose."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
