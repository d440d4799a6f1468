"""Inputs that change unnoticed, shared models, hostile text in files: refused, named, escaped or masked."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peru_cli.checkpoints.local import checkpoint as local
from peru_cli.checkpoints.local import inputs
from peru_cli.errors import UsageError
from peru_cli.publish.run import collect
from peru_cli.vectors.selection import Select
from tests.conftest import random_pair, run_peru, save
from tests.support import data_family, models

Peru = Callable[..., str]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A base and a fine-tune, folders with a config each."""
    for name, tensors in zip(("base", "fine"), random_pair("bf16"), strict=True):
        (tmp_path / name).mkdir()
        save(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"hidden_size": 4}')
    return tmp_path / "base", tmp_path / "fine"


@pytest.fixture
def limit() -> Iterator[None]:
    """Wakes whoever waits for a pipe after 20 seconds."""

    def late(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def stderr(peru: Peru) -> str:
    return str(peru.stderr)  # type: ignore[attr-defined]


# -- inputs that change -------------------------------------------------------------------------------


def change_while_read(monkeypatch: pytest.MonkeyPatch, victim: Path, change: Callable[[], None], after: int = 3) -> None:
    """Change a file after this many reads of some file."""
    read, left = local.RandomAccessFile.read_into, [after]

    def counted(self: local.RandomAccessFile, offset: int, buffer: memoryview) -> None:
        read(self, offset, buffer)
        left[0] -= 1
        if left[0] == 0:
            change()

    monkeypatch.setattr(local.RandomAccessFile, "read_into", counted)


def overwrite(path: Path) -> Callable[[], None]:
    """Other weights in place, of the same size."""

    def change() -> None:
        data = bytearray(path.read_bytes())
        data[-1000:] = bytes(1000)
        with open(path, "r+b") as file:
            file.write(data)

    return change


COMMANDS = {
    "prune": ["prune", "t={fine}", "-b", "{base}", "-o", "{out}/a.safetensors", "--keep", "10%"],
    "lossless": ["prune", "t={fine}", "-b", "{base}", "-o", "{out}/a.safetensors", "--lossless"],
    "tensor": ["prune", "t={fine}", "-b", "{base}", "-o", "{out}/a.safetensors", "--keep", "10%", "--scope", "tensor"],
    "merge": ["merge", "a={fine}", "b={base}", "-o", "{out}/m", "--method", "linear"],
    "unpack": ["unpack", "{artifact}", "-b", "{base}", "-o", "{out}/r"],
    "pack": ["shuffle-pack", "a={fine}", "b={other}", "-b", "{base}", "-o", "{out}/p.safetensors"],
    "svd-lora": ["svd-lora", "{fine}", "-b", "{base}", "-o", "{out}/l", "--rank", "2"],
    "inspect": ["inspect", "{fine}", "-b", "{base}"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_input_that_changes_is_named_and_nothing_is_written(tmp_path: Path, peru, pair, monkeypatch, name: str) -> None:
    """Every input of every command: overwritten in place; a side file by another of the same size."""
    base, fine = pair
    artifact, out = tmp_path / "artifact.safetensors", tmp_path / "out"
    out.mkdir()
    peru("prune", f"t={fine}", "-b", base, "-o", artifact, "--lossless", "--no-sync")
    other = save({n: -t if t.is_floating_point() else t for n, t in random_pair("bf16")[1].items()}, tmp_path / "other.safetensors")
    command = [part.format(base=base, fine=fine, artifact=artifact, out=out, other=other) for part in COMMANDS[name]]
    command += [] if name == "inspect" else ["--no-sync"]
    victims = [base / "model.safetensors", artifact if name == "unpack" else fine / "model.safetensors"]
    kept = {path: path.read_bytes() for path in victims}
    for victim in victims:
        with monkeypatch.context() as patch:
            change_while_read(patch, victim, overwrite(victim), 9)
            peru(*command, code=1)
        assert f"{victim} was changed while it was being read" in stderr(peru)
        assert list(out.iterdir()) == []
        victim.write_bytes(kept[victim])
    if name not in ("inspect", "unpack"):
        config = fine / "config.json"

        def another() -> None:  # the file's clock is set back: only its bytes differ
            times = config.stat()
            config.write_text('{"hidden_size": 5}')
            os.utime(config, ns=(times.st_atime_ns, times.st_mtime_ns))

        with monkeypatch.context() as patch:
            change_while_read(patch, config, another, 9)
            peru(*command, code=1)
        assert f"{config} was changed while it was being read" in stderr(peru)
        assert list(out.iterdir()) == []


def test_both_passes_read_the_same_bytes_of_a_base_that_carries_digests(tmp_path: Path, peru, pair, monkeypatch) -> None:
    """A sealed base that was compared in the first pass, then overwritten with its times put back."""
    base, fine = pair
    merged, out = tmp_path / "merged.safetensors", tmp_path / "a.safetensors"
    peru("merge", f"a={fine}", f"b={base}", "-o", merged, "-m", "linear", "--no-sync")
    select = Select.apply

    def at_once(self: Select, *given: object) -> object:
        monkeypatch.setattr(Select, "apply", select)
        times, data = merged.stat(), bytearray(merged.read_bytes())
        data[-400:] = bytes(400)
        with open(merged, "r+b") as file:
            file.write(data)
        os.utime(merged, ns=(times.st_atime_ns, times.st_mtime_ns))
        return select(self, *given)

    monkeypatch.setattr(inputs, "_SMALL", 0)  # as if all were large
    monkeypatch.setattr(Select, "apply", at_once)
    peru("prune", f"t={fine}", "-b", merged, "-o", out, "--keep", "10%", "--no-sync", code=1)
    assert "changed while it was being read: nothing was written" in stderr(peru)
    assert not out.exists()


def test_an_input_that_is_replaced_or_removed(tmp_path: Path, peru, pair, monkeypatch) -> None:
    base, fine = pair
    weights, out = fine / "model.safetensors", tmp_path / "a.safetensors"
    data = weights.read_bytes()

    def replace() -> None:
        (fine / "new").write_bytes(data)
        os.replace(fine / "new", weights)

    for change, says in ((replace, "was changed while"), (weights.unlink, "disappeared while")):
        with monkeypatch.context() as patch:
            change_while_read(patch, weights, change, 9)
            peru("prune", f"t={fine}", "-b", base, "-o", out, "--lossless", "--no-sync", code=1)
        assert says in stderr(peru) and str(weights) in stderr(peru)
        assert not out.exists()


def test_an_output_may_take_the_place_of_its_input(tmp_path: Path, peru, pair) -> None:
    """--force over an artifact that is pruned again, twice in one command."""
    base, fine = pair
    out = tmp_path / "deltas"
    peru("prune", f"a={fine}", f"b={fine}", "-b", base, "-o", out, "--lossless", "--no-sync")
    peru("prune", f"a={out}/a.safetensors", f"b={out}/b.safetensors", "-b", base, "-o", out, "--keep", "10%", "--force", "--no-sync")
    peru("unpack", out / "a.safetensors", "-b", base, "-o", tmp_path / "r", "--no-sync")


def test_what_a_merge_sealed_can_be_pruned(tmp_path: Path, peru, pair) -> None:
    """Its digests are of its own tensors, not of what pruning leaves of them."""
    base, fine = pair
    for keep in (["--lossless"], ["--keep", "10%"]):
        peru("merge", f"a={fine}", "-b", base, "-o", tmp_path / "merged", "-m", "task-arithmetic", "--no-sync", "--force")
        peru("prune", tmp_path / "merged", "-b", base, "-o", tmp_path / "a.safetensors", *keep, "--no-sync", "--force")
        peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r", "--no-sync", "--force")


# -- files that are not regular ------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX")
def test_pipes_devices_and_folders_in_the_place_of_files(tmp_path: Path, peru, pair, limit) -> None:
    base, fine = pair
    made = tmp_path / "made.safetensors"
    peru("prune", f"t={fine}", "-b", base, "-o", made, "--lossless", "--no-sync")
    out = ["-o", tmp_path / "a.safetensors", "--lossless"]
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        for kind in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
            folder = tmp_path / "odd"
            folder.mkdir()
            kind(folder / name)
            for command in (["prune", folder, "-b", base, *out], ["prune", fine, "-b", folder, *out], ["inspect", folder]):
                before = set(tmp_path.rglob("*"))
                code = 1 if name != "pytorch_model.bin" else 2
                peru(*command, code=code)
                assert code == 2 or "not a regular file" in stderr(peru), stderr(peru)
                assert set(tmp_path.rglob("*")) == before
            (folder / name).rmdir() if (folder / name).is_dir() else (folder / name).unlink()
            folder.rmdir()
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for command in (["unpack", pipe, "-b", base, "-o", tmp_path / "r"], ["unpack", made, "-b", pipe, "-o", tmp_path / "r"]):
        peru(*command, code=2)
        assert "not a regular file" in stderr(peru)
    (tmp_path / "adapter").mkdir()
    os.mkfifo(tmp_path / "adapter" / "adapter_config.json")
    peru("unpack", tmp_path / "adapter", "-b", base, "-o", tmp_path / "r", code=2)


# -- text in strangers' files --------------------------------------------------------------------------------

HOSTILE = "\x1b]0;owned\x07\x1b[31m\u202egnp\u2028error: all is well\u0085"


def harmless(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n")), repr(text)


def test_nothing_in_metadata_names_or_labels_reaches_the_terminal_raw(tmp_path: Path, peru, pair) -> None:
    base, fine = pair
    folder = tmp_path / f"odd{HOSTILE.replace('/', '')}"
    folder.mkdir()
    tensors = {f"layer{HOSTILE[7:9]}\u202e\u2028.weight".replace("\x1b", ""): torch.randn(40, 8).bfloat16()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": HOSTILE})
    (folder / f"{HOSTILE}.json").write_text("{}")
    config = {"id2label": {"0": HOSTILE}, "model_type": HOSTILE, "architectures": [HOSTILE]}
    (folder / "config.json").write_text(json.dumps(config))
    for command in (
        ["inspect", folder], ["inspect", folder, "--json"], ["inspect", folder, "-b", base], ["prune", folder, "-b", base, "-o", "x"],
        ["merge", f"a={folder}", f"b={fine}", "-o", tmp_path / "m", "--method", "linear"],
            ["svd-lora", folder, "-b", fine, "-o", tmp_path / "l", "--rank", "2"],
        ["eval", folder, "--data", folder / "config.json"], ["push", folder, "org/name"], [HOSTILE], ["inspect", f"--{HOSTILE}"],
        ["--debug", "prune", folder, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless"],
    ):  # fmt: skip
        for code in (0, 1, 2):
            try:
                out = peru(*command, code=code)
                break
            except AssertionError:
                assert code < 2
        harmless(out)
        harmless(stderr(peru))
        if "--json" in command:
            assert "\u202e" in json.loads(out)["tensor_list"][0]["name"]  # the same value, escaped


def test_a_password_in_an_address_is_masked_also_with_debug(tmp_path: Path) -> None:
    """Of the endpoint and of proxies: nobody answers there."""
    for variable in ("HF_ENDPOINT", "HTTPS_PROXY"):
        env = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), variable: "http://user:hunter22@127.0.0.1:9", "HF_TOKEN": "hf_" + "a" * 30}
        found = run_peru("--debug", "inspect", "org/name", env=env)
        assert found.returncode == 1 and "hunter22" not in found.stdout + found.stderr and "aaaa" not in found.stderr
    assert "***@" in run_peru("--debug", "inspect", "org/name", env=env | {"HF_ENDPOINT": "http://user:hunter22@127.0.0.1:9"}).stderr


def test_messages_stay_short_whatever_names_there_are(tmp_path: Path, peru, pair) -> None:
    base, _ = pair
    long = {"n" * 300_000: torch.zeros(8), "m " * 100_000: torch.zeros(8)}
    many = {f"tensor.{i}.weight": torch.zeros(1) for i in range(3000)}
    for name, tensors in (("long", long), ("many", many)):
        path = save(tensors, tmp_path / f"{name}.safetensors")
        for command in (
            ["prune", path, "-b", base, "-o", tmp_path / "a.safetensors", "--lossless"],
            ["merge", f"a={path}", f"b={base}", "-o", tmp_path / "m", "--method", "linear"],
            ["prune", base, "-b", path, "-o", tmp_path / "a.safetensors", "--lossless"],
        ):
            before = set(tmp_path.rglob("*"))
            peru(*command, code=1)
            assert len(stderr(peru)) < 20_000
            assert set(tmp_path.rglob("*")) == before
    assert len(max(peru("inspect", tmp_path / "long.safetensors").split("\n"), key=len)) < 1000
    header = json.dumps({"x" * 2_000_000: {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    peru("inspect", tmp_path / "bad.safetensors", code=1)
    assert "(2,000,002 characters)" in stderr(peru) and len(stderr(peru)) < 1000


# -- reports that nobody reads -------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_report_that_cannot_be_written_says_what_was(tmp_path: Path, pair) -> None:
    base, fine = pair
    import subprocess
    import sys

    out = tmp_path / "a.safetensors"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "peru_cli", "prune", f"t={fine}", "-b", base, "-o", out, "--lossless", "--json", "--no-sync"]
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        inspected = subprocess.run([*command[:3], "inspect", out], stdout=full, stderr=subprocess.PIPE, text=True)
        quiet = subprocess.run([*command[:-2], "--force"], stdout=subprocess.PIPE, stderr=full, text=True)
    assert found.returncode == 1 and out.exists()
    assert f"wrote {out}, but the report could not be written to stdout: No space left" in found.stderr
    assert "another disk" not in found.stderr and "Exception" not in found.stderr
    assert inspected.returncode == 1 and "the report could not be written to stdout" in inspected.stderr
    assert "wrote" not in inspected.stderr
    assert quiet.returncode == 0  # notes that nobody reads are no reason to fail


# -- what is published, and what code runs -------------------------------------------------------------------


def test_links_out_of_a_folder_are_not_published(tmp_path: Path, pair) -> None:
    """A secret under the name of a side file, or a folder elsewhere; links within the folder are published."""
    _, fine = pair
    secret = tmp_path / "id_rsa"
    secret.write_text("{}")
    (fine / "generation_config.json").symlink_to(fine / "config.json")
    assert sorted(collect([fine])) == ["config.json", "generation_config.json", "model.safetensors"]
    (fine / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UsageError, match=r"links to files outside of it: .*tokenizer\.json"):
        collect([fine])


def test_code_that_a_model_names_is_neither_run_nor_asked_for(tmp_path: Path, peru, monkeypatch) -> None:
    """A type that transformers knows runs with transformers' code, with a note; any other is refused."""
    _base, fine = models.pair(models.bert, tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": n % 3}) + "\n" for n, text in enumerate(["a b", "c d", "a"])))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    config = json.loads((fine / "config.json").read_text())
    (fine / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    own = {"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    (fine / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    peru("eval", fine, "--data", data)
    assert "names its own Python code (auto_map), which peru does not run" in stderr(peru)
    (fine / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "evil"}))
    peru("eval", fine, "--data", data, code=1)
    assert "its own Python code, which peru does not run" in stderr(peru) and "--trust-remote-code" in stderr(peru)
    assert not (tmp_path / "ran").exists()
    peru("eval", fine, "--trust-remote-code", "-b", _base, "--against", fine, code=2)  # weights only: no model is run


OWN_CODE = """
from transformers import BertConfig, BertForSequenceClassification
from .tools import ran
class Config(BertConfig):
    model_type = "own"
class Model(BertForSequenceClassification):
    config_class = Config
    def forward(self, *given, **named):
        ran()
        return super().forward(*given, **named)
"""


@pytest.mark.parametrize("kind", ["own", "bert"])
def test_code_is_run_for_those_who_mean_it(tmp_path: Path, peru, kind: str) -> None:
    """The model's own class runs in eval and in a merge with data, for its own type and one of transformers'; afterwards never again."""
    family = data_family.write_family(tmp_path, count=4)
    plain = json.loads(peru("eval", family / "a", "--data", family / "a.jsonl", "--json"))
    for name in ("base", "a", "b"):
        path = family / name / "config.json"
        own = {"AutoModelForSequenceClassification": "own.Model"} | ({"AutoConfig": "own.Config"} if kind == "own" else {})
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": own, "model_type": kind}))
        (family / name / "own.py").write_text(OWN_CODE if kind == "own" else OWN_CODE.replace("config_class = Config", "pass"))
        (family / name / "tools.py").write_text(f"def ran():\n    open({str(tmp_path / 'ran')!r}, 'w')\n")
    trusted = json.loads(peru("eval", family / "a", "--data", family / "a.jsonl", "--json", "--trust-remote-code"))
    assert "its own Python code is run (own.py, tools.py)" in stderr(peru) and (tmp_path / "ran").exists()
    assert trusted["tasks"] == plain["tasks"] if "tasks" in plain else trusted == plain
    (tmp_path / "ran").unlink()
    merge = data_family.command(family, "fisher", "-o", tmp_path / "merged")
    peru(*merge, "--trust-remote-code")
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    peru("eval", family / "a", "--data", family / "a.jsonl", code=1 if kind == "own" else 0)
    assert not (tmp_path / "ran").exists()
    own = json.loads((family / "a" / "config.json").read_text())
    other = own | {"auto_map": {"AutoConfig": "org/repo--own.Config"}}
    (family / "a" / "config.json").write_text(json.dumps(other))
    peru("eval", family / "a", "--data", family / "a.jsonl", "--trust-remote-code", code=2)
    assert "names code of another repo" in stderr(peru)
