"""A merge that is killed at any moment leaves no output, and the same command continues it: the same bytes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from peru_cli.checkpoints.local import journal
from tests.conftest import save
from tests.support.damage import files, run_and_kill

LAYERS = 24


@pytest.fixture
def models(tmp_path: Path) -> Path:
    noise = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(256, 256, generator=noise).bfloat16() for i in range(LAYERS)}
    save(base, tmp_path / "base.safetensors")
    for task in "ab":
        fine = {n: (t.float() + torch.randint(-3, 4, t.shape, generator=noise) / 256).bfloat16() for n, t in base.items()}
        save(fine, tmp_path / f"{task}.safetensors")
    return tmp_path


def arguments(folder: Path, out: Path, *options: object) -> list[str]:
    given = ["merge", f"a={folder / 'a.safetensors'}", f"b={folder / 'b.safetensors'}", "-b", folder / "base.safetensors", "-o", out]
    return [str(a) for a in (*given, "-m", "ties", "--no-sync", "--threads", 1, "--tile-entries", 16384, *options)]


@pytest.mark.parametrize("compress", [False, True])
def test_kill_at_many_moments_then_resume(models: Path, peru, compress: bool) -> None:
    extra = ["--max-shard-size", "1MB", *(["--compress", "5%"] if compress else [])]
    peru(*arguments(models, models / "whole", *extra))
    expected = files(models / "whole")
    out = models / "out"
    moments = (1, 3, 6, 11, 17, 30, 48, 60, 79, 97, 110, 124, 126, 128) if not compress else (5, 60, 124, 128, 131, 134)
    resumed = 0
    for moment in moments:
        assert run_and_kill(moment, arguments(models, out, *extra)) == -signal.SIGKILL, moment
        assert not out.exists(), moment
        peru(*arguments(models, out, *extra))
        assert files(out) == expected, moment
        resumed += "continuing after" in peru.stderr
        for path in sorted(out.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        out.rmdir()
    assert resumed >= 3
    assert sorted(p.name for p in models.iterdir()) == ["a.safetensors", "b.safetensors", "base.safetensors", "whole"]


def test_a_pass_that_looks_at_all_tensors_first_goes_on_too(models: Path, peru) -> None:
    peru(*arguments(models, models / "whole", "--then", "lines"))
    killed(models, 40, models / "out", "--then", "lines")
    assert '"gathered"' in journal_of(models / "out").read_text()
    peru(*arguments(models, models / "out", "--then", "lines"))
    assert "continuing after" in peru.stderr
    assert "measuring the merge" not in peru.stderr
    assert files(models / "out") == files(models / "whole")


def killed(models: Path, moment: int, out: Path, *options: object) -> None:
    assert run_and_kill(moment, arguments(models, out, *options)) == -signal.SIGKILL


def journal_of(out: Path) -> Path:
    return out.parent / f".{out.name}.peru-partial" / ".peru-journal"


def test_finished_output_is_not_written_again(models: Path, peru, monkeypatch) -> None:
    killed(models, 70, models / "out")
    claimed = journal_of(models / "out").read_text().count('"done"')
    assert 10 <= claimed < LAYERS
    written = []
    from peru_cli.checkpoints.local.writer import DirectoryWriter

    original = DirectoryWriter.write
    monkeypatch.setattr(DirectoryWriter, "write", lambda self, name, *rest: (written.append(name), original(self, name, *rest))[1])
    peru(*arguments(models, models / "out"))
    assert len(set(written)) == LAYERS - claimed


@pytest.mark.parametrize("what", ["options", "input", "force", "torn", "single file"])
def test_only_the_same_command_resumes(models: Path, peru, what: str) -> None:
    out = models / ("out.safetensors" if what == "single file" else "out")
    killed(models, 70, out)
    options: list[object] = []
    if what == "options":
        options = ["--keep", "30%"]
    elif what == "input":
        time.sleep(0.01)
        os.utime(models / "a.safetensors")
    elif what == "force":
        options = ["--force"]
    elif what == "torn":
        text = journal_of(out).read_bytes()
        journal_of(out).write_bytes(text[:-7])
    calls = []
    original = journal.Journal.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        calls.append(len(self.done))

    journal.Journal.__init__ = spy  # type: ignore[method-assign]
    try:
        peru(*arguments(models, out, *options))
    finally:
        journal.Journal.__init__ = original  # type: ignore[method-assign]
    assert (calls[0] > 0) == (what in ("torn", "single file"))
    if what != "options":
        peru(*arguments(models, models / f"again{out.suffix}"))
        again = models / f"again{out.suffix}"
        assert (out.read_bytes() == again.read_bytes()) if out.is_file() else (files(out) == files(again))


def test_an_interrupt_keeps_partial_work_and_an_error_does_not(models: Path, peru, monkeypatch) -> None:
    from peru_cli.checkpoints.local.writer import DirectoryWriter

    original = DirectoryWriter.write
    for error, code in ((KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1)):
        left = [60]

        def fail(self, *args, left=left, error=error):
            left[0] -= 1
            if not left[0]:
                raise error
            original(self, *args)

        monkeypatch.setattr(DirectoryWriter, "write", fail)
        out = models / f"out{code}"
        peru(*arguments(models, out), code=code)
        assert journal_of(out).exists() == (code == 130)
        assert not out.exists()


@pytest.mark.parametrize("where", ["unfinished", "merged", "head", "key"])
def test_what_was_altered_after_the_kill_is_written_again(models: Path, peru, where: str) -> None:
    """Of the tensors that a journal calls done, and of a finished merge whose artifacts are not."""
    compress = [] if where == "unfinished" else ["--compress", "5%"]
    for task in "ab":
        head = {**load_file(models / f"{task}.safetensors"), "head": torch.ones(3)}
        save(head, models / f"{task}.safetensors")
    peru(*arguments(models, models / "whole", *compress))
    out = models / "out"
    if compress:
        assert run_and_kill(1, arguments(models, out, *compress), line="'sealed'") == -signal.SIGKILL
    else:
        killed(models, 40, out)
    partial = models / ".out.peru-partial"
    at = {
        "unfinished": partial / ".model.safetensors.peru-partial", "merged": partial / "merged" / "model.safetensors",
        "head": partial / "merged" / "heads" / "a.safetensors", "key": partial / ".peru-merge-key",
    }[where]  # fmt: skip
    data = bytearray(at.read_bytes())
    place = next(i for i in reversed(range(len(data))) if data[i])  # of an unfinished file: in the last tensor that is done
    data[place] ^= 0x80
    at.write_bytes(data)
    peru(*arguments(models, out, *compress))
    assert files(out) == files(models / "whole")


def test_what_an_older_version_left_is_written_anew_with_a_word(models: Path, peru) -> None:
    """Its journal says in other lines which tensors are done: [key], then ["done", tensor, note] without digests."""
    out = models / "out"
    peru(*arguments(models, models / "whole"))
    killed(models, 40, out)
    path = journal_of(out)
    seal, old = b"", b""
    for line in path.read_text().splitlines():
        value = json.loads(line.rpartition("\t")[0])
        value = value[:1] if len(value[0]) == 64 else [*value[:2], value[2]["note"]] if value[0] == "done" else value
        text = json.dumps(value).encode()
        seal = blake3(seal + text).hexdigest(8).encode()
        old += text + b"\t" + seal + b"\n"
    assert b'"done"' in old
    path.write_bytes(old)
    peru(*arguments(models, out))
    assert "another version of peru left unfinished files" in peru.stderr and "starting over" in peru.stderr
    assert files(out) == files(models / "whole")
