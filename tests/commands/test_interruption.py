"""Kills, signals, full disks, broken pipes and competing processes: the old state or the new one, and the same bytes next time."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import run_peru, save, start_peru
from tests.support.forkserver import Running

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and locks are POSIX")

KILLS = 9
SLOW = ["--threads", 1, "--tile-entries", 16384]
Child = Running | subprocess.Popen[str]


class Pair:
    """A base and a fine-tune large enough to be interrupted, and the outputs of prune and unpack for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        noise = torch.Generator().manual_seed(0)
        base = {f"layers.{i}.weight": torch.randn(400_000, generator=noise).bfloat16() for i in range(8)}
        fine = {n: t + (torch.randn(t.shape, generator=noise) * 0.01).bfloat16() for n, t in base.items()}
        (folder / "fine").mkdir()
        self.base, self.fine = save(base, folder / "base.safetensors"), save(fine, folder / "fine" / "model.safetensors").parent
        (self.fine / "config.json").write_text('{"new": true}')
        self.artifact, self.result = folder / "reference.safetensors", folder / "result.safetensors"
        for verb, target in (("prune", self.artifact), ("unpack", self.result)):
            self.run(*self.command(verb, target))

    def command(self, verb: str, target: Path) -> list[object]:
        if verb == "prune":
            return ["prune", f"t={self.fine}", "-b", self.base, "-o", target, "--keep", "40%", *SLOW]
        return ["unpack", self.artifact, "-b", self.base, "-o", target, *SLOW]

    def run(self, *arguments: object) -> None:
        done = run_peru(*arguments)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def others(folder: Path, target: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path != target)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bytes_on_disk(path: Path) -> int:
    """Bytes written of a file or a folder's files, without holes; -1 if there is nothing."""
    total = -1
    with contextlib.suppress(FileNotFoundError):
        for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
            total += file.stat().st_blocks * 512 + (total < 0)
    return total


def wait_for(child: Child, partial: Path, written: float) -> None:
    """Wait until this much is written, or the process has ended."""
    while child.poll() is None and bytes_on_disk(partial) < written:
        time.sleep(0.0005)


def kill_at(child: Child, partial: Path, written: float) -> bool:
    """Wait until this much is written, then kill. Returns whether the process was still running."""
    wait_for(child, partial, written)
    child.kill()
    return child.wait() == -signal.SIGKILL


# -- kills --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("verb", ["prune", "unpack"])
def test_a_killed_file_is_absent_old_or_complete(tmp_path: Path, pair: Pair, verb: str, old: bool) -> None:
    target, partial = tmp_path / "out.safetensors", tmp_path / ".out.safetensors.peru-partial"
    want = (pair.artifact if verb == "prune" else pair.result).read_bytes()
    command = pair.command(verb, target) + (["--force"] if old else [])
    killed = 0
    for i in range(KILLS):
        target.unlink(missing_ok=True)
        if old:
            target.write_bytes(b"old")
        killed += kill_at(start_peru(*command), partial, len(want) * i / KILLS)
        assert set(others(tmp_path, target)) <= {partial.name, f"{partial.name}-journal"}
        if target.exists():
            assert target.read_bytes() == want or (old and target.read_bytes() == b"old")
        if i % 4 == 0:
            pair.run(*command, *([] if old or not target.exists() else ["--force"]))
            assert target.read_bytes() == want and others(tmp_path, target) == []
    assert killed >= 3


def test_a_killed_folder_is_the_old_one_or_the_new_one(tmp_path: Path, pair: Pair) -> None:
    target, partial = tmp_path / "out", tmp_path / ".out.peru-partial"
    command = [*pair.command("unpack", target), "--force", "--max-shard-size", "2MB"]
    pair.run(*command)
    new = tree(target)
    assert len(new) == 6 and "model.safetensors.index.json" in new and new["config.json"] == b'{"new": true}'
    old = {"model.safetensors": b"old", "config.json": b"older"}
    killed, seen = 0, set()
    for i in range(KILLS):
        shutil.rmtree(target)
        target.mkdir()
        for name, content in old.items():
            (target / name).write_bytes(content)
        killed += kill_at(start_peru(*command), partial, sum(map(len, new.values())) * i / KILLS)
        assert tree(target) in (old, new)
        seen.add(tree(target) == new)
        assert set(others(tmp_path, target)) <= {partial.name, f"{partial.name}.lock"}
        if i % 4 == 0:
            pair.run(*command)
            assert tree(target) == new and others(tmp_path, target) == []
    assert killed >= 3 and False in seen


def rival(kind: str, target: Path, letter: int, seconds: float) -> Child:
    """A process that writes a target as often as it can."""
    write = f"from tests.support.rivals import write_until\nwrite_until({kind!r}, {str(target)!r}, {letter}, {time.time() + seconds})"
    return start_peru("--version", before=write)


def test_rivals_never_touch_what_one_of_them_has_finished(tmp_path: Path, pair: Pair) -> None:
    """Six processes write one target as fast as they can: it is always whole, and all from one writer."""
    target = tmp_path / "out"
    rivals = [rival("file", target, letter, 3) for letter in range(6)]
    reads = set()
    while any(one.poll() is None for one in rivals):
        if target.exists():
            content = target.read_bytes()
            assert len(content) == 4000 and len(set(content)) == 1
            reads.add(content[0])
    assert all(one.wait() == 0 for one in rivals) and len(reads) > 1
    assert others(tmp_path, target) == []


