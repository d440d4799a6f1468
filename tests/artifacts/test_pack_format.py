"""docs/packs.md: a golden pack is compared literally and read by another reader; damaged and hostile packs are refused."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.superposed import METADATA, OPTIONAL, decode_index, encode_index
from peru_cli.checkpoints.resolve import open_model
from peru_cli.errors import BadFile, PeruError
from peru_cli.finetunes.open import open_artifact
from peru_cli.finetunes.verify import verify
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import StreamSettings
from tests.conftest import save
from tests.golden.make_pack import HERE as GOLDEN
from tests.golden.make_pack import PACKS, as_read, base, expected, write_family
from tests.support.damage import damaged
from tests.support.readers.format_reader import read_safetensors
from tests.support.readers.pack_reader import PackReader

Peru = Callable[..., str]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "packs.md").read_text("utf-8")


# -- the golden pack ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", PACKS)
def test_the_writer_produces_the_golden_bytes(tmp_path: Path, peru: Peru, pack: str) -> None:
    peru(*write_family(tmp_path), *PACKS[pack], "-o", tmp_path / "p.safetensors", "--no-sync")
    assert (tmp_path / "p.safetensors").read_bytes() == (GOLDEN / f"{pack}.safetensors").read_bytes()


@pytest.mark.parametrize("task", ["a", "b"])
@pytest.mark.parametrize("pack", PACKS)
def test_a_reader_from_the_document_and_peru_produce_the_golden_tasks(tmp_path: Path, peru: Peru, pack: str, task: str) -> None:
    wanted = read_safetensors((GOLDEN / f"{expected(pack, task)}.safetensors").read_bytes())[1]
    reader = PackReader((GOLDEN / f"{pack}.safetensors").read_bytes())
    assert reader.retrieve(task, as_read(base())) == wanted
    peru("unpack", GOLDEN / f"{pack}.safetensors", "--task", task, "-b", GOLDEN / "base", "-o", tmp_path / "out", "--no-sync")
    assert read_safetensors((tmp_path / "out" / "model.safetensors").read_bytes())[1] == wanted
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".txt")}
    assert files == {"config.json": f'{{"task": {"ab".index(task) + 1}}}\n', "vocab.txt": "a\nb\n", "generation_config.json": "{}\n"}


def test_the_table_of_metadata_matches_the_code() -> None:
    rows = re.findall(r"^\| `(peru\.[\w.]+)` \| (yes|no) \| `(.*?)` \|", PAGE, re.MULTILINE)
    written = {key: (need, form.replace("\\|", "|")) for key, need, form in rows if key != "peru.digest"}
    assert {key: form for key, (_, form) in written.items()} == METADATA
    assert {key for key, (need, _) in written.items() if need == "no"} == OPTIONAL


# -- damage -------------------------------------------------------------------------------------------


def read_everything(pack: Path, model: Path) -> None:
    """Read all tasks without writing anything."""
    with Pack(pack) as opened:
        tasks = list(opened.tasks)
    with open_model(str(model)) as base:
        for task in tasks:
            with open_artifact(pack, str(pack), base, task) as source:
                source.contents()
                verify(source, StreamSettings(CPU, 1, 1 << 14))


@pytest.mark.parametrize("name", PACKS)
def test_every_altered_byte_of_a_pack_is_detected(tmp_path: Path, name: str) -> None:
    whole, noise = (GOLDEN / f"{name}.safetensors").read_bytes(), random.Random(3)
    pack = tmp_path / "p.safetensors"
    pack.write_bytes(whole)
    read_everything(pack, GOLDEN / "base")
    for i in range(len(whole)):
        pack.write_bytes(whole[:i] + bytes([(whole[i] + noise.randrange(1, 256)) % 256]) + whole[i + 1 :])
        with pytest.raises(PeruError) as caught:
            read_everything(pack, GOLDEN / "base")
        assert str(pack) in str(caught.value), i


def test_truncated_packs_are_refused_by_every_command(tmp_path: Path, peru: Peru) -> None:
    write_family(tmp_path)
    whole, pack = (GOLDEN / "pack.safetensors").read_bytes(), tmp_path / "p.safetensors"
    for size in (0, 7, 9, 500, len(whole) // 2, len(whole) - 1):
        pack.write_bytes(whole[:size])
        removal = ["shuffle-pack", f"b={tmp_path}/b", "--remove-from", pack, "-b", GOLDEN / "base", "-o", tmp_path / "q.safetensors"]
        for command in (["inspect", pack], ["unpack", pack, "-b", GOLDEN / "base", "-o", tmp_path / "out"], removal):
            peru(*command, code=1)
            assert str(pack) in peru.stderr and "defect" not in peru.stderr  # type: ignore[attr-defined]
        assert pack.read_bytes() == whole[:size] and not (tmp_path / "out").exists() and not (tmp_path / "q.safetensors").exists()


INDEXES = [PackReader((GOLDEN / f"{name}.safetensors").read_bytes()).roles["index"] for name in PACKS]


def test_the_index_round_trips() -> None:
    assert [index[0] for index in INDEXES] == [1, 2]
    for index in INDEXES:
        assert encode_index(decode_index(index)) == index


@settings(max_examples=900, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_damaged_index_raises_badfile_or_is_another_valid_one(seed: int, mutations: int) -> None:
    noise = random.Random(seed)
    data = damaged(noise.choice(INDEXES), noise, mutations)
    try:
        decoded = decode_index(data)
    except BadFile:
        return
    assert encode_index(decode_index(encode_index(decoded))) == encode_index(decoded)


# -- wrong use ----------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, peru: Peru) -> Path:
    """A folder with a base, fine-tunes a, b, c and a pack of a and b."""
    noise = torch.Generator().manual_seed(0)
    shapes = {"embed": (30, 8), **{f"layers.{i}.w": (16, 8) for i in range(3)}}
    tables = {"base": {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}}
    for task in "abc":
        tables[task] = {name: t + 0.01 * torch.randn(t.shape, generator=noise) for name, t in tables["base"].items()}
    for name, table in tables.items():
        save(table, tmp_path / f"{name}.safetensors")
    peru(
        "shuffle-pack",
        f"a={tmp_path}/a.safetensors",
        f"b={tmp_path}/b.safetensors",
        "-b",
        tmp_path / "base.safetensors",
        "-o",
        tmp_path / "p.safetensors",
    )
    return tmp_path


def change(folder: Path, name: str, label: str = "changed", **tensors: torch.Tensor) -> Path:
    """A model with some tensors replaced."""
    return save({**load_file(folder / f"{name}.safetensors"), **tensors}, folder / f"{label}-{name}.safetensors")


def test_wrong_tasks_checkpoints_and_bases_leave_the_old_pack_alone(made: Path, peru: Peru) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    out, base_path, old = made / "q.safetensors", made / "base.safetensors", made / "p.safetensors"
    torch.manual_seed(1)
    other_a = change(made, "a", embed=torch.randn(30, 8))
    other_base = change(made, "base", embed=torch.randn(30, 8))
    half = change(made, "c", embed=torch.randn(30, 8).half())
    broken = change(made, "b", embed=torch.full((30, 8), float("nan")))
    broken_base = change(made, "base", "broken", embed=torch.full((30, 8), float("nan")))
    longer = change(made, "c", "longer", embed=torch.randn(31, 8))
    cases: list[tuple[list[object], int, str]] = [
        ([f"x={made}/c.safetensors", "--remove-from", old, "-b", base_path], 2, "has no task 'x'"),
        ([f"a={other_a}", "--remove-from", old, "-b", base_path], 1, "is not the checkpoint that was packed as 'a'"),
        ([f"a={made}/a.safetensors", f"b={made}/b.safetensors", "--remove-from", old, "-b", base_path], 2, "would hold 0 tasks"),
        ([f"A={made}/c.safetensors", "--add-to", old, "-b", base_path], 2, "already has a task a"),
        ([f"c={made}/c.safetensors", "--add-to", old, "-b", other_base], 1, "is not the base that"),
        ([f"a={made}/a.safetensors", "--remove-from", old, "-b", other_base], 1, "is not the base that"),
        ([f"c={half}", "--add-to", old, "-b", base_path], 1, "embed: F16 in c, F32 in the pack"),
        ([f"c={longer}", "--add-to", old, "-b", base_path], 1, "have no partner: embed"),
        ([f"c={made}/c.safetensors", f"b={broken}", "-b", base_path], 1, "differs from the base by NaN or infinity"),
        ([f"c={made}/c.safetensors", "-b", broken_base], 1, f"{broken_base}: 'embed' is NaN or infinite at entry 0"),
        ([f"c={made}/c.safetensors", f"d={made}/c.safetensors", "-b", base_path], 1, "are the same model"),
        ([f"c={base_path}", "-b", base_path], 1, "is the base itself"),
        ([f"c={made}/c.safetensors", "--add-to", old, "-b", base_path, "--seed", 4], 2, "--seed: fixed when"),
        ([f"c={made}/c.safetensors", "--add-to", old, "--remove-from", old, "-b", base_path], 2, "exclude each other"),
        ([f"c={made}/c.safetensors", "--add-to", made / "a.safetensors", "-b", base_path], 1, "not a peru artifact"),
        ([f"c={made}/c.safetensors", "-b", base_path, "--scale", "nan"], 2, "--scale"),
        ([f"c={made}/c.safetensors", "-b", base_path, "--decorrelate", "stir"], 2, "is not shuffle, shift or none"),
    ]  # fmt: skip
    for arguments, code, says in cases:
        peru("shuffle-pack", *arguments, "-o", out, code=code)
        assert says in peru.stderr and "defect" not in peru.stderr, peru.stderr  # type: ignore[attr-defined]
        assert not out.exists()
    assert {name: (made / name).read_bytes() for name in before} == before
    assert {path.name for path in made.iterdir()} - set(before) == {
        p.name for p in (other_a, other_base, half, broken, broken_base, longer)
    }


def test_unpacking_a_missing_artifact(made: Path, peru: Peru) -> None:
    pack, out = made / "p.safetensors", made / "out.safetensors"
    base_path = made / "base.safetensors"
    peru("unpack", pack, "--task", "c", "-b", base_path, "-o", out, code=2)
    assert "holds a, b, not 'c'" in peru.stderr  # type: ignore[attr-defined]
    peru("unpack", pack, "-b", base_path, "-o", out, code=2)
    assert "holds a, b: choose one" in peru.stderr  # type: ignore[attr-defined]
    torch.manual_seed(1)
    wrong = change(made, "base", **{"layers.1.w": torch.randn(16, 8)})
    peru("unpack", pack, "--task", "a", "-b", wrong, "-o", out, code=1)
    assert "layers.1.w: different contents" in peru.stderr and not out.exists()  # type: ignore[attr-defined]
    peru("prune", made / "a.safetensors", "-b", base_path, "-o", made / "d.safetensors", "--keep", "10%")
    peru("unpack", made / "d.safetensors", "--task", "x", "-b", base_path, "-o", out, code=2)
    assert "d.safetensors holds a" in peru.stderr  # type: ignore[attr-defined]


def test_values_that_do_not_fit(made: Path, peru: Peru) -> None:
    base_path = made / "base.safetensors"
    torch.manual_seed(1)
    spike = torch.zeros(30, 8)
    spike[3, 4] = 1e9
    peru("shuffle-pack", f"a={change(made, 'a', embed=spike)}", "-b", base_path, "-o", made / "q.safetensors", "--precision", 20, code=1)
    assert "too large for the pack's step" in peru.stderr  # type: ignore[attr-defined]
    peru("shuffle-pack", f"c={made}/c.safetensors", "-b", base_path, "-o", made / "q.safetensors", "--dtype", "fp16", "--scale", "1e9")
    peru("unpack", made / "q.safetensors", "-b", base_path, "-o", made / "out.safetensors", code=1)
    assert "does not fit F16" in peru.stderr and not (made / "out.safetensors").exists()  # type: ignore[attr-defined]


@pytest.mark.skipif(os.name == "nt", reason="kills are POSIX")
def test_a_killed_pack_is_the_old_one_or_the_new_one(tmp_path: Path, peru: Peru) -> None:
    noise = torch.Generator().manual_seed(0)
    tables = {"base": {f"layers.{i}.w": torch.randn(600, 400, generator=noise) for i in range(6)}}
    for task in "ab":
        tables[task] = {name: t + 0.01 * torch.randn(t.shape, generator=noise) for name, t in tables["base"].items()}
    at = {name: save(table, tmp_path / f"{name}.safetensors") for name, table in tables.items()}
    old, new, out = tmp_path / "old.safetensors", tmp_path / "new.safetensors", tmp_path / "out.safetensors"
    peru("shuffle-pack", f"a={at['a']}", "-b", at["base"], "-o", old, "--no-sync")
    command = ["shuffle-pack", f"b={at['b']}", "--add-to", old, "-b", at["base"]]
    peru(*command, "-o", new, "--no-sync")
    before, after = old.read_bytes(), new.read_bytes()
    arguments = [*map(str, command), "-o", str(out), "--force", "--threads", "1", "--tile-entries", "16384"]
    whole = 0.0
    for share in (None, 0.5, 0.7, 0.85, 0.95):
        shutil.copy(old, out)
        started = time.monotonic()
        child = subprocess.Popen([sys.executable, "-m", "peru_cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if share is not None:
            time.sleep(share * whole)
            child.send_signal(signal.SIGKILL)
        child.wait(60)
        whole = max(whole, time.monotonic() - started) if share is None else whole
        assert out.read_bytes() in ((after,) if share is None else (before, after))
        assert old.read_bytes() == before
    peru(*command, "-o", out, "--force", "--no-sync")
    assert out.read_bytes() == after
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
