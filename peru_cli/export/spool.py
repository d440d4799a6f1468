"""Write a safetensors file whose tensors become known one by one: their bytes wait in temporary files, one per width."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.header import TensorInfo, build_header


class Spool:
    """Takes whole tensors in any order. `write` puts the wide ones first, so that each is aligned."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, BinaryIO] = {}
        self._held: dict[int, list[TensorInfo]] = {}

    def add(self, name: str, dtype: Dtype, shape: tuple[int, ...], data: bytes) -> None:
        """Add a tensor; `data` is all of it."""
        width = dtype.bits
        if width not in self._files:
            self._files[width] = (self._folder / f".spool-{width}").open("w+b")
            self._held[width] = []
        self._held[width].append(TensorInfo(name, dtype, shape))
        self._files[width].write(data)

    def write(self, path: Path, metadata: Mapping[str, str]) -> int:
        """Write the file. Returns its size in bytes."""
        at, placed = 0, []
        for width in sorted(self._held, reverse=True):
            for info in self._held[width]:
                placed.append(TensorInfo(info.name, info.dtype, info.shape, at))
                at += info.nbytes
        with path.open("wb") as out:
            out.write(build_header(placed, metadata))
            for width in sorted(self._held, reverse=True):
                self._files[width].seek(0)
                shutil.copyfileobj(self._files[width], out, 1 << 20)
            return out.tell()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for width, file in self._files.items():
            file.close()
            (self._folder / f".spool-{width}").unlink(missing_ok=True)
