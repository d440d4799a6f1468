"""`peru unpack --in-place`: after any kill the checkpoint is the old one, the new one, or said to be half patched and then finished."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from peru_cli.checkpoints.local import patch
from peru_cli.checkpoints.local.atomic import partial_path
from tests.export.test_export import State, same_bits, states
from tests.support.chain_model import call

Peru = Callable[..., str]
MARKER = ".peru-patch"


def write(state: State, folder: Path, shards: int = 1, config: str = "{}") -> Path:
    folder.mkdir()
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        where = {name: files[i % shards] for i, name in enumerate(sorted(state))}
        for file in files:
            save_file({name: state[name] for name in state if where[name] == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(config)
    return folder


def read(folder: Path) -> State:
    return {name: tensor.clone() for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def pair() -> tuple[State, State]:
    """Besides the usual dtypes: bytes, booleans, an empty tensor, and one of several blocks of which a single entry changes."""
    base, fine = states()
    noise = torch.Generator().manual_seed(5)
    for state in (base, fine):
        state["codes"] = torch.arange(300).to(torch.uint8).reshape(3, 100)
        state["flags"] = torch.arange(9) % 2 == 0
        state["empty"] = torch.zeros(0, 5)
        state["long"] = torch.randn(300_001, generator=noise.manual_seed(6)).half()
    fine["codes"][1, 7] += 1
    fine["flags"][3] = True
    fine["long"][-1] += 1
    fine["long"][65_536] += 1
    return base, fine


@pytest.fixture
def made(tmp_path: Path, peru: Peru) -> tuple[Path, State, Path, Path]:
    """A base in three shards, the fine-tune's tensors, its artifact, and another folder with the base."""
    base, fine = pair()
    write(base, tmp_path / "first", config='{"a": 1}')
    peru("prune", write(fine, tmp_path / "fine", config='{"a": 2}'), "--base", tmp_path / "first", "-o", tmp_path / "a.safetensors",
         "--lossless")  # fmt: skip
    return write(base, tmp_path / "base", shards=3, config='{"a": 1}'), fine, tmp_path / "a.safetensors", tmp_path / "first"


def is_done(base: Path, fine: State) -> bool:
    names = {path.name for path in base.iterdir()}
    return same_bits(read(base), fine) and (base / "config.json").read_text() == '{"a": 2}' and not any(n.startswith(".") for n in names)


def test_a_checkpoint_becomes_the_fine_tune_where_it_lies(made: tuple[Path, State, Path, Path], peru: Peru) -> None:
    base, fine, artifact, single = made
    plan = json.loads(peru("unpack", artifact, "--base", base, "--in-place", "--dry-run", "--json"))
    assert not same_bits(read(base), fine)
    nodes = {path.name: path.stat().st_ino for path in base.glob("*.safetensors")}
    done = json.loads(peru("unpack", artifact, "--base", base, "--in-place", "--json"))
    assert is_done(base, fine) and nodes == {path.name: path.stat().st_ino for path in base.glob("*.safetensors")}
    assert 0 < done["journal_bytes"] <= plan["journal_bytes"] + 10_000
    assert json.loads(peru("unpack", artifact, "--base", base, "--in-place", "--json"))["changed"] == 0, (
        "a second time it has nothing to do"
    )
    peru("unpack", artifact, "--base", single / "model.safetensors", "--in-place", "--tile-entries", 16384, "--threads", 2)
    assert is_done(single, fine)