def test_rivals_leave_a_whole_folder(tmp_path: Path, pair: Pair) -> None:
    target = tmp_path / "out"
    rivals = [rival("folder", target, letter, 2) for letter in range(4)]
    assert all(one.wait() == 0 for one in rivals)
    content = tree(target)
    assert sorted(content) == ["0", "1", "2", "3"] and len(set(content.values())) == 1
    assert others(tmp_path, target) == []


def stopped_while_writing(pair: Pair, verb: str, target: Path) -> Child:
    """A process stopped in the middle of its work; on a busy machine it may take several attempts to catch one."""
    for _ in range(20):
        child = start_peru(*pair.command(verb, target), "--force")
        wait_for(child, target.with_name(f".{target.name}.peru-partial"), 100_000)  # by then it has its lock
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGSTOP)
        if not target.exists():
            return child
        child.kill()
        child.wait()
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    raise AssertionError("no process was caught at work")


@pytest.mark.parametrize("verb,name", [("prune", "out.safetensors"), ("unpack", "out.safetensors"), ("unpack", "out")])
def test_a_second_writer_of_the_same_target_is_refused(tmp_path: Path, pair: Pair, peru: Any, verb: str, name: str) -> None:
    target = tmp_path / name
    first = stopped_while_writing(pair, verb, target)
    peru(*pair.command(verb, target), code=1)
    assert f"{target} is being written by another peru" in peru.stderr
    os.kill(first.pid, signal.SIGCONT)
    _, stderr = first.communicate()
    assert first.returncode == 0, stderr
    made = target / "model.safetensors" if target.is_dir() else target
    assert made.read_bytes() == (pair.artifact if verb == "prune" else pair.result).read_bytes()
    assert others(tmp_path, target) == []


# -- signals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb,name", [("prune", "out.safetensors"), ("unpack", "out")])
def test_an_interrupted_command_cleans_up(tmp_path: Path, pair: Pair, verb: str, name: str, sent: signal.Signals, threads: int) -> None:
    target = tmp_path / name
    for _ in range(20):  # on a busy machine one may finish before it is caught
        child = start_peru(*pair.command(verb, target), "--threads", threads, "--force")
        wait_for(child, tmp_path / f".{name}.peru-partial", 100_000)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, sent)
        _, stderr = child.communicate()
        if not target.exists():
            break
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    assert child.returncode == 130, stderr
    assert "interrupted" in stderr and "Traceback" not in stderr
    kept = {f".{name}.peru-partial", f".{name}.peru-partial-journal"} if verb == "prune" else set()  # for the same command to continue with
    left = set(others(tmp_path, target))
    assert left <= kept and not target.exists()
    promised = f"the finished part is kept in {tmp_path}" if left else "nothing unfinished was left behind"
    assert promised in stderr and ("run the same command again" in stderr) == bool(left)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc to see when the import begins")
@pytest.mark.parametrize("library", ["openblas", "pcodec"])
def test_ctrl_c_while_libraries_are_being_imported(tmp_path: Path, pair: Pair, library: str) -> None:
    command = [sys.executable, "-m", "peru_cli", *map(str, pair.command("prune", tmp_path / "out.safetensors"))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while library not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None, f"it ended without {library}"
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr, stderr
    assert list(tmp_path.iterdir()) == []


# -- full disks, broken pipes -------------------------------------------------------------------------


def test_a_full_disk_is_reported_and_left_clean(small_disk: Path, pair: Pair, peru: Any) -> None:
    used = shutil.disk_usage(small_disk).used
    peru(*pair.command("prune", small_disk / "a.safetensors"), code=1)
    assert f"{small_disk / 'a.safetensors'}: " in peru.stderr and "the disk is full" in peru.stderr
    for name in ("r.safetensors", "r"):  # sizes are known here: refused before anything is read
        peru(*pair.command("unpack", small_disk / name), code=1)
        assert "the disk has" in peru.stderr and "needs 6,4" in peru.stderr
    assert list(small_disk.iterdir()) == [] and shutil.disk_usage(small_disk).used == used
    (small_disk / "a.safetensors").write_bytes(b"old")
    peru(*pair.command("prune", small_disk / "a.safetensors"), "--force", code=1)
    assert (small_disk / "a.safetensors").read_bytes() == b"old"
    assert others(small_disk, small_disk / "a.safetensors") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_stdout(pair: Pair) -> None:
    done = subprocess.run(
        f"{sys.executable} -m peru_cli unpack {pair.artifact} -b {pair.base} -o - >/dev/full", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 1 and "the disk is full" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_broken_pipe_is_quiet(pair: Pair) -> None:
    command = f"{sys.executable} -m peru_cli unpack {pair.artifact} -b {pair.base} -o - | head -c 10 | wc -c; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.split() == ["10", "1"]
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr and "Error" not in done.stderr, done.stderr


def test_a_pipe_carries_the_file(pair: Pair, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "peru_cli", "unpack", pair.artifact, "-b", pair.base, "-o", "-", "--json"], capture_output=True
    )
    assert done.returncode == 0 and done.stdout == pair.result.read_bytes(), done.stderr
    closed = run_peru("inspect", pair.artifact, stdin=b"")
    assert closed.returncode == 0
