"""`peru svd-lora ADAPTER`: PERU-LoRA, the best approximation of every B A of an adapter, as an adapter.

PERU paper (section 3.2, algorithm 2). The product is factored, never A and B separately (its table 6). DoRA's magnitudes
stay unchanged: they are the norms of the rows of base + update, which DoRA restores for any update."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.local.atomic import PartialDirectory
from peru_cli.checkpoints.local.writer import CheckpointWriter, FileWriter, header_bytes
from peru_cli.checkpoints.lora.adapter import REST, Adapter
from peru_cli.checkpoints.lora.config import resized_config
from peru_cli.checkpoints.lora.keys import PEFT
from peru_cli.checkpoints.lora.module import PARAMETER, LoraModule
from peru_cli.checkpoints.lora.writer import (
    adapter_writer,
    as_bytes,
    beside,
    bias_name,
    copied_tensors,
    factor_names,
    resized_metadata,
    resized_tensors,
    round_to,
)
from peru_cli.checkpoints.places import on_disk, size_of
from peru_cli.checkpoints.sidefiles import find_side_files
from peru_cli.errors import UsageError
from peru_cli.lora.passes import FactorPass, TargetPass
from peru_cli.lora.ranks import AdapterReport, Array, ModuleReport, Wanted, choose_ranks
from peru_cli.methods.compact.lowrank import DenseSvd, ThinSvd, move_scale, squared_distance, thin_inner, thin_values
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile
from peru_cli.vectors.family import StreamSettings


@dataclass
class Resize:
    """One adapter to resize: its name (empty for the only one) and its place below the output."""

    name: str
    adapter: Adapter
    folder: Path  # relative; "." for the output itself

    def dtype(self, module: LoraModule, wanted: Wanted) -> Dtype:
        """Dtype of the factors: the requested one, or that of lora_A."""
        return wanted.dtype or module.down.dtype

    def cost(self, module: LoraModule, wanted: Wanted) -> int:
        """Bytes of one more rank."""
        return self.dtype(module, wanted).nbytes(module.blocks * (module.rows + module.columns))

    def fixed_bytes(self, wanted: Wanted) -> int:
        """Bytes of the output that do not depend on ranks: the longest header, and what is copied."""
        ranks = [module.rank for module in self.adapter.modules]
        dtypes = [self.dtype(module, wanted) for module in self.adapter.modules]
        tensors = resized_tensors(self.adapter, ranks, dtypes)
        factors = {name for module in self.adapter.modules for name in factor_names(module, self.adapter.layout)}
        copied = sum(info.nbytes for info in tensors if info.name not in factors)
        return header_bytes(tensors, resized_metadata(self.adapter, ranks, wanted.words()), _sealed_files(self.adapter)) + copied


# -- the two passes over modules ------------------------------------------------------------------------


def _entries(adapter: Adapter) -> list[int]:
    """Number of entries in each module's factors."""
    return [module.down.entries + module.up.entries for module in adapter.modules]


