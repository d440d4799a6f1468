"""Apply a task of a pack to weights in memory, switch to another task, and restore the base bit for bit.

    pack = peru_cli.open_artifact("pack.safetensors")
    applied = peru_cli.apply(model, pack, task="a")
    applied.switch("b")                              # or apply(model, pack, task="b"): the base is not read again
    pack.load()                                      # optional: holds the sums in memory, so that a switch is fast
    applied.restore()                                # the model is the base again, bit for bit

The base's tensors are saved while a task is applied: packs change every entry."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch

from peru_cli.artifacts.cache import BlockCache
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.errors import Mismatch
from peru_cli.finetunes.pack_task import TaskOfPack
from peru_cli.live.applied import Applied, match, memory, not_restored, owners, verify_base
from peru_cli.live.memory import TensorTable, empty_tensor, fill
from peru_cli.live.owners import Claim

if TYPE_CHECKING:
    from torch import Tensor, nn

_SOURCES = 8  # tasks whose places and signs are cached


class AppliedPack(Applied):
    """A pack's task applied to a model. `switch` changes the task, `restore` puts the base back. Also a context manager."""

    def __init__(self, table: MutableMapping[str, Tensor], pack: Pack, model: nn.Module | MutableMapping[str, Tensor]) -> None:
        """UsageError if another thread has changed these weights."""
        module = model if isinstance(model, torch.nn.Module) else None
        super().__init__(None, module)
        self.pack, self._table, self._is_module = pack, table, module is not None
        self._kept: dict[str, Tensor] = {}  # the base's tensors, by their names in the model
        self._base = TensorTable("the model", {})  # the same tensors, by the base's names
        self._own = Applied()  # the task's own tensors
        self._names: dict[str, tuple[list[Any], dict[str, str]]] = {}  # by task: the model's tensors, and the result of `match` for them
        self._sources: BlockCache[TaskOfPack] = BlockCache(_SOURCES)

    @property
    def is_applied(self) -> bool:
        """Whether the model currently has a task."""
        return bool(self._kept)

    def switch(self, task: str, verify: bool = False) -> None:
        """Turn the model into another task of the pack. Mismatch if the model has no place for it: then the base is restored."""
        if self._claim is None:
            self._claim = Claim(self._table.values(), str(self.pack.path))
        self._own.restore()
        try:
            self._switch(task, verify)
        except BaseException:
            self.restore()
            raise

    def _switch(self, task: str, verify: bool) -> None:
        pack = self.pack
        pack.task(task)
        source = self._sources.get((task, pack.scale), lambda: TaskOfPack(pack, task, str(pack.path), self._base))
        names = self._matched(source)
        own = {fine: empty_tensor(source.label, origin.info) for fine, origin in source.origins.items() if origin.base is None}
        with torch.no_grad():
            self._keep(source, names)
            if verify:
                verify_base(self._base, source.origins, names, pack)
            source.verify_stored()
            changed = {fine: name for fine, name in names.items() if fine not in own and source.origins[fine].changes}
            fill(source, {fine: self._table[name] for fine, name in owners(self._table, changed, source).items()})
            fill(source, own)
            for fine, value in own.items():
                old = self._table.get(names[fine])
                self._own.set_tensor(self._table, names[fine], value if old is None else value.to(old.device))

    def _matched(self, source: TaskOfPack) -> dict[str, str]:
        """The model's name for each of the task's tensors. Matched again only if the model's tensors have changed."""
        seen = [(name, t.shape, t.dtype, t.data_ptr()) for name, t in self._table.items() if isinstance(t, torch.Tensor)]
        known = self._names.get(source.record.name)
        if known is not None and known[0] == seen:
            return known[1]
        names = match(self._table, source.origins, self.pack, self._is_module)
        self._names[source.record.name] = seen, names
        return names

    def _keep(self, source: TaskOfPack, names: dict[str, str]) -> None:
        """Save the base's tensors that the task changes, tied ones once."""
        first = {memory(self._table[name]): name for name in self._kept}
        for fine, name in names.items():
            origin = source.origins[fine]
            if origin.base is None or origin.base.name in self._base.tensors:
                continue
            tensor = self._table[name]
            if not origin.changes:
                self._base.add({origin.base.name: tensor})
                continue
            if origin.info.dtype is not origin.base.dtype:
                raise Mismatch(f"{name}: the task has another dtype than the base", "unpack instead")
            if not tensor.is_contiguous():
                raise Mismatch(f"{name} is not contiguous in memory: call .contiguous() on it first")
            owner = first.setdefault(memory(tensor), name)
            if owner not in self._kept:
                self._kept[owner] = tensor.detach().clone()
            self._base.add({origin.base.name: self._kept[owner]})

    def restore(self) -> None:
        """Restore the earlier weights, as Applied.restore does."""
        if self._claim is not None:
            self._claim.check_last()
        self._own.restore()
        held, lost = self._held(), 0
        with torch.no_grad():
            for name, kept in self._kept.items():
                tensor = self._table[name]
                if (held is not None and id(tensor) not in held) or tensor.shape != kept.shape or tensor.device.type == "meta":
                    lost += 1
                else:
                    tensor.detach().copy_(kept)
        self._kept = {}
        self._base.clear()
        self.let_go()
        self._claim = None
        if lost:
            raise not_restored(lost)
