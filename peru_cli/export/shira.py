"""A fine-tune as PEFT's SHiRA adapter (Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175): sparse differences of linear layers.

The format is that of peft 0.21 (peft/tuners/shira): for each targeted module `shira_weight` (K,) float32 and `shira_indices` (2, K)
int32 rows and columns, where K = r (d_in + d_out) with one r for all modules. What is missing is padded with differences of zero.
A module that changes in more places, or in its bias, or that is no linear layer, is saved whole (`modules_to_save`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import FileWriter
from peru_cli.checkpoints.lora.keys import OUTER
from peru_cli.checkpoints.lora.module import LINEAR
from peru_cli.checkpoints.lora.writer import adapter_writer
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch
from peru_cli.export.changes import Array, Change, Changes, Target
from peru_cli.lora.extract_plan import Extraction, Rest, Weight, plan_extraction, plan_rest
from peru_cli.shown import listed

_FLOATS = ("BF16", "F16", "F32")
_EACH = 4 + 8  # bytes of one entry: its difference, its row and column


@dataclass(frozen=True)
class Plan:
    """What becomes of each changed module: sparse with rank `rank`, or whole."""

    extraction: Extraction
    rank: int
    sparse: list[Weight]
    counts: Mapping[str, int]  # changed entries of each tensor that changed
    rest: Rest

    def entries(self, weight: Weight) -> int:
        """K of a module."""
        return self.rank * (weight.rows + weight.columns)

    @property
    def tensors(self) -> list[TensorInfo]:
        """All tensors of the adapter's file."""
        found = [TensorInfo(OUTER + self.extraction.in_memory(info.name), info.dtype, info.shape) for info in self.rest.saved]
        for weight in self.sparse:
            found.append(TensorInfo(f"{OUTER}{weight.name}.shira_weight", BY_NAME["F32"], (self.entries(weight),)))
            found.append(TensorInfo(f"{OUTER}{weight.name}.shira_indices", BY_NAME["I32"], (2, self.entries(weight))))
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of these tensors."""
        return sum(info.nbytes for info in self.tensors)


def plan_shira(changes: Changes, advance: Callable[[int], None]) -> Plan:
    """Count what changed, and decide. Mismatch for what the format cannot hold."""
    extraction = plan_extraction("shira", changes.fine, changes.base, None)
    counts = {target.info.name: found for target in changes.targets if (found := _count(changes, target, advance))}
    in_base = {target.info.name for target in changes.targets if target.base is not None}
    biased = {extraction.module_of(name) for name in counts if extraction.in_memory(name).endswith(".bias")}
    able = [
        weight
        for weight in extraction.weights
        if weight.kind == LINEAR
        and not weight.transposed
        and weight.tensor in counts
        and weight.tensor in in_base
        and weight.name not in biased
        and weight.pair.fine.dtype.name in _FLOATS
    ]
    rank, sparse = _choose(able, counts)
    if not sparse:
        raise Mismatch(
            f"{changes.fine.label}: no linear layer changed in so few entries that SHiRA would be smaller than the layer",
            "keep fewer entries (peru prune --keep), or write an adapter of low rank (peru svd-lora)",
        )
    rest = plan_rest(extraction, sparse, counts, in_modules=True)
    if left := [info.name for info in rest.delta] + [pair.fine.name for pair in rest.biases]:
        raise Mismatch(f"SHiRA cannot hold what changed here: {listed(left)}", "send the whole model (peru unpack), or undo these changes")
    return Plan(extraction, rank, sparse, counts, rest)


def _count(changes: Changes, target: Target, advance: Callable[[int], None]) -> int:
    """Changed entries of a tensor; all of them if the base has none like it."""
    found = 0
    for _, ours, theirs in changes.pieces(target):
        width = max(target.info.dtype.bits // 8, 1)
        unit = f"u{width}" if width <= 8 else "u1"
        new = np.frombuffer(ours, unit)
        found += len(new) if theirs is None else int(np.count_nonzero(new != np.frombuffer(theirs, unit)))
    advance(target.info.entries)
    return found


def _choose(able: list[Weight], counts: Mapping[str, int]) -> tuple[int, list[Weight]]:
    """The rank with the fewest bytes, and the modules that are sparse with it; the others are saved whole."""
    need = {weight.name: -(-counts[weight.tensor] // (weight.rows + weight.columns)) for weight in able}
    best, fewest = (0, list[Weight]()), sum(weight.pair.fine.nbytes for weight in able)
    for rank in sorted(set(need.values())):
        sparse = [w for w in able if need[w.name] <= rank and rank * (w.rows + w.columns) <= w.rows * w.columns]
        names = {weight.name for weight in sparse}
        whole = sum(weight.pair.fine.nbytes for weight in able if weight.name not in names)
        nbytes = whole + sum(rank * (weight.rows + weight.columns) * _EACH for weight in sparse)
        if sparse and nbytes < fewest:
            best, fewest = (rank, sparse), nbytes
    return best


def _floats(raw: bytes, dtype: str) -> Array:
    """Values as float32, exactly."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


