"""Adapters and artifacts as fine-tunes of `prune`: the same bytes as for the unpacked model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import save
from tests.merge.test_inputs import Small, adapter


@pytest.fixture
def made(tmp_path: Path, peru) -> Path:
    """A folder with base, fine-tune, artifact, adapter, and the last two unpacked."""
    torch.manual_seed(3)
    model = Small()
    base = {name: tensor.clone().bfloat16() for name, tensor in model.state_dict().items()}
    save(base, tmp_path / "base.safetensors")
    save({n: t + (torch.randn(t.shape) * 0.1).bfloat16() for n, t in base.items()}, tmp_path / "full.safetensors")
    adapter(tmp_path / "lora", model.bfloat16(), target_modules=["query", "conv", "embed"], r=4)
    at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru("prune", tmp_path / "full.safetensors", *at, "-o", tmp_path / "artifact.safetensors", "--keep", "30%")
    peru("unpack", tmp_path / "artifact.safetensors", *at, "-o", tmp_path / "from-artifact.safetensors")
    peru("unpack", tmp_path / "lora", *at, "-o", tmp_path / "from-lora.safetensors")
    return tmp_path


@pytest.mark.parametrize(("expanded", "unpacked"), [("artifact.safetensors", "from-artifact"), ("lora", "from-lora")])
@pytest.mark.parametrize("options", [["--keep", "7%"], ["--keep", "7%", "--scope", "tensor"], ["--lossless"]])
def test_expanded_fine_tunes_prune_as_unpacked_ones(made: Path, peru, expanded: str, unpacked: str, options: list[str]) -> None:
    for out, model in (("x", expanded), ("y", f"{unpacked}.safetensors")):
        peru("prune", f"t={made / model}", "-b", made / "base.safetensors", "-o", made / f"{out}.safetensors", *options, "--no-sync")
    assert (made / "x.safetensors").read_bytes() == (made / "y.safetensors").read_bytes()


def test_an_artifact_of_another_base_or_damaged_is_refused(made: Path, peru) -> None:
    save({n: t * 2 for n, t in load_file(made / "base.safetensors").items()}, made / "wrong.safetensors")
    out = ["-o", made / "x.safetensors", "--keep", "7%"]
    peru("prune", made / "artifact.safetensors", "-b", made / "wrong.safetensors", *out, code=1)
    assert "is not the base" in peru.stderr and not (made / "x.safetensors").exists()
    data = bytearray((made / "artifact.safetensors").read_bytes())
    data[1100] ^= 1
    (made / "artifact.safetensors").write_bytes(data)
    peru("prune", made / "artifact.safetensors", "-b", made / "base.safetensors", *out, code=1)
    assert "altered" in peru.stderr and not (made / "x.safetensors").exists()


def test_an_adapter_is_refused_on_a_merge(made: Path, peru) -> None:
    models = [f"a={made / 'lora'}", f"b={made / 'full.safetensors'}", "-b", made / "base.safetensors"]
    peru("merge", *models, "-o", made / "merged", "-m", "ties", "--compress", "10%", "--no-sync")
    peru("prune", made / "lora", "-b", made / "merged" / "merged", "-o", made / "x.safetensors", "--keep", "7%", code=2)
    assert "no adapter was trained on" in peru.stderr
    # with --compress it is first expanded on its own base
    peru("prune", f"a={made / 'from-lora.safetensors'}", "-b", made / "merged" / "merged", "-o", made / "y.safetensors", "--keep", "10%")
    assert (made / "y.safetensors").read_bytes() == (made / "merged" / "a.safetensors").read_bytes()
