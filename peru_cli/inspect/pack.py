"""`peru inspect` of a pack."""

from __future__ import annotations

from pathlib import Path

from peru_cli.checkpoints.places import Place
from peru_cli.console import console, count, plural, si_bytes


def show_pack(path: Place, plot: Path | None) -> None:
    """Print tasks, groups, bytes, and cosines between task vectors, unmoved and moved apart."""
    from peru_cli.artifacts.index import STORED
    from peru_cli.artifacts.packs.pack import Pack
    from peru_cli.artifacts.packs.superposed import UNKNOWN, PackMode
    from peru_cli.methods.compact.superpose import quality
    from peru_cli.pack.plan import describe_groups
    from peru_cli.reports.plots import plot_cosines

    with Pack(path) as pack:
        meta, index, container = pack.metadata, pack.index, pack.container
        parts = {
            "sums": sum(block.nbytes for block in index.blocks),
            **({"residuals": sum(residual.nbytes for residual in index.residuals)} if index.residuals else {}),
            "tasks' own tensors": container.sizes["whole"],
            "side files": container.sizes["files"],
            "index": container.sizes["index"],
            "header": container.header_bytes,
        }
        entries = max(index.entries, 1)
        groups = describe_groups(index.tensors, pack.arrangement.groups)
        pairs = [(other, task.name, *cosines) for task in index.tasks for other, cosines in task.cosines.items()]
        console.line(f"{path}: {meta['peru.kind']}, {plural(len(index.tasks), 'task')}, {si_bytes(container.file_bytes)}")
        console.line(f"base:     {meta.get('peru.base', 'not recorded (shuffle-pack --base-id records it)')}")
        how = f"decorrelate {meta['peru.decorrelate']}, signs {meta['peru.signs']}, seed {meta['peru.seed']}"
        if any(record.mode == PackMode.WEIGHTS for record in index.tensors):
            console.line("          the pack superposes whole weights, not task vectors (--whole-weights)")
        if pack.has_own_base:
            console.line("          with the plain sums of these tasks in it (--merge-base)")
        console.line(f"how:      {how}, scale {meta['peru.scale']}, precision {meta['peru.precision']}")
        console.line()
        rows = [[part, count(nbytes), f"{8 * nbytes / entries:.4f}" if part == "sums" else ""] for part, nbytes in parts.items()]
        in_all = ["deltas in all", count(pack.delta_bytes), f"{8 * pack.delta_bytes / entries:.4f}"]
        console.table(["part", ">bytes", ">bits/param"], [*rows, in_all])
        console.line()
        energies = {task.name: float(task.norm) ** 2 for task in index.tasks}
        total = sum(energies.values())
        residuals = {task.name: residual for task, residual in zip(index.tasks, index.residuals, strict=False)}
        tasks = []
        for task in index.tasks:
            own = energies[task.name]
            now = quality(own, total, own, pack.scale).error  # as if all vectors were independent
            side = sum(file.size for file in task.files if file.origin == STORED)
            mended = [residuals[task.name].error, si_bytes(residuals[task.name].nbytes)] if residuals else []
            shift = [str(task.shift)] if meta["peru.decorrelate"] == "shift" else []
            tasks.append([task.name, task.norm, f"{now:.3f}", task.error, str(task.together), task.rounding, si_bytes(task.whole_bytes),
                          si_bytes(side), *shift, *mended])  # fmt: skip
        columns = ["task", ">norm", ">expected error", ">measured", ">among", ">rounding", ">own tensors", ">side files"]
        columns += [">shift"] if meta["peru.decorrelate"] == "shift" else []
        console.table(columns + ([">with residual", ">residual"] if residuals else []), tasks)
        console.line()
        console.table(["targets", "shape", ">blocks", ">entries"], groups)
        if pairs:
            console.line()
            shown = [[a, b, *("?" if c == UNKNOWN else f"{c / 10_000:.4f}" for c in found)] for a, b, *found in pairs]
            console.table(["task", "and", ">cosine", ">moved apart"], shown)
        console.result(
            {
                "metadata": meta,
                "file_bytes": container.file_bytes,
                "delta_bytes": pack.delta_bytes,
                "parts": parts,
                "entries": index.entries,
                "bits_per_parameter": 8 * pack.delta_bytes / entries,
                "groups": [{"prefix": g.prefix, "members": list(g.members)} for g in pack.arrangement.groups],
                "tasks": [
                    {
                        "task": task.name,
                        "norm": float(task.norm),
                        "error": float(task.error),
                        "cosine": float(task.cosine),
                        "rounding": float(task.rounding),
                        "together": task.together,
                        "shift": task.shift,
                        "own_tensors": [tensor.info.name for tensor in task.tensors],
                        "digest": task.digest.hex(),
                        "residual": None
                        if task.name not in residuals
                        else {
                            "density": str(residuals[task.name].density),
                            "error": float(residuals[task.name].error),
                            "kept": sum(residuals[task.name].kept),
                            "bytes": residuals[task.name].nbytes,
                        },
                    }
                    for task in index.tasks
                ],
                "cosines": [
                    {"tasks": [a, b], "before": None if x == UNKNOWN else x / 10_000, "after": None if y == UNKNOWN else y / 10_000}
                    for a, b, x, y in pairs
                ],
            }
        )
        if plot is not None:
            plot_cosines(plot, [task.name for task in index.tasks], [(a, b, x, y) for a, b, x, y in pairs if x != UNKNOWN])
            console.note(f"drew {plot}")
