"""`prune --values sign` and `--scope sign` (T-Switch) beside the formula in float64."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peru_cli
from peru_cli.artifacts.index import SIGN, Block, Index, Mode, Stream, TensorRecord, decode_index, encode_index
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.errors import BadFile
from tests.conftest import save

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
SHAPES = {"big": (700, 300), "row": (64,), "tiny": (3,), "scalar": (), "same": (9, 5), "up": (40,)}
Tensors = dict[str, torch.Tensor]


def pair(dtype: torch.dtype, seed: int = 5) -> tuple[Tensors, Tensors]:
    """A base and a fine-tune: `same` is unchanged, in `up` all entries grow, a third of `big` is unchanged."""
    noise = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=noise).to(dtype) for name, shape in SHAPES.items()}
    moved = {name: 0.05 * torch.randn(shape, generator=noise).double() for name, shape in SHAPES.items()}
    moved["same"] = moved["same"] * 0
    moved["up"] = moved["up"].abs() + 0.1
    moved["big"] *= torch.rand(SHAPES["big"], generator=noise) > 0.3
    fine = {name: (tensor.double() + moved[name]).to(dtype) for name, tensor in base.items()}
    for tensors in (base, fine):
        tensors["ids"] = torch.arange(7)
    fine["big"][0, :2], base["big"][0, :2] = 0.0, -0.0  # not a change of the value
    return base, fine


def kept(tau: torch.Tensor, share: Fraction, scope: str) -> torch.Tensor:
    """Which entries are kept in one tensor; ties with the last one, too, where each sign has its threshold."""
    found = torch.zeros(tau.shape, dtype=torch.bool)
    for side in (tau > 0, tau < 0) if scope == "sign" else (tau != 0,):
        count = int(share * (int(side.sum()) if scope == "sign" else tau.numel()))
        if scope == "sign" and not count:
            found |= side
        elif count:
            sizes = tau[side].abs().sort(descending=True).values
            found |= side & (tau.abs() >= sizes[min(count, len(sizes)) - 1]) if len(sizes) else side
    return found


def switched(base: torch.Tensor, fine: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """base + sign(tau) ||kept|| / sqrt(n), rounded once."""
    tau = (fine.double() - base.double()) * mask
    scale = tau.square().sum().div(mask.sum().clamp_min(1)).sqrt()
    if base.dtype == torch.float64:
        return base + tau.sign() * scale
    return (base.float() + (tau.sign() * scale).float()).to(base.dtype)


@pytest.fixture
def cases(tmp_path: Path, peru):
    def run(base: Tensors, fine: Tensors, *options: object, name: str = "a") -> Tensors:
        save(base, tmp_path / "base.safetensors")
        save(fine, tmp_path / "fine.safetensors")
        artifact, back = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-back.safetensors"
        at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
        peru("prune", tmp_path / "fine.safetensors", *at, "-o", artifact, "--values", "sign", *options)
        peru("unpack", artifact, *at, "-o", back)
        return load_file(back)

    return run


@pytest.mark.parametrize("scope", ["sign", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_comes_back_is_the_formula(dtype: str, scope: str, cases) -> None:
    base, fine = pair(DTYPES[dtype])
    got = cases(base, fine, "--keep", "40%", "--scope", scope)
    assert torch.equal(got["ids"], base["ids"]) and torch.equal(got["same"], base["same"])
    exact = dtype in ("f32", "f64") or scope == "sign"  # 16 bits have equal changes: of these, other scopes keep the first
    for name in SHAPES:
        tau = fine[name].double() - base[name].double()
        mask = kept(tau, Fraction(2, 5), scope)
        if exact:
            torch.testing.assert_close(got[name], switched(base[name], fine[name], mask), rtol=1e-6, atol=1e-7, msg=name)
        changed = got[name] != base[name]
        assert bool((changed <= mask).all()), name
        assert bool((torch.sign(got[name].double() - base[name].double()) * changed == torch.sign(tau) * changed).all()), name
    assert int((got["big"] != base["big"]).sum()) >= 0.2 * 700 * 300


def test_one_threshold_for_all_tensors_has_a_scale_in_each(cases) -> None:
    base, fine = pair(torch.float32)
    got = cases(base, fine, "--keep", "10%")
    keys = torch.cat([(fine[name] - base[name]).abs().flatten() for name in SHAPES])
    least = keys.sort(descending=True).values[int(0.1 * len(keys)) - 1]
    for name in SHAPES:
        expected = switched(base[name], fine[name], (fine[name] - base[name]).abs() >= least)
        torch.testing.assert_close(got[name], expected, rtol=1e-6, atol=1e-7, msg=name)


def test_all_that_changed_may_be_kept(cases) -> None:
    base, fine = pair(torch.float32)
    for number, scope in enumerate(("sign", "tensor", "global")):
        got = cases(base, fine, "--keep", "100%", "--scope", scope, name=f"a{number}")
        for name in SHAPES:
            torch.testing.assert_close(got[name], switched(base[name], fine[name], fine[name] != base[name]), rtol=1e-6, atol=1e-7)


def test_what_no_scale_can_make_is_stored_exactly_and_said(cases, peru) -> None:
    """NaN, infinity, and sums that do not fit the dtype."""
    base, fine = pair(torch.float16)
    fine["big"][3, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    base["row"][:2], fine["row"][:2] = torch.tensor([65504.0, -65504.0]), torch.tensor([1.0, 2.0])
    base["row"][2], fine["row"][2] = 65504.0, float("inf")
    got = cases(base, fine, "--keep", "50%", "--scope", "sign")
    assert torch.equal(got["big"][3, :3].view(torch.int16), fine["big"][3, :3].view(torch.int16))
    assert torch.equal(got["row"][2], fine["row"][2])
    back = fine["row"].double() - base["row"].double()
    mask = kept(torch.where(back.isfinite(), back, 70_000.0), Fraction(1, 2), "sign") & back.isfinite()
    expected = switched(base["row"], torch.where(mask, fine["row"], base["row"]), mask)
    torch.testing.assert_close(got["row"][3:], expected[3:], rtol=1e-3, atol=0)


def test_threads_and_tiles_change_nothing_and_every_command_reads_it(tmp_path: Path, cases, peru) -> None:
    base, fine = pair(torch.bfloat16)
    for number, more in enumerate((["--threads", 1], ["--threads", 3, "--tile-entries", 16384])):
        got = cases(base, fine, "--keep", "20%", "--scope", "sign", *more, name=f"a{number}")
    artifact, at = tmp_path / "a0.safetensors", ["-b", tmp_path / "base.safetensors"]
    assert artifact.read_bytes() == (tmp_path / "a1.safetensors").read_bytes()
    peru("verify", artifact)
    assert "signs, one scale a tensor" in peru("inspect", artifact) and "scope sign" in peru("inspect", artifact)
    peru("merge", f"x={artifact}", *at, "-o", tmp_path / "m.safetensors", "-m", "task-arithmetic", "--scale", "1", "--no-sync")
    merged = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(merged[name], got[name]) for name in SHAPES)
    live = {name: tensor.clone() for name, tensor in base.items()}
    with peru_cli.apply(live, peru_cli.open_artifact(artifact)):
        assert all(torch.equal(live[name], got[name]) for name in SHAPES)
    assert all(torch.equal(live[name], base[name]) for name in SHAPES)


def test_each_sign_apart_with_values_of_their_own(tmp_path: Path, cases, peru) -> None:
    """--scope sign chooses entries; --values says what is kept of them."""
    base, fine = pair(torch.float32)
    got = cases(base, fine, "--keep", "25%", "--scope", "sign", "--values", "exact")
    for name in SHAPES:
        mask = kept(fine[name].double() - base[name].double(), Fraction(1, 4), "sign")
        assert torch.equal(got[name], torch.where(mask, fine[name], base[name])), name
    report = json.loads(peru("inspect", tmp_path / "a.safetensors", "--json"))
    assert report["metadata"]["peru.scope"] == "sign"


def test_a_scale_that_no_number_holds_is_refused_by_name(cases, peru, tmp_path: Path) -> None:
    base, fine = pair(torch.float64)
    fine["row"] = fine["row"] * 1e300
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    arguments = ["-b", tmp_path / "base.safetensors", "-o", tmp_path / "a.safetensors", "--keep", "40%", "--values", "sign"]
    peru("prune", tmp_path / "fine.safetensors", *arguments, code=1)
    assert "the changes of 'row' are too large for one scale" in peru.stderr and not (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_an_index_with_an_impossible_scale_is_refused(scale: float) -> None:
    tensors = [TensorRecord(TensorInfo("w", BY_NAME["F32"], (8,)), Mode.DELTA, base_dtype=BY_NAME["F32"], base_digest=bytes(16), kept=2)]
    stream = Stream(BY_NAME["F32"], SIGN, kept=2, scales=[scale])
    with pytest.raises(BadFile, match="scale of its signs"):
        decode_index(encode_index(Index(tensors, [stream], [Block(0, 0, 2, False, 4, 4, 0, bytes(16))], [])))


def test_every_altered_byte_is_detected(tmp_path: Path) -> None:
    data = (Path(__file__).resolve().parents[1] / "golden" / "signs" / "artifact.safetensors").read_bytes()
    path = tmp_path / "a.safetensors"
    for at, byte in enumerate(data):
        path.write_bytes(data[:at] + bytes([byte ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(BadFile), SparseDelta(path) as delta:
            delta.verify()