def _blocks(adapter: Adapter, module: LoraModule, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factors of each block on the device, in their stored dtype."""
    return [(left.to(device), right.to(device)) for left, right in adapter.factors(module)]


class Energies(TargetPass):
    """Squared singular values of every module, summed over blocks."""

    def __init__(self, adapter: Adapter, how: StreamSettings) -> None:
        super().__init__(how, _entries(adapter))
        self._adapter = adapter
        self.energies: list[Array] = [np.zeros(0)] * len(adapter.modules)

    def apply(self, tile: Tile, buffers: None) -> Array:
        module = self._adapter.modules[tile.tensor]
        values = [thin_values(left, right).square().cpu().numpy() for left, right in _blocks(self._adapter, module, self.device)]
        total: Array = np.sum(values, axis=0) * module.scale**2
        return total

    def commit(self, tile: Tile, result: Array) -> None:
        self.energies[tile.tensor] = result


class _Write(FactorPass):
    """Factors every module at its rank, writes the factors and measures their error."""

    def __init__(
        self, job: Resize, wanted: Wanted, ranks: Sequence[int], stored: Sequence[int], writer: CheckpointWriter, how: StreamSettings
    ) -> None:
        super().__init__(how, _entries(job.adapter), ranks, stored, writer)
        self._job, self._adapter, self._wanted = job, job.adapter, wanted

    def apply(self, tile: Tile, buffers: None) -> list[ModuleReport]:
        adapter, number = self._adapter, tile.tensor
        module, rank, stored = adapter.modules[number], self._ranks[number], self._stored[number]
        dtype = self._job.dtype(module, self._wanted)
        bytes_ = stored * self._job.cost(module, self._wanted)
        report = ModuleReport(
            module.target, module.rows, module.columns, module.blocks, module.rank, stored, bytes_
        )  # fmt: skip
        blocks, kept = [], 0.0
        for left, right in _blocks(adapter, module, self.device):
            whole = (left.double() * module.scale, right.double())
            new_left, new_right, squared, share = self._best(whole, (left, right), module.scale, rank)
            new_left = round_to(new_left, dtype, f"{adapter.label}: {module.name}")
            new_right = round_to(new_right, dtype, f"{adapter.label}: {module.name}")
            report.squared += squared
            report.squared_error += squared_distance(whole, (new_left, new_right), squared)
            kept += share * squared
            blocks.append(self.padded(new_left, new_right, stored))
        report.energy = kept / report.squared if report.squared else 1.0
        down, up = module.join(blocks)
        names = factor_names(module, adapter.layout)
        self.write([names], (down.unsqueeze(0), up.unsqueeze(0)), dtype, [f"{adapter.label}: {module.name}"])
        self._small(module, stored)
        return [report]

    def _best(
        self, whole: tuple[torch.Tensor, torch.Tensor], factors: tuple[torch.Tensor, torch.Tensor], scale: float, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        """Factors at a rank with the scale in them, float64; the squared norm of the product, and the share of it that they keep.

        `whole` includes the scale. `factors` are the stored ones: they are used unchanged if nothing has to be dropped."""
        if rank >= whole[0].shape[1]:
            left, right = move_scale(factors[0].double(), factors[1].double(), scale)
            return left, right, thin_inner(whole, whole), 1.0
        found = DenseSvd(whole[0] @ whole[1]) if self._wanted.exact else ThinSvd(*whole)
        energies = found.values.square()
        squared = float(energies.sum())
        left, right = found.factors(rank)
        return left, right, squared, float(energies[:rank].sum()) / squared if squared else 1.0

    def _small(self, module: LoraModule, rank: int) -> None:
        """Write the small tensors: the bias of lora_B times the scale, and an alpha equal to the rank."""
        if module.bias is not None:
            info = self._adapter.file.tensors[module.bias]
            scaled = self._adapter.tensor(module.bias).double() * module.scale
            self._writer.write(bias_name(module), 0, as_bytes(round_to(scaled, info.dtype, f"{self._adapter.label}: {module.bias}")))
        if module.alpha is not None:
            info = self._adapter.file.tensors[module.alpha]
            alpha = torch.full(info.shape, float(rank)).to(getattr(torch, info.dtype.torch_name or ""))
            self._writer.write(module.alpha, 0, as_bytes(alpha))


# -- the job --------------------------------------------------------------------------------------------


def ranks_of(job: Resize, wanted: Wanted, how: StreamSettings) -> tuple[list[int], list[int]]:
    """The rank of each module's contents, and of the tensors that hold them."""
    modules = job.adapter.modules
    most = [min(m.rank, m.rows, m.columns) for m in modules]
    if wanted.rank is not None:
        ranks = [wanted.rank] * len(modules)
    else:
        energies = Energies(job.adapter, how)
        run(energies, energies.tiles(), how.threads, how.advance)
        costs = [job.cost(module, wanted) for module in modules]
        ranks = choose_ranks(wanted, energies.energies, costs, job.fixed_bytes(wanted), job.adapter.label)
    if wanted.uniform:
        ranks = [max(ranks)] * len(modules)
    # a module that already has this rank keeps its own factors, even if its matrix is smaller
    contents = [m.rank if rank >= m.rank else min(rank, top) for m, rank, top in zip(modules, ranks, most, strict=True)]
    stored = [max(contents)] * len(modules) if wanted.uniform else contents
    if len(set(stored)) > 1 and any(m.kind == PARAMETER and m.parameter is None for m in modules):
        name = next(m.name for m in modules if m.kind == PARAMETER and m.parameter is None)
        raise UsageError(f"{job.adapter.label}: peru cannot tell which parameter of {name} a rank belongs to", "use --uniform-rank")
    return contents, stored


def resize(
    jobs: Sequence[Resize], target: Path, wanted: Wanted, how: StreamSettings, sync: bool, note: Callable[[str], None]
) -> list[AdapterReport]:
    """Write all adapters. They appear at once. `target` is a folder, or a file for a single adapter in a file's layout."""
    ranks = []
    for job in jobs:
        note(f"{job.name or job.adapter.label}: choosing ranks")
        ranks.append(ranks_of(job, wanted, how))
    if target.suffix == ".safetensors":
        return [_resize(jobs[0], target, None, wanted, ranks[0], how, sync, note)]
    reports = []
    with PartialDirectory(target, sync) as folder:
        for job, chosen in zip(jobs, ranks, strict=True):
            reports.append(_resize(job, target / job.folder, folder.path / job.folder, wanted, chosen, how, sync, note))
        folder.commit()
    return reports


def _resize(
    job: Resize,
    target: Path,
    folder: Path | None,
    wanted: Wanted,
    ranks: tuple[list[int], list[int]],
    how: StreamSettings,
    sync: bool,
    note: Callable[[str], None],
) -> AdapterReport:
    adapter, (contents, stored) = job.adapter, ranks
    note(f"{job.name or adapter.label}: factoring")
    dtypes = [job.dtype(module, wanted) for module in adapter.modules]
    tensors = resized_tensors(adapter, stored, dtypes)
    metadata = resized_metadata(adapter, stored, wanted.words())
    if folder is None:
        writer = FileWriter(target, tensors, sync, metadata, files={})
    elif adapter.layout == PEFT:
        config = resized_config(adapter.config, {m.target: rank for m, rank in zip(adapter.modules, stored, strict=True)})
        small = {name: path.read_bytes() for name, path in find_side_files(adapter.path).items()}
        writer = adapter_writer(folder, tensors, config, small, metadata, sync)
    else:
        folder.mkdir(exist_ok=True, parents=True)
        writer = FileWriter(folder / adapter.weights.name, tensors, sync, metadata, files={})
    with writer:
        step = _Write(job, wanted, contents, stored, writer, how)
        run(step, step.tiles(), how.threads, how.advance)
        for name, source in copied_tensors(adapter).items():
            writer.copy(name, adapter.file, source)
        writer.commit()
    rest = adapter.path / REST
    if folder is not None and rest.is_file():  # of the base, not of the factors: unchanged
        shutil.copyfile(on_disk(rest), folder / REST)
    total = sum(info.nbytes for info in tensors)
    kept = total - sum(report.bytes for report in step.reports)
    beside_it = size_of(rest) if rest.is_file() else 0
    return AdapterReport(job.name, target, writer.nbytes, step.reports, size_of(adapter.weights) + beside_it, kept, beside_it)


def _sealed_files(adapter: Adapter) -> dict[str, bytes]:
    """The names beside the weights that the output's seal covers. Their contents do not change its size."""
    if adapter.layout != PEFT:
        return {}
    return beside({}, dict.fromkeys(find_side_files(adapter.path), b""))
