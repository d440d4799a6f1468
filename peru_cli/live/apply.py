"""Put an artifact onto weights in memory, and take it off again, to the bit.

    artifact = peru_cli.open_artifact("news.safetensors")
    applied = peru_cli.apply(model, artifact)        # the model is the fine-tune now
    applied.restore()                                # the model is the base again, bit for bit

The entries that an artifact touches are kept aside and put back: nothing is subtracted.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peru_cli.artifacts.container import artifact_kind, find_artifact
from peru_cli.artifacts.index import COPY, WHOLE, TensorRecord
from peru_cli.artifacts.packs.masks import KINDS, open_pack
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.reader import SparseDelta, whole_shape
from peru_cli.checkpoints.places import locate
from peru_cli.errors import Mismatch, UsageError
from peru_cli.finetunes.decode import decode_bits
from peru_cli.live.applied import INTEGERS, Applied, _bytes, _is_unchanged, as_saved, match, memory, verify_base
from peru_cli.methods.delta import cast_bits
from peru_cli.streaming.arrays import BITS, CPU

if TYPE_CHECKING:
    from torch import Tensor, nn

_PIECE = 1 << 22  # entries decoded at once

_applied: weakref.WeakKeyDictionary[Any, Applied] = weakref.WeakKeyDictionary()


def open_artifact(path: str | Path) -> SparseDelta | Pack:
    """Open an artifact that `peru prune` or `peru shuffle-pack` wrote: a path, or a name on the Hub.

    Raises BadFile if it is damaged or of an unknown kind, OSError if it cannot be read.
    """
    place = find_artifact(locate(str(path)))
    return open_pack(place) if artifact_kind(place) in KINDS else SparseDelta(place)


def apply(
    model: nn.Module | MutableMapping[str, Tensor], artifact: SparseDelta | Pack, *, task: str | None = None, verify: bool = True
) -> Applied:
    """Turn a base model in memory into the artifact's fine-tune.

    Args:
        model: a torch module, or a state dict, with the base's weights in the base's dtype and on any
            device. A module that already carries an artifact is restored first, so tasks can be swapped.
            From one task of a pack to another it goes without the base being put back or verified again.
        artifact: from `open_artifact`.
        task: which task of a pack; may be left out if there is one only.
        verify: check first that every tensor is the base's, by digest. Switch off only for speed.

    Returns:
        A handle whose `restore()` gives the earlier weights back bit for bit.

    Raises:
        Mismatch: the weights are not the artifact's base (the first tensors that differ are named), a
            module has no place of that shape and dtype for a tensor, or tied weights would have to
            differ. Nothing has been changed then, but that an earlier artifact has been taken off.
        BadFile: the artifact is damaged; what was changed is put back.
        UsageError: the pack has no such task.
    """
    if isinstance(artifact, Pack):
        return _apply_pack(model, artifact, artifact.task(task).name, verify)
    if task is not None:
        raise UsageError(f"{artifact.path} is no pack, it holds one fine-tune", "leave task out")
    is_module = isinstance(model, torch.nn.Module)
    if is_module and (earlier := _applied.pop(model, None)) is not None:
        earlier.restore()
    table: MutableMapping[str, Tensor] = as_saved(model) if isinstance(model, torch.nn.Module) else model
    names = match(table, artifact, is_module)
    if verify:
        verify_base(table, names, artifact)
    _drop_tied(table, names, artifact)
    applied = Applied()
    try:
        with torch.no_grad():
            for record in artifact.index.tensors:
                if record.info.name in names:
                    _apply_tensor(applied, table, names[record.info.name], record, artifact)
    except BaseException:
        applied.restore()
        raise
    if is_module:
        _applied[model] = applied
    return applied


def _apply_pack(model: nn.Module | MutableMapping[str, Tensor], pack: Pack, task: str, verify: bool) -> Applied:
    from peru_cli.live.pack import AppliedPack

    is_module = isinstance(model, torch.nn.Module)
    earlier = _applied.pop(model, None) if is_module else None
    if isinstance(earlier, AppliedPack) and earlier.pack is pack and earlier.is_applied:
        applied, verify = earlier, False
    else:
        if earlier is not None:
            earlier.restore()
        applied = AppliedPack(as_saved(model) if isinstance(model, torch.nn.Module) else model, pack, is_module)
    applied.switch(task, verify)
    if is_module:
        _applied[model] = applied
    return applied


def _whole(record: TensorRecord, artifact: SparseDelta) -> Tensor:
    artifact.verify_whole(record)
    data = bytearray(record.whole_bytes)
    if data:
        artifact.read_whole(record, record.info.dtype.nbytes(record.base_entries), memoryview(data))
    kind = getattr(torch, record.info.dtype.torch_name or "", None)
    if kind is None:
        raise Mismatch(f"torch has no dtype for {record.info.name!r} ({record.info.dtype.name})")
    shape = whole_shape(record)
    return torch.frombuffer(data, dtype=kind).view(shape) if data else torch.empty(shape, dtype=kind)


def _result(tensor: Tensor | None, record: TensorRecord, artifact: SparseDelta) -> Tensor:
    """A new tensor with what the fine-tune has in place of the base's `tensor`, on the same device."""
    if record.mode == WHOLE:
        value = _whole(record, artifact)
        return value if tensor is None else value.to(tensor.device)
    assert tensor is not None and record.base_dtype is not None
    value = tensor.detach().clone(memory_format=torch.contiguous_format)
    if record.mode == COPY:
        return value
    raw = _bytes(value).view(BITS[record.base_dtype.bits])
    flat = torch.from_numpy(cast_bits(CPU, raw, record.base_dtype, record.info.dtype)).to(value.device)
    _overwrite(None, flat, record, artifact)
    value = flat.view(getattr(torch, record.info.dtype.torch_name or "")).view(record.base_shape)
    return torch.cat((value, _whole(record, artifact).to(value.device))) if record.base_rows else value


