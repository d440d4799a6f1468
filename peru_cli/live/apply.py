"""Apply an artifact to weights in memory, and restore them bit for bit.

    artifact = peru_cli.open_artifact("news.safetensors")
    applied = peru_cli.apply(model, artifact)        # the model is the fine-tune now
    applied.restore()                                # the model is the base again, bit for bit

The entries that an artifact changes are saved and put back: nothing is subtracted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peru_cli.artifacts.container import artifact_kind, find_artifact
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.routed import KIND as ROUTED
from peru_cli.artifacts.packs.routed import Routed, open_routed
from peru_cli.checkpoints.places import locate
from peru_cli.errors import Mismatch, UsageError
from peru_cli.finetunes.decode import kept_bits
from peru_cli.finetunes.delta import DeltaOnBase
from peru_cli.finetunes.fine_tune import Artifact, FromArtifact
from peru_cli.finetunes.open import on_base, open_bytes, open_compact
from peru_cli.live.applied import INTEGERS, Applied, as_saved, base_tensors, match, owners, verify_base
from peru_cli.live.memory import TensorTable, empty_tensor, fill
from peru_cli.live.owners import Claim

if TYPE_CHECKING:
    from torch import Tensor, nn

_PIECE = 1 << 22  # entries decoded at once

_applied: weakref.WeakKeyDictionary[Any, Applied] = weakref.WeakKeyDictionary()


def open_artifact(path: str | Path | bytes | memoryview) -> Artifact:
    """Open an artifact that `peru prune` or `peru shuffle-pack` wrote: a path, or a name on the Hub.

    The bytes of an artifact, as `peru_cli.diff` returns them, will do as well; packs come from files only.

    Raises BadFile if it is damaged or of an unknown kind, OSError if it cannot be read.
    """
    if isinstance(path, bytes | memoryview):
        return open_bytes(path)
    place = find_artifact(locate(str(path)))
    return open_routed(place) if artifact_kind(place) == ROUTED else open_compact(place)


def apply(model: nn.Module | MutableMapping[str, Tensor], artifact: Artifact, *, task: str | None = None, verify: bool = True) -> Applied:
    """Turn a base model in memory into the artifact's fine-tune.

    Args:
        model: a torch module or a state dict with the base's weights, in the base's dtype and on any device.
            Applies to a module do not nest: a module that carries an artifact is restored first. From one task of a pack
            to another the base is neither restored nor verified again. Applies to a state dict nest if `verify` is off;
            restore the last one first. Routed experts need a module. Weights belong to the thread that applied something
            to them until it restores them: any other thread gets an error.
        artifact: from `open_artifact`.
        task: which task of a pack; optional if there is only one. Routed experts choose by themselves.
        verify: check first that every tensor is the base's, by digest. Switch off only for speed.

    Returns:
        A handle whose `restore()` puts the earlier weights back, bit for bit.

    Raises:
        Mismatch: the weights are not the artifact's base (the message names the first tensors that differ), a module has
            no tensor of that shape and dtype, or tied weights would have to differ. The model is unchanged, except that
            an earlier artifact has been restored.
        BadFile: the artifact is damaged. What was changed is put back.
        UsageError: the pack has no such task, or another thread has applied something to these weights."""
    if isinstance(artifact, Routed):
        return _apply_routed(model, artifact, task, verify)
    if isinstance(artifact, Pack):
        return _apply_pack(model, artifact, artifact.task(task).name, verify)
    if task is not None:
        raise UsageError(f"{artifact.path} is not a pack: it holds one fine-tune", "leave task out")
    is_module = isinstance(model, torch.nn.Module)
    if isinstance(model, torch.nn.Module):
        _restore_earlier(model, artifact)
    table: MutableMapping[str, Tensor] = as_saved(model) if isinstance(model, torch.nn.Module) else model
    applied = _claimed(table, artifact, lambda claim: _apply_delta(model, table, artifact, claim, verify))
    if is_module:
        _applied[model] = applied
    return applied


def _restore_earlier(model: nn.Module, artifact: Artifact) -> None:
    """Restore what a module carries. UsageError if its weights are another thread's."""
    if (earlier := _applied.get(model)) is not None:
        Claim(as_saved(model).values(), str(artifact.path)).release()
        _applied.pop(model, None)
        earlier.restore()


