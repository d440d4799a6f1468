"""A prune that is killed at any moment leaves no output, and the same command continues it: the same bytes, nothing read twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from peru_cli import cli
from peru_cli.checkpoints.local import journal
from peru_cli.vectors import threshold_journal as countlog
from peru_cli.vectors import thresholds
from tests.conftest import run_peru, save, start_peru
from tests.support.damage import files, run_and_kill
from tests.support.forkserver import Running
from tests.support.hub_server import Handler, HubServer, Request

LAYERS = 12


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Deltas with many ties over several blocks, an exact copy, a counter that differs, a head, a grown vocabulary."""
    noise = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(300, 512, generator=noise) for i in range(LAYERS)}
    base |= {"embed": torch.randn(4200, 64, generator=noise), "ids": torch.arange(500), "steps": torch.zeros(1, dtype=torch.int64)}
    for i in range(0, LAYERS, 2):
        base[f"layers.{i}.weight"] = base[f"layers.{i}.weight"].bfloat16()
    save(base, tmp_path / "base.safetensors")
    for n, task in enumerate("ab"):
        fine = {k: (t.float() + torch.randint(-3, 4, t.shape, generator=noise) / 256).to(t.dtype) for k, t in base.items() if k != "ids"}
        fine |= {"ids": base["ids"], "steps": torch.ones(1, dtype=torch.int64), "head": torch.randn(5 + n, 64, generator=noise)}
        fine["embed"] = torch.cat([fine["embed"], torch.randn(9, 64, generator=noise)]) if task == "a" else fine["embed"]
        save(fine, tmp_path / f"{task}.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def noted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, work on local files is recorded once a second."""
    monkeypatch.setattr(countlog, "EVERY", 0.0)
    monkeypatch.setattr(thresholds, "SAMPLE_RUNS", 64)  # less than everything, so that something is left to count


VARIANTS = {
    "global": ["--keep", "15%"],
    "exact": ["--keep", "60%", "--values", "exact"],
    "lossless": ["--lossless"],
    "tensor": ["--keep", "15%", "--scope", "tensor"],
    "octaves": ["--keep", "15%", "--values", "log2"],
    "several": ["--keep", "15%"],
}


def arguments(folder: Path, out: Path, *options: object) -> list[str]:
    several = out.suffix != ".safetensors"
    given = ["prune", *(f"{t}={folder / t}.safetensors" for t in ("ab" if several else "a")), "-b", folder / "base.safetensors", "-o"]
    more = [f"{out}/" if several else out, "--no-sync", "--threads", 2, "--tile-entries", 16384, "--base-id", "x/y", *options]
    return [str(a) for a in (*given, *more)]


def figures(printed: str) -> list[dict[str, object]]:
    """The output of --json, without the path."""
    return [{key: value for key, value in task.items() if key != "path"} for task in json.loads(printed)]


# Signs have a threshold for each tensor, too, and stay on one machine.
HERE = {name: options for name, options in VARIANTS.items() if name != "tensor"} | {
    "signs": ["--keep", "15%", "--scope", "sign", "--values", "sign"]
}


@pytest.mark.parametrize("variant", HERE)
def test_kill_at_many_moments_then_resume(models: Path, peru, variant: str) -> None:
    options = HERE[variant]
    name = "out" if variant == "several" else "out.safetensors"
    (models / "whole").mkdir()
    said = figures(peru(*arguments(models, models / "whole" / name, *options, "--json")))
    expected = files(models / "whole")
    (models / "made").mkdir()
    out = models / "made" / name
    moment, resumed, killed = 1, 0, 0
    while run_and_kill(moment, arguments(models, out, *options)) == -signal.SIGKILL:
        killed += 1
        assert figures(peru(*arguments(models, out, *options, "--json"))) == said
        resumed += "continuing" in peru.stderr
        assert files(models / "made") == expected, moment  # and nothing beside it
        for path in sorted((models / "made").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        moment += 1 if moment < 3 else 5
    assert files(models / "made") == expected
    assert killed >= 6 and resumed >= killed - 3


def test_killed_again_and_again(models: Path, peru) -> None:
    """Every run is killed a little later than the one before."""
    peru(*arguments(models, models / "whole.safetensors", "--keep", "15%"))
    out = models / "out.safetensors"
    for _ in range(60):
        if run_and_kill(35, arguments(models, out, "--keep", "15%")) == 0:
            break
    assert out.read_bytes() == (models / "whole.safetensors").read_bytes()
    assert not [path for path in models.iterdir() if "partial" in path.name]


def test_some_artifacts_in_place(models: Path, peru, monkeypatch) -> None:
    """Killed between the renames: finished files stay, and do not count as files that must not be replaced."""
    peru(*arguments(models, models / "whole", "--keep", "15%"))
    child = os.fork()
    if not child:
        replace, left = os.replace, [2]

        def counted(*args):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*args)

        os.replace = counted
        os._exit(cli.run(arguments(models, models / "out", "--keep", "15%", "--quiet")))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    done = models / "out" / "a.safetensors"
    assert done.exists() and not (models / "out" / "b.safetensors").exists()
    before = done.stat().st_ino
    peru(*arguments(models, models / "out", "--keep", "16%"), code=2)  # another command: not its output
    assert "exists already" in peru.stderr
    peru(*arguments(models, models / "out", "--keep", "15%"))
    assert files(models / "out") == files(models / "whole")
    assert done.stat().st_ino in (before, done.stat().st_ino)


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_finished_artifact_that_was_damaged_is_not_taken_for_finished(models: Path, peru, share: float) -> None:
    """One of two is in place, the journal still there; then a byte of it changes: exit code 0 without a look at it was a defect."""
    peru(*arguments(models, models / "whole", "--keep", "15%"))
    child = os.fork()
    if child == 0:
        replace = os.replace

        def counted(a, b):
            if str(b).endswith("/b.safetensors"):
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(a, b)

        os.replace = counted
        os._exit(cli.run(arguments(models, models / "out", "--keep", "15%", "--quiet")))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    done = models / "out" / "a.safetensors"
    data = bytearray(done.read_bytes())
    data[int(len(data) * share)] ^= 0x55
    done.write_bytes(data)
    peru(*arguments(models, models / "out", "--keep", "15%"), code=2)
    assert f"{done} exists already" in peru.stderr and "--force" in peru.stderr
    peru(*arguments(models, models / "out", "--keep", "15%", "--force"))
    assert files(models / "out") == files(models / "whole")


CHANGES = ["same", "torn", "keep", "scope", "values", "base-id", "force", "fine", "base", "truncated", "version", "boot"]


@pytest.mark.parametrize("what", CHANGES)
def test_only_the_same_command_resumes(models: Path, peru, monkeypatch, what: str) -> None:
    out = models / "out.safetensors"
    assert run_and_kill(9, arguments(models, out, "--keep", "15%"), "slots before") == -signal.SIGKILL
    partial = models / ".out.safetensors.peru-partial"
    notes = partial.with_name(f"{partial.name}-journal")
    assert notes.read_text().count("slots before") == 8
    options = ["--keep", "15%"]
    if what in ("keep", "scope", "values", "base-id"):
        options += [f"--{what}", {"keep": "14%", "scope": "tensor", "values": "exact", "base-id": "z/y"}[what]]
    elif what in ("fine", "base"):
        time.sleep(0.01)
        os.utime(models / ("a.safetensors" if what == "fine" else "base.safetensors"))
    elif what == "force":
        options.append("--force")
    elif what == "torn":
        notes.write_bytes(notes.read_bytes()[:-7])
    elif what == "truncated":
        os.truncate(partial, 1000)
    elif what == "version":
        from peru_cli.prune import run as prune

        monkeypatch.setattr(prune, "__version__", "0")
    elif what == "boot":  # nothing was synced, and the machine crashed
        monkeypatch.setattr(journal, "_boot", lambda: "another")
    peru(*arguments(models, out, *options))
    assert ("continuing" in peru.stderr) == (what in ("same", "torn"))
    peru(*arguments(models, models / "again.safetensors", *[o for o in options if o != "--force"]))
    assert out.read_bytes() == (models / "again.safetensors").read_bytes()
    assert not partial.exists() and not notes.exists()


def test_after_a_machine_crash_only_synced_data_counts(models: Path, peru, monkeypatch) -> None:
    monkeypatch.setattr(journal, "_SYNC_SECONDS", 0.0)
    command = [a for a in arguments(models, models / "out.safetensors", "--keep", "15%") if a != "--no-sync"]
    assert run_and_kill(5, command, "slots before") == -signal.SIGKILL
    monkeypatch.setattr(journal, "_boot", lambda: "another")
    peru(*command)
    assert "continuing after" in peru.stderr
    peru(*arguments(models, models / "again.safetensors", "--keep", "15%"))
    assert (models / "out.safetensors").read_bytes() == (models / "again.safetensors").read_bytes()


# -- from the Hub ---------------------------------------------------------------------------------------


BASE, FINE = "meta/base", "org/fine"

# Less is kept in memory, as for a model larger than it: pass 1 reads everything, and pass 2 again.
SMALL = """
from peru_cli.checkpoints.local import readahead
from peru_cli.vectors import family as taskvectors, thresholds
taskvectors.KEPT_BYTES, thresholds.SAMPLE_RUNS, readahead.PIECE, readahead.HELD = 0, 64, 1 << 18, 1 << 20
"""


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_what_was_altered_after_the_kill_is_written_again(models: Path, peru, share: float) -> None:
    """A block of kept entries, and a tensor stored whole."""
    peru(*arguments(models, models / "whole.safetensors", *VARIANTS["exact"]))
    out = models / "out.safetensors"
    assert run_and_kill(1, arguments(models, out, *VARIANTS["exact"]), line="sealed") == -signal.SIGKILL
    (partial,) = models.glob(".out*.peru-partial")
    data = bytearray(partial.read_bytes())
    data[int(len(data) * share)] ^= 0x55
    partial.write_bytes(data)
    peru(*arguments(models, out, *VARIANTS["exact"]))
    assert out.read_bytes() == (models / "whole.safetensors").read_bytes()


@pytest.fixture
def hub(models: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add(BASE, {"model.safetensors": models / "base.safetensors"})
        server.add(FINE, {"model.safetensors": models / "a.safetensors"})
        yield server


def start(hub: HubServer, models: Path, *options: object) -> Running | subprocess.Popen[str]:
    command = ["prune", f"a={FINE}", "-b", BASE, "-o", models / "hub.safetensors", "--base-id", "x/y", "--keep", "15%", *options]
    return start_peru(*command, "--no-sync", "--tile-entries", 16384, env=hub.env(models / "hf"), before=SMALL)


def asked(hub: HubServer) -> dict[str, list[tuple[int, int]]]:
    """Ranges that were answered completely, by repo."""
    found: dict[str, list[tuple[int, int]]] = {BASE: [], FINE: []}
    for r in hub.requests:
        if r.status == 206 and r.range and r.origin == "cdn":
            found["/".join(r.path.split("/")[1:3])].append((r.range[0], r.range[0] + r.sent))
    return found


def depth(ranges: list[tuple[int, int]], begin: int, end: int) -> int:
    """How often the most requested byte of a range was requested."""
    marks = torch.zeros(end - begin + 1, dtype=torch.int64)
    for first, stop in ranges:
        if first < end and stop > begin:
            marks[max(first, begin) - begin] += 1
            marks[min(stop, end) - begin] -= 1
    return int(marks.cumsum(0).max())


def places(path: Path) -> dict[str, tuple[int, int]]:
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:length])
    return {name: (length + at["data_offsets"][0], length + at["data_offsets"][1]) for name, at in table.items() if name != "__metadata__"}


