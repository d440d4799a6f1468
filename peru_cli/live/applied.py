"""What all live swaps share: matching names, checking the base, restoring the weights."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from peru_cli.checkpoints.digests import tensor_digest
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import find_prefix
from peru_cli.console import plural
from peru_cli.errors import Mismatch
from peru_cli.finetunes.fine_tune import Artifact, FromArtifact, Origin, is_base
from peru_cli.live.memory import TensorTable, infos
from peru_cli.live.owners import Claim

if TYPE_CHECKING:
    from torch import nn


INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32, 64: torch.int64}


class Kept(NamedTuple):
    """The earlier contents of a tensor: entries at positions, or all of it."""

    tensor: Tensor
    seen: tuple[object, ...]  # where the tensor was in memory then
    positions: Tensor | None  # flat, ascending
    old: Tensor  # (k,) or the tensor's shape, in its dtype


class Applied:
    """An artifact applied to a model. `restore` puts back exactly what was there before. Also a context manager.

    Until then the weights belong to this thread: another thread that applies something to them gets an error (owners.py)."""

    def __init__(self, claim: Claim | None = None, model: nn.Module | None = None) -> None:
        self._claim, self._model = claim, weakref.ref(model) if model is not None else None
        self._entries: list[Kept] = []
        self._added: list[tuple[MutableMapping[str, Tensor], str]] = []
        self._replaced: list[tuple[MutableMapping[str, Tensor], str, Tensor]] = []

    def set_entries(self, tensor: Tensor, positions: Tensor, bits: Tensor) -> None:
        """Overwrite entries of a contiguous tensor with integers of its width, and keep the old ones."""
        flat = tensor.detach().view(-1)
        self._entries.append(Kept(tensor, memory(tensor), positions, flat[positions]))
        flat.view(bits.dtype)[positions] = bits

    def set_tensor(self, table: MutableMapping[str, Tensor], name: str, value: Tensor) -> None:
        """Overwrite a whole tensor in place if it fits. Otherwise put it into the table, under all names that are tied to it."""
        old = table.get(name)
        if old is not None and old.shape == value.shape and old.dtype == value.dtype:
            self._entries.append(Kept(old, memory(old), None, old.detach().clone()))
            old.detach().copy_(value)
        elif old is not None:
            for alias in [n for n, tensor in table.items() if isinstance(tensor, torch.Tensor) and memory(tensor) == memory(old)]:
                self._replaced.append((table, alias, table[alias]))
                table[alias] = value
        else:
            self._added.append((table, name))
            table[name] = value

    def restore(self) -> None:
        """Restore the earlier weights. A second call does nothing.

        If the model was moved or cast meanwhile (`model.to(...)`), it gets the base's entries in its new dtype and place: it is the base,
        moved or cast. Raises Mismatch, after everything else is restored, if tensors were replaced or reshaped: the base is not
        restored then.
        UsageError if a later change is still applied on top."""
        if self._claim is not None:
            self._claim.check_last()
        lost = 0
        held = self._held()
        with torch.no_grad():
            for kept in reversed(self._entries):
                if (held is not None and id(kept.tensor) not in held) or not put_back(kept):
                    lost += 1
        for table, name in self._added:
            table.pop(name, None)
        for table, name, tensor in reversed(self._replaced):
            table[name] = tensor
        self._entries, self._added, self._replaced = [], [], []
        self.let_go()
        if lost:
            raise not_restored(lost)

    def let_go(self) -> None:
        """Let other threads change the weights again."""
        if self._claim is not None:
            self._claim.release()

    def _held(self) -> set[int] | None:
        """Which tensors the module has now. None for a state dict, whose tensors are written to wherever they are."""
        model = self._model() if self._model is not None else None
        return {id(tensor) for tensor in model.state_dict(keep_vars=True).values()} if model is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()


def not_restored(tensors: int) -> Mismatch:
    """The error for tensors that are no longer where they were."""
    return Mismatch(
        f"the base was not restored: the model has since replaced or reshaped tensors of {plural(tensors, 'change')}",
        "load the base again; restore the artifact before you replace the model's weights",
    )


def put_back(kept: Kept) -> bool:
    """Write the earlier contents in the tensor's current dtype and place. False if its shape has changed."""
    tensor = kept.tensor.detach()
    shape = kept.seen[2]
    if tensor.shape != shape or tensor.device.type == "meta":
        return False
    if kept.positions is None:
        tensor.copy_(kept.old)
    elif memory(kept.tensor) == kept.seen:
        bits = INTEGERS[8 * kept.old.element_size()]  # as integers, so that NaN payloads survive
        tensor.view(-1).view(bits)[kept.positions] = kept.old.view(bits)
    elif tensor.is_contiguous():
        tensor.view(-1)[kept.positions.to(tensor.device)] = kept.old.to(tensor.device, tensor.dtype)
    else:
        return False
    return True


