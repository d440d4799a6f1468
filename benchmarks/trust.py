"""A campaign of damage: alter every file of every output, interrupt and kill commands, fill disks; count what came out.

    python benchmarks/trust.py [--mutations N] [--moments N]

Every mutation is followed by a command that reads the file. What must come out is an error, or the very bytes that the sound file gives.
"other result" counts the worst defect: exit code 0 and other bytes. It must be 0, but for cards, which decide nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from peru_cli import cli
from peru_cli.artifacts import container
from peru_cli.console import console
from tests.conftest import save
from tests.support.damage import damaged, files, run_and_kill


def peru(*arguments: object) -> tuple[int, str]:
    """A command in this process: its exit code, and what it said."""
    console.quiet = console.json = console.data_on_stderr = False
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.run([str(argument) for argument in arguments])
    return code, said.getvalue()


def family(folder: Path) -> list[str]:
    """A base, and two fine-tunes with heads; the tasks as a command line has them."""
    noise = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(40, 30, generator=noise).bfloat16() for i in range(3)} | {"norm": torch.ones(30).bfloat16()}
    save(base, folder / "base.safetensors")
    tasks = []
    for task, classes in (("a", 3), ("b", 5)):
        fine = {n: (t + 0.05 * torch.randn(t.shape, generator=noise)).bfloat16() for n, t in base.items()}
        fine["classifier.weight"] = torch.randn(classes, 30, generator=noise).bfloat16()
        (folder / task).mkdir()
        save(fine, folder / task / "model.safetensors")
        (folder / task / "config.json").write_text('{"model_type": "bert", "hidden_size": 30}')
        tasks.append(f"{task}={folder / task}")
    return tasks


def makers(folder: Path, tasks: list[str], out: Path) -> dict[str, list[object]]:
    """By output: the command that writes it."""
    more = ["-b", folder / "base.safetensors", "--no-sync", "--threads", 1, "-o"]
    return {
        "sparse.safetensors": ["prune", tasks[0], "--keep", "10%", *more, out / "sparse.safetensors"],
        "pack.safetensors": ["shuffle-pack", *tasks, "--residual", "5%", *more[:-3], "-o", out / "pack.safetensors"],
        "masks.safetensors": ["shuffle-pack", *tasks, "--method", "tall-masks", *more[:-3], "-o", out / "masks.safetensors"],
        "merged": ["merge", *tasks, "-m", "task-arithmetic", *more, out / "merged"],
        "adapter": ["svd-lora", tasks[0], "--rank", "2", *more, out / "adapter"],
    }


def readers(folder: Path, out: Path, name: str) -> list[object]:
    """The command that reads an output."""
    to = ["-o", folder / "read.safetensors", "--no-sync"]
    base = [] if name == "merged" else ["-b", folder / "base.safetensors"]
    return ["unpack", out / name, *(["--task", "a"] if name not in ("sparse.safetensors", "adapter") else []), *base, *to]


def resealed(data: bytes) -> bytes:
    """An artifact whose index or header was altered, with a digest made anew: what a careful attacker would write."""
    length = int.from_bytes(data[:8], "little")
    at = data.find(b'"peru.digest":"') + 15
    if at < 15 or 8 + length > len(data):
        return data
    blank = data[:at] + b"0" * 64 + data[at + 64 :]
    begin = data.find(b'"index":')
    try:
        first, end = (int(n) for n in data[data.index(b"[", data.index(b"offsets", begin)) + 1 : data.index(b"]}", begin)].split(b","))
    except ValueError:
        return data
    digest = container._seal(blank[: 8 + length], data[8 + length + first : 8 + length + end])
    return data[:at] + digest.encode() + data[at + 64 :]


def outcome(folder: Path, command: list[object], wanted: bytes) -> str:
    """What a command made of a damaged file."""
    target = folder / "read.safetensors"
    code, said = peru(*command)
    if "Traceback" in said or "a defect in peru" in said:
        return "defect"
    if code:
        return "left something" if target.exists() else "refused"
    found = target.read_bytes()
    target.unlink()
    return "same result" if found == wanted else "other result"


def mutate(folder: Path, out: Path, mutations: int) -> None:
    """Alter each file of each output so many times; print a line for each file and kind of damage."""
    noise = random.Random(0)
    for name in sorted(path.name for path in out.iterdir()):
        command = readers(folder, out, name)
        assert peru(*command)[0] == 0
        wanted = (folder / "read.safetensors").read_bytes()
        (folder / "read.safetensors").unlink()
        whole = out / name
        for path in [whole] if whole.is_file() else sorted(path for path in whole.rglob("*") if path.is_file()):
            sound, kinds = path.read_bytes(), ["altered"] + (["resealed"] if whole.is_file() else [])
            for kind in kinds:
                found: Counter[str] = Counter()
                for _ in range(mutations):
                    bad = damaged(sound, noise, noise.choice((1, 1, 1, 3)))
                    path.write_bytes(resealed(bad) if kind == "resealed" else bad)
                    found[outcome(folder, command, wanted)] += 1
                path.write_bytes(sound)
                print(f"{path.relative_to(out)!s:40} {kind:9} {dict(sorted(found.items()))}", flush=True)


def kill_and_interrupt(folder: Path, tasks: list[str], moments: int) -> None:
    """Kill each writing command at many moments, and type it again: the same bytes, or the old state."""
    reference = {path.name: files(path) if path.is_dir() else path.read_bytes() for path in (folder / "out").iterdir()}
    for signal_name in ("SIGKILL", "SIGINT"):
        for name in makers(folder, tasks, folder / "again"):
            found: Counter[str] = Counter()
            for moment in range(1, moments + 1):
                again = folder / "again"
                shutil.rmtree(again, ignore_errors=True)
                again.mkdir()
                command = [str(part) for part in makers(folder, tasks, again)[name]]
                code = run_and_kill(moment, command) if signal_name == "SIGKILL" else interrupt(moment, command)
                found["there after it" if (again / name).exists() else f"exit {code}"] += 1
                if not (again / name).exists():
                    peru(*command)
                made = files(again / name) if (again / name).is_dir() else (again / name).read_bytes() if (again / name).exists() else None
                found["same bytes" if made == reference[name] else "OTHER BYTES"] += 1
            print(f"{signal_name} {name:25} {dict(sorted(found.items()))}", flush=True)


def interrupt(moment: int, command: list[str]) -> int:
    """Run in a forked process that gets Ctrl-C at its n-th write."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    from peru_cli.checkpoints.local import atomic

    write, left = atomic.PartialFile.write_at, [moment]

    def counted(self: atomic.PartialFile, offset: int, data: bytes | memoryview) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, offset, data)

    atomic.PartialFile.write_at = counted  # type: ignore[method-assign]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        code = cli.run(command)
    os._exit(code)


