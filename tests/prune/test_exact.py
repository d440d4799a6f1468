"""The kept set, entry for entry, against a plain reference; and bit-for-bit restoration."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import FLOATS, assert_same_tensors, random_pair, raw, save
from tests.support.reference import bits, post_prune

DTYPES = list(FLOATS)


def expected_result(base, fine, masks):
    """Base plus kept entries, exactly: the fine-tune's bits where the mask is set, the cast base's elsewhere."""
    result = {}
    for name, tensor in fine.items():
        if name not in masks:
            result[name] = tensor
            continue
        cast = base[name].to(tensor.dtype)
        mixed = np.where(masks[name], bits(tensor), bits(cast))
        result[name] = torch.frombuffer(bytearray(mixed.tobytes()), dtype=tensor.dtype).view(tensor.shape) if mixed.size else tensor
    return result


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("density", ["0.3%", "1%", "10%", "0.5", "100%"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_set_equals_the_plain_reference(tmp_path: Path, peru, dtype: str, density: str, scope: str) -> None:
    base, fine = random_pair(dtype, seed=len(density))
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru(
        "prune",
        tmp_path / "fine.safetensors",
        *at,
        "-o",
        tmp_path / "a.safetensors",
        "--keep",
        density,
        "--scope",
        scope,
        "--values",
        "exact",
    )
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r.safetensors")
    share = Fraction(density.rstrip("%")) / (100 if "%" in density else 1)
    masks = post_prune(base, fine, share, scope)
    assert any(mask.any() for mask in masks.values())
    assert_same_tensors(tmp_path / "r.safetensors", expected_result(base, fine, masks))


PAIRS = [("fp32", "bf16"), ("bf16", "fp32"), ("fp16", "bf16"), ("fp64", "fp16"), ("fp32", "fp64"), ("bf16", "fp16")]


@pytest.mark.parametrize("pair", PAIRS)
def test_base_of_another_dtype_is_cast_first(tmp_path: Path, peru, pair: tuple[str, str]) -> None:
    base_dtype, dtype = pair
    base, fine = random_pair(dtype, base_dtype=base_dtype)
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru("prune", tmp_path / "fine.safetensors", *at, "-o", tmp_path / "a.safetensors", "--keep", "7%", "--values", "exact")
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r.safetensors")
    masks = post_prune(base, fine, Fraction(7, 100))
    assert_same_tensors(tmp_path / "r.safetensors", expected_result(base, fine, masks))


@pytest.mark.parametrize("dtype", DTYPES)
def test_lossless_restores_every_bit(tmp_path: Path, peru, dtype: str) -> None:
    base, fine = random_pair(dtype)
    odd = torch.tensor([float("nan"), -0.0, 0.0, float("inf"), float("-inf"), 1e-45, 1.0, -1.0]).to(FLOATS[dtype])
    base["odd"], fine["odd"] = odd.clone(), odd.flip(0).contiguous()
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[odd.element_size()]
    every = torch.arange(-(2**15), 2**15).to(width)
    if width != torch.int16:  # all patterns of the top 16 bits: every sign, exponent and some NaN payloads
        every = every << (8 * odd.element_size() - 16)
    noise = torch.Generator().manual_seed(1)
    base["every"] = every.view(FLOATS[dtype])
    fine["every"] = every[torch.randperm(len(every), generator=noise)].view(FLOATS[dtype])
    fine["position_ids"] = torch.arange(77) + 1
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru("prune", tmp_path / "fine.safetensors", *at, "-o", tmp_path / "a.safetensors", "--lossless")
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r.safetensors")
    assert_same_tensors(tmp_path / "r.safetensors", fine)


@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_that_are_not_finite_rank_first_and_are_exact(tmp_path: Path, peru, dtype: str) -> None:
    base, fine = random_pair(dtype)
    flat, base_flat = fine["embed.weight"].view(-1), base["embed.weight"].view(-1)
    flat[5], flat[9], base_flat[12], flat[100] = float("nan"), float("inf"), float("-inf"), torch.finfo(FLOATS[dtype]).max
    base_flat[20] = flat[20] = float("nan")  # unchanged: does not compete
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru("prune", tmp_path / "fine.safetensors", *at, "-o", tmp_path / "a.safetensors", "--keep", "0.01%")
    assert "differ by NaN or infinity" in peru.stderr
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r.safetensors")
    got = load_file(tmp_path / "r.safetensors")["embed.weight"].view(-1)
    for i in (5, 9, 12):
        assert raw(got[i : i + 1]) == raw(flat[i : i + 1])
    masks = post_prune(base, fine, Fraction(1, 10000))
    kept = set(np.flatnonzero(masks["embed.weight"]))
    assert {5, 9, 12} <= kept
    unkept = [i for i in range(200) if i not in kept]
    assert raw(got[unkept]) == raw(base_flat[unkept])


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_rounded_values_are_bf16_differences(tmp_path: Path, peru, dtype: str) -> None:
    """auto on wide dtypes: base + bf16(fine - base) at the kept entries, computed here directly."""
    base, fine = random_pair(dtype)
    fine["layers.0.mlp.weight"] = fine["layers.0.mlp.weight"] * 1.0371  # differences that bf16 cannot represent
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    at = ["-b", tmp_path / "base.safetensors", "--no-sync"]
    peru("prune", tmp_path / "fine.safetensors", *at, "-o", tmp_path / "a.safetensors", "--keep", "20%")
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "r.safetensors")
    masks = post_prune(base, fine, Fraction(20, 100))
    got = load_file(tmp_path / "r.safetensors")
    rounded_somewhere = False
    for name, mask in masks.items():
        delta = (fine[name] - base[name]).to(torch.float32).to(torch.bfloat16)
        want = torch.where(torch.from_numpy(mask).view(base[name].shape), base[name] + delta.to(FLOATS[dtype]), base[name])
        assert raw(got[name]) == raw(want), name
        rounded_somewhere |= raw(got[name]) != raw(torch.where(torch.from_numpy(mask).view(base[name].shape), fine[name], base[name]))
    assert rounded_somewhere


@pytest.mark.parametrize("threads,tile", [(1, 2**14), (2, 2**14), (3, 2**15), (1, 2**20), (4, 2**20)])
@pytest.mark.parametrize("extra", [("--keep", "9%"), ("--keep", "9%", "--scope", "tensor"), ("--lossless",)])
def test_same_bytes_for_any_threads_and_tiles(tmp_path: Path, peru, threads: int, tile: int, extra: tuple[str, ...]) -> None:
    noise = torch.Generator().manual_seed(3)
    base = {f"t{i}": torch.randn(150_000 + 977 * i, generator=noise).bfloat16() for i in range(3)}
    base["f"] = torch.randn(70_000, generator=noise)
    fine = {n: (t.float() + torch.randn(t.shape, generator=noise) * 0.01).to(t.dtype) for n, t in base.items()}
    save(base, tmp_path / "base.safetensors")
    save(fine, tmp_path / "fine.safetensors")
    at = [tmp_path / "fine.safetensors", "-b", tmp_path / "base.safetensors", "--no-sync", *extra]
    peru("prune", *at, "-o", tmp_path / "a.safetensors")
    peru("prune", *at, "-o", tmp_path / "b.safetensors", "--threads", threads, "--tile-entries", tile)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    unpack = ["unpack", tmp_path / "b.safetensors", "-b", tmp_path / "base.safetensors", "--no-sync"]
    peru(*unpack, "-o", tmp_path / "r1.safetensors")
    peru(*unpack, "-o", tmp_path / "r2.safetensors", "--threads", threads, "--tile-entries", tile)
    assert (tmp_path / "r1.safetensors").read_bytes() == (tmp_path / "r2.safetensors").read_bytes()


def test_several_fine_tunes_give_the_bytes_of_one_at_a_time(tmp_path: Path, peru) -> None:
    base, first = random_pair("bf16", seed=1)
    noise = torch.Generator().manual_seed(5)
    second = {n: (t + torch.randn(t.shape, generator=noise) * 0.01).to(t.dtype) if t.is_floating_point() else t for n, t in base.items()}
    second["head.weight"] = torch.randn(3, 48, generator=noise).bfloat16()
    del second["layers.1.mlp.weight"]
    save(base, tmp_path / "base.safetensors")
    save(first, tmp_path / "x.safetensors")
    save(second, tmp_path / "y.safetensors")
    common = ["-b", tmp_path / "base.safetensors", "--keep", "5%", "--no-sync", "--allow-unpaired"]
    peru("prune", f"one={tmp_path / 'x.safetensors'}", f"two={tmp_path / 'y.safetensors'}", *common, "-o", tmp_path / "both")
    for task, file in (("one", "x"), ("two", "y")):
        peru("prune", f"{task}={tmp_path / f'{file}.safetensors'}", *common, "-o", tmp_path / f"{task}.safetensors")
        assert (tmp_path / "both" / f"{task}.safetensors").read_bytes() == (tmp_path / f"{task}.safetensors").read_bytes()
