"""LyCORIS' products in single files: LoHa's Hadamard product and LoKr's Kronecker product, as its trainers write them.

LoHa (FedPara, https://arxiv.org/abs/2108.06098): (w1_a w1_b) * (w2_a w2_b). LoKr (https://arxiv.org/abs/2212.10650):
w1 kron w2, each whole or a product of two. Both are scaled by alpha / rank if there is a rank, and have Tucker cores for
kernels. One module's update is computed at once. PEFT's own LoHa and LoKr adapters are read by peft instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.errors import BadFile
from peru_cli.shown import listed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Product:
    """One module: `parts` are its tensors by LyCORIS' names; `rows` and `columns` are its update's, with kernels flattened."""

    name: str
    parts: Mapping[str, TensorInfo]
    kind: str
    rows: int
    columns: int
    scale: float

    def delta(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """The scaled update, float32 (rows, columns). `read` returns a tensor by its name in the file."""
        import torch

        given = {part: read(info.name).float() for part, info in self.parts.items() if part != "alpha"}
        if self.kind == "LoHa":
            left, right = (_loha_half(given, half) for half in "12")
            return (left * right).flatten(1).mul_(self.scale)
        first, second = (_lokr_half(given, half) for half in "12")
        for _ in range(second.ndim - first.ndim):
            first = first.unsqueeze(-1)
        return torch.kron(first, second.contiguous()).flatten(1).mul_(self.scale)


def _loha_half(given: Mapping[str, torch.Tensor], half: str) -> torch.Tensor:
    a, b, core = given[f"hada_w{half}_a"], given[f"hada_w{half}_b"], given.get(f"hada_t{half}")
    return a @ b if core is None else _tucker(core, a, b)


def _lokr_half(given: Mapping[str, torch.Tensor], half: str) -> torch.Tensor:
    if f"lokr_w{half}" in given:
        return given[f"lokr_w{half}"]
    a, b, core = given[f"lokr_w{half}_a"], given[f"lokr_w{half}_b"], given.get(f"lokr_t{half}")
    return a @ b if core is None else _tucker(core, a, b)


def _tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.einsum("ij...,jr,ip->pr...", core, b, a)


def open_product(module: str, parts: Mapping[str, TensorInfo], alpha: float | None, recorded: float | None, label: str) -> Product:
    """Check a module's parts by their shapes. BadFile names what is missing or does not fit.

    Args:
        alpha: the module's own. recorded: the metadata's alpha for all modules."""
    kind = "LoHa" if any(part.startswith("hada_") for part in parts) else "LoKr"
    halves = [_half(kind, half, parts) for half in "12"]
    if any(half is None for half in halves):
        raise BadFile(
            f"{label}: {module}: its {kind} has {listed(sorted(parts))} only", "the file is incomplete: save or download it again"
        )
    sizes = [half for half in halves if half is not None]
    (rows, columns, rank), (more_rows, more_columns, other) = sizes
    used = {part for half in "12" for part in _parts(kind, half, parts)} | {"alpha"}
    if odd := sorted(set(parts) - used):
        raise BadFile(f"{label}: {module}: its {kind} has {parts[odd[0]].name} and another tensor for the same half")
    if rank is not None and other is not None and rank != other:
        raise BadFile(f"{label}: {module}: the halves of its {kind} have ranks {rank} and {other}")
    if kind == "LoHa" and (rows, columns) != (more_rows, more_columns):
        raise BadFile(f"{label}: {module}: the halves of its LoHa are {rows} x {columns} and {more_rows} x {more_columns}")
    rank = rank if rank is not None else other
    alpha = alpha if alpha is not None else recorded
    scale = 1.0 if rank is None or alpha is None else alpha / rank  # two whole factors have no rank, and LyCORIS does not scale them
    if kind == "LoKr":
        rows, columns = rows * more_rows, columns * more_columns
    return Product(module, parts, kind, rows, columns, scale)


def _parts(kind: str, half: str, parts: Mapping[str, TensorInfo]) -> list[str]:
    """The existing parts of one half. LoKr's whole factor takes precedence over a product."""
    if kind == "LoKr" and f"lokr_w{half}" in parts:
        return [f"lokr_w{half}"]
    stem = "hada" if kind == "LoHa" else "lokr"
    return [part for part in (f"{stem}_w{half}_a", f"{stem}_w{half}_b", f"{stem}_t{half}") if part in parts]


def _half(kind: str, half: str, parts: Mapping[str, TensorInfo]) -> tuple[int, int, int | None] | None:
    """Rows, columns (kernels flattened) and rank of one half. None if it is incomplete or its shapes do not fit."""
    shapes = [parts[part].shape for part in _parts(kind, half, parts)]
    if not shapes or any(len(shape) < 2 or not math.prod(shape) for shape in shapes):
        return None
    if len(shapes) == 1:
        return (shapes[0][0], math.prod(shapes[0][1:]), None) if kind == "LoKr" and f"lokr_w{half}" in parts else None
    a, b = shapes[:2]
    if len(shapes) == 2:
        return (a[0], b[1], a[1]) if len(a) == len(b) == 2 and a[1] == b[0] else None
    core = shapes[2]
    return (a[1], b[1] * math.prod(core[2:]), a[0]) if core[:2] == (a[0], b[0]) else None
