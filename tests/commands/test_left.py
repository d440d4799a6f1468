"""What an interrupted command leaves is said, and how to go on; whatever moment it is interrupted at."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from peru_cli.artifacts.cache import BlockCache
from peru_cli.checkpoints.local import atomic, journal
from tests.conftest import save
from tests.support.damage import files

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to let go of locks")

STEPS = [
    (os, "open"), (os, "ftruncate"), (os, "replace"), (os, "rename"), (os, "unlink"), (Path, "mkdir"), (Path, "unlink"),
    (journal.Journal, "_append"), (journal.Journal, "remove"), (journal.Journal, "close"), (atomic.PartialFile, "write_at"),
    (atomic.PartialFile, "__enter__"), (atomic.PartialDirectory, "__enter__"), (shutil, "rmtree"),
]  # fmt: skip


@contextlib.contextmanager
def interrupted(folder: Path, step: int, after: bool) -> Iterator[list[int]]:
    """Press Ctrl-C once, before or after the n-th step that changes what lies in a folder; the list holds how many are left."""
    left = [step]
    with pytest.MonkeyPatch.context() as patch:

        def pressing(do: Callable[..., Any], args: Any, named: Any) -> Any:
            ours = any(str(folder) in str(getattr(arg, "path", getattr(arg, "_path", arg))) for arg in args[:2]) or "dir_fd" in named
            left[0] -= ours
            if ours and left[0] == 0 and not after:
                raise KeyboardInterrupt
            made = do(*args, **named)
            if ours and left[0] == 0:
                raise KeyboardInterrupt
            return made

        for where, name in STEPS:
            do = getattr(where, name)
            patch.setattr(where, name, lambda *args, do=do, **named: pressing(do, args, named))
        yield left
    for fd in os.listdir("/proc/self/fd"):  # as a process lets go of its locks when it ends
        with contextlib.suppress(OSError):
            if ".peru-partial" in os.readlink(f"/proc/self/fd/{fd}"):
                os.close(int(fd))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    noise = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(16, 16, generator=noise).bfloat16() for i in range(2)}
    save(base, tmp_path / "base.safetensors")
    for task in "ab":
        fine = {n: (t.float() + torch.randn(t.shape, generator=noise)).bfloat16() for n, t in base.items()}
        save(fine | {"head": torch.randn(3, generator=noise).bfloat16()}, tmp_path / f"{task}.safetensors")
    save({n: (t.float() + 1).bfloat16() for n, t in base.items()}, tmp_path / "plain.safetensors")
    (tmp_path / "out").mkdir()
    return tmp_path


COMMANDS = {  # by name: what is typed, the output, and how many steps apart the moments are
    "folder": (["merge", "a", "b", "-m", "ties"], "merged", 3),
    "file": (["merge", "plain", "x", "-m", "linear"], "merged.safetensors", 2),
    "compressed": (["merge", "a", "b", "-m", "ties", "--compress", "10%"], "both", 9),
    "tasks": (["prune", "a", "b", "--keep", "10%"], "deltas", 3),
    "unpack": (["unpack", "x"], "fine", 5),
}


@pytest.mark.parametrize("kind", list(COMMANDS))
def test_what_is_left_is_said(models: Path, peru, kind: str) -> None:
    words, name, apart = COMMANDS[kind]
    base: list[object] = ["-b", models / "base.safetensors", "--no-sync", "--threads", 1]
    peru("prune", models / "plain.safetensors", *base, "--keep", "10%", "-o", models / "x.safetensors")
    given = [models / f"{word}.safetensors" if (models / f"{word}.safetensors").exists() else word for word in words]
    out = models / "out"
    command = [*given, *base, "-o", out / name]
    peru(*command)
    want, kept = files(out), 0
    for step in range(1, 500, apart):
        shutil.rmtree(out)
        out.mkdir()
        with interrupted(out, step, after=step % 2 == 0) as left, contextlib.suppress(AssertionError):  # it may be through
            peru(*command, code=130)
        if left[0] > 0:
            break
        if {at: data for at, data in files(out).items() if ".peru-" not in at} == want:
            continue
        hidden = [path for path in out.rglob("*") if path.name.startswith(".") and ".peru-" in path.name]
        assert not (out / name).exists() or hidden, step
        where = min(hidden, key=lambda path: len(path.parts)).parent if hidden else ""
        said = f"the finished part is kept in {where}, in hidden files" in peru.stderr and "run the same command again" in peru.stderr
        assert said == bool(hidden), (step, hidden, peru.stderr)
        assert said or "nothing unfinished was left behind" in peru.stderr, step
        kept += said
        peru(*command)
        assert files(out) == want, step
    assert step > 4 and (kept or kind == "unpack")


def test_what_fails_after_the_merge_is_not_called_a_vanished_input(models: Path, peru, monkeypatch) -> None:
    """--compress reads the unfinished merge back; when a full disk takes it away again, the message is about the disk."""

    def fill(*given: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "b.safetensors")

    monkeypatch.setattr("peru_cli.prune.run.prune", fill)
    command = ["merge", models / "a.safetensors", models / "b.safetensors", "-b", models / "base.safetensors", "-m", "ties"]
    peru(*command, "--compress", "10%", "-o", models / "out" / "both", code=1)
    assert "the disk is full" in peru.stderr and "disappeared" not in peru.stderr and not list((models / "out").iterdir())


def test_ctrl_c_just_after_a_block_was_decoded(monkeypatch) -> None:
    """It stays a Ctrl-C: telling the block's other readers of it once more was a defect."""
    done = Future.set_result

    def press(self: Future[int], value: int) -> None:
        done(self, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "set_result", press)
    cache = BlockCache[int](2)
    with pytest.raises(KeyboardInterrupt):
        cache.get("block", lambda: 1)
    assert cache.get("block", lambda: 2) == 1


def test_what_fails_because_of_ctrl_c_is_a_ctrl_c(peru, monkeypatch) -> None:
    """A thread still reads a file that cleaning up has closed."""

    def app(*given: object, **named: object) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None

    monkeypatch.setattr("peru_cli.cli._built", lambda command: app)
    peru("verify", "x", code=130)
    assert peru.stderr == "error: interrupted: nothing unfinished was left behind\n"