@pytest.mark.parametrize(("writes", "torn"), [(0, False), (1, True), (5, True)])
def test_a_killed_patch_is_reported_and_finished(
    made: tuple[Path, State, Path, Path], peru: Peru, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int, torn: bool
) -> None:
    base, fine, artifact, first = made
    whole = patch._write

    def kill_at(last: int) -> None:
        """Run the command in a child that kills itself at a write, perhaps in the middle of it."""
        left = [last]

        def dying(fd: int, data: bytearray, offset: int) -> None:
            if not left[0]:
                whole(fd, data[: len(data) // 2 if torn else 0], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            whole(fd, data, offset)

        child = os.fork()
        if child == 0:
            patch._write = dying
            call("unpack", artifact, "--base", base, "--in-place", "--no-sync")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    kill_at(writes)
    for command in (["inspect", base], ["prune", base, "--base", first, "-o", tmp_path / "x.safetensors", "--lossless"]):
        peru(*command, code=1)
        assert "is half patched" in peru.stderr  # type: ignore[attr-defined]
    peru("inspect", base / "model-00001-of-00003.safetensors", code=1)
    kill_at(writes)
    if writes == 1:  # what is left needs no artifact
        artifact.unlink()
        peru("unpack", artifact, "--base", base, "--in-place", code=2)
    else:
        peru("unpack", artifact, "--base", base, "--in-place")
    assert is_done(base, fine)
    peru("inspect", base)


def test_a_patch_interrupted_before_its_journal_is_complete_changes_nothing(
    made: tuple[Path, State, Path, Path], peru: Peru, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    base, fine, artifact, _ = made
    before = read(base)
    monkeypatch.setattr(patch.PatchJournal, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    peru("unpack", artifact, "--base", base, "--in-place", code=130)
    assert same_bits(read(base), before) and not [path for path in base.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    monkeypatch.setattr(patch, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    peru("unpack", artifact, "--base", base, "--in-place", code=130)
    assert "is half patched\n  run the same command again" in peru.stderr  # type: ignore[attr-defined]
    monkeypatch.undo()
    peru("unpack", artifact, "--base", base, "--in-place", "--dry-run")
    assert (base / MARKER).exists()
    peru("unpack", artifact, "--base", base, "--in-place")
    assert is_done(base, fine)


def test_the_next_update_finishes_the_one_before(made: tuple[Path, State, Path, Path], peru: Peru, tmp_path: Path) -> None:
    base, fine, artifact, _ = made
    later = {name: tensor.clone() for name, tensor in fine.items()}
    later["embed"][::7] *= 2
    peru("prune", write(later, tmp_path / "later", config='{"a": 2}'), "--base", tmp_path / "fine", "-o", tmp_path / "b.safetensors",
         "--lossless")  # fmt: skip
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(patch, "_write", lambda *_: (_ for _ in ()).throw(OSError(5, "the disk is tired")))
        peru("unpack", artifact, "--base", base, "--in-place", code=1)
        assert "is half patched" in peru.stderr  # type: ignore[attr-defined]
    peru("unpack", tmp_path / "b.safetensors", "--base", base, "--in-place")
    assert is_done(base, later)


def test_a_wrong_base_or_artifact_changes_nothing(made: tuple[Path, State, Path, Path], peru: Peru) -> None:
    base, _, artifact, first = made
    state = read(base)
    state["same"][0] += 1
    save_file(state, first / "model.safetensors", {"format": "pt"})
    peru("unpack", artifact, "--base", first, "--in-place", code=1)
    assert "same: different contents" in peru.stderr  # type: ignore[attr-defined]
    assert same_bits(read(first), state)
    raw = bytearray(artifact.read_bytes())
    raw[len(raw) // 2] ^= 1
    artifact.write_bytes(raw)
    before = read(base)
    peru("unpack", artifact, "--base", base, "--in-place", code=1)
    assert same_bits(read(base), before) and not (base / MARKER).exists()


def test_altered_journals_and_files_are_found(made: tuple[Path, State, Path, Path], peru: Peru, monkeypatch: pytest.MonkeyPatch) -> None:
    base, fine, artifact, _ = made
    monkeypatch.setattr(patch, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    peru("unpack", artifact, "--base", base, "--in-place", code=130)
    monkeypatch.undo()
    journal = (base / MARKER).read_bytes()
    for at in (20, len(journal) // 2, len(journal) - 1):
        (base / MARKER).write_bytes(journal[:at] + bytes([journal[at] ^ 1]) + journal[at + 1 :])
        peru("unpack", artifact, "--base", base, "--in-place", code=1)
        assert "was altered" in peru.stderr and "remove .peru-patch" in peru.stderr  # type: ignore[attr-defined]
    (base / MARKER).write_bytes(journal)
    file = next(path for path in base.glob("*.safetensors") if "same" in load_file(path))
    content, state = file.read_bytes(), {name: tensor.clone() for name, tensor in load_file(file).items()}
    state["same"][0] += 1  # no tensor of the artifact's changes
    save_file(state, file, {"format": "pt"})
    peru("unpack", artifact, "--base", base, "--in-place", code=1)
    assert "another program" in peru.stderr and (base / MARKER).exists()  # type: ignore[attr-defined]
    file.write_bytes(content)
    peru("unpack", artifact, "--base", base, "--in-place")
    assert is_done(base, fine)


def forged(journal: bytes, change: Callable[[dict[str, Any]], None], records: bytes | None = None) -> bytes:
    """A journal that says something else, with its digest computed anew."""
    length = struct.unpack("<Q", journal[-40:-32])[0]
    told, body = json.loads(journal[-40 - length : -40]), journal[: -40 - length]
    if records is not None:
        body = body[:16] + records + body[16:]
        told["records"] += len(records)
    change(told)
    text = json.dumps(told).encode()
    whole = body + text + struct.pack("<Q", len(text))
    return whole + blake3(whole).digest()


def _of(key: str, number: int, place: int, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda told: told[key][number].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "records"),
    [
        (_of("side", 0, 0, "../outside.json"), None),
        (_of("side", 0, 0, "code.py"), None),
        (_of("side", 0, 1, -1), None),
        (_of("side", 0, 1, 1 << 60), None),
        (_of("files", 0, 0, "../outside.safetensors"), None),
        (_of("files", 0, 0, "config.json"), None),
        (_of("tensors", 0, 1, "F13"), None),
        (_of("tensors", 0, 2, [1 << 40, 1 << 40]), None),
        (_of("tensors", 0, 3, 9), None),
        (_of("tensors", 0, 4, -5), None),
        (lambda told: told.pop("tensors"), None),
        (lambda told: told.__setitem__("records", "all"), None),
        (lambda told: None, struct.pack("<IQIB", 999, 0, 1, 0) + b"\0\0"),
        (lambda told: None, struct.pack("<IQIB", 0, 0, 1 << 31, 1)),
        (lambda told: None, struct.pack("<IQIB", 0, 0, 1, 7) + b"\0\0"),
    ],
)
def test_a_strangers_journal_reaches_nothing_but_the_checkpoint(
    made: tuple[Path, State, Path, Path], peru: Peru, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], records: bytes | None
) -> None:
    base, _, artifact, _ = made
    monkeypatch.setattr(patch, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    peru("unpack", artifact, "--base", base, "--in-place", code=130)
    monkeypatch.undo()
    (base.parent / "outside.safetensors").write_bytes(next(base.glob("*.safetensors")).read_bytes())
    (base / MARKER).write_bytes(forged((base / MARKER).read_bytes(), change, records))
    before = {path: path.read_bytes() for path in base.parent.rglob("*") if path.is_file()}
    peru("unpack", artifact, "--base", base, "--in-place", code=1)
    assert "was altered" in peru.stderr and "a defect" not in peru.stderr  # type: ignore[attr-defined]
    assert {path: path.read_bytes() for path in base.parent.rglob("*") if path.is_file()} == before


def test_a_link_in_a_half_patched_folder_is_not_followed(
    made: tuple[Path, State, Path, Path], peru: Peru, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, artifact, _ = made
    monkeypatch.setattr(patch, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    peru("unpack", artifact, "--base", base, "--in-place", code=130)
    monkeypatch.undo()
    file = min(base.glob("*.safetensors"))
    elsewhere = file.rename(base.parent / "elsewhere.safetensors")
    file.symlink_to(elsewhere)
    content = elsewhere.read_bytes()
    peru("unpack", artifact, "--base", base, "--in-place", code=1)
    assert "half patched" in peru.stderr and elsewhere.read_bytes() == content  # type: ignore[attr-defined]


def test_a_link_in_the_place_of_the_unfinished_journal_is_not_written_through(made: tuple[Path, State, Path, Path], peru: Peru) -> None:
    base, _, artifact, _ = made
    outside = base.parent / "outside"
    outside.write_bytes(b"mine")
    partial_path(base / MARKER).symlink_to(outside)
    peru("unpack", artifact, "--base", base, "--in-place", code=1)
    assert outside.read_bytes() == b"mine" and not (base / MARKER).exists()


def test_what_cannot_be_patched_is_refused_with_the_way_out(
    made: tuple[Path, State, Path, Path], peru: Peru, tmp_path: Path
) -> None:  # fmt: skip
    base, fine, artifact, _ = made
    grown = fine | {"same": torch.zeros(18), "head": torch.ones(2)}
    del grown["half"]
    peru("prune", write(grown, tmp_path / "grown"), "--base", base, "-o", tmp_path / "g.safetensors", "--lossless", "--allow-unpaired")
    peru("unpack", tmp_path / "g.safetensors", "--base", base, "--in-place", code=1)
    said = peru.stderr  # type: ignore[attr-defined]
    assert all(word in said for word in ("half: the fine-tune lacks it", "head: the base lacks it", "same: F32 [17]", "-o OUT"))
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(tmp_path / "first" / "model.safetensors")
    peru("unpack", artifact, "--base", linked, "--in-place", code=2)
    assert "is a link" in peru.stderr  # type: ignore[attr-defined]
    (tmp_path / "link").symlink_to(base)
    peru("unpack", artifact, "--base", tmp_path / "link", "--in-place", code=2)
    assert f"--base {base}" in peru.stderr  # type: ignore[attr-defined]
    for arguments in (["--in-place"], ["--base", base], ["--base", base, "--in-place", "-o", "x"], ["--base", "org/name", "--in-place"],
                      ["--base", base, "--in-place", "--dtype", "bf16"]):  # fmt: skip
        peru("unpack", artifact, *arguments, code=2)
    peru("unpack", base, "--base", base, "--in-place", code=2)
    assert not (base / MARKER).exists()


def test_an_artifact_comes_through_a_pipe(
    made: tuple[Path, State, Path, Path], peru: Peru, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    base, fine, artifact, first = made
    piped = io.TextIOWrapper(io.BytesIO())
    from contextlib import redirect_stderr, redirect_stdout

    from peru_cli import cli

    with redirect_stdout(piped), redirect_stderr(io.StringIO()):
        assert cli.run(["prune", str(tmp_path / "fine"), "--base", str(first), "-o", "-", "--lossless"]) == 0
    data = piped.buffer.getvalue()  # type: ignore[attr-defined]
    assert data == artifact.read_bytes().replace(b'"a"', b'"fine"') or len(data) == artifact.stat().st_size
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    peru("unpack", "-", "--base", first, "-o", tmp_path / "out/")
    assert same_bits(read(tmp_path / "out"), fine)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    peru("unpack", "-", "--base", base, "--in-place")
    assert is_done(base, fine)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    peru("unpack", "-", "--base", base, "--in-place", code=2)
    peru("prune", base, tmp_path / "fine", "--base", first, "-o", "-", "--lossless", code=2)
