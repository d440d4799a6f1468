"""`peru export` and `peru_cli.patches`: an engine that applies them to the base gets the fine-tune's bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import peru_cli
from peru_cli.errors import BadFile, Mismatch, UsageError
from tests.export.readers import READERS, State

Peru = Callable[..., str]
OPTIONS = {"lossless": ["--lossless"], "bits": ["--bits", "3", "--per-task", r"^layer\.bias$"]}


def states(seed: int = 0, share: float = 0.03) -> tuple[State, State]:
    """A base and a fine-tune with some changed entries, including NaN and -0.0; one tensor stays, one changes everywhere."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {
        "embed": random(70_000, 2).bfloat16(), "layer.weight": random(40, 25).bfloat16(), "layer.bias": random(40),
"half": random(33).half(),
        "same": random(17), "all": random(9, 5), "steps": torch.tensor([3]), "double": random(7).double(), "odd": random(3).bfloat16(),
    }  # fmt: skip
    fine = {name: tensor.clone() for name, tensor in base.items()}
    for name in ("embed", "layer.weight", "layer.bias", "half", "double", "odd"):
        flat = fine[name].view(-1)
        flat[torch.rand(len(flat), generator=generator) < share] += 1
    fine["all"] += 1
    fine["steps"] += 4
    fine["layer.bias"][:2] = torch.tensor([float("nan"), -0.0])
    fine["odd"][1] *= 3
    return base, fine


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path]:
    base, fine = states()
    for name, state in (("base", base), ("fine", fine)):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors", {"format": "pt"})
    return tmp_path / "base", tmp_path / "fine"


def same_bits(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[name].contiguous().view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8)) for name in a
    )


def load(folder: Path) -> State:
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("to", READERS)
@pytest.mark.parametrize("form", ["checkpoint", "lossless", "bits"])
def test_an_update_turns_the_base_into_the_fine_tune(family: tuple[Path, Path], tmp_path: Path, peru: Peru, to: str, form: str) -> None:
    base, fine = family
    given, wanted = fine, load(fine)
    if form != "checkpoint":
        given = tmp_path / "a.safetensors"
        peru("prune", fine, "--base", base, "-o", given, *(OPTIONS[form]))
        peru("unpack", given, "--base", base, "-o", tmp_path / "back/")
        wanted = load(tmp_path / "back")
    out = tmp_path / "weight_v000004"
    report = json.loads(peru("export", given, "--base", base, "--to", to, "-o", out, "--step", 4, "--base-step", 2, "--json"))
    state = load(base)
    changed = sum(int((state[name].view(-1).view(torch.uint8) != wanted[name].view(-1).view(torch.uint8)).any()) for name in state)
    READERS[to](state, out, 2)
    assert same_bits(state, wanted)
    assert report["changed_tensors"] == changed and report["bytes"] == sum(path.stat().st_size for path in out.iterdir())


def test_nothing_changed_is_an_update_without_tensors(family: tuple[Path, Path], tmp_path: Path, peru: Peru) -> None:
    base, _ = family
    for to in READERS:
        out = tmp_path / to / "weight_v000001"
        out.parent.mkdir()
        peru("export", base, "--base", base, "--to", to, "-o", out, "--step", 1)
        state = load(base)
        READERS[to](state, out, 0)
        assert same_bits(state, load(base))


