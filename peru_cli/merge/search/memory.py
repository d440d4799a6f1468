"""Merges in memory."""

from __future__ import annotations

import torch

from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.merge.passes.run import merge
from peru_cli.merge.plan import MergePlan
from peru_cli.methods.rules import Rule
from peru_cli.vectors.family import StreamSettings


class MemoryWriter(CheckpointWriter):
    """A checkpoint in memory."""

    def __init__(self, plan: MergePlan) -> None:
        self.order = plan.outputs
        self.tables = {info.name: bytearray(info.nbytes) for info in self.order}

    def write(self, name: str, offset: int, data: memoryview) -> None:
        self.tables[name][offset : offset + len(data)] = data

    def commit(self) -> None:
        pass

    def __enter__(self) -> MemoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def merged_weights(plan: MergePlan, rule: Rule, how: StreamSettings, device: torch.device) -> dict[str, torch.Tensor]:
    """Merge, and return the merged and averaged tensors in float32 on the device, by the reference's names."""
    writer = MemoryWriter(plan)
    merge(plan, rule, writer, how)
    found = {}
    for slot in (*plan.slots, *plan.averaged):
        info = slot.info
        tensor = torch.empty(info.shape)
        if info.entries:
            tensor = torch.frombuffer(writer.tables.pop(info.name), dtype=getattr(torch, info.dtype.torch_name or ""))
        found[slot.base.name] = tensor.view(info.shape).float().to(device)
    return found
