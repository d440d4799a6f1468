"""Write a checkpoint whose sizes are known in advance: every tensor goes straight to its final offset."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from peru_cli.checkpoints.header import TensorInfo, build_header
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import PartialDirectory, PartialFile, check_room, may_go_on, partial_path, remove
from peru_cli.checkpoints.local.journal import Journal, fits
from peru_cli.checkpoints.local.layout import METADATA, Layout, data_order, placed
from peru_cli.checkpoints.local.sealed import model_digest
from peru_cli.checkpoints.source import Checkpoint


def header_bytes(tensors: Sequence[TensorInfo], metadata: Mapping[str, str] | None = None, files: Mapping[str, bytes] | None = None) -> int:
    """The header's length for a file with these tensors; with `files`, for a sealed one."""
    return Layout(tensors, metadata, files).begin


def split_shards(tensors: Sequence[TensorInfo], max_shard_bytes: int) -> list[list[TensorInfo]]:
    """Split tensors into shards of at most `max_shard_bytes` of data (a larger tensor gets its own)."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for info in tensors:
        if shards[-1] and size + info.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.nbytes
    return [placed(data_order(shard)) for shard in shards]


class CheckpointWriter(ABC):
    """Takes the bytes of tensors. `order` is the order in which `ordered` writers want them."""

    order: list[TensorInfo]
    journal: Journal | None = None  # of tensors that an earlier run has written, for writers that resume
    ordered = False  # whether write() must be called in `order`, without gaps

    @abstractmethod
    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes of one tensor from byte `offset` on."""

    def write_whole(self, parts: Sequence[memoryview], names: Sequence[str]) -> None:
        """Write all bytes of several tensors."""
        for name, data in zip(names, parts, strict=True):
            self.write(name, 0, data)

    def copy(self, name: str, source: Checkpoint, source_name: str) -> None:
        """Copy a tensor from a checkpoint, where it has the name `source_name`."""
        for offset, piece in source.pieces(source_name):
            self.write(name, offset, piece)

    def claim(self, name: str, note: Any, parts: Sequence[str] | None = None) -> None:
        """All bytes of a tensor are written, as these tensors of the file (itself): writers that resume note it. From any thread."""
        return

    @abstractmethod
    def commit(self) -> None:
        """Rename the output into place."""

    @abstractmethod
    def __enter__(self) -> CheckpointWriter: ...

    @abstractmethod
    def __exit__(self, *exc: object) -> None: ...


_Where = Callable[[str], tuple[PartialFile, Layout] | None]  # the file that a tensor goes to


def _claim(journal: Journal, where: _Where, name: str, note: Any, parts: Sequence[str] | None) -> None:
    """Note in a journal that a tensor is written, and what its parts are."""
    digests = {part: _digest(where, part) for part in parts or [name]}
    journal.claim(name, {"note": note, "digests": digests})


def _digest(where: _Where, name: str) -> str | None:
    """A written tensor's digest, hexadecimal. None if no file has it."""
    found = where(name)
    return found[1].digest(found[0], name).hex() if found is not None else None


def _believe(journal: Journal, where: _Where) -> None:
    """Keep in `done` what is still what was written, with its note; anything else is written again."""
    for name, told in list(journal.done.items()):
        digests = {part: digest for part, digest in told["digests"].items() if where(part) is not None}
        if all(_digest(where, part) == digest for part, digest in digests.items()):
            journal.done[name] = told["note"]
        else:
            del journal.done[name]
            for part in digests:
                if (found := where(part)) is not None:
                    found[1].forget(part)


class FileWriter(CheckpointWriter):
    """One safetensors file."""

    def __init__(
        self,
        target: Path,
        tensors: Sequence[TensorInfo],
        sync: bool,
        metadata: Mapping[str, str] | None = None,
        resume_key: str | None = None,
        fresh: bool = False,
        files: Mapping[str, bytes] | None = None,
    ) -> None:
        """With `files`, the files beside it (possibly none), the file carries digests (sealed.py)."""
        self._layout = Layout(tensors, metadata, files)
        self.order, size = self._layout.order, self._layout.size
        check_room(target, 0 if partial_path(target).exists() else size)
        self._file = PartialFile(target, sync, resume=resume_key is not None)
        try:
            if resume_key is not None:
                path = self._file.path.with_name(self._file.path.name + "-journal")
                self.journal = Journal(
                    path, resume_key, [self._file], sync, lambda _: not fresh and fits(self._file, self._layout.header, size)
                )
                _believe(self.journal, self._where)
            self._layout.write_header(self._file)
        except BaseException as error:
            self._file.__exit__(type(error), error)
            raise

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return self._layout.size

    def _where(self, name: str) -> tuple[PartialFile, Layout] | None:
        return (self._file, self._layout) if name in self._layout.tensors else None

    def write(self, name: str, offset: int, data: memoryview) -> None:
        self._layout.saw(name, offset, data)
        self._file.write_at(self._layout.at(name) + offset, data)

    def write_whole(self, parts: Sequence[memoryview], names: Sequence[str]) -> None:
        self._layout.write_whole(self._file, parts, names)

    def claim(self, name: str, note: Any, parts: Sequence[str] | None = None) -> None:
        if self.journal is not None:
            _claim(self.journal, self._where, name, note, parts)

    def commit(self) -> None:
        self._layout.seal(self._file)
        self._file.commit()
        if self.journal is not None:
            self.journal.remove()

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)
        if self.journal is not None:
            self.journal.close() if may_go_on(exc) and self._file.path.exists() else self.journal.remove()