def _claimed(table: MutableMapping[str, Tensor], artifact: Artifact, change: Callable[[Claim], Applied]) -> Applied:
    """Claim weights for this thread and change them. If that fails, they are nobody's again."""
    claim = Claim(table.values(), str(artifact.path))
    try:
        return change(claim)
    except BaseException:
        claim.release()
        raise


def _apply_routed(model: nn.Module | MutableMapping[str, Tensor], routed: Routed, task: str | None, verify: bool) -> Applied:
    from peru_cli.live.routed import apply_routed

    if task is not None:
        raise UsageError(f"{routed.path} chooses a task for every input", "leave task out")
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"{routed.path} holds routed experts: they are installed in a module, not in a state dict", "pass the model itself"
        )
    _restore_earlier(model, routed)
    table = as_saved(model)
    applied = _claimed(table, routed, lambda claim: apply_routed(model, table, routed, claim, verify))
    _applied[model] = applied
    return applied


def _apply_delta(
    model: nn.Module | MutableMapping[str, Tensor], table: MutableMapping[str, Tensor], artifact: Artifact, claim: Claim, verify: bool
) -> Applied:
    is_module = isinstance(model, torch.nn.Module)
    base = TensorTable("the model", {})
    source = on_base(artifact, None, str(artifact.path), base)
    names = match(table, source.origins, artifact, is_module)
    base.add(base_tensors(table, source.origins, names))
    if verify:
        verify_base(base, source.origins, names, artifact)
    source.verify_stored()
    applied, names = Applied(claim, model if isinstance(model, torch.nn.Module) else None), owners(table, names, source)
    try:
        with torch.no_grad():
            for fine, name in names.items():
                _apply_tensor(applied, table, name, source, fine)
    except BaseException:
        applied.restore()
        raise
    return applied


def _apply_pack(model: nn.Module | MutableMapping[str, Tensor], pack: Pack, task: str, verify: bool) -> Applied:
    from peru_cli.live.pack import AppliedPack

    is_module = isinstance(model, torch.nn.Module)
    earlier = _applied.get(model) if is_module else None
    if isinstance(model, torch.nn.Module) and earlier is not None:
        Claim(as_saved(model).values(), str(pack.path)).release()  # fails if they are another thread's
        _applied.pop(model, None)
    if isinstance(earlier, AppliedPack) and earlier.pack is pack and earlier.is_applied:
        applied, verify = earlier, False
    else:
        if earlier is not None:
            earlier.restore()
        applied = AppliedPack(as_saved(model) if isinstance(model, torch.nn.Module) else model, pack, model)
    applied.switch(task, verify)
    if is_module:
        _applied[model] = applied
    return applied


def _apply_tensor(applied: Applied, table: MutableMapping[str, Tensor], name: str, source: FromArtifact, fine: str) -> None:
    """Turn the model's tensor `name` into the fine-tune's tensor `fine`, in place if it fits."""
    origin, tensor = source.origins[fine], table.get(name)
    if not origin.changes:
        return
    base = origin.base
    fits = tensor is not None and base is not None and (base.shape, base.dtype) == (origin.info.shape, origin.info.dtype)
    if tensor is None or base is None or not fits or not isinstance(source, DeltaOnBase):
        value = empty_tensor(source.label, origin.info)
        fill(source, {fine: value})
        applied.set_tensor(table, name, value if tensor is None else value.to(tensor.device))
        return
    if not tensor.is_contiguous():
        raise Mismatch(f"{name} is not contiguous in memory: call .contiguous() on it first")
    flat, record = tensor.detach().view(-1).view(INTEGERS[base.dtype.bits]), source.delta.records[fine]
    for start in range(0, base.entries, _PIECE):
        found = kept_bits(source.delta, record, start, start + _PIECE, partial(_entries, flat, start))
        if found is not None:
            positions, bits = (torch.from_numpy(part).to(flat.device) for part in (found[0] + start, found[1]))
            applied.set_entries(tensor, positions, bits)


def _entries(flat: Tensor, start: int, positions: Any) -> Any:
    """Entries of a flat integer tensor on any device as an array, at positions counted from `start`; (k,) -> (k,)."""
    return flat[torch.from_numpy(positions + start).to(flat.device)].cpu().numpy()
