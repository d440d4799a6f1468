"""`peru_cli.diff`: what changed between two state dicts in memory, as the bytes of an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from peru_cli.checkpoints.checks.unpaired import judge
from peru_cli.checkpoints.local.atomic import MemoryFile
from peru_cli.checkpoints.pairing import pair_checkpoints
from peru_cli.checkpoints.resolve import check_task
from peru_cli.errors import UsageError
from peru_cli.live.memory import TensorTable
from peru_cli.methods.compact.magnitude import ALL_CHANGED
from peru_cli.prune.artifact import Job, PruneOptions, PruneTask
from peru_cli.shown import listed
from peru_cli.streaming.engine import run
from peru_cli.vectors.family import Family, TaskVector
from peru_cli.vectors.selection import Select
from peru_cli.vectors.settings import streaming


def diff(
    old: Mapping[str, torch.Tensor], new: Mapping[str, torch.Tensor], *, name: str = "update", threads: int | None = None
) -> bytes:  # fmt: skip
    """What changed from one state dict to another, losslessly: the bytes that `peru prune NAME=NEW --base OLD --lossless` writes.

        update = peru_cli.diff(before, model.state_dict())            # on the trainer
        peru_cli.apply(weights, peru_cli.open_artifact(update))       # on the engine: verified, then changed in place

    Args:
        old: the weights that the update is to be applied to, on the CPU or another device.
        new: the weights that it gives.
        name: the task's name in the artifact.
        threads: CPU threads. Default: all available.

    No tensor is copied whole, unless it is not contiguous. Nothing is written to a disk.

    Raises:
        Mismatch: too little of the two pairs.
        UsageError: an entry is no tensor, or of a dtype that no checkpoint has; or they share no floating tensors.
    """
    before, after = TensorTable("old", old), TensorTable("new", new)
    for table, given in ((before, old), (after, new)):
        if strange := [key for key in given if key not in table.tensors]:
            raise UsageError(f"no checkpoint can hold these entries of the {table.label} weights: {listed(strange)}", "leave them out")
    pairing = pair_checkpoints(after, before)
    judge(after, before, pairing, None, allowed=False)
    task = PruneTask(TaskVector(check_task(name), after, pairing), Path(name), None)
    if not task.entries:
        raise UsageError("the old and the new weights share no floating-point tensors")
    file = MemoryFile()
    with streaming("cpu", threads, None, lambda entries: None) as how:
        family = Family(before, [task.vector], how)
        job = Job(0, before, task, PruneOptions(None), sync=False, file=file)
        with job.writer:
            job.sink.add_threshold(ALL_CHANGED)
            select = Select(family, [job.sink])
            run(select, family.plan(), how.threads)
            job.seal(select)
            job.commit()
    return file.data
