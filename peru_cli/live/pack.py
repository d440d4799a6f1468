"""Put a task of a pack onto weights in memory, another one in its place, and the base back, to the bit.

    pack = peru_cli.open_artifact("pack.safetensors")
    applied = peru_cli.apply(model, pack, task="a")
    applied.switch("b")                              # or apply(model, pack, task="b"): the base is not read again
    pack.load()                                      # not needed: holds the sums in memory, so that a switch is fast
    applied.restore()                                # the model is the base again, bit for bit

The base's tensors are kept aside while a task is applied: packs change every entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.index import COPY, DELTA, WHOLE, TensorRecord
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.superposed import WHOLE as WHOLE_WEIGHTS
from peru_cli.artifacts.packs.superposed import PackedTensor, TaskTensor
from peru_cli.errors import Mismatch
from peru_cli.finetunes.retrieve import Retrieval, float_kind
from peru_cli.live.applied import INTEGERS, Applied, match, memory, verify_base
from peru_cli.streaming.engine import available_threads

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 16  # entries worked on at once: they stay in a core's cache
_BATCH = 1 << 18  # entries that one thread takes at once: asking for more costs more than a small tensor
_RETRIEVALS = 8  # tasks whose places and signs are kept


@dataclass
class _Index:
    tensors: list[TensorRecord]


class _TaskView:
    """A task of a pack as `match` and `verify_base` see artifacts: every packed tensor is a difference."""

    def __init__(self, pack: Pack, retrieval: Retrieval) -> None:
        self.path = pack.path
        task = retrieval.task
        records = []
        for record, info in zip(pack.index.tensors, retrieval.tensors(), strict=False):
            mode = DELTA if _changes(pack, record) else COPY
            records.append(TensorRecord(info, mode, b"", record.base_dtype, 0, record.base_digest, record.info.entries))
        records += [TensorRecord(tensor.info, WHOLE, tensor.digest) for tensor in task.tensors]
        self.index = _Index(records)


def _changes(pack: Pack, record: PackedTensor) -> bool:
    """Whether a task may have other values there than the base."""
    return record.is_sum or (bool(pack.index.residuals) and record.info.dtype.compressible)


def _batches(chosen: dict[str, PackedTensor]) -> Iterator[list[tuple[str, PackedTensor, int]]]:
    """Pieces of all tensors, some at a time."""
    batch: list[tuple[str, PackedTensor, int]] = []
    size = 0
    for name, record in chosen.items():
        for start in range(0, record.info.entries, _PIECE):
            batch.append((name, record, start))
            size += min(_PIECE, record.info.entries - start)
            if size >= _BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Writes a task's vectors, each on its base, on all threads. `base` and `out` have tensors under the model's names."""

    def __init__(self, retrieval: Retrieval, base: Mapping[str, Tensor], out: Mapping[str, Tensor]) -> None:
        self._retrieval, self._base, self._out = retrieval, base, out

    def write(self, chosen: dict[str, PackedTensor]) -> None:
        """Fill the chosen tensors of `out`. BadFile if the pack is damaged."""
        with ThreadPoolExecutor(available_threads()) as pool:
            for _ in pool.map(self._pieces, _batches(chosen)):
                pass

    def _pieces(self, batch: list[tuple[str, PackedTensor, int]]) -> None:
        for name, record, start in batch:
            self._piece(name, record, start)

    def _piece(self, name: str, record: PackedTensor, start: int) -> None:
        retrieval = self._retrieval
        stop = min(start + _PIECE, record.info.entries)
        base, tensor = (t.detach().view(-1)[start:stop] for t in (self._base[name], self._out[name]))
        if record.mode == WHOLE_WEIGHTS:
            base = torch.zeros_like(base)
        dtype = record.info.dtype
        integers = INTEGERS[dtype.bits]
        if not record.is_sum:
            tensor.copy_(base)
        elif tensor.device.type == "cpu" and dtype.bits > 16:
            vector = retrieval.vector(record, start, _sums(retrieval, record, start, stop), tensor.numpy())
            np.add(vector, base.numpy(), out=vector)
        elif tensor.device.type == "cpu":
            sums = _sums(retrieval, record, start, stop)
            np.copyto(tensor.view(integers).numpy(), retrieval.entries(record, start, sums, base.view(integers).numpy()))
        else:
            sums = _sums(retrieval, record, start, stop)
            vector = retrieval.vector(record, start, sums, np.empty(stop - start, float_kind(dtype)))
            moved = torch.from_numpy(vector).to(tensor.device)
            tensor.copy_(moved.add_(base.to(moved.dtype)))
        if retrieval.corrected(record):
            bits = tensor.view(integers).cpu()  # the same memory, if it is there already
            retrieval.correct(record, start, bits.numpy())
            tensor.view(integers).copy_(bits)