def test_a_wrong_base_or_a_damaged_artifact_leaves_no_update(family: tuple[Path, Path], tmp_path: Path, peru: Peru) -> None:
    base, fine = family
    artifact, other = tmp_path / "a.safetensors", tmp_path / "other"
    peru("prune", fine, "--base", base, "-o", artifact, "--lossless")
    other.mkdir()
    state = load(base)
    state["same"][0] += 1
    save_file(state, other / "model.safetensors", {"format": "pt"})
    peru("export", artifact, "--base", other, "--to", "prime-rl", "--step", 1, "-o", tmp_path / "u", code=1)
    assert "same: different contents" in peru.stderr  # type: ignore[attr-defined]
    raw = bytearray(artifact.read_bytes())
    raw[len(raw) // 2] ^= 1
    artifact.write_bytes(raw)
    peru("export", artifact, "--base", base, "--to", "prime-rl", "--step", 1, "-o", tmp_path / "u", code=1)
    assert not (tmp_path / "u").exists() and not list(tmp_path.glob(".u*"))


def test_tensors_that_engines_cannot_patch_are_refused(family: tuple[Path, Path], tmp_path: Path, peru: Peru) -> None:
    base, fine = family
    state = load(fine) | {"head": torch.ones(3)}
    save_file(state, fine / "model.safetensors", {"format": "pt"})
    peru("export", fine, "--base", base, "--to", "trl", "--step", 1, "-o", tmp_path / "u", code=1)
    assert "head" in peru.stderr and "unpack" in peru.stderr  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "sglang", "-o", "update"], "weight_v000001"),
        (["--to", "sglang", "-o", "weight_v000003", "--step", "4"], "not the version"),
        (["--to", "sglang", "-o", "weight_v000000"], "steps count from 1"),
        (["--to", "trl", "-o", "u"], "add --step N"),
        (["--to", "trl", "-o", "u", "--step", "3", "--base-step", "3"], "cannot follow"),
        (["--to", "onnx", "-o", "u", "--step", "3"], "sglang, prime-rl, trl, shira, gguf"),
        (["--to", "gguf", "-o", "u.gguf", "--step", "3"], "an adapter has no number"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(arguments: list[str], says: str, peru: Peru) -> None:
    peru("export", "nothing", "--base", "nothing", *arguments, code=2)
    assert says in peru.stderr  # type: ignore[attr-defined]


@pytest.mark.parametrize("dense", [None, True, False])
@pytest.mark.parametrize("form", ["checkpoint", "lossless"])
def test_patches_turn_the_base_into_the_fine_tune(
    family: tuple[Path, Path], tmp_path: Path, peru: Peru, dense: bool | None, form: str
) -> None:
    base, fine = family
    given = fine
    if form == "lossless":
        given = tmp_path / "a.safetensors"
        peru("prune", fine, "--base", base, "-o", given, "--lossless")
    state = load(base)
    for patch in peru_cli.patches(given, base, dense=dense):
        assert patch.shape == tuple(state[patch.name].shape) and patch.dtype == state[patch.name].dtype == patch.values.dtype
        if patch.indices is None:
            assert dense is not False
            state[patch.name] = patch.values.view(patch.shape)
        else:
            assert dense is not True and patch.indices.dtype == torch.int32 and bool((patch.indices.diff() > 0).all())
            state[patch.name].view(-1)[patch.indices] = patch.values
    assert same_bits(state, load(fine))


def test_patches_take_the_smaller_form_for_each_tensor(family: tuple[Path, Path]) -> None:
    base, fine = family
    found = {patch.name: patch for patch in peru_cli.patches(fine, base)}
    assert "same" not in found and found["all"].indices is None and found["embed"].indices is not None
    for patch in found.values():
        size = patch.values.element_size()
        if patch.indices is not None:
            assert len(patch.indices) * (size + 4) < size * torch.Size(patch.shape).numel()


@pytest.mark.parametrize("held", [0, 1 << 27])
def test_patches_yield_nothing_for_a_wrong_base(family: tuple[Path, Path], tmp_path: Path, peru: Peru, monkeypatch, held: int) -> None:
    """Nor for an artifact that was altered; whether the changes are held until they are verified, or read twice."""
    monkeypatch.setattr("peru_cli.export.patches.HELD", held)
    base, fine = family
    artifact = tmp_path / "a.safetensors"
    peru("prune", fine, "--base", base, "-o", artifact, "--keep", "20%")
    state, given = load(base), load(fine)
    for patch in peru_cli.patches(artifact, base):
        if patch.indices is not None:
            now, was, wanted = (t.contiguous().view(torch.uint8).view(len(patch.indices), -1) for t in (
                patch.values, state[patch.name].view(-1)[patch.indices], given[patch.name].view(-1)[patch.indices]
            ))  # fmt: skip
            assert bool((now != was).any(1).all())
            assert patch.dtype == torch.float32 or torch.equal(now, wanted)  # --keep rounds differences of float32
    with pytest.raises(Mismatch):
        next(peru_cli.patches(artifact, fine))
    data = bytearray(artifact.read_bytes())
    data[len(data) // 4] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(data)
    with pytest.raises(BadFile):
        next(peru_cli.patches(tmp_path / "altered.safetensors", base))
    with pytest.raises(Mismatch):  # at the end, unless it is verified first
        list(peru_cli.patches(artifact, fine, verify_first=False))


def test_patches_of_new_tensors_are_dense(family: tuple[Path, Path]) -> None:
    base, fine = family
    save_file(load(fine) | {"head": torch.arange(3.0)}, fine / "model.safetensors", {"format": "pt"})
    head = next(patch for patch in peru_cli.patches(fine, base) if patch.name == "head")
    assert head.indices is None and head.values.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match="head"):
        list(peru_cli.patches(fine, base, dense=False))


def test_dtypes_that_torch_lacks_are_refused(tmp_path: Path) -> None:
    from peru_cli.checkpoints.dtypes import BY_NAME
    from peru_cli.checkpoints.header import TensorInfo, build_header

    for name, value in (("base", 0), ("fine", 1)):
        info = TensorInfo("x", BY_NAME["F6_E2M3"], (4,), 0)
        floats = TensorInfo("w", BY_NAME["F32"], (1,), 3)
        (tmp_path / f"{name}.safetensors").write_bytes(build_header([info, floats], {"format": "pt"}) + bytes([value, 0, 0]) + bytes(4))
    with pytest.raises(BadFile, match="torch has no dtype"):
        list(peru_cli.patches(tmp_path / "fine.safetensors", tmp_path / "base.safetensors"))
