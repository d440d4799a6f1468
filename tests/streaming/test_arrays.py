"""Whole commands on torch's arrays, which a GPU uses: the same bytes as on NumPy's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peru_cli.methods.table import METHODS
from peru_cli.streaming.gpu import Gpu
from peru_cli.vectors import settings as how
from tests.conftest import random_pair, save


def on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(how, "pick_arrays", lambda device: Gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


@pytest.mark.parametrize("dtypes", [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("fp64", "fp64"), ("bf16", "fp32")], ids="-".join)
@pytest.mark.parametrize("options", [["--keep", "10%"], ["--keep", "5%", "--scope", "tensor"], ["--lossless"]], ids=" ".join)
def test_prune_and_unpack_write_the_same_bytes_on_torch_as_on_numpy(
    tmp_path: Path, peru: Callable[..., str], monkeypatch: pytest.MonkeyPatch, options: list[str], dtypes: tuple[str, str]
) -> None:
    tensors = random_pair(dtypes[0], base_dtype=dtypes[1])
    base, fine = save(tensors[0], tmp_path / "base.safetensors"), save(tensors[1], tmp_path / "fine.safetensors")
    for name in ("numpy", "torch"):
        if name == "torch":
            on_torch(monkeypatch)
        peru("prune", fine, "-b", base, "-o", tmp_path / f"{name}.safetensors", *options, "--no-sync")
        peru("unpack", tmp_path / f"{name}.safetensors", "-b", base, "-o", tmp_path / f"{name}-fine.safetensors", "--no-sync")
    for suffix in (".safetensors", "-fine.safetensors"):
        assert (tmp_path / f"torch{suffix}").read_bytes() == (tmp_path / f"numpy{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.statistics is None and m.tasks[1] != 1])
def test_merge_writes_the_same_bytes_on_torch_as_on_numpy(
    tmp_path: Path, peru: Callable[..., str], monkeypatch: pytest.MonkeyPatch, method: str, dtype: str
) -> None:
    base, first = random_pair(dtype)
    second = random_pair(dtype, seed=1)[1]
    for name, tensors in (("base", base), ("a", first), ("b", {n: second[n] for n in first})):
        save(tensors, tmp_path / f"{name}.safetensors")
    models = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", "-b", tmp_path / "base.safetensors", "-m", method]
    heads = ["--weight", "a=0.7"] if "weight" in METHODS[method].options else []
    peru("merge", *models, *heads, "-o", tmp_path / "numpy", "--no-sync")
    on_torch(monkeypatch)
    peru("merge", *models, *heads, "-o", tmp_path / "torch", "--no-sync")
    for path in (tmp_path / "numpy").rglob("*"):
        assert path.is_dir() or path.read_bytes() == (tmp_path / "torch" / path.relative_to(tmp_path / "numpy")).read_bytes()