def _drop_tied(table: MutableMapping[str, Tensor], names: dict[str, str], artifact: SparseDelta) -> None:
    """Leave memory that several of the artifact's tensors share (tied weights) to the first of them.

    Raises Mismatch if the fine-tune has different values there: it was untied, this model is not.
    """
    first: dict[tuple[object, ...], TensorRecord] = {}
    for record in artifact.index.tensors:
        tensor = table.get(names.get(record.info.name, ""))
        if tensor is None or not tensor.numel():
            continue
        owner = first.setdefault(memory(tensor), record)
        if owner is record:
            continue
        if not np.array_equal(_bytes(_result(tensor, owner, artifact)), _bytes(_result(tensor, record, artifact))):
            pair = f"{names[owner.info.name]} and {names[record.info.name]}"
            raise Mismatch(
                f"{pair} are tied in this model, in the fine-tune of {artifact.path} they differ",
                "load the base untied (tie_word_embeddings=False), or unpack",
            )
        del names[record.info.name]


def _apply_tensor(applied: Applied, table: MutableMapping[str, Tensor], name: str, record: TensorRecord, artifact: SparseDelta) -> None:
    if _is_unchanged(record):
        return
    tensor, dtype = table.get(name), record.info.dtype
    if tensor is None or record.mode == WHOLE or record.base_rows or dtype is not record.base_dtype:
        applied.set_tensor(table, name, _result(tensor, record, artifact))
        return
    if not tensor.is_contiguous():
        raise Mismatch(f"{name} is not contiguous in memory: call .contiguous() on it first")
    _overwrite(applied, tensor.detach().view(-1).view(INTEGERS[dtype.bits]), record, artifact)


def _overwrite(applied: Applied | None, flat: Tensor, record: TensorRecord, artifact: SparseDelta) -> None:
    """Put a tensor's kept entries into a flat integer tensor."""
    for start in range(0, record.base_entries, _PIECE):
        stream, entries = artifact.entries(record, start, start + _PIECE)
        if stream is None or not len(entries.positions):
            continue
        positions = torch.from_numpy(entries.positions + start).to(flat.device)
        old = flat[positions]
        new = torch.from_numpy(decode_bits(old.cpu().numpy(), entries, stream.values, record.info.dtype)).to(flat.device)
        if applied is None:
            flat[positions] = new
        else:
            applied.set_entries(flat, positions, new)
