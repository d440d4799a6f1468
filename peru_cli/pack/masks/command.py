"""`peru shuffle-pack --method tall-masks|magnitude-masks|emr`: its options, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from peru_cli import options
from peru_cli.console import console, count, si_bytes
from peru_cli.errors import UsageError
from peru_cli.methods.compact.masks.table import MASKS, with_option
from peru_cli.methods.compact.routed import ROUTED
from peru_cli.pack.show import say_size

if TYPE_CHECKING:
    from peru_cli.pack.masks.run import MaskOptions, MaskResult
    from peru_cli.pack.plan import PackPlan

_ANEW = "make new masks from all fine-tunes"


def read_options(
    method: str, thresholds: list[str], keep: Optional[str], given: Mapping[str, object], change: Optional[Path]
) -> Optional[MaskOptions]:
    """The options of a method that makes masks. None for `superpose`.

    Args:
        given: other options of the command, by name. None means that the option was not given.
        change: the pack of --add-to or --remove-from.

    Raises UsageError for options that the method does not have."""
    from peru_cli.pack.masks.run import MaskOptions

    if method not in ("superpose", *MASKS):
        raise UsageError(f"--method {method!r} is not superpose, {', '.join(MASKS)}, {' or '.join(ROUTED)}")
    for option, typed in (("threshold", bool(thresholds)), ("keep", keep is not None)):
        if typed and (method not in MASKS or MASKS[method].option != option):
            raise UsageError(f"--{option} has no meaning with --method {method}", f"it belongs to --method {with_option(option)}")
    if method not in MASKS:
        return None
    if change is not None:
        said = f"--add-to and --remove-from change packs, not masks ({change})"
        raise UsageError(f"{said}: every mask depends on the sum of all task vectors", _ANEW)
    if wrong := [name for name, value in given.items() if value is not None]:
        raise UsageError(f"{', '.join(wrong)}: no meaning with --method {method}, which superposes nothing", "leave it out")
    density = options.parse_density(keep) if keep is not None else MaskOptions().keep
    return MaskOptions(method, _read_thresholds(thresholds), density)


def refuse_masks(change: Path) -> None:
    """UsageError if the pack to change is an artifact of masks."""
    from peru_cli.artifacts.container import artifact_kind
    from peru_cli.artifacts.packs.masks import KIND

    if artifact_kind(change) == KIND:
        raise UsageError(f"{change} holds masks, and every mask depends on the sum of all task vectors", _ANEW)


def _read_thresholds(texts: list[str]) -> dict[str, float]:
    """`0.4` for all tasks, `a=0.3` for one."""
    found: dict[str, float] = {}
    for text in texts:
        task, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not (math.isfinite(value) and value >= 0):
            raise UsageError(f"--threshold {text!r} is not a finite number of at least 0", "write --threshold 0.4 or --threshold TASK=0.4")
        if task in found:
            raise UsageError(f"--threshold is given twice for {task or 'all tasks'}")
        found[task] = value
    return found


def planned(plan: PackPlan, masks: MaskOptions, out: Path) -> dict[str, Any]:
    """Print what --dry-run says, and return it."""
    from peru_cli.methods.compact.masks.table import build_masks

    names = [vector.name for vector in plan.vectors]
    told: dict[str, Any] = {"output": str(out), "method": masks.method, "tasks": names, "entries": plan.entries}
    told["heads"] = {task: [info.name for info in heads] for task, heads in plan.heads.items()}
    listed = MASKS[masks.method]
    if listed.option == "threshold":
        grid = ", ".join(map(str, build_masks(masks.method).thresholds(None)))
        given = {name: masks.thresholds.get(name, masks.thresholds.get("")) for name in names}
        console.table(["task", "threshold"], [[name, f"one of {grid}" if value is None else f"{value:g}"] for name, value in given.items()])
        return told | {"thresholds": given}
    if listed.option is None:
        console.line(listed.title)
        return told
    kept = int(masks.keep * plan.entries)
    console.line(f"each task keeps its {count(kept)} largest of {count(plan.entries)} entries, or all that changed")
    return told | {"kept": kept}


def report(result: MaskResult, published: dict[str, Any]) -> None:
    """Print tasks with their masks, errors of retrieval, and bytes."""
    from peru_cli.methods.compact.masking import entropy

    pack = result.pack
    rows, packed = [], []
    for task, mask in zip(pack.tasks, result.masks, strict=True):
        share = mask.kept / max(pack.entries, 1)
        bits, least = 8 * mask.nbytes / max(pack.entries, 1), entropy(mask.kept, pack.entries)
        rows.append(
            [
                task.name,
                f"{task.norm:.4g}",
                f"{mask.threshold:.4g}" + (" (grid)" if mask.from_grid else "") if mask.scale is None else f"{mask.scale:.4g}",
                f"{100 * share:.2f}%",
                f"{task.predicted.error:.3f}",
                f"{task.measured.error:.3f}",
                f"{task.measured.cosine:.3f}",
                f"{bits:.4f}",
                f"{least:.4f}",
                si_bytes(mask.nbytes),
                si_bytes(task.whole_bytes),
            ]
        )
        packed.append(
            {
                "task": task.name,
                "norm": task.norm,
                "threshold": mask.threshold,
                "from_grid": mask.from_grid,
                "kept": mask.kept,
                "kept_share": share,
                "mask_bytes": mask.nbytes,
                "mask_bits_per_parameter": bits,
                "mask_entropy": least,
                "predicted_error": task.predicted.error,
                "predicted_cosine": task.predicted.cosine,
                "error": task.measured.error,
                "cosine": task.measured.cosine,
                "rounding": task.rounding,
                **({"scale": mask.scale} if mask.scale is not None else {}),
                "whole_bytes": task.whole_bytes,
            }
        )
    columns = [
        ">norm",
        ">scale" if result.masks[0].scale is not None else ">threshold",
        ">kept",
        ">predicted error",
        ">error",
        ">cosine",
        ">bits/entry",
        ">entropy",
        ">mask",
        ">own tensors",
    ]
    console.table(["task", *columns], rows)
    say_size(pack)
    if result.masks[0].scale is None:
        console.line(f"scale {pack.scale:g}")
    console.result(
        {
            "path": str(pack.path),
            "method": result.method,
            "file_bytes": pack.file_bytes,
            "sums_bytes": pack.sums_bytes,
            "delta_bytes": pack.delta_bytes,
            "entries": pack.entries,
            "bits_per_parameter": pack.bits_per_parameter,
            "precision": pack.precision,
            "scale": pack.scale,
            "best_scale": pack.best_scale,
            "tasks": pack.all_tasks,
            "packed": packed,
        }
        | published
    )