def _sums(retrieval: Retrieval, record: PackedTensor, start: int, stop: int) -> Any:
    return retrieval.pack.sums(retrieval.place(record), start, stop)


def _whole(retrieval: Retrieval, tensor: TaskTensor) -> Tensor:
    """A task's own tensor."""
    pack = retrieval.pack
    pack.verify_whole(retrieval.task, tensor)
    kind = getattr(torch, tensor.info.dtype.torch_name or "", None)
    if kind is None:
        raise Mismatch(f"torch has no dtype for {tensor.info.name!r} ({tensor.info.dtype.name})")
    data = bytearray(tensor.info.nbytes)
    if not data:
        return torch.empty(tensor.info.shape, dtype=kind)
    pack.read_whole(retrieval.task, tensor, 0, memoryview(data))
    return torch.frombuffer(data, dtype=kind).view(tensor.info.shape)


def _vectors_at(retrieval: Retrieval, names: dict[str, str]) -> dict[str, PackedTensor]:
    """What a task changes, by the model's names; `names` gives those for the task's."""
    by_fine = {
        retrieval.task.fine_name(record.info.name): record for record in retrieval.pack.index.tensors if _changes(retrieval.pack, record)
    }
    return {names[fine]: record for fine, record in by_fine.items() if fine in names and record.info.entries}


def _require_dtype(name: str, record: PackedTensor) -> None:
    if record.info.dtype is not record.base_dtype:
        raise Mismatch(f"{name}: the task has another dtype than the base", "unpack instead")


def task_tensors(table: dict[str, Tensor], pack: Pack, task: str, *, verify: bool) -> dict[str, Tensor]:
    """A task's tensors under its own names. Those that it changes are new, the others are the base's themselves.

    Args:
        table: the base's tensors under its checkpoint's names; they stay as they are.
        verify: check first that every one of them is the base's, by digest.

    Raises Mismatch for another base or a task of another dtype, BadFile if the pack is damaged, UsageError for no such task.
    """
    retrieval = Retrieval(pack, pack.task(task))
    view: Any = _TaskView(pack, retrieval)
    names = match(table, view, False)
    if verify:
        verify_base(table, names, view)
    chosen = _vectors_at(retrieval, names)
    for name, record in chosen.items():
        _require_dtype(name, record)
    new = {name: torch.empty_like(table[name]) for name in chosen}
    _Writer(retrieval, table, new).write(chosen)
    own = {tensor.info.name: _whole(retrieval, tensor) for tensor in retrieval.task.tensors}
    return {fine: new.get(name, table[name]) for fine, name in names.items() if fine not in own} | own


