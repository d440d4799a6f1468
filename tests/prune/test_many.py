"""Checkpoints of many small tensors: they share tiles, and the artifact is the same as if each had its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peru_cli.checkpoints import bundle
from peru_cli.vectors.copy import _Copy
from peru_cli.vectors.family import TaskVector
from peru_cli.vectors.selection import Select
from tests.conftest import assert_same_tensors, save

SHAPES = [(8, 8), (3, 5), (1,), (), (0, 4), (7,), (64, 3)]


def many(count: int, mixed: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A base and a fine-tune of small tensors, here and there one of another dtype, a large one, or one that grew."""
    noise = torch.Generator().manual_seed(1)
    base, fine = {}, {}
    for i in range(count):
        name, shape = f"experts.{i}.weight", SHAPES[i % len(SHAPES)]
        other = mixed and i % 29 == 0
        dtype = torch.float32 if other else torch.bfloat16
        shape = (20_000,) if mixed and i == 40 else shape
        base[name] = torch.randn(shape, generator=noise).to(dtype)
        fine[name] = base[name] if mixed and i % 11 == 3 else (base[name] + (torch.randn(shape, generator=noise) * 0.1).to(dtype)).to(dtype)
    if mixed:
        base["experts.7.position_ids"] = fine["experts.7.position_ids"] = torch.arange(4)
        base["embed.weight"] = torch.randn(5000, 2, generator=noise)
        fine["embed.weight"] = torch.cat([base["embed.weight"] * 1.5, torch.ones(3, 2)])
        fine["head.weight"] = torch.ones(2)
    return base, fine


@pytest.mark.parametrize("how", [["--keep", "10%"], ["--lossless"], ["--keep", "5%", "--values", "bf16"]])
def test_small_tensors_that_share_tiles_give_the_same_artifact(tmp_path: Path, peru, how: list[str], monkeypatch) -> None:
    base, fine = many(150, mixed=True)
    a, b = save(base, tmp_path / "base.safetensors"), save(fine, tmp_path / "fine.safetensors")
    peru("prune", b, "-b", a, *how, "--no-sync", "-o", tmp_path / "together.safetensors")
    back, folder, alone = (tmp_path / name for name in ("back.safetensors", "back", "back-alone.safetensors"))
    peru("unpack", tmp_path / "together.safetensors", "-b", a, "--no-sync", "-o", back)
    peru("unpack", tmp_path / "together.safetensors", "-b", a, "--no-sync", "--max-shard-size", "20kB", "-o", folder)
    if how == ["--lossless"]:
        assert_same_tensors(back, fine)
    monkeypatch.setattr(bundle, "MOST", -1)
    peru("prune", b, "-b", a, *how, "--no-sync", "-o", tmp_path / "alone.safetensors")
    assert (tmp_path / "together.safetensors").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    peru("unpack", tmp_path / "together.safetensors", "-b", a, "--no-sync", "-o", alone)
    assert back.read_bytes() == alone.read_bytes()
    shards = [load_file(shard) for shard in sorted(folder.glob("*.safetensors"))]
    assert len(shards) > 2
    assert_same_tensors(back, {name: tensor for shard in shards for name, tensor in shard.items()})


def test_a_wrong_base_is_refused_by_the_small_tensor_that_differs(tmp_path: Path, peru) -> None:
    base, fine = many(150, mixed=True)
    a, b = save(base, tmp_path / "base.safetensors"), save(fine, tmp_path / "fine.safetensors")
    peru("prune", b, "-b", a, "--keep", "10%", "--no-sync", "-o", tmp_path / "delta.safetensors")
    base["experts.63.weight"][3] += 1
    save(base, a)
    peru("unpack", tmp_path / "delta.safetensors", "-b", a, "--no-sync", "-o", tmp_path / "back.safetensors", code=1)
    assert "experts.63.weight: different contents" in peru.stderr and not (tmp_path / "back.safetensors").exists()


def test_work_is_done_by_tiles_not_by_tensors(tmp_path: Path, peru, monkeypatch) -> None:
    base, fine = many(2000, mixed=False)
    a, b = save(base, tmp_path / "base.safetensors"), save(fine, tmp_path / "fine.safetensors")
    tiles = []
    apply = Select.apply
    monkeypatch.setattr(Select, "apply", lambda self, tile, room: (tiles.append(tile), apply(self, tile, room))[1])
    peru("prune", b, "-b", a, "--keep", "10%", "--no-sync", "-o", tmp_path / "out.safetensors")
    assert len(tiles) < 10
    copied = []
    copy = _Copy.apply
    monkeypatch.setattr(_Copy, "apply", lambda self, tile, room: (copied.append(tile), copy(self, tile, room))[1])
    peru("unpack", tmp_path / "out.safetensors", "-b", a, "--no-sync", "-o", tmp_path / "back.safetensors")
    assert 0 < len(copied) < 10


def test_a_threshold_for_each_tensor_does_not_look_at_all_tensors_each_time(tmp_path: Path, peru, monkeypatch) -> None:
    class Walked(dict):  # type: ignore[type-arg]
        def values(self):  # type: ignore[no-untyped-def]
            walks.append(self)
            return super().values()

    walks: list[Walked] = []
    made = TaskVector.__post_init__
    monkeypatch.setattr(TaskVector, "__post_init__", lambda self: (made(self), setattr(self, "pairs", Walked(self.pairs)))[0])
    base, fine = many(100, mixed=False)
    a, b = save(base, tmp_path / "base.safetensors"), save(fine, tmp_path / "fine.safetensors")
    peru("prune", b, "-b", a, "--keep", "10%", "--scope", "tensor", "--no-sync", "-o", tmp_path / "out.safetensors")
    assert walks and len(walks) < 50


def test_a_part_of_a_bundle_lies_in_the_right_tensors() -> None:
    from peru_cli.checkpoints.dtypes import BY_NAME
    from peru_cli.checkpoints.header import TensorInfo

    sizes = [3, 0, 4, 1, 0, 5]
    infos = [TensorInfo(str(i), BY_NAME["F32"], (n,)) for i, n in enumerate(sizes)]
    whole = bundle.bundle(infos)
    entries = [(i, at) for i, n in enumerate(sizes) for at in range(n)]
    for start in range(len(entries)):
        for stop in range(start + 1, len(entries) + 1):
            got = [(int(info.name), at) for info, first, last in bundle.cut(whole, start, stop) for at in range(first, last)]
            assert got == entries[start:stop]
    raw = memoryview(np.arange(13, dtype=np.float32).tobytes())
    joined = b"".join(bytes(piece) for _, _, piece in bundle.pieces_of(whole, 0, raw))
    assert joined == bytes(raw)
