"""PyTorch files, read only with `torch.load(weights_only=True, mmap=True)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from peru_cli.checkpoints.dtypes import BY_TORCH_NAME
from peru_cli.checkpoints.header import TensorInfo, check_tensor_name
from peru_cli.checkpoints.local.files import RandomAccessFile, refuse_impostor
from peru_cli.checkpoints.places import Place, on_disk
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError


class TorchCheckpoint(Checkpoint):
    """pytorch_model.bin files, read only with `torch.load(weights_only=True, mmap=True)`."""

    def __init__(self, label: str, kind: str, files: Sequence[Place], side_files: Mapping[str, Place]) -> None:
        self.label, self.kind, self.side_files, self.warnings, self.metadata = label, kind, side_files, [], {}
        self.files = files
        self._bytes: dict[str, memoryview] = {}
        tensors: dict[str, TensorInfo] = {}
        for path in files:
            for name, (info, data) in _load_torch_file(path).items():
                if name in tensors:
                    raise BadFile(f"{path}: tensor {name!r} is in another shard, too")
                tensors[name], self._bytes[name] = info, data
        self.tensors = tensors

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        buffer[:] = self._bytes[name][offset : offset + len(buffer)]


def _load_torch_file(path: Place) -> dict[str, tuple[TensorInfo, memoryview]]:
    if not isinstance(path, Path) and path.streams:
        raise UsageError(f"{path} is a PyTorch file, which cannot be read by ranges", "leave --stream out, or name one with safetensors")
    import torch

    with closing(RandomAccessFile(path)) as file:
        refuse_impostor(file)
        prefix = bytearray(min(4, file.size))
        file.read_into(0, memoryview(prefix))
    # Files older than the zip format cannot be mapped: they are read whole.
    zipped = prefix == b"PK\x03\x04"
    try:
        loaded: Any = torch.load(on_disk(path), map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # torch raises pickle, zip and runtime errors, which all mean the same here
        reason = str(error).strip().splitlines()
        raise BadFile(
            f"{path}: torch cannot load this safely ({reason[0] if reason else type(error).__name__})",
            "pickles that would run code are refused: save the model as safetensors",
        ) from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise BadFile(f"{path}: holds a {type(loaded).__name__}, not a table of tensors")
    result: dict[str, tuple[TensorInfo, memoryview]] = {}
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise BadFile(f"{path}: the entry {name!r} is a {type(tensor).__name__}, not a tensor")
        try:
            check_tensor_name(name)
        except BadFile as error:
            raise BadFile(f"{path}: {error.message}") from error
        dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None or tensor.layout != torch.strided:
            raise BadFile(f"{path}: tensor {name!r} is {tensor.dtype}, {tensor.layout}, which safetensors does not know")
        flat = tensor.detach().contiguous().view(-1)  # copies only if the file holds a transposed view
        data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
        result[name] = (TensorInfo(name, dtype, tuple(tensor.shape)), data)
    return result