class DirectoryWriter(CheckpointWriter):
    """A directory that transformers loads: model.safetensors or shards with an index, and side files."""

    def __init__(
        self,
        target: Path,
        tensors: Sequence[TensorInfo],
        side_files: Mapping[str, bytes],
        max_shard_bytes: int,
        sync: bool,
        metadata: Mapping[str, str] | None = None,
        resume_key: str | None = None,
        fresh: bool = False,
        seal: bool = False,
    ) -> None:
        """With `resume_key`, `journal.done` has the tensors that an earlier run with the same key wrote, unless `fresh`.

        With `seal`, the shards carry digests of their tensors and of the side files (sealed.py)."""
        shards = split_shards(sorted(tensors, key=lambda t: t.name), max_shard_bytes)
        total = sum(info.nbytes for info in tensors)
        resume = resume_key is not None
        check_room(target, 0 if resume and partial_path(target).exists() else total + sum(map(len, side_files.values())))
        self.order = [info for shard in shards for info in shard]
        self._where: dict[str, tuple[PartialFile, Layout]] = {}
        self._files: list[tuple[PartialFile, Layout]] = []
        self._sealed: list[tuple[Path, Layout]] = []
        self._digests: dict[str, bytes] = {}
        with ExitStack() as undo:
            self._folder = undo.enter_context(PartialDirectory(target, sync, resume))
            names = shard_names(len(shards))
            self.shards = len(shards)
            for shard, name in zip(shards, names, strict=True):
                path = self._folder.path / name
                if resume and path.exists():  # killed while the shards were being renamed
                    os.replace(path, partial_path(path))
                file = undo.enter_context(PartialFile(path, sync, resume))
                layout = Layout(shard, metadata, side_files if seal else None)
                self._files.append((file, layout))
                self._where.update(dict.fromkeys((info.name for info in shard), (file, layout)))
            if resume_key is not None:
                path = self._folder.path / ".peru-journal"
                ours = [file for file, _ in self._files]
                self.journal = Journal(
                    path, resume_key, ours, sync, lambda _: not fresh and all(fits(file, at.header, at.size) for file, at in self._files)
                )
                _believe(self.journal, self._where.get)
                self._remove_strangers(names)
            for file, layout in self._files:
                layout.write_header(file)
            if len(shards) > 1:
                weight_map = {info.name: name for shard, name in zip(shards, names, strict=True) for info in shard}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
                text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
                (self._folder.path / "model.safetensors.index.json").write_text(text, "utf-8")
            for file_name, content in side_files.items():
                (self._folder.path / file_name).write_bytes(content)
            self._undo = undo.pop_all()

    @property
    def folder(self) -> Path:
        """The unfinished folder, for additional files."""
        return self._folder.path

    def _remove_strangers(self, names: Sequence[str]) -> None:
        """Remove what an earlier run left, except the journal and the shards of this one."""
        ours = {partial_path(self._folder.path / name).name for name in names} | {".peru-journal"}
        for path in self._folder.path.iterdir():
            if path.name not in ours:
                remove(path)

    def write_whole(self, parts: Sequence[memoryview], names: Sequence[str]) -> None:
        files = [self._where[name] for name in names]
        if any(where is not files[0] for where in files):
            super().write_whole(parts, names)
        else:
            files[0][1].write_whole(files[0][0], parts, names)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        file, layout = self._where[name]
        layout.saw(name, offset, data)
        file.write_at(layout.at(name) + offset, data)

    def claim(self, name: str, note: Any, parts: Sequence[str] | None = None) -> None:
        if self.journal is not None:
            _claim(self.journal, self._where.get, name, note, parts)

    def seal(self) -> None:
        """Call when everything is written: the unfinished folder can be read as a checkpoint before `commit`."""
        if self.journal is not None and self._files:
            self.journal.flush()
        for file, layout in self._files:
            self._digests |= layout.seal(file)
            file.commit()
            self._sealed.append((file.target, layout))
        self._files = []

    def amend(self, name: str, content: bytes) -> None:
        """Replace a side file after `seal`, and record it in the shards."""
        (self._folder.path / name).write_bytes(content)
        for path, layout in self._sealed:
            with open(path, "r+b") as file:
                file.write(layout.amended(name, content))
        inputs.forget(self._folder.path)

    @property
    def model_digest(self) -> str:
        """The content of the sealed shards together."""
        return model_digest(self._digests)

    def commit(self) -> None:
        self.seal()
        if self.journal is not None:
            self.journal.remove()
        self._folder.commit()

    def __enter__(self) -> DirectoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.journal is not None:
            self.journal.close()
        self._undo.__exit__(*exc)  # type: ignore[arg-type]


def shard_names(count: int) -> list[str]:
    """File names as transformers gives them."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


class PipeWriter(CheckpointWriter):
    """One safetensors file into a pipe: bytes in order, nothing can be undone."""

    ordered = True

    def __init__(self, pipe: BinaryIO, tensors: Sequence[TensorInfo]) -> None:
        self.order = placed(data_order(tensors))
        self._pipe = pipe
        self._header = build_header(self.order, METADATA)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        if self._header:
            self._pipe.write(self._header)
            self._header = b""
        self._pipe.write(data)

    def commit(self) -> None:
        self.write("", 0, memoryview(b""))
        inputs.check()
        self._pipe.flush()

    def __enter__(self) -> PipeWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class NullWriter(CheckpointWriter):
    """Writes nothing: everything is read and checked."""

    def __init__(self, tensors: Sequence[TensorInfo]) -> None:
        self.order = list(tensors)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        pass

    def commit(self) -> None:
        pass

    def __enter__(self) -> NullWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        pass
