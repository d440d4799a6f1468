"""`peru_cli.patches`: a fine-tune's changes as tensors for an engine in the same process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from peru_cli.checkpoints.resolve import open_model
from peru_cli.errors import BadFile, UsageError
from peru_cli.export.changes import Change, Changes
from peru_cli.finetunes.fine_tune import FromArtifact
from peru_cli.finetunes.open import open_fine_tune
from peru_cli.finetunes.verify import verify_expanded
from peru_cli.vectors.settings import streaming

HELD = 1 << 27  # bytes of changes that are held until all of them are verified; more are read twice


class Patch(NamedTuple):
    """New values of one tensor, in the names and shapes of the base's checkpoint.

    `values` are (k,) in `dtype`, `indices` (k,) flat, unique and ascending: int32, or int64 from 2^31 entries on. If `indices` is
    None, `values` are the whole tensor, (entries,). The fields are those of vLLM's CheckpointWeightPatch."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: torch.Tensor
    indices: torch.Tensor | None


def patches(
    fine_tune: str | Path, base: str | Path, *, task: str | None = None, dense: bool | None = None, verify_first: bool = True
) -> Iterator[Patch]:
    """The changes that turn the base's tensors into a fine-tune. Unchanged tensors are left out.

    Args:
        fine_tune: an artifact, a pack, a LoRA adapter or a checkpoint.
        base: the base that the engine has loaded.
        task: which task of a pack.
        dense: True for whole tensors, False for changed entries only, None for whichever is smaller, tensor by tensor.
        verify_first: verify everything before the first patch, so that nothing wrong is handed out. Otherwise artifacts are verified
            only at the end of the iteration, which raises then.

    Memory: two tensors. With `verify_first` all changes, if they take at most 128 MB; larger ones are read twice.

    Raises:
        Mismatch: the base is another one.
        BadFile: the artifact is damaged, or torch lacks a dtype.
        UsageError: a tensor is new or has another shape, and `dense` is False; or the pack has no such task."""
    with open_model(str(base)) as below, open_fine_tune(str(fine_tune), below, task) as fine:
        changes = Changes(fine, below)
        for target in changes.targets:
            if target.base is None and dense is False:
                raise UsageError(f"{target.name} is new or has another shape: it has no changed entries", "use dense=None")
        each = (changes.change(target, _index_bytes(target.info.entries), dense) for target in changes.targets)
        found = (change for change in each if change is not None)
        if verify_first and isinstance(fine, FromArtifact) and changes.largest(8, dense) <= HELD:
            held = list(found)  # all of them are proven by one reading
            changes.prove()
            yield from map(_patch, held)
            return
        if verify_first:
            with streaming("cpu", None, None, lambda entries: None) as how:
                verify_expanded([fine], how)
        yield from map(_patch, found)
        changes.prove()


def _index_bytes(entries: int) -> int:
    return 4 if entries < 1 << 31 else 8


def _patch(change: Change) -> Patch:
    info = change.target.info
    kind = getattr(torch, info.dtype.torch_name or "", None)
    if kind is None:
        raise BadFile(f"torch has no dtype for {info.name!r} ({info.dtype.name})")
    values = torch.frombuffer(bytearray(change.raw), dtype=kind) if change.raw else torch.empty(0, dtype=kind)
    if change.positions is None:
        return Patch(change.target.name, info.shape, kind, values, None)
    wide = np.int32 if _index_bytes(info.entries) == 4 else np.int64
    return Patch(change.target.name, info.shape, kind, values, torch.from_numpy(change.positions.astype(wide)))