@pytest.mark.parametrize("requests", [60, 90, 120, 150, 165])
def test_a_killed_stream_requests_nothing_finished(hub: HubServer, models: Path, requests: int) -> None:
    """Killed after this many ranges: what a pass has finished is not requested again in that pass."""
    seen = [0]

    def stop(handler: Handler, request: Request) -> bool:
        if request.range is None or request.origin != "cdn":
            return False
        seen[0] += 1
        if seen[0] <= requests:
            return False
        time.sleep(20)
        return True

    hub.fault(stop)
    first = start(hub, models, "--stream")
    notes = models / ".hub.safetensors.peru-partial-journal"
    before, still = "", time.monotonic()
    while time.monotonic() - still < 3.0 and first.poll() is None:  # until it makes no more progress
        time.sleep(0.1)
        now = notes.read_text() if notes.exists() else ""
        if now != before:
            before, still = now, time.monotonic()
    first.kill()
    first.wait()
    text = [json.loads(line.partition("\t")[0]) for line in before.split("\n")[1:-1]]
    hub.faults.clear()
    hub.clear()
    second = start(hub, models, "--stream")
    _, err = second.communicate(timeout=100)
    assert second.returncode == 0, err
    assert "continuing" in err or not any(line[0] == "note" for line in text)
    assert (models / "hub.safetensors").read_bytes() == local(models)
    assert not [path for path in (models / "hf").rglob("*") if path.is_file()] and not notes.exists()
    names = sorted(places(models / "a.safetensors").keys() & {f"layers.{i}.weight" for i in range(LAYERS)} | {"embed"})
    counted = max((int(line[1].rsplit(" ", 1)[1]) + 1 for line in text if line[0] == "note" and " count " in line[1]), default=0)
    written = max((int(line[1].rsplit(" ", 1)[1]) for line in text if line[0] == "note" and line[1].startswith("slots")), default=0)
    ranges = asked(hub)
    for repo, file in ((BASE, "base"), (FINE, "a")):
        for number, name in enumerate(names):
            begin, end = places(models / f"{file}.safetensors")[name]
            end = min(end, begin + places(models / "base.safetensors")[name][1] - places(models / "base.safetensors")[name][0])
            most = 0 if number < written else 1 if number < counted or written else 2
            assert depth(ranges[repo], begin + 8, end - 8) <= most, (repo, name, counted, written)


