"""Weight updates on disk, as engines and trainers read them: SGLang, prime-rl, TRL. Written from their public sources (docs/engines.md)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.errors import Mismatch, UsageError
from peru_cli.export.changes import Change, Changes
from peru_cli.export.spool import Spool

_ZSTD_LEVEL = 1


@dataclass(frozen=True)
class Step:
    """The number of this update, and of the one that the engine must have applied before."""

    number: int
    before: int


@dataclass
class Written:
    """The contents of an update."""

    changed: int = 0  # entries
    tensors: int = 0
    nbytes: int = 0

    def add(self, entries: int) -> None:
        """Count a tensor."""
        self.changed += entries
        self.tensors += 1


Advance = Callable[[int], None]


def write_sglang(changes: Changes, folder: Path, step: Step, advance: Advance) -> Written:
    """SGLang's /pull_weights: each changed tensor's bytes XOR the base's, one zstd stream, with a BLAKE3 of the new bytes.

    Memory: one compressed tensor."""
    import zstandard

    changes.check_in_place()
    written, digests, shard = Written(), dict[str, str](), "model-00000-of-00001.safetensors"
    with Spool(folder) as spool:
        for target in changes.targets:
            packed, hasher, packer = bytearray(), blake3(), zstandard.ZstdCompressor(_ZSTD_LEVEL).compressobj()
            entries, width = 0, max(target.info.dtype.bits // 8, 1)
            for _, ours, theirs in changes.pieces(target):
                difference = np.frombuffer(ours, np.uint8) ^ np.frombuffer(theirs or b"", np.uint8)
                entries += int(np.count_nonzero(difference.reshape(-1, width).any(axis=1))) if difference.any() else 0
                packed += packer.compress(difference.data)
                hasher.update(ours)
            packed += packer.flush()
            if entries:
                digests[target.name] = hasher.hexdigest()
                spool.add(target.name, BY_NAME["U8"], (len(packed),), bytes(packed))
                written.add(entries)
            advance(target.info.entries)
        if digests:
            written.nbytes = spool.write(folder / shard, digests)
    metadata = {
        "version": f"{step.number:06d}", "base_version": f"{step.before:06d}", "delta_encoding": "xor", "compression_format": "zstd",
        "checksum_format": "blake3",
    }  # fmt: skip
    written.nbytes += _write_json(
        folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": dict.fromkeys(digests, shard)}
    )
    return written


def write_prime_rl(changes: Changes, folder: Path, step: Step, advance: Advance) -> Written:
    """prime-rl's sparse update: a manifest, and indices and values of each changed tensor."""
    changes.check_in_place()
    written, entries, patch = Written(), list[dict[str, Any]](), "sparse_update_patch.safetensors"
    with Spool(folder) as spool:
        for number, target in enumerate(changes.targets):
            width = 4 if target.info.entries < 1 << 31 else 8
            change = changes.change(target, width, dense=False)
            advance(target.info.entries)
            if change is None:
                continue
            indices, count = _indices(change, width), _count(change)
            checksum = _prime_rl_checksum(change, indices)
            keys = [f"tensor_{number}.indices", f"tensor_{number}.values"]
            spool.add(keys[0], BY_NAME["I32" if width == 4 else "I64"], (count,), indices.tobytes())
            spool.add(keys[1], target.info.dtype, (count,), change.raw)
            entries.append(
                {
                    "name": target.name, "shape": list(target.info.shape), "dtype": target.info.dtype.torch_name, "indices": keys[0],
                    "values": keys[1], "numel": target.info.entries, "changed_numel": count, "checksum": checksum,
                }
            )  # fmt: skip
            written.add(count)
        if entries:
            written.nbytes = spool.write(folder / patch, {"format": "pt"})
    total = changes.entries
    stats = {
        "total_tensors": len(changes.targets), "patched_tensors": written.tensors, "total_numel": total, "changed_numel": written.changed,
        "sparsity": 1 - written.changed / total if total else 1.0, "patch_bytes": written.nbytes,
    }  # fmt: skip
    manifest = {
        "format": "prime-rl-sparse-update", "version": 1, "step": step.number, "base_step": step.before, "compute_dtype": None,
        "compressed": False, "patch_file": patch if entries else None, "tensors": entries, "stats": stats,
    }  # fmt: skip
    written.nbytes += _write_json(folder / "sparse_update_manifest.json", manifest)
    return written


