"""A checkpoint whose tensors are put together from those in its files, entry by entry, as transformers does when it loads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.names.layout import Bits, Layout
from peru_cli.checkpoints.source import Checkpoint, Over

_KINDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


class Converted(Over):
    """A model in which layouts take the place of the tensors that they are made of. Only entries move; no value changes."""

    def __init__(self, model: Checkpoint, layouts: Mapping[str, Layout]) -> None:
        """`layouts` by new name. All sources of a layout have one dtype of whole bytes."""
        super().__init__(model, f", {len(layouts)} tensors converted")
        self._layouts, self.converted = dict(layouts), set(layouts)
        used = {piece.source for layout in layouts.values() for piece in layout.pieces}
        self.tensors = {name: info for name, info in model.tensors.items() if name not in used}
        for name, layout in layouts.items():
            self.tensors[name] = TensorInfo(name, model.tensors[layout.pieces[0].source].dtype, layout.shape)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        layout = self._layouts.get(name)
        if layout is None:
            self.below.read_into(name, offset, buffer)
            return
        nbytes = self.tensors[name].dtype.bits // 8
        kind = _KINDS[nbytes * 8]

        def read(source: str, first: int, entries: int) -> Bits:
            run = bytearray(entries * nbytes)
            self.below.read_into(source, first * nbytes, memoryview(run))
            return np.frombuffer(run, kind)

        layout.read(offset // nbytes, np.frombuffer(buffer, kind), read)

    def expect(self, ranges: Iterable[tuple[str, int, int]], keep: bool = False) -> None:
        self.below.expect((part for part in ranges if part[0] not in self._layouts), keep)