def local(models: Path) -> bytes:
    target = models / "local.safetensors"
    command = ("prune", f"a={models / 'a.safetensors'}", "-b", models / "base.safetensors", "-o", target, "--base-id", "x/y")
    done = run_peru(*command, "--keep", "15%", "--force")
    assert done.returncode == 0, done.stderr
    return target.read_bytes()


def test_a_moved_branch_starts_over(hub: HubServer, models: Path) -> None:
    """The journal belongs to one commit."""
    slow = [0]

    def stop(handler: Handler, request: Request) -> bool:
        slow[0] += request.range is not None and request.origin == "cdn"
        if slow[0] > 120:
            time.sleep(20)
        return False

    hub.fault(stop)
    first = start(hub, models, "--stream")
    notes = models / ".hub.safetensors.peru-partial-journal"
    for _ in range(300):
        if notes.exists() and b"count" in notes.read_bytes():
            break
        time.sleep(0.1)
    first.kill()
    first.wait()
    hub.faults.clear()
    (models / "a.safetensors").write_bytes((models / "b.safetensors").read_bytes())
    hub.add(FINE, {"model.safetensors": models / "a.safetensors"})
    second = start(hub, models, "--stream")
    _, err = second.communicate(timeout=100)
    assert second.returncode == 0 and "continuing" not in err, err
    assert (models / "hub.safetensors").read_bytes() == local(models)


def test_a_lost_connection_keeps_the_finished_work(hub: HubServer, models: Path) -> None:
    """The error says so, and the journal stays; through the cache, whole files that are there are not requested again."""
    seen = [0]

    def stop(handler: Handler, request: Request) -> bool:
        seen[0] += request.range is not None and request.origin == "cdn"
        if request.range is None or seen[0] <= 120:
            return False
        handler.answer(503, Retry_After="0")
        return True

    hub.fault(stop)
    first = start(hub, models, "--stream")
    _, err = first.communicate(timeout=100)
    assert first.returncode == 1 and "status 503" in err, err
    assert (models / ".hub.safetensors.peru-partial-journal").exists() and not (models / "hub.safetensors").exists()
    hub.faults.clear()
    second = start(hub, models)  # the same models: ranges or cache make no difference
    _, err = second.communicate(timeout=100)
    assert second.returncode == 0 and "continuing" in err, err
    assert (models / "hub.safetensors").read_bytes() == local(models)
