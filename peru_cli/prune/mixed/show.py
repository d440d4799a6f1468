"""The report of `peru prune` for mixed artifacts."""

from __future__ import annotations

from typing import Any

from peru_cli.console import console, si_bytes
from peru_cli.options import written_to
from peru_cli.prune.mixed.run import MixedResult


def report(results: list[MixedResult], published: dict[str, Any]) -> None:
    """Print a table, or with --json all figures."""
    rows = [
        [
            r.task,
            written_to(r.path),
            si_bytes(r.file_bytes),
            f"{r.fine_bytes / r.file_bytes:.1f}x",
            f"{r.bits_per_parameter:.4f}",
            f"{100 * r.quality:.4g}%",
            f"{r.relative_error:.4f}",
            si_bytes(r.whole_bytes),
        ]
        for r in results
    ]
    heads = ["task", "artifact", ">size", ">smaller", ">bits/param", "?>energy", ">relative error", "?>stored whole"]
    console.table(heads, rows)
    console.result([_figures(r) | published for r in results])


def _figures(r: MixedResult) -> dict[str, Any]:
    return {
        "task": r.task,
        "path": written_to(r.path),
        "kind": "mixed",
        "file_bytes": r.file_bytes,
        "delta_bytes": r.delta_bytes,
        "whole_bytes": r.whole_bytes,
        "side_bytes": r.side_bytes,
        "fine_tune_bytes": r.fine_bytes,
        "entries": r.entries,
        "bits_per_parameter": r.bits_per_parameter,
        "energy": r.energy,
        "squared_error": r.error,
        "predicted_squared_error": r.predicted_error,
        "relative_error": r.relative_error,
        "quality": r.quality,
        "ranks": r.ranks,
        "whole": [info.name for info in r.whole],
    } | ({} if r.gain is None else {"data": r.gain.figures()})