def write_trl(changes: Changes, folder: Path, step: Step, advance: Advance) -> Written:
    """TRL's sparse weight patch: one file with gaps between positions and values of each changed tensor.

    The format records only the new step."""
    changes.check_in_place()
    written = Written()
    with Spool(folder) as spool:
        for target in changes.targets:
            change = changes.change(target, 2, dense=False)
            advance(target.info.entries)
            if change is None:
                continue
            assert change.positions is not None
            gaps = np.diff(change.positions, prepend=-1) - 1
            if int(gaps.max()) >= 1 << 32:
                raise Mismatch(f"{target.name}: two changes lie more than 2^32 entries apart, which the format cannot hold")
            kind, dtype = ("U16", np.uint16) if int(gaps.max()) < 1 << 16 else ("U32", np.uint32)
            spool.add(f"{target.name}.idx", BY_NAME[kind], (len(gaps),), gaps.astype(dtype).tobytes())
            spool.add(f"{target.name}.val", target.info.dtype, (len(gaps),), change.raw)
            written.add(len(gaps))
        total = changes.entries
        metadata = {
            "format": "sparse_weight_patch", "version": "1", "sparse": "True", "model_version": str(step.number),
            "num_changed_params": str(written.tensors), "total_changed_elements": str(written.changed), "total_elements": str(total),
            "sparsity": str(1 - written.changed / total if total else 1.0), "encoding": "gap_delta",
        }  # fmt: skip
        written.nbytes = spool.write(folder / "patch.safetensors", metadata)
    return written


FORMATS: dict[str, Callable[[Changes, Path, Step, Advance], Written]] = {
    "sglang": write_sglang,
    "prime-rl": write_prime_rl,
    "trl": write_trl,
}


def parse_step(to: str, output: Path, number: int | None, before: int | None) -> Step:
    """The step that was given, or that SGLang's folder name states. UsageError for an invalid one."""
    named = re.fullmatch(r"weight_v(\d{6})", output.name)
    if to == "sglang" and named is None:
        raise UsageError(f"-o {output}: SGLang looks for folders called weight_v000001 and so on", "name it by its version")
    if to == "sglang" and named is not None:
        if number is not None and number != int(named.group(1)):
            raise UsageError(f"--step {number} is not the version that {output.name} says", "leave --step out")
        number = int(named.group(1))
    if number is None:
        raise UsageError(f"{to} numbers its updates", "add --step N")
    before = number - 1 if before is None else before
    if number < 1 or not 0 <= before < number:
        raise UsageError(f"step {number} cannot follow step {before}", "steps count from 1; the base is step 0")
    return Step(number, before)


def _count(change: Change) -> int:
    return change.target.info.entries if change.positions is None else len(change.positions)


def _indices(change: Change, width: int) -> Any:
    positions = np.arange(change.target.info.entries) if change.positions is None else change.positions
    return positions.astype(np.int32 if width == 4 else np.int64)


def _prime_rl_checksum(change: Change, indices: Any) -> int:
    """The XOR of both tensors' hashes, as torch computes them."""
    import torch

    kind = getattr(torch, change.target.info.dtype.torch_name or "")
    values = torch.frombuffer(bytearray(change.raw), dtype=kind)
    return int(torch.hash_tensor(torch.from_numpy(indices)).item()) ^ int(torch.hash_tensor(values).item())


def _write_json(path: Path, value: dict[str, Any]) -> int:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, "utf-8")
    return len(text.encode())
