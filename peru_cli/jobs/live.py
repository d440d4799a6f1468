"""Put an artifact onto weights in memory, and take it off again, to the bit.

    artifact = peru_cli.open_artifact("news.safetensors")
    applied = peru_cli.apply(model, artifact)        # the model is the fine-tune now
    applied.restore()                                # the model is the base again, bit for bit

The entries that an artifact touches are kept aside and put back: nothing is subtracted.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peru_cli.artifacts.container import artifact_kind, find_artifact
from peru_cli.artifacts.index import COPY, DELTA, WHOLE, TensorRecord
from peru_cli.artifacts.masks import KINDS, open_pack
from peru_cli.artifacts.pack import Pack
from peru_cli.artifacts.reader import SparseDelta, whole_shape
from peru_cli.checkpoints.dtypes import BY_TORCH_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import find_prefix
from peru_cli.checkpoints.places import locate
from peru_cli.errors import Mismatch, UsageError
from peru_cli.jobs.decode import decode_bits
from peru_cli.methods.delta import cast_bits
from peru_cli.streaming.arrays import BITS, CPU
from peru_cli.streaming.digests import SHORT, tensor_digest

if TYPE_CHECKING:
    from torch import Tensor, nn

_PIECE = 1 << 22  # entries decoded at once
INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}

_applied: weakref.WeakKeyDictionary[Any, Applied] = weakref.WeakKeyDictionary()


def open_artifact(path: str | Path) -> SparseDelta | Pack:
    """Open an artifact that `peru prune` or `peru shuffle-pack` wrote: a path, or a name on the Hub.

    Raises BadFile if it is damaged or of an unknown kind, OSError if it cannot be read.
    """
    place = find_artifact(locate(str(path)))
    return open_pack(place) if artifact_kind(place) in KINDS else SparseDelta(place)


class Applied:
    """An artifact on a model; `restore` puts back exactly what was there before. Also a context manager."""

    def __init__(self) -> None:
        self._entries: list[tuple[Tensor, Tensor, Tensor]] = []  # flat tensor, positions, what was there
        self._added: list[tuple[MutableMapping[str, Tensor], str]] = []
        self._replaced: list[tuple[MutableMapping[str, Tensor], str, Tensor]] = []

    def set_entries(self, flat: Tensor, positions: Tensor, bits: Tensor) -> None:
        """Overwrite entries of a flat integer view, keeping the old ones."""
        self._entries.append((flat, positions, flat[positions]))
        flat[positions] = bits

    def set_tensor(self, table: MutableMapping[str, Tensor], name: str, value: Tensor) -> None:
        """Overwrite a whole tensor in place where it fits, else put it into the table (under all names that are tied to it)."""
        old = table.get(name)
        if old is not None and old.shape == value.shape and old.dtype == value.dtype:
            kept = old.detach().clone()
            old.detach().copy_(value)
            self._entries.append((old.detach(), torch.empty(0), kept))
        elif old is not None:
            for alias in [n for n, tensor in table.items() if isinstance(tensor, torch.Tensor) and memory(tensor) == memory(old)]:
                self._replaced.append((table, alias, table[alias]))
                table[alias] = value
        else:
            self._added.append((table, name))
            table[name] = value

    def restore(self) -> None:
        """Put back what was there before; a second call does nothing."""
        with torch.no_grad():
            for flat, positions, old in reversed(self._entries):
                if positions.is_floating_point():  # a whole tensor
                    flat.copy_(old)
                else:
                    flat[positions] = old
        for table, name in self._added:
            table.pop(name, None)
        for table, name, tensor in reversed(self._replaced):
            table[name] = tensor
        self._entries, self._added, self._replaced = [], [], []

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


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
    from peru_cli.jobs.livepack import AppliedPack

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


def as_saved(model: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors under the names of its checkpoint, which transformers renames while loading.

    Where loading fused tensors (experts), saving would make new ones: then the names in memory stay.
    """
    table = model.state_dict(keep_vars=True)
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return table
    from transformers.core_model_loading import revert_weight_conversion

    saved = revert_weight_conversion(model, dict(table))
    own = {id(tensor) for tensor in table.values()}
    return saved if all(id(tensor) in own for tensor in saved.values()) else table