def _differences(base: Array, fine: Array) -> tuple[Array, int]:
    """d in float32 so that base + d is the fine-tune's value in float32; and for how many entries there is no such d: they are off by
    one unit in the last place of the larger of both values."""
    found: Array = (fine.astype(np.float64) - base.astype(np.float64)).astype(np.float32)
    for toward in (np.float32(np.inf), np.float32(-np.inf)):
        other = np.nextafter(found, toward)
        better = (base + found != fine) & (base + other == fine)
        found = np.where(better, other, found)
    return found, int(np.count_nonzero(base + found != fine))


def write_shira(plan: Plan, changes: Changes, folder: Path, sync: bool, advance: Callable[[int], None]) -> int:
    """Write the adapter into an unfinished folder. Returns how many entries float32 differences cannot give exactly.

    BadFile or Mismatch for values that are not finite. Memory: two tensors."""
    extraction, inexact = plan.extraction, 0
    config = {
        "auto_mapping": None, "base_model_name_or_path": changes.base.public_name, "fan_in_fan_out": False,
        "inference_mode": True, "init_weights": True, "mask_type": "given", "modules_to_save": sorted(plan.rest.modules) or None,
        "peft_type": "SHIRA", "r": plan.rank, "random_seed": None, "revision": None,
        "target_modules": sorted(weight.name for weight in plan.sparse), "task_type": None,
    }  # fmt: skip
    targets = {target.info.name: target for target in changes.targets}
    writer: FileWriter = adapter_writer(folder, plan.tensors, config, {}, {}, sync)
    with writer:
        for info in plan.rest.saved:
            writer.copy(OUTER + extraction.in_memory(info.name), changes.fine, info.name)
            advance(info.entries)
        for weight in plan.sparse:
            inexact += _write_module(plan, weight, changes.change(targets[weight.tensor], _EACH, dense=False), changes.base, writer)
            advance(weight.pair.fine.entries)
        writer.commit()
    return inexact


def _write_module(plan: Plan, weight: Weight, change: Change | None, base: Checkpoint, writer: FileWriter) -> int:
    assert change is not None and change.positions is not None and change.target.base is not None
    positions, dtype = change.positions, change.target.info.dtype
    old = _floats(_gather(base, change.target.base, positions), dtype.name)
    new = _floats(change.raw, dtype.name)
    if not (np.isfinite(old).all() and np.isfinite(new).all()):
        raise Mismatch(f"{weight.tensor} changes to or from NaN or infinity, which a difference cannot hold")
    differences, inexact = _differences(old, new)
    room = plan.entries(weight)
    values, places = np.zeros(room, "<f4"), np.zeros((2, room), "<i4")
    values[: len(positions)] = differences
    places[0, : len(positions)], places[1, : len(positions)] = np.divmod(positions, weight.columns)
    writer.write(f"{OUTER}{weight.name}.shira_weight", 0, values.data.cast("B"))
    writer.write(f"{OUTER}{weight.name}.shira_indices", 0, places.data.cast("B"))
    return inexact


def _gather(base: Checkpoint, info: TensorInfo, positions: Array) -> bytes:
    """A tensor's entries at ascending positions, in its own dtype."""
    parts, width = list[bytes](), info.dtype.bits // 8
    for offset, piece in base.pieces(info.name):
        first = offset // width
        here = positions[slice(*np.searchsorted(positions, (first, first + len(piece) // width)))]
        parts.append(np.frombuffer(piece, f"<u{width}")[here - first].tobytes())
    return b"".join(parts)


def config_of(plan: Plan) -> dict[str, Any]:
    """What a report says of a plan."""
    return {"rank": plan.rank, "sparse_modules": len(plan.sparse), "whole_modules": len(plan.rest.modules), "tensor_bytes": plan.nbytes}
