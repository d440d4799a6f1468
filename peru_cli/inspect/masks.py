"""`peru inspect` of masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.places import Place
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.artifacts.packs.masks import MaskPack


def show_masks(path: Place, plot: Path | None) -> None:
    """Print tasks, thresholds, how much each task keeps, and its mask's bits against the entropy of the kept share."""
    from peru_cli.artifacts.packs.masks import MaskPack
    from peru_cli.artifacts.packs.superposed import UNKNOWN

    if plot is not None:
        raise UsageError(f"--plot cannot draw masks ({path})", "leave it out")
    with MaskPack(path) as pack:
        meta, index, container = pack.metadata, pack.index, pack.container
        masks = sum(mask.nbytes for mask in pack.masks.values())
        parts = {
            "sums": container.sizes["blocks"] - masks,
            "masks": masks,
            "tasks' own tensors": container.sizes["whole"],
            "side files": container.sizes["files"],
            "index": container.sizes["index"],
            "header": container.header_bytes,
        }
        entries = max(index.entries, 1)
        console.line(f"{path}: {meta['peru.kind']}, {plural(len(index.tasks), 'task')}, {si_bytes(container.file_bytes)}")
        console.line(f"base:     {meta.get('peru.base', 'not recorded (shuffle-pack --base-id records it)')}")
        share = f", keep {meta['peru.density']}" if "peru.density" in meta else ""
        console.line(f"how:      {meta['peru.method']}{share}, scale {meta['peru.scale']}, precision {meta['peru.precision']}")
        console.line()
        rows = [[part, count(nbytes), f"{8 * nbytes / entries:.4f}" if part in ("sums", "masks") else ""] for part, nbytes in parts.items()]
        in_all = ["deltas in all", count(pack.delta_bytes), f"{8 * pack.delta_bytes / entries:.4f}"]
        console.table(["part", ">bytes", ">bits/param"], [*rows, in_all])
        console.line()
        tasks = _tasks(pack, entries)
        pairs = [(other, task.name, before) for task in index.tasks for other, (before, _) in task.cosines.items() if before != UNKNOWN]
        if pairs:
            console.line()
            console.table(["task", "and", ">cosine"], [[a, b, f"{cosine / 10_000:.4f}"] for a, b, cosine in pairs])
        console.result(
            {
                "metadata": meta,
                "file_bytes": container.file_bytes,
                "delta_bytes": pack.delta_bytes,
                "parts": parts,
                "entries": index.entries,
                "bits_per_parameter": 8 * pack.delta_bytes / entries,
                "tasks": tasks,
                "cosines": [{"tasks": [a, b], "cosine": cosine / 10_000} for a, b, cosine in pairs],
            }
        )


def _tasks(pack: MaskPack, entries: int) -> list[dict[str, Any]]:
    """Print the tasks, and return them for --json."""
    from peru_cli.artifacts.index import STORED
    from peru_cli.methods.compact.masking import entropy

    rows, found = [], []
    for task in pack.index.tasks:
        mask = pack.masks[task.name]
        threshold, share = float(mask.threshold), mask.kept / entries
        bits, least = 8 * mask.nbytes / entries, entropy(mask.kept, entries)
        side = sum(file.size for file in task.files if file.origin == STORED)
        rows.append(
            [
                task.name,
                task.norm,
                f"{pack.scales.get(task.name, threshold):.4g}",
                f"{100 * share:.2f}%",
                task.error,
                task.cosine,
                f"{bits:.4f}",
                f"{least:.4f}",
                si_bytes(mask.nbytes),
                si_bytes(task.whole_bytes),
                si_bytes(side),
            ]
        )
        found.append(
            {
                "task": task.name,
                "norm": float(task.norm),
                "threshold": threshold,
                **({"scale": pack.scales[task.name]} if pack.scales else {}),
                "kept": mask.kept,
                "kept_share": share,
                "mask_bytes": mask.nbytes,
                "mask_bits_per_parameter": bits,
                "mask_entropy": least,
                "error": float(task.error),
                "cosine": float(task.cosine),
                "rounding": float(task.rounding),
                "own_tensors": [tensor.info.name for tensor in task.tensors],
                "digest": task.digest.hex(),
            }
        )
    columns = [
        ">norm",
        ">scale" if pack.scales else ">threshold",
        ">kept",
        ">error",
        ">cosine",
        ">bits/entry",
        ">entropy",
        ">mask",
        ">own tensors",
        ">side files",
    ]
    console.table(["task", *columns], rows)
    return found
