"""Write adapters that load everywhere: the scale in the factors, alpha = r, keys in the adapter's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import FileWriter
from peru_cli.checkpoints.lora.adapter import WEIGHTS, Adapter
from peru_cli.checkpoints.lora.alpha import without_alpha
from peru_cli.checkpoints.lora.bound import BASE_TENSORS
from peru_cli.checkpoints.lora.config import CONFIG, encode_config, sealed_config
from peru_cli.checkpoints.lora.keys import DIFFUSERS, KOHYA, OUTER, PEFT
from peru_cli.checkpoints.lora.module import EMBEDDING, LoraModule
from peru_cli.errors import BadFile
from peru_cli.version import __version__

if TYPE_CHECKING:
    import torch


def factor_names(module: LoraModule, layout: str) -> tuple[str, str]:
    """The names of A and B: PEFT's, or the file's."""
    if layout != PEFT:
        return module.down.name, module.up.name
    if module.kind == EMBEDDING:
        return f"{OUTER}{module.path}.lora_embedding_A", f"{OUTER}{module.path}.lora_embedding_B"
    return f"{OUTER}{module.path}.lora_A.weight", f"{OUTER}{module.path}.lora_B.weight"


def copied_tensors(adapter: Adapter) -> dict[str, str]:
    """Tensors that are neither factors nor scales: the output's name -> the input's."""
    names = {stored: stored for stored in (*adapter.whole.values(), *adapter.deltas)}
    for module in adapter.modules:
        if module.magnitude is not None:
            peft = f"{OUTER}{module.path}.lora_magnitude_vector"
            names[peft if adapter.layout == PEFT else module.magnitude] = module.magnitude
    return names


def bias_name(module: LoraModule) -> str:
    """The name of lora_B's bias (only PEFT has one)."""
    return f"{OUTER}{module.path}.lora_B.bias"


def resized_tensors(adapter: Adapter, ranks: Sequence[int], dtypes: Sequence[Dtype]) -> list[TensorInfo]:
    """All tensors of the output. `ranks` and `dtypes` are those of the adapter's modules."""
    tensors = [_like(adapter, source, name) for name, source in copied_tensors(adapter).items()]
    for module, rank, dtype in zip(adapter.modules, ranks, dtypes, strict=True):
        names, shapes = factor_names(module, adapter.layout), module.shapes(rank)
        tensors += [TensorInfo(name, dtype, shape) for name, shape in zip(names, shapes, strict=True)]
        if module.bias is not None:
            tensors.append(_like(adapter, module.bias, bias_name(module)))
        if module.alpha is not None:
            tensors.append(_like(adapter, module.alpha, module.alpha))
    return tensors


def _like(adapter: Adapter, source: str, name: str) -> TensorInfo:
    info = adapter.file.tensors[source]
    return TensorInfo(name, info.dtype, info.shape)


def resized_metadata(adapter: Adapter, ranks: Sequence[int], options: str) -> dict[str, str]:
    """The input's metadata that is still valid, and how the file was made."""
    metadata = {"peru.svd-lora.version": __version__, "peru.svd-lora.options": options}
    if BASE_TENSORS in adapter.file.metadata:
        metadata[BASE_TENSORS] = adapter.file.metadata[BASE_TENSORS]
    if adapter.layout == KOHYA:
        before = adapter.file.metadata
        kept = {key: value for key, value in without_alpha(before).items() if not key.startswith(("sshs_", "peru."))}
        if "ss_network_dim" in before or "ss_network_alpha" in before:
            shown = str(ranks[0]) if len(set(ranks)) == 1 else "Dynamic"  # as sd-scripts' resize_lora does
            kept |= {"ss_network_dim": shown, "ss_network_alpha": shown}
        return kept | metadata
    if adapter.layout == DIFFUSERS:
        return {key: value for key, value in without_alpha(adapter.file.metadata).items() if not key.startswith("peru.")} | metadata
    return metadata


def adapter_writer(
    folder: Path,
    tensors: Sequence[TensorInfo],
    config: Mapping[str, Any],
    small_files: Mapping[str, bytes],
    metadata: Mapping[str, str],
    sync: bool,
) -> FileWriter:
    """Write a PEFT adapter's small files into a new folder. Returns the writer of its weights, which the caller enters and commits."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / CONFIG).write_bytes(encode_config(config))
    for name, content in small_files.items():
        (folder / name).write_bytes(content)
    return FileWriter(folder / WEIGHTS, tensors, sync, metadata, files=beside(config, small_files))


def beside(config: Mapping[str, Any], small_files: Mapping[str, bytes]) -> dict[str, bytes]:
    """What the seal of an adapter's weights covers besides them."""
    return dict(small_files) | {CONFIG: sealed_config(config)}


def round_to(tensor: torch.Tensor, dtype: Dtype, what: str) -> torch.Tensor:
    """Round a float64 tensor to a dtype. BadFile if a value does not fit."""
    import torch

    rounded = tensor.to(getattr(torch, dtype.torch_name or ""))
    if not bool(torch.isfinite(rounded).all()):
        raise BadFile(f"{what} does not fit {dtype.name}", "use --dtype bf16 or fp32")
    return rounded


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