def _infos(table: MutableMapping[str, Tensor]) -> dict[str, TensorInfo]:
    """What a table holds, but for what no checkpoint could hold (extra state, exotic dtypes)."""
    infos = {}
    for name, tensor in table.items():
        dtype = BY_TORCH_NAME.get(str(tensor.dtype).removeprefix("torch.")) if isinstance(tensor, torch.Tensor) else None
        if dtype is not None:
            infos[name] = TensorInfo(name, dtype, tuple(tensor.shape))
    return infos


def memory(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that are tied: the same memory seen in the same way."""
    return tensor.device, tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype


def _is_unchanged(record: TensorRecord) -> bool:
    if record.mode == DELTA:
        return not record.kept and not record.base_rows and record.info.dtype is record.base_dtype
    return record.mode == COPY


def _as_loaded(name: str | None, present: Mapping[str, TensorInfo]) -> str | None:
    """A tensor's name in memory: bert-base-uncased and its like call `gamma` and `beta` what models call `weight` and `bias`."""
    if name is not None and name not in present:
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if name.endswith(old) and (loaded := name.removesuffix(old) + new) in present:
                return loaded
    return name


def match(table: MutableMapping[str, Tensor], artifact: SparseDelta, is_module: bool) -> dict[str, str]:
    """The model's name for each of the fine-tune's tensors. Its names may be the base's or the fine-tune's.

    Left out are tensors that the model lacks and the artifact does not change: buffers of old
    checkpoints (`position_ids`, `rotary_emb.inv_freq`) that today's models compute themselves.
    """
    present = _infos(table)
    wanted = {r.info.name: TensorInfo(r.info.name, r.info.dtype, r.base_shape) for r in artifact.index.tensors}
    prefix = find_prefix(wanted, present)
    names, problems = {}, []
    for record in artifact.index.tensors:
        name = _as_loaded(prefix.base_name(record.info.name), present)
        found = present.get(name) if name is not None else None
        if record.mode == WHOLE and (found is None or (found.shape, found.dtype) != (record.info.shape, record.info.dtype)):
            if is_module:
                has = "no such tensor" if found is None else f"{found.dtype.name} {list(found.shape)}"
                problems.append(f"{record.info.name}: {record.info.dtype.name} {list(record.info.shape)}, the module has {has}")
            names[record.info.name] = record.info.name if name is None else name
        elif found is None and _is_unchanged(record):
            continue
        elif found is None:
            problems.append(f"{record.info.name}: the model has no such tensor")
        elif record.mode != WHOLE and (found.shape != record.base_shape or found.dtype is not record.base_dtype):
            assert record.base_dtype is not None
            has = f"{record.base_dtype.name} {list(record.base_shape)}"
            problems.append(f"{name}: {found.dtype.name} {list(found.shape)}, the artifact's base has {has}")
        elif is_module and (record.base_rows or (record.mode != WHOLE and record.info.dtype is not record.base_dtype)):
            problems.append(f"{name}: the fine-tune has another shape or dtype; apply to a state dict, or unpack")
        else:
            assert name is not None
            names[record.info.name] = name
    if problems:
        raise Mismatch(
            f"{artifact.path} does not fit this model: {len(problems)} tensor(s)\n  " + "\n  ".join(problems[:5]),
            'load the base as its files have it (dtype="auto"); where loading renames or fuses tensors, unpack instead',
        )
    return names


def _bytes(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def verify_base(table: MutableMapping[str, Tensor], names: dict[str, str], artifact: SparseDelta) -> None:
    wrong, infos = [], _infos(table)
    for record in artifact.index.tensors:
        name = names.get(record.info.name)
        if record.mode == WHOLE or name is None:
            continue
        info = infos[name]
        if tensor_digest(info, _bytes(table[name]).data if info.entries else b"")[:SHORT] != record.base_digest:
            wrong.append(name)
    if wrong:
        raise Mismatch(f"the model is not the base of {artifact.path}: {len(wrong)} tensor(s) differ: {', '.join(wrong[:3])}")


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
