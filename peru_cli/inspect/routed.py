"""`peru inspect` of artifacts that route: what all methods share. Each method's own table is below."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.places import Place
from peru_cli.console import console, count, plural, si_bytes
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.artifacts.packs.smile import Smile
    from peru_cli.artifacts.packs.wemoe import Wemoe


def show_routed(path: Place, plot: Path | None, every: bool) -> None:
    """Print tasks, what is stored of the task vectors, and bytes by part and by layer."""
    from peru_cli.artifacts.index import STORED
    from peru_cli.artifacts.packs.routed import open_routed

    if plot is not None:
        raise UsageError(f"--plot cannot draw routed experts ({path})", "leave it out")
    with open_routed(path) as routed:
        meta, index, container = routed.metadata, routed.index, routed.container
        own = _OWN[routed.method](routed, every)
        parts = {
            **own.parts,
            "tasks' own tensors": container.sizes["whole"],
            "side files": container.sizes["files"],
            "index": container.sizes["index"],
            "header": container.header_bytes,
        }
        console.line(f"{path}: {meta['peru.kind']}, {plural(len(index.tasks), 'task')}, {si_bytes(container.file_bytes)}")
        console.line(f"base:     {meta.get('peru.base', 'not recorded (shuffle-pack --base-id records it)')}")
        console.line(f"how:      {meta['peru.method']}, {routed.how()}")
        console.line(f"layers:   {own.said}")
        console.line()
        console.table(["part", ">bytes"], [[part, count(nbytes)] for part, nbytes in parts.items()])
        console.line()
        tasks = []
        for task in index.tasks:
            side = sum(file.size for file in task.files if file.origin == STORED)
            sizes = (routed.task_bytes(task), task.whole_bytes, side)
            tasks.append([task.name, task.norm, task.error, task.cosine, *map(si_bytes, sizes)])
        console.table(["task", ">norm", ">error", ">cosine", f">{own.blocks}", ">own tensors", ">side files"], tasks)
        console.line()
        own.show()
        shown = [
            {
                "task": task.name,
                "norm": float(task.norm),
                "error": float(task.error),
                "cosine": float(task.cosine),
                "expert_bytes": routed.task_bytes(task),
                "own_tensors": [tensor.info.name for tensor in task.tensors],
                "whole_bytes": task.whole_bytes,
                "digest": task.digest.hex(),
            }
            for task in index.tasks
        ]
        told = {"metadata": meta, "file_bytes": container.file_bytes, "parts": parts}
        console.result(told | routed.figures() | {"tasks": shown, "layers": own.layers()})


class _OfSmile:
    """Experts by layer."""

    blocks = "experts"

    def __init__(self, smile: Smile, every: bool) -> None:
        self._smile, self._every = smile, every
        self.parts = {"experts": smile.container.sizes["blocks"]}
        others = sum(t.info.dtype.compressible for t in smile.index.tensors) - sum(len(layer.held) for layer in smile.layers)
        self.said = f"{count(len(smile.layers))} routed; {plural(others, 'other tensor')} stay as in the base"
        self._sizes = {
            layer.weight.name: sum(smile.dtype.nbytes(layer.numbers(task)) for task in range(len(smile.index.tasks)))
            for layer in smile.layers
        }

    def show(self) -> None:
        from peru_cli.reports.fold import fold

        ranks = {layer.weight.name: [expert.rank for expert in layer.experts] for layer in self._smile.layers}
        span = {name: (min(found), max(found)) for name, found in ranks.items()}
        groups = fold(
            self._smile.layers,
            lambda layer: layer.weight.name,
            lambda layer: layer.weight.name if self._every else (layer.weight.shape, span[layer.weight.name]),
        )
        rows = []
        for name, members in groups:
            least, most = span[members[0].weight.name]
            shape = f"{members[0].outputs}x{members[0].inputs}"
            size = sum(self._sizes[layer.weight.name] for layer in members)
            rows.append([name, str(len(members)), shape, str(least) if least == most else f"{least} to {most}", si_bytes(size)])
        console.table(["layer", "?>count", "shape", ">rank", ">bytes"], rows)

    def layers(self) -> list[dict[str, Any]]:
        return [
            {
                "name": layer.weight.name,
                "shape": [layer.outputs, layer.inputs],
                "bias": layer.bias is not None,
                "ranks": [expert.rank for expert in layer.experts],
                "bytes": self._sizes[layer.weight.name],
            }
            for layer in self._smile.layers
        ]


class _OfWemoe:
    """MLPs with their routers, and where the routers sent what they were trained on."""

    blocks = "MLPs"

    def __init__(self, wemoe: Wemoe, every: bool) -> None:
        self._wemoe, self._every = wemoe, every
        blocks, rest = wemoe.container.sizes["blocks"], wemoe.sizes[0][0]
        self.parts = {"differences of MLPs": blocks - rest - wemoe.router_bytes, "difference of all other tensors": rest}
        self.parts["routers"] = wemoe.router_bytes
        layers = sum(len(mlp.layers) for mlp in wemoe.mlps)
        others = sum(t.info.dtype.compressible for t in wemoe.index.tensors) - len(wemoe.gated)
        self.said = f"{plural(len(wemoe.mlps), 'MLP')} of {layers} layers; {plural(others, 'other tensor')} are summed"

    def show(self) -> None:
        from peru_cli.reports.fold import fold

        wemoe = self._wemoe
        if wemoe.seen:
            tasks = list(wemoe.tasks)
            rows = [
                [task, count(seen.examples), *(f"{100 * n / max(seen.examples, 1):.1f}" for n in seen.sent)]
                for task, seen in zip(tasks, wemoe.seen, strict=True)
            ]
            console.table(["routed to, % of the inputs trained on", ">inputs", *(f">{task}" for task in tasks)], rows)
            console.line()
        named = [(mlp, layer, entry) for mlp in wemoe.mlps for layer, entry in zip(mlp.layers, mlp.entries, strict=True)]
        groups = fold(
            named, lambda one: one[1].weight.name, lambda one: one[1].weight.name if self._every else (one[1].weight.shape, one[2])
        )
        rows = [
            [name, str(len(members)), f"{members[0][1].outputs}x{members[0][1].inputs}", "yes" if members[0][2] else ""]
            for name, members in groups
        ]
        console.table(["layer", "?>count", "shape", "seen by the router"], rows)

    def layers(self) -> list[dict[str, Any]]:
        return [
            {
                "name": layer.weight.name,
                "shape": [layer.outputs, layer.inputs],
                "bias": layer.bias is not None,
                "mlp": number,
                "entry": entry,
            }
            for number, mlp in enumerate(self._wemoe.mlps)
            for layer, entry in zip(mlp.layers, mlp.entries, strict=True)
        ]


_OWN: dict[str, Callable[[Any, bool], Any]] = {"smile": _OfSmile, "wemoe": _OfWemoe}
