"""`peru verify`: every kind of file that peru writes passes unchanged, and any changed byte is reported, as is what cannot be checked."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from tests.conftest import save


@pytest.fixture
def outputs(tmp_path: Path, peru) -> Path:
    """One file of each kind, for a base and two fine-tunes with heads."""
    noise = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.weight": torch.randn(24, 20, generator=noise).bfloat16() for i in range(2)}
    out = tmp_path / "out"
    out.mkdir()
    save(base, tmp_path / "base.safetensors")
    models = []
    for task, classes in (("a", 3), ("b", 5)):
        fine = {n: (t + 0.05 * torch.randn(t.shape, generator=noise)).bfloat16() for n, t in base.items()}
        fine["classifier.weight"] = torch.randn(classes, 20, generator=noise).bfloat16()
        (tmp_path / task).mkdir()
        save(fine, tmp_path / task / "model.safetensors")
        (tmp_path / task / "config.json").write_text('{"model_type": "bert"}')
        models.append(f"{task}={tmp_path / task}")
    more = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru("prune", models[0], *more, "-o", out / "sparse.safetensors", "--keep", "10%")
    peru("shuffle-pack", *models, *more, "-o", out / "pack.safetensors", "--residual", "5%")
    peru("shuffle-pack", *models, *more, "-o", out / "masks.safetensors", "--method", "tall-masks")
    peru("merge", *models, *more, "-o", out / "fft", "-m", "task-arithmetic", "--compress", "10%")
    peru("svd-lora", models[0], *more, "-o", out / "adapter", "--rank", "2")
    return out


def test_outputs_of_peru_are_sound_and_every_change_is_detected(outputs: Path, peru) -> None:
    found = json.loads(peru("verify", outputs, "--json"))
    assert {f["verdict"] for f in found} == {"sound"}
    told = {str(Path(f["file"]).relative_to(outputs)) for f in found}
    files = {str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file() and path.name != "README.md"}
    assert told == files  # configs, too; people edit cards
    noise = random.Random(1)
    for name in sorted(files):
        path = outputs / name
        sound = path.read_bytes()
        places = [noise.randrange(len(sound)) for _ in range(6)] + [len(sound) - 2]
        if name.endswith("adapter_config.json"):
            places = [sound.index(b'"lora_alpha": ') + 14]
        for at in places:
            damaged = bytearray(sound)
            damaged[at] ^= 1
            path.write_bytes(damaged)
            peru("verify", outputs if "heads" in name or not name.endswith(".safetensors") else path, code=1)
            assert "changed" in peru.stderr, (name, at)
        path.write_bytes(sound)


def test_an_artifact_with_a_damaged_kind_counts_as_changed(outputs: Path, peru) -> None:
    """Damage to the very key that makes it an artifact must not turn it into somebody else's file."""
    for name in ("sparse", "pack", "masks"):
        path = outputs / f"{name}.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"peru.format"', b'"peru.furmat"'))
        assert "was altered" in peru("verify", path, code=1)


def test_files_that_cannot_be_checked_are_reported(outputs: Path, peru) -> None:
    """Files of others, and unpack's output."""
    base = outputs.parent / "base.safetensors"
    peru("unpack", outputs / "sparse.safetensors", "-b", base, "-o", outputs.parent / "r", "--no-sync")
    assert "cannot be checked" in peru("verify", base, outputs.parent / "r")
    assert "2 of 2 files cannot be checked" in peru.stderr
    peru("verify", outputs.parent / "nowhere", code=2)
    (outputs.parent / "empty").mkdir()
    peru("verify", outputs.parent / "empty", code=2)
