"""`peru inspect` of routed experts."""

from __future__ import annotations

from pathlib import Path

from peru_cli.checkpoints.places import Place
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError


def show_routed(path: Place, plot: Path | None, every: bool) -> None:
    """Print tasks, what their experts hold of the task vectors, and bytes by part and by layer."""
    from peru_cli.artifacts.index import STORED
    from peru_cli.artifacts.packs.routed import Routed, RoutedLayer
    from peru_cli.reports.fold import fold

    if plot is not None:
        raise UsageError(f"--plot cannot draw routed experts ({path})", "leave it out")
    with Routed(path) as routed:
        meta, index, container = routed.metadata, routed.index, routed.container
        parts = {
            "experts": container.sizes["blocks"],
            "tasks' own tensors": container.sizes["whole"],
            "side files": container.sizes["files"],
            "index": container.sizes["index"],
            "header": container.header_bytes,
        }
        console.line(f"{path}: {meta['peru.kind']}, {plural(len(index.tasks), 'task')}, {si_bytes(container.file_bytes)}")
        console.line(f"base:     {meta.get('peru.base', 'not recorded (shuffle-pack --base-id records it)')}")
        how = f"rank {routed.rank}, router of {routed.gate} directions, top {routed.top}, experts in {routed.dtype.name}"
        console.line(f"how:      {meta['peru.method']}, {how}")
        others = sum(t.info.dtype.compressible for t in index.tensors) - sum(1 + (layer.bias is not None) for layer in routed.layers)
        console.line(f"layers:   {count(len(routed.layers))} routed; {plural(others, 'other tensor')} stay as in the base")
        console.line()
        console.table(["part", ">bytes"], [[part, count(nbytes)] for part, nbytes in parts.items()])
        console.line()
        tasks = []
        for task in index.tasks:
            side = sum(file.size for file in task.files if file.origin == STORED)
            sizes = (routed.expert_bytes(task), task.whole_bytes, side)
            tasks.append([task.name, task.norm, task.error, task.cosine, *map(si_bytes, sizes)])
        console.table(["task", ">norm", ">error", ">cosine", ">experts", ">own tensors", ">side files"], tasks)
        console.line()

        def ranks(layer: RoutedLayer) -> tuple[int, int]:
            found = [expert.rank for expert in layer.experts]
            return min(found), max(found)

        def size(layer: RoutedLayer) -> int:
            return sum(routed.dtype.nbytes(layer.numbers(task)) for task in range(len(index.tasks)))

        groups = fold(
            routed.layers, lambda layer: layer.weight.name, lambda layer: layer.weight.name if every else (layer.weight.shape, ranks(layer))
        )
        rows = []
        for name, members in groups:
            least, most = ranks(members[0])
            shape = f"{members[0].outputs}x{members[0].inputs}"
            rows.append(
                [name, str(len(members)), shape, str(least) if least == most else f"{least} to {most}", si_bytes(sum(map(size, members)))]
            )
        console.table(["layer", "?>count", "shape", ">rank", ">bytes"], rows)
        console.result(
            {
                "metadata": meta,
                "file_bytes": container.file_bytes,
                "parts": parts,
                "rank": routed.rank,
                "gate": routed.gate,
                "top": routed.top,
                "tasks": [
                    {
                        "task": task.name,
                        "norm": float(task.norm),
                        "error": float(task.error),
                        "cosine": float(task.cosine),
                        "expert_bytes": routed.expert_bytes(task),
                        "own_tensors": [tensor.info.name for tensor in task.tensors],
                        "whole_bytes": task.whole_bytes,
                        "digest": task.digest.hex(),
                    }
                    for task in index.tasks
                ],
                "layers": [
                    {
                        "name": layer.weight.name,
                        "shape": [layer.outputs, layer.inputs],
                        "bias": layer.bias is not None,
                        "ranks": [expert.rank for expert in layer.experts],
                        "bytes": size(layer),
                    }
                    for layer in routed.layers
                ],
            }
        )
