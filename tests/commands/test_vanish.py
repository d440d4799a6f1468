"""Folders that are renamed away while a command reads them: the file is named, and nothing is left; two writers of one output."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from peru_cli import cli
from peru_cli.checkpoints.local import atomic
from peru_cli.checkpoints.local import checkpoint as local
from tests.conftest import random_pair, save

TEMPLATES = ("base", "fine", "other")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and one of everything that peru writes from them."""
    at = tmp_path_factory.mktemp("vanish")
    base, fine = random_pair("bf16")
    other = {name: -tensor if tensor.is_floating_point() else tensor for name, tensor in fine.items()}
    for name, tensors in zip(TEMPLATES, (base, fine, other), strict=True):
        (at / name).mkdir()
        save(tensors, at / name / "model.safetensors")
        (at / name / "config.json").write_text('{"hidden_size": 4}')
    (at / "made").mkdir()
    for command in (
        "prune t={at}/fine -b {at}/base -o {at}/made/lossless.safetensors --lossless",
        "prune t={at}/fine -b {at}/base -o {at}/made/sparse.safetensors --keep 10%",
        "shuffle-pack a={at}/fine b={at}/other -b {at}/base -o {at}/made/pack.safetensors",
        "svd-lora {at}/fine -b {at}/base -o {at}/adapter --rank 2",
        "merge a={at}/fine b={at}/other -b {at}/base -m ties --per-task layers.10 -o {at}/merged",
        "chain add {at}/run {at}/base --step 1",
        "chain add {at}/run {at}/fine --step 2",
    ):
        assert cli.run([*command.format(at=at).split(), "--no-sync"]) == 0, command
    return at


READERS = {  # what is typed; {in} is the folder that holds the inputs, {out} the folder that must stay empty
    "prune keep": "prune t={in}/fine -b {in}/base -o {out}/a.safetensors --keep 10%",
    "prune lossless": "prune t={in}/fine -b {in}/base -o {out}/a.safetensors --lossless",
    "prune bits": "prune t={in}/fine -b {in}/base -o {out}/a.safetensors --bits 2",
    "merge linear": "merge a={in}/fine b={in}/base -o {out}/m -m linear",
    "merge ties": "merge a={in}/fine b={in}/other -b {in}/base -o {out}/m -m ties",
    "merge compressed": "merge a={in}/fine b={in}/other -b {in}/base -o {out}/m -m ties --compress 10%",
    "unpack": "unpack {in}/made/lossless.safetensors -b {in}/base -o {out}/r",
    "unpack a pack": "unpack {in}/made/pack.safetensors --task a -b {in}/base -o {out}/r.safetensors",
    "unpack an adapter": "unpack {in}/adapter -b {in}/base -o {out}/r",
    "unpack a head": "unpack {in}/merged --task a -o {out}/r",
    "shuffle-pack": "shuffle-pack a={in}/fine b={in}/other -b {in}/base -o {out}/p.safetensors",
    "masks": "shuffle-pack a={in}/fine b={in}/other -b {in}/base --method tall-masks -o {out}/p.safetensors",
    "svd-lora": "svd-lora {in}/fine -b {in}/base -o {out}/l --rank 2",
    "svd-lora smaller": "svd-lora {in}/adapter -o {out}/l --rank 1",
    "export": "export {in}/made/sparse.safetensors -b {in}/base --to prime-rl --step 1 -o {out}/x",
    "inspect": "inspect {in}/fine -b {in}/base",
    "verify": "verify {in}/made",
    "eval": "eval {in}/made/lossless.safetensors -b {in}/base --against {in}/fine",
    "chain add": "chain add {out}/run {in}/fine --step 7",
    "chain add on": "chain add {in}/run {in}/fine --step 7",
    "chain get": "chain get {in}/run 2 -o {out}/r",
    "chain verify": "chain verify {in}/run",
    "chain squash": "chain squash {in}/run 1 2 -o {out}/x.safetensors",
    "chain prune": "chain prune {in}/run --keep-every 2",
}
READS_ONLY = ("inspect", "verify", "eval", "chain verify")


def typed(name: str, inputs: Path, out: Path) -> list[str]:
    words = READERS[name].replace("{in}", str(inputs)).replace("{out}", str(out)).split()
    return words + ([] if name in READS_ONLY else ["--no-sync"])


@pytest.mark.parametrize("name", READERS)
def test_a_folder_that_is_renamed_away_is_named_and_nothing_is_left(models: Path, tmp_path: Path, capsys, monkeypatch, name: str) -> None:
    read, named = local.RandomAccessFile.read_into, 0
    victims = [victim for victim in ("base", "fine", "made", "adapter", "merged", "run") if f"{{in}}/{victim}" in READERS[name]]
    for number, (victim, after) in enumerate([(victim, after) for victim in victims for after in (2, 6)]):
        inputs, out = tmp_path / str(number), tmp_path / f"out-{number}"
        shutil.copytree(models, inputs)
        out.mkdir()
        left = [after]

        def counted(self: local.RandomAccessFile, offset: int, buffer: memoryview, victim=victim, inputs=inputs, left=left) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.rename(inputs / victim, inputs / "elsewhere")
            read(self, offset, buffer)

        with monkeypatch.context() as patch:
            patch.setattr(local.RandomAccessFile, "read_into", counted)
            code = cli.run(typed(name, inputs, out))
        said = capsys.readouterr().err
        if code == 1:
            assert f"{inputs / victim}/" in said and "disappeared while it was being read" in said, (victim, after, said)
            named += 1
        else:  # it was gone before it was opened; or it is not read any more; or a chain that is not there is begun
            begun = name == "chain add on" and victim == "run"
            assert (code == 2 and "no such" in said) or (code == 0 and (left[0] > 0 or begun)), (victim, after, code, said)
        assert code == 0 or list(out.rglob("*")) == [], (victim, after)
    assert named


@pytest.mark.parametrize("name", [name for name in READERS if name not in READS_ONLY])
def test_a_second_writer_is_refused_and_disturbs_nothing(models: Path, tmp_path: Path, peru, name: str) -> None:
    inputs, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(models, inputs)
    out.mkdir()
    words = typed(name, inputs, out)
    changes_chain = name in ("chain add", "chain add on", "chain prune")
    target = Path(words[2] if changes_chain else words[words.index("-o") + 1])
    with (
        atomic.only_writer(target, make=True) if changes_chain
        else atomic.PartialFile(target, sync=False) if target.suffix == ".safetensors"
        else atomic.PartialDirectory(target, sync=False)
    ):  # fmt: skip
        before = sorted(out.rglob("*"))
        peru(*words, code=1)
        assert "is being written by another peru" in peru.stderr
        assert sorted(out.rglob("*")) == before
    peru(*words)
