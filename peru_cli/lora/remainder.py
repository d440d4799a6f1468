"""The part of a fine-tune that an adapter cannot hold: a sparse delta beside the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peru_cli.checkpoints.base_name import BaseName
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.lora.adapter import REST
from peru_cli.checkpoints.pairing import Pairing
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.lora.extract_plan import Extraction
from peru_cli.prune import run as pruning
from peru_cli.vectors.family import StreamSettings, TaskVector


class Part(Checkpoint):
    """Some tensors of a checkpoint, without its side files."""

    def __init__(self, whole: Checkpoint, tensors: Sequence[TensorInfo]) -> None:
        self._whole = whole
        self.label, self.kind, self.warnings, self.files = whole.label, whole.kind, [], whole.files
        self.metadata, self.side_files = whole.metadata, {}
        self.tensors = {info.name: info for info in tensors}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self._whole.read_into(name, offset, buffer)


def write_delta(
    plan: Extraction, tensors: Sequence[TensorInfo], folder: Path, base_name: BaseName | None, how: StreamSettings, sync: bool
) -> int:
    """Write a lossless delta of these tensors into the adapter's folder. Returns its size in bytes."""
    names = {info.name for info in tensors}
    pairing = Pairing(plan.pairing.prefix)
    pairing.pairs = [pair for pair in plan.pairing.pairs if pair.fine.name in names]
    pairing.whole = [info for info in plan.pairing.whole if info.name in names]
    vector = TaskVector(plan.name, Part(plan.fine, tensors), pairing)
    task = pruning.PruneTask(vector, folder / REST, None)
    (result,) = pruning.prune(plan.base, [task], pruning.PruneOptions(None, base_name=base_name), how, sync)
    return result.file_bytes