def as_saved(model: nn.Module) -> dict[str, Tensor]:
    """A module's own tensors under the names of its checkpoint, which transformers renames on loading.

    If loading fused tensors (experts), saving would create new ones; then the names in memory are used."""
    table = model.state_dict(keep_vars=True)
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return table
    from transformers.core_model_loading import revert_weight_conversion

    saved = revert_weight_conversion(model, dict(table))
    own = {id(tensor) for tensor in table.values()}
    return saved if all(id(tensor) in own for tensor in saved.values()) else table


def memory(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for tied tensors: the same memory, viewed the same way."""
    return tensor.device, tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride(), tensor.dtype


def as_loaded(name: str | None, present: Mapping[str, TensorInfo]) -> str | None:
    """A tensor's name in memory: checkpoints like bert-base-uncased say `gamma` and `beta` where models say `weight` and `bias`."""
    if name is not None and name not in present:
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if name.endswith(old) and (loaded := name.removesuffix(old) + new) in present:
                return loaded
    return name


def match(table: Mapping[str, Tensor], origins: Mapping[str, Origin], artifact: Artifact, is_module: bool) -> dict[str, str]:
    """Find the model's name for each of the fine-tune's tensors. The model may use the base's or the fine-tune's names.

    Leaves out tensors that the model lacks and the artifact does not change: buffers of old checkpoints (`position_ids`,
    `rotary_emb.inv_freq`) that current models compute themselves."""
    present = infos(table)
    wanted = {name: TensorInfo(name, o.info.dtype, o.base.shape if o.base is not None else o.info.shape) for name, o in origins.items()}
    prefix = find_prefix(wanted, present)
    names, problems = {}, []
    for fine, origin in origins.items():
        info, base = origin.info, origin.base
        name = as_loaded(prefix.base_name(fine), present)
        found = present.get(name) if name is not None else None
        if base is None and (found is None or (found.shape, found.dtype) != (info.shape, info.dtype)):
            if is_module:
                has = "no such tensor" if found is None else f"{found.dtype.name} {list(found.shape)}"
                problems.append(f"{fine}: {info.dtype.name} {list(info.shape)}, the module has {has}")
            names[fine] = fine if name is None else name
        elif found is None and not origin.changes:
            continue
        elif found is None:
            problems.append(f"{fine}: the model has no such tensor")
        elif base is not None and (found.shape != base.shape or found.dtype is not base.dtype):
            has = f"{base.dtype.name} {list(base.shape)}"
            problems.append(f"{name}: {found.dtype.name} {list(found.shape)}, the artifact's base has {has}")
        elif is_module and base is not None and (base.shape != info.shape or base.dtype is not info.dtype):
            problems.append(f"{name}: the fine-tune has another shape or dtype; apply to a state dict, or unpack")
        else:
            assert name is not None
            names[fine] = name
    if problems:
        raise Mismatch(
            f"{artifact.path} does not fit this model: {plural(len(problems), 'tensor')}\n  " + "\n  ".join(problems[:5]),
            'load the base as its files have it (dtype="auto"); where loading renames or fuses tensors, unpack instead',
        )
    return names


def base_tensors(table: Mapping[str, Tensor], origins: Mapping[str, Origin], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The base's tensors found in a model, under the base's names. `names` is the result of `match`."""
    based = ((origin.base.name, names[fine]) for fine, origin in origins.items() if origin.base is not None and fine in names)
    return {base: table[name] for base, name in based}


def verify_base(base: TensorTable, origins: Mapping[str, Origin], names: Mapping[str, str], artifact: Artifact) -> None:
    """Mismatch if a tensor in memory differs from the artifact's base, by digest. Messages use the names in `names`."""
    wrong = []
    for fine, origin in origins.items():
        if origin.base is not None and fine in names:
            info = base.tensors[origin.base.name]
            if not is_base(origin, tensor_digest(info, base.view(info.name, 0, info.nbytes) or base.read(info.name))):
                wrong.append(names[fine])
    if wrong:
        raise Mismatch(
            f"the model is not the base of {artifact.path}: it differs in {plural(len(wrong), 'tensor')}: {', '.join(wrong[:3])}"
        )


def owners(table: Mapping[str, Tensor], names: Mapping[str, str], source: FromArtifact) -> dict[str, str]:
    """`names` without duplicates: memory that several of the fine-tune's tensors share (tied weights) goes to the first of them.

    Raises Mismatch if their values differ in the fine-tune: it was untied, but this model is not."""
    first: dict[tuple[object, ...], str] = {}
    kept = {}
    for fine, name in names.items():
        tensor = table.get(name)
        owner = first.setdefault(memory(tensor), fine) if tensor is not None and tensor.numel() else fine
        if owner == fine:
            kept[fine] = name
        elif not _equal(source, owner, fine):
            raise Mismatch(
                f"{names[owner]} and {name} are tied in this model, but differ in the fine-tune of {source.artifact.path}",
                "load the base untied (tie_word_embeddings=False), or unpack",
            )
    return kept


def _equal(source: FromArtifact, one: str, other: str) -> bool:
    """Whether two tensors of a fine-tune have the same bytes."""
    a, b = source.tensors[one], source.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return all(ours == theirs for (_, ours), (_, theirs) in zip(source.pieces(one), source.pieces(other), strict=True))
