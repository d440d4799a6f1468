"""`peru_cli.diff`: what changed between two state dicts in memory, as the bytes of an artifact; `peru_cli.Updates`: step after step."""

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
    return _Difference(_table("old", old), _table("new", new), name).compute(threads, follow=False)


class Updates:
    """Updates of weights that change step by step. Each is the bytes that `diff` of the weights before and after gives.

        updates = peru_cli.Updates(model.state_dict())      # copies the weights
        ...                                                 # a step of training, in place
        data = updates.next(model.state_dict())             # send it; the next one begins here

    The weights of the last step are kept on the CPU: one checkpoint of memory, as much as `diff` needs for `old`. Their digests are
    known from then on, so that each update digests one checkpoint where `diff` digests two.

    Raises:
        UsageError: an entry is no tensor, or of a dtype that no checkpoint has.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], *, name: str = "update", threads: int | None = None) -> None:
        """`name` and `threads` as for `diff`. The weights are copied; only this object changes the copy."""
        self._name, self._threads = check_task(name), threads
        _table("first", weights)
        self._last = {key: _copied(tensor) for key, tensor in weights.items()}
        self._digests: dict[str, bytes] = {}
        self._usable = True

    def next(self, weights: Mapping[str, torch.Tensor]) -> bytes:
        """The update from the last weights to these, which are the last ones then.

        Raises as `diff`, before anything has changed: the next call then begins where this one began. UsageError after a call that
        was interrupted while it computed."""
        if not self._usable:
            raise UsageError("an update was interrupted, so its weights are not known", "begin again with peru_cli.Updates(weights)")
        difference = _Difference(TensorTable("old", self._last), _table("new", weights), self._name)
        self._usable = False
        data = difference.compute(self._threads, follow=True, known=self._digests)
        for key in self._last.keys() - weights.keys():
            del self._last[key]
        for key, tensor in weights.items():
            mine = self._last.get(key)
            if mine is None or (mine.shape, mine.dtype) != (tensor.shape, tensor.dtype):
                self._last[key] = _copied(tensor)
            elif key not in difference.followed:
                mine.copy_(tensor.detach())
        self._digests, self._usable = difference.digests, True
        return data


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _table(label: str, given: Mapping[str, torch.Tensor]) -> TensorTable:
    table = TensorTable(label, given)
    if strange := [key for key in given if key not in table.tensors]:
        raise UsageError(f"no checkpoint can hold these entries of the {label} weights: {listed(strange)}", "leave them out")
    return table


class _Difference:
    """Two state dicts whose difference can be taken. Raises as `diff`."""

    def __init__(self, before: TensorTable, after: TensorTable, name: str) -> None:
        pairing = pair_checkpoints(after, before)
        judge(after, before, pairing, None, allowed=False)
        self._before, self._task = before, PruneTask(TaskVector(check_task(name), after, pairing), Path(name), None)
        if not self._task.entries:
            raise UsageError("the old and the new weights share no floating-point tensors")
        self.digests: dict[str, bytes] = {}  # of the new tensors that were compared entry by entry
        self.followed: set[str] = set()  # old tensors that are equal to the new ones now

    def compute(self, threads: int | None, follow: bool, known: Mapping[str, bytes] | None = None) -> bytes:
        """The artifact. With `follow` old tensors become the new ones, as far as their memory is used as it is. `known` are digests of
        old tensors, 32 bytes each."""
        file = MemoryFile()
        with streaming("cpu", threads, None, lambda entries: None) as how:
            family = Family(self._before, [self._task.vector], how)
            job = Job(0, self._before, self._task, PruneOptions(None), sync=False, file=file)
            with job.writer:
                job.sink.add_threshold(ALL_CHANGED)
                select = Select(family, [job.sink])
                select.base_digests.found |= known or {}
                select.follow = follow
                run(select, family.plan(), how.threads)
                job.seal(select)
                job.commit()
            self.digests = job.sink.result.all(job.sink.kept)
            pairs = family.pairs[0].values() if follow else ()
            self.followed = {
                p.fine.name for p in pairs if (p.fine.name, p.fine.dtype, p.fine.shape) == (p.base.name, p.base.dtype, p.base.shape)
            }
        return file.data
