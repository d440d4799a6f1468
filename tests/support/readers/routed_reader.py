"""A reader of routed experts written from docs/routing.md, docs/packs.md and docs/format.md alone. It shares no code with peru."""

from __future__ import annotations

import numpy as np

from tests.support.readers.format_reader import BITS, DTYPES, Array, Cursor, short
from tests.support.readers.pack_reader import COPY, PackReader


class RoutedReader(PackReader):
    """Everything in the file. `experts[weight, task]` is left (out, r), right (r, in) and bias (out,) or None, in float64."""

    kind = "routed"

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        assert all(tensor["mode"] == COPY for tensor in self.tensors)
        outer = self.outer
        kind = DTYPES[outer.byte()]
        self.experts: dict[tuple[str, str], tuple[Array, Array, Array | None]] = {}
        self.transposed: dict[str, bool] = {}
        at, last, blocks = 0, -1, self.roles["blocks"]
        for _ in range(outer.varint()):
            number, flags = outer.varint(), outer.byte()
            assert number > last
            last = number
            weight = self.tensors[number]
            rows, columns = weight["shape"][::-1] if flags & 1 else weight["shape"]
            if flags & 2:
                assert self.tensors[outer.varint()]["shape"] == (rows,)
            self.transposed[weight["name"]] = bool(flags & 1)
            for task in self.tasks:
                rank, digest = outer.varint(), outer.take(16)
                numbers = rank * (columns + rows) + (rows if flags & 2 else 0)
                block = blocks[at : at + numbers * BITS[kind] // 8]
                at += len(block)
                assert short(block) == digest and rank <= int(self.metadata["peru.rank"])
                values = floats(block, kind)
                right, left = values[: rank * columns].reshape(rank, columns), values[rank * columns : rank * (columns + rows)]
                bias = values[rank * (columns + rows) :] if flags & 2 else None
                self.experts[weight["name"], task["name"]] = left.reshape(rank, rows).T, right, bias
        assert at == len(blocks) and outer.at == len(outer.data)

    def open_index(self, index: bytes) -> Cursor:
        self.outer = Cursor(index)
        assert self.outer.byte() == 1
        return Cursor(self.outer.take(self.outer.varint()))

    def read_sums(self) -> dict[str, Array]:
        assert self.cursor.byte() == 1 and self.cursor.varint() and self.cursor.varint() == 0
        return {}


def floats(data: bytes, kind: str) -> Array:
    """Numbers in float64."""
    if kind == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[kind]).astype(np.float64)


class GatedReader(PackReader):
    """Everything in an artifact of gated MLPs. `routers` has, by the name of an MLP's first weight, the weight and bias of each layer.

    `parts` are the differences, whole artifacts of kind `mixed`: of all other tensors, then of each task. `mlps` lists the layers of each
    MLP: weight, bias or None, transposed, whether it takes the MLP's input. `seen` has, for each task, examples and how they were sent."""

    kind = "routed"

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        outer, blocks = self.outer, self.roles["blocks"]
        kind, depth, tasks = DTYPES[outer.byte()], int(self.metadata["peru.layers"]), len(self.tasks)
        self.mlps: list[list[tuple[str, str | None, bool, bool]]] = []
        self.routers: dict[str, list[tuple[Array, Array]]] = {}
        at = 0
        for _ in range(outer.varint()):
            layers, width = [], 0
            for _ in range(outer.varint()):
                weight, flags = self.tensors[outer.varint()], outer.byte()
                bias = self.tensors[outer.varint()]["name"] if flags & 2 else None
                layers.append((weight["name"], bias, bool(flags & 1), bool(flags & 4)))
                width = weight["shape"][0 if flags & 1 else 1] if flags & 4 else width
            outputs = [width] * (depth - 1) + [tasks]
            size = sum(n * (width + 1) for n in outputs) * BITS[kind] // 8 + (
                4 * tasks * (tasks + 1) if int(self.metadata["peru.steps"]) else 0
            )
            block, at = blocks[at : at + size], at + size
            assert short(block) == outer.take(16)
            values, router = floats(block[: sum(n * (width + 1) for n in outputs) * BITS[kind] // 8], kind), []
            for n in outputs:
                router.append((values[: n * width].reshape(n, width), values[n * width : n * (width + 1)]))
                values = values[n * (width + 1) :]
            self.mlps.append(layers)
            self.routers[layers[0][0]] = router
        self.parts = []
        for _ in range(1 + tasks):
            size, digest = outer.varint(), outer.take(16)
            self.parts.append(blocks[at : at + size])
            at += size
            assert short(self.parts[-1]) == digest
        self.seen = [(outer.take(16), outer.varint(), [outer.varint() for _ in self.tasks]) for _ in self.tasks] if outer.byte() else []
        assert at == len(blocks) and outer.at == len(outer.data)

    open_index = RoutedReader.open_index
    read_sums = RoutedReader.read_sums
