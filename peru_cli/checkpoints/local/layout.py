"""Where the tensors of one safetensors file go, whose sizes are known in advance, and the digests that it carries."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from peru_cli.checkpoints.header import TensorInfo, build_header
from peru_cli.checkpoints.local.atomic import PartialFile
from peru_cli.checkpoints.local.sealed import Collected, blank, complete, filled

METADATA = {"format": "pt"}  # transformers rejects files without this


def data_order(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The order of tensors in a file: wide dtypes first, so that each is aligned, then by name."""
    return sorted(tensors, key=lambda t: (-t.dtype.bits, t.name))


def placed(tensors: Sequence[TensorInfo]) -> list[TensorInfo]:
    """The same tensors one after another."""
    at, found = 0, []
    for info in tensors:
        found.append(info if info.begin == at else TensorInfo(info.name, info.dtype, info.shape, at))
        at += info.nbytes
    return found


class Layout:
    """Where one file's tensors go, and the digests to fill into its header at the end, if it carries any."""

    def __init__(self, tensors: Sequence[TensorInfo], metadata: Mapping[str, str] | None, files: Mapping[str, bytes] | None) -> None:
        """`files` are the files beside it that the seal covers. None for no seal."""
        self.order = placed(data_order(tensors))
        self.tensors = {info.name: info for info in self.order}
        self._metadata, self._files = METADATA | dict(metadata or {}), dict(files) if files is not None else None
        self._begun: dict[str, Collected] = {}  # of tensors that are written in part: there may be a hundred thousand in all
        self._digests: dict[str, bytes] = {}
        self.header = self._built()  # until it is written
        self.begin = len(self.header)
        self.size = self.begin + sum(info.nbytes for info in self.order)

    def _built(self) -> bytes:
        """The header, digests blank."""
        return build_header(self.order, self._metadata | (blank(self.order, self._files) if self._files is not None else {}))

    def at(self, name: str) -> int:
        """The offset of a tensor's first byte."""
        return self.begin + self.tensors[name].begin

    def write_header(self, file: PartialFile) -> None:
        """Write the header, and let go of it: it may have megabytes."""
        file.write_at(0, self.header)
        self.header = b""
        os.ftruncate(file.fd, self.size)

    def saw(self, name: str, offset: int, data: memoryview) -> None:
        """Take bytes that are written."""
        if self._files is None or name in self._digests:
            return
        collected = self._begun.get(name) or self._begun.setdefault(name, Collected(self.tensors[name]))
        if collected.saw(offset, data):
            self._digests[name] = collected.digest()
            self._begun.pop(name, None)

    def write_whole(self, file: PartialFile, parts: Sequence[memoryview], names: Sequence[str]) -> None:
        """Write all bytes of several tensors: those that lie one after another at once."""
        begin = end = 0
        run: list[memoryview] = []
        for name, data in zip(names, parts, strict=True):
            self.saw(name, 0, data)
            at = self.at(name)
            if run and at != end:
                file.write_at(begin, b"".join(run))
                run = []
            begin, end = at if not run else begin, at + len(data)
            run.append(data)
        if run:
            file.write_at(begin, b"".join(run))

    def digest(self, file: PartialFile, name: str) -> bytes:
        """A tensor's digest; what was not seen of it is read from the file."""

        def read(offset: int, buffer: memoryview) -> None:
            buffer[:] = file.read_at(self.at(name) + offset, len(buffer))

        if name not in self._digests:
            collected = self._begun.pop(name, None) or Collected(self.tensors[name])
            complete(collected, read)
            self._digests[name] = collected.digest()
        return self._digests[name]

    def forget(self, name: str) -> None:
        """A tensor will be written again."""
        self._digests.pop(name, None)
        self._begun.pop(name, None)

    def seal(self, file: PartialFile) -> dict[str, bytes]:
        """Write the digests into the header, if there are any."""
        if self._files is None:
            return {}
        for name in self.tensors:
            self.digest(file, name)
        file.write_at(*filled(file.read_at(0, self.begin), self._digests))
        return self._digests

    def amended(self, name: str, content: bytes) -> bytes:
        """The sealed header with a new content of a side file. Empty if there is no seal."""
        if self._files is None:
            return b""
        self._files[name] = content
        header = self._built()
        assert len(header) == self.begin
        at, told = filled(header, self._digests)
        return header[:at] + told + header[at + len(told) :]
