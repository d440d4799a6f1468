"""Readers of the weight updates of SGLang, prime-rl and TRL, written from their public descriptions, without code of peru."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import zstandard
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

State = dict[str, torch.Tensor]


def apply_sglang(state: State, folder: Path, applied: int) -> None:
    """The `delta_encoding: xor` of /pull_weights."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    about = index["metadata"]
    assert int(about["base_version"]) == applied and folder.name == f"weight_v{about['version']}"
    assert (about["delta_encoding"], about["compression_format"], about["checksum_format"]) == ("xor", "zstd", "blake3")
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, "pt") as file:
            digests = file.metadata()
            assert set(file.keys()) == {name for name, at in index["weight_map"].items() if at == shard}
            for name in file.keys():  # noqa: SIM118
                raw = state[name].contiguous().view(-1).view(torch.uint8).numpy()
                raw ^= np.frombuffer(
                    zstandard.ZstdDecompressor().decompressobj().decompress(file.get_tensor(name).numpy().tobytes()), np.uint8
                )
                assert blake3(raw.tobytes()).hexdigest() == digests[name]


def apply_prime_rl(state: State, folder: Path, applied: int) -> None:
    """`sparse_update_manifest.json` and its patch file."""
    manifest = json.loads((folder / "sparse_update_manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["base_step"]) == ("prime-rl-sparse-update", 1, applied)
    tensors = load_file(folder / manifest["patch_file"]) if manifest["patch_file"] else {}
    for entry in manifest["tensors"]:
        tensor, values = state[entry["name"]], tensors[entry["values"]]
        indices = tensors[entry["indices"]].long()
        assert (
            list(tensor.shape) == entry["shape"]
            and str(tensor.dtype) == f"torch.{entry['dtype']}"
            and len(indices) == entry["changed_numel"]
        )
        assert torch.hash_tensor(indices).item() ^ torch.hash_tensor(values).item() == entry["checksum"]
        tensor.view(-1)[indices] = values


def apply_trl(state: State, folder: Path, applied: int) -> None:
    """`NAME.idx`, gaps minus one, and `NAME.val`."""
    with safe_open(folder / "patch.safetensors", "pt") as file:
        about = file.metadata()
        assert (about["format"], about["sparse"], about["encoding"]) == ("sparse_weight_patch", "True", "gap_delta")
        for name in {key.removesuffix(".idx") for key in file.keys() if key.endswith(".idx")}:  # noqa: SIM118
            places = torch.cumsum(file.get_tensor(f"{name}.idx").long() + 1, 0) - 1
            state[name].view(-1)[places] = file.get_tensor(f"{name}.val")


READERS = {"sglang": apply_sglang, "prime-rl": apply_prime_rl, "trl": apply_trl}