class AppliedPack(Applied):
    """A pack's task on a model; `switch` puts another in its place, `restore` the base. Also a context manager."""

    def __init__(self, table: MutableMapping[str, Tensor], pack: Pack, is_module: bool) -> None:
        super().__init__()
        self.pack, self._table, self._is_module = pack, table, is_module
        self._kept: dict[str, Tensor] = {}  # the base's tensors, by their names in the model
        self._own = Applied()  # the task's own tensors
        self._names: dict[str, tuple[list[Any], dict[str, str]]] = {}  # by task: the model's tensors, and what `match` made of them
        self._retrievals: BlockCache[Retrieval] = BlockCache(_RETRIEVALS)

    @property
    def is_applied(self) -> bool:
        """Whether a task is on the model."""
        return bool(self._kept)

    def switch(self, task: str, verify: bool = False) -> None:
        """Turn the model into another task of the pack. Mismatch if the model has no place for it: then it is the base again."""
        self._own.restore()
        try:
            self._switch(task, verify)
        except BaseException:
            self.restore()
            raise

    def _switch(self, task: str, verify: bool) -> None:
        found = self.pack.task(task)
        retrieval = self._retrievals.get((task, self.pack.scale), lambda: Retrieval(self.pack, found))
        names = self._matched(retrieval, verify)
        chosen = _vectors_at(retrieval, names)
        own = {tensor.info.name: _whole(retrieval, tensor) for tensor in retrieval.task.tensors}
        with torch.no_grad():
            self._set(retrieval, self._untied(retrieval, chosen))
            for name, value in own.items():
                old = self._table.get(names[name])
                self._own.set_tensor(self._table, names[name], value if old is None else value.to(old.device))

    def _matched(self, retrieval: Retrieval, verify: bool) -> dict[str, str]:
        """The model's name for each of the task's tensors; looked for again only if the model's tensors are others by now."""
        seen = [(name, t.shape, t.dtype, t.data_ptr()) for name, t in self._table.items() if isinstance(t, torch.Tensor)]
        known = self._names.get(retrieval.task.name)
        if known is not None and known[0] == seen and not verify:
            return known[1]
        view = _TaskView(self.pack, retrieval)
        names = match(self._table, view, self._is_module)  # type: ignore[arg-type]
        if verify:
            verify_base(self._table, names, view)  # type: ignore[arg-type]
        self._names[retrieval.task.name] = seen, names
        return names

    def _set(self, retrieval: Retrieval, chosen: dict[str, PackedTensor]) -> None:
        """Base plus vector, written over the model's tensors."""
        for name, record in chosen.items():
            tensor = self._table[name]
            _require_dtype(name, record)
            if not tensor.is_contiguous():
                raise Mismatch(f"{name} is not contiguous in memory: call .contiguous() on it first")
            if name not in self._kept:
                self._kept[name] = tensor.detach().clone()
        _Writer(retrieval, self._kept, self._table).write(chosen)

    def _untied(self, retrieval: Retrieval, chosen: dict[str, PackedTensor]) -> dict[str, PackedTensor]:
        """Leave memory that several tensors share to the first; Mismatch if the task has different values there."""
        first: dict[tuple[object, ...], str] = {}
        untied = {}
        for name, record in chosen.items():
            other = first.setdefault(memory(self._table[name]), name)
            if other == name:
                untied[name] = record
            elif any(
                not np.array_equal(a, b) for a, b in zip(*(self._vectors(retrieval, r) for r in (chosen[other], record)), strict=True)
            ):
                raise Mismatch(
                    f"{other} and {name} are tied in this model, in {retrieval.task.name} they differ", "load the base untied, or unpack"
                )
        return untied

    def _vectors(self, retrieval: Retrieval, record: PackedTensor) -> Iterator[Any]:
        """What is added to the base, and how that is corrected, piece by piece."""
        for start in range(0, record.info.entries, _PIECE):
            stop = min(start + _PIECE, record.info.entries)
            sums = _sums(retrieval, record, start, stop) if record.is_sum else np.zeros(stop - start, np.int32)
            yield retrieval.vector(record, start, sums, np.empty(len(sums), "f8"))
            if retrieval.corrections is not None:
                changed = np.zeros(stop - start, f"i{record.info.dtype.bits // 8}")
                retrieval.correct(record, start, changed)
                yield changed

    def restore(self) -> None:
        """Put back what was there before; a second call does nothing."""
        self._own.restore()
        with torch.no_grad():
            for name, kept in self._kept.items():
                self._table[name].detach().copy_(kept)
        self._kept = {}
