"""Plain files that peru writes carry digests: any changed byte is found when they are read back, and files without digests are read."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import assert_same_tensors, save

Peru = Callable[..., str]


def model(folder: Path, seed: int, head: int | None) -> Path:
    """Two layers of a kilobyte and, optionally, a head with this many classes."""
    noise = torch.Generator().manual_seed(7)
    own = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{i}.weight": torch.randn(24, 20, generator=noise) for i in range(2)}
    tensors = {n: (t + 0.05 * torch.randn(t.shape, generator=own) * bool(seed)).bfloat16() for n, t in tensors.items()}
    if head is not None:
        tensors["classifier.weight"] = torch.randn(head, 20, generator=own).bfloat16()
    folder.mkdir()
    save(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 20}))
    return folder


@pytest.fixture
def family(tmp_path: Path, peru) -> Path:
    """Base, two fine-tunes, their merge with heads, and an adapter of one of them."""
    base = model(tmp_path / "base", 0, None)
    a, b = model(tmp_path / "a", 1, 3), model(tmp_path / "b", 2, 5)
    peru("merge", f"a={a}", f"b={b}", "-b", base, "-o", tmp_path / "merged", "-m", "task-arithmetic", "--no-sync")
    peru("svd-lora", a, "-b", base, "-o", tmp_path / "adapter", "--rank", "4", "--no-sync")
    return tmp_path


def readers(family: Path) -> dict[str, list[list[object]]]:
    """By file: the commands that read it."""
    out = ["--no-sync", "-o", family / "out.safetensors"]
    merged, head = "merged/model.safetensors", "merged/heads/a.safetensors"
    unpack = ["unpack", family / "merged", "--task", "a", *out]
    prune = ["prune", f"a={family / 'a'}", "-b", family / "merged", "--lossless", *out]
    adapter = [
        ["unpack", family / "adapter", "-b", family / "base", *out],
        ["prune", f"x={family / 'adapter'}", "-b", family / "base", "--lossless", *out],
        ["svd-lora", family / "adapter", "-o", family / "out", "--rank", "2", "--no-sync"],
    ]
    return {
        merged: [unpack, prune], head: [unpack], "adapter/adapter_model.safetensors": adapter, "adapter/adapter_config.json": adapter,
    }  # fmt: skip


def test_any_byte_that_changes_is_found(family: Path, peru) -> None:
    """Flips in every part of every file; nothing is written. In a config, every field that changes a weight."""
    noise = random.Random(0)
    tried = 0
    for name, commands in readers(family).items():
        path = family / name
        sound = path.read_bytes()
        for command in commands:
            peru(*command)
            for output in (family / "out.safetensors", family / "out"):
                shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
        places = [noise.randrange(len(sound)) for _ in range(7)] + [0, 9, len(sound) - 1]
        if name.endswith(".json"):
            places = [sound.index(b'"lora_alpha": ') + 14, sound.index(b'"r": ') + 5]
        for at in places:
            damaged = bytearray(sound)
            damaged[at] = damaged[at] ^ (1 << noise.randrange(8)) if not name.endswith(".json") else ord("7")
            path.write_bytes(damaged)
            for command in commands:
                before = set(family.rglob("*"))
                for code in (1, 2):
                    try:
                        peru(*command, code=code)
                        break
                    except AssertionError:
                        assert (code == 1 and "exit 2" in peru.stderr) or code == 1, (name, at)  # type: ignore[attr-defined]
                assert "defect" not in peru.stderr and set(family.rglob("*")) == before, (name, at)  # type: ignore[attr-defined]
                tried += 1
        path.write_bytes(sound)
    assert tried > 60


def test_a_tensor_that_was_altered_is_named(family: Path, peru) -> None:
    path = family / "merged" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for command in readers(family)["merged/model.safetensors"]:
        peru(*command, code=1)
        assert f"{path}: tensor 'layers.1.weight' was altered after it was written" in peru.stderr


def test_digests_match_the_document(family: Path) -> None:
    """Implements docs/format.md, "Sealed files", again."""
    path = family / "merged" / "model.safetensors"
    raw = path.read_bytes()
    header = raw[: 8 + int.from_bytes(raw[:8], "little")]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    told = metadata["peru.digests"]
    assert blake3(b"peru file 1\0" + header.replace(told[:64].encode(), b"0" * 64)).hexdigest() == told[:64]
    for number, (name, tensor) in enumerate(sorted(load_file(path).items())):
        shape = ",".join(map(str, tensor.shape)).encode()
        leaf = blake3(tensor.view(torch.uint8).numpy().tobytes()).digest()
        expected = blake3(b"peru tensor 1\0BF16\0" + shape + b"\0" + leaf).hexdigest()[:32]
        assert told[64 + 32 * number : 96 + 32 * number] == expected, name
    files = json.loads(metadata["peru.files"])
    assert files["config.json"] == blake3((family / "merged" / "config.json").read_bytes()).hexdigest()[:32]


def test_a_head_of_another_merge_is_refused(family: Path, peru) -> None:
    a, b = family / "a", family / "b"
    other = ["-b", family / "base", "-o", family / "other", "-m", "task-arithmetic", "--scale", "0.9", "--no-sync"]
    peru("merge", f"a={a}", f"b={b}", *other)
    shutil.copy(family / "other" / "heads" / "a.safetensors", family / "merged" / "heads" / "a.safetensors")
    peru("unpack", family / "merged", "--task", "a", "-o", family / "out", code=1)
    assert "belongs to another merge than" in peru.stderr and not (family / "out").exists()


def test_an_adapter_on_another_base_is_refused(family: Path, peru) -> None:
    """A base with other contents is refused; for one of another dtype peru warns that it cannot tell."""
    weights = load_file(family / "base" / "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in weights.items()}
    changed["layers.1.weight"][3, 3] += 1
    save(changed, family / "wrong.safetensors")
    unpack = ["unpack", family / "adapter", "-o", family / "out.safetensors", "--no-sync"]
    for command in (unpack, ["prune", f"x={family / 'adapter'}", "--lossless", *unpack[2:]]):
        peru(*command, "-b", family / "wrong.safetensors", code=1)
        assert "is not the base that" in peru.stderr and "layers.1.weight" in peru.stderr
        assert not (family / "out.safetensors").exists()
    save({name: tensor.float() for name, tensor in weights.items()}, family / "wide.safetensors")
    peru(*unpack, "-b", family / "wide.safetensors")
    assert "peru cannot tell whether it is that base" in peru.stderr
    peru("svd-lora", family / "adapter", "-o", family / "small", "--rank", "2", "--no-sync")
    peru("unpack", family / "small", "-b", family / "wrong.safetensors", "-o", family / "no.safetensors", code=1)


def test_files_without_digests_are_read_unchecked(family: Path, peru) -> None:
    """The same weights saved by safetensors, without digests; and the heads beside them, with a warning."""
    path = family / "merged" / "model.safetensors"
    weights = load_file(path)
    peru("unpack", family / "merged", "--task", "a", "-o", family / "sound.safetensors", "--no-sync")
    save_file(weights, path, metadata={"format": "pt"})
    peru("unpack", family / "merged", "--task", "a", "-o", family / "again.safetensors", "--no-sync")
    assert "have no digests" in peru.stderr
    assert_same_tensors(family / "again.safetensors", load_file(family / "sound.safetensors"))
    weights["layers.0.weight"][0, 0] += 1
    save_file(weights, path, metadata={"format": "pt"})
    peru("prune", f"a={family / 'a'}", "-b", family / "merged", "--lossless", "-o", family / "a.safetensors", "--no-sync")


def test_a_changed_configuration_beside_a_merge_is_reported(family: Path, peru) -> None:
    config = family / "merged" / "config.json"
    config.write_text(config.read_text().replace("20", "21"))
    peru("prune", f"a={family / 'a'}", "-b", family / "merged", "--lossless", "-o", family / "a.safetensors", "--no-sync")
    assert "config.json" in peru.stderr and "was changed after" in peru.stderr
