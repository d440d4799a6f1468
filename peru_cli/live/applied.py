"""What every live swap stands on: matching names, checking the base, and putting the weights back."""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peru_cli.artifacts.index import COPY, DELTA, WHOLE, TensorRecord
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.checkpoints.dtypes import BY_TORCH_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import find_prefix
from peru_cli.errors import Mismatch
from peru_cli.streaming.digests import SHORT, tensor_digest

if TYPE_CHECKING:
    from torch import Tensor, nn


INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


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
