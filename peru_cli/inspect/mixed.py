"""`peru inspect` of a mixed artifact: how each tensor is coded, its size and its error."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peru_cli.console import console, count, si_bytes

if TYPE_CHECKING:
    from peru_cli.artifacts.mixed.index import MixedRecord
    from peru_cli.artifacts.mixed.reader import Mixed
    from peru_cli.checkpoints.places import Place


def show_mixed(path: Place, plot: Path | None, every: bool) -> None:
    """Print the artifact, repeated layers in one row unless `every`. `plot` draws the bits of each tensor."""
    from peru_cli.artifacts.index import Mode
    from peru_cli.artifacts.mixed.reader import Mixed
    from peru_cli.reports.fold import fold
    from peru_cli.reports.plots import plot_by_tensor

    with Mixed(path) as artifact:
        meta, container = artifact.metadata, artifact.container
        energy, error, entries = float(meta["peru.energy"]), float(meta["peru.error"]), int(meta["peru.entries"])
        delta_bytes = container.file_bytes - container.sizes["whole"] - container.sizes["files"]
        quality, missed = (1 - error / energy, math.sqrt(error / energy)) if energy else (1.0, 0.0)
        console.line(f"{path}: {meta['peru.kind']}, task {meta['peru.task']}, {si_bytes(container.file_bytes)}")
        console.line(f"base:     {meta.get('peru.base', 'not recorded (prune --base-id records it)')}")
        console.line(f"goal:     {meta['peru.goal']}")
        if "peru.data" in meta:
            console.line(f"data:     {_data(meta['peru.data'].split(' ')[1:])}")
        console.line(f"kept:     {100 * quality:.4g}% of the task vector's energy, relative error {missed:.4f}")
        console.line(
            f"bits:     {8 * delta_bytes / max(entries, 1):.4f} per parameter ({count(entries)}), heads and side files not counted"
        )
        parts = {role: container.sizes[role] for role in ("blocks", "index", "whole", "files")} | {"header": container.header_bytes}
        console.line("bytes:    " + ", ".join(f"{role} {count(n)}" for role, n in parts.items()))
        bits = {record.info.name: tensor_bits(artifact, record) for record in artifact.index.tensors}
        console.line()
        console.table(
            ["tensor", "?>count", "?dtype", "shape", "stored as", ">bits/param"],
            [
                [
                    name,
                    str(len(members)),
                    members[0].info.dtype.name,
                    "x".join(map(str, members[0].info.shape)) or "scalar",
                    describe_all(members),
                    f"{sum(bits[r.info.name] for r in members) / max(sum(r.info.entries for r in members), 1):.4f}",
                ]
                for name, members in fold(
                    artifact.index.tensors,
                    lambda r: r.info.name,
                    lambda r: r.info.name if every else (r.info.dtype, r.info.shape, r.mode, r.parts, r.base_rows),
                )
            ],
        )
        console.result(
            {
                "metadata": dict(meta),
                "file_bytes": container.file_bytes,
                "delta_bytes": delta_bytes,
                "parts": parts,
                "entries": entries,
                "bits_per_parameter": 8 * delta_bytes / max(entries, 1),
                "quality": quality,
                "relative_error": missed,
                "tensors": [_figures(record, bits[record.info.name]) for record in artifact.index.tensors],
            }
        )
        if plot is not None:
            deltas = [record for record in artifact.index.tensors if record.mode == Mode.DELTA]
            values = [bits[record.info.name] / max(record.info.entries, 1) for record in deltas]
            plot_by_tensor(plot, [record.info.name for record in deltas], values, "bits a parameter")
            console.note(f"drew {plot}")


def describe_all(records: Sequence[MixedRecord]) -> str:
    """The parts of several tensors of one kind. Only ranks may differ."""
    ranks = sorted({record.rank for record in records})
    if len(ranks) < 2:
        return describe(records[0])
    return re.sub(r"rank \d+( of [\d,]+ rows)?", f"rank {ranks[0]} to {ranks[-1]}", describe(records[0]))


def describe(record: MixedRecord) -> str:
    """The parts of a tensor, in words."""
    from peru_cli.artifacts.index import Mode
    from peru_cli.artifacts.mixed.index import DENSE, LOW_RANK, ULPS

    if record.mode == Mode.WHOLE:
        return "whole"
    if record.mode == Mode.COPY:
        return "as in the base"
    words = []
    if record.parts & LOW_RANK:
        words.append(f"rank {record.rank}" + (f" of {count(record.kept_rows)} rows" if record.kept_rows else ""))
    if record.parts & DENSE:
        words.append("quantised")
    if record.parts & ULPS:
        words.append("exact")
    new = [f"{record.info.shape[0] - record.base_rows} new rows whole"] if record.base_rows else []
    return ", ".join([" + ".join(words) or "as in the base", *new])


def tensor_bits(artifact: Mixed, record: MixedRecord) -> float:
    """Approximate bits of a tensor: its integers at their own order-0 entropy, or its bytes if it is whole."""
    from peru_cli.artifacts.mixed.index import DENSE, LOW_RANK
    from peru_cli.methods.mixed.rates import entropy

    bits = 8.0 * record.whole_bytes
    if record.parts & LOW_RANK:
        factors = artifact.factors(record)
        bits += sum(entropy(column) for column in factors.left.T) + sum(entropy(row) for row in factors.right)
    if record.parts & DENSE:
        bits += entropy(artifact.plain(record, 0, record.base_entries))
    ulps = artifact.ulps(record, 0, record.base_entries)
    return bits + (entropy(np.asarray(ulps)) if ulps is not None else 0.0)


def _figures(record: MixedRecord, bits: float) -> dict[str, Any]:
    return {
        "name": record.info.name,
        "dtype": record.info.dtype.name,
        "shape": record.info.shape,
        "stored_as": describe(record),
        "rank": record.rank,
        "rows": record.kept_rows,
        "bits": bits,
    }


def _data(fields: list[str]) -> str:
    """What was measured on examples, in words."""
    if len(fields) == 3:
        examples, counted, agreed = fields
        share = f"{100 * int(agreed) / int(counted):.2f}%"
        return f"{int(agreed):,} of {int(counted):,} answers are the fine-tune's, {share}, on the {examples} examples that chose the bytes"
    examples, held, before, after = fields
    return f"tuned on {examples} examples; {after} from the fine-tune's outputs where {before} was without data, on {held} held out"