def fill_disks(folder: Path, tasks: list[str]) -> None:
    """Write to a file system of 16 kB, with the check beforehand switched off."""
    disk = folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], capture_output=True).returncode:
        print("no small file system can be mounted here")
        return
    from peru_cli.checkpoints.local import atomic, writer

    before = atomic.check_room
    atomic.check_room = writer.check_room = lambda *given, **named: None
    try:
        for name, command in makers(folder, tasks, disk).items():
            code, said = peru(*command)
            left = [path.name for path in disk.rglob("*")]
            print(f"disk full, {name:22} exit {code}, {'says so' if 'full' in said or 'No space' in said else said[-80:]}, left {left}")
            for path in disk.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    finally:
        atomic.check_room = writer.check_room = before
        subprocess.run(["umount", disk], check=True)


def main() -> None:
    """Run all of it in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mutations", type=int, default=300, help="of each file")
    parser.add_argument("--moments", type=int, default=20, help="at which each command is killed and interrupted")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="peru-trust-") as place:
        folder = Path(place)
        tasks, out = family(folder), folder / "out"
        out.mkdir()
        for command in makers(folder, tasks, out).values():
            code, said = peru(*command)
            assert code == 0, said
        mutate(folder, out, given.mutations)
        kill_and_interrupt(folder, tasks, given.moments)
        fill_disks(folder, tasks)


if __name__ == "__main__":
    main()
