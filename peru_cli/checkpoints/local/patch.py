"""Change the tensors of a checkpoint where they lie, with a journal: `.peru-patch` in the checkpoint's folder.

The journal holds every new value and side file. It is written first, synced, and renamed into place; from then on the checkpoint
counts as half patched, and peru refuses to read it. Then the values are written, all digests are compared, and the journal is
removed. After a kill `finish` needs nothing but the journal: writing a value twice does no harm.

    magic        b"peru patch 1" and four zero bytes
    records      tensor u32, first unit u64, units u32, kind u8 (0 dense, 1 sparse); if sparse, units x u16 positions; units values.
                 A unit is an entry, or a byte if an entry has not 1, 2, 4 or 8 bytes. Sparse positions count from the first unit.
    side files   their bytes, in the order of `side`
    JSON         what is patched: files, tensors with their digests, side files, the artifact's digest
    u64          the length of the JSON
    32 bytes     BLAKE3 of all before

All integers are little-endian; records are in the order of tensors and entries, so that memory does not grow with the model."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from blake3 import blake3

from peru_cli.checkpoints.digests import TensorDigest, leaves
from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.atomic import PATCH_MARKER, PartialFile, partial_path, sync_folder
from peru_cli.checkpoints.sidefiles import MAX_SIDE_FILE_BYTES, is_side_file_name
from peru_cli.console import console
from peru_cli.errors import BadFile, PeruError
from peru_cli.shown import listed

AGAIN = "run the same `peru unpack ... --in-place` again: it finishes what was begun, even if the artifact is gone"
_MAGIC = b"peru patch 1\0\0\0\0"
_RECORD = struct.Struct("<IQIB")
_TAIL = struct.Struct("<Q32s")
_BLOCK = 1 << 16  # units whose positions fit u16
_PIECE = 3 * _BLOCK  # units patched at once: whole chunks of every dtype, for their digests
_DENSE, _SPARSE = 0, 1
_READ = 1 << 20


@dataclass(frozen=True)
class Placed:
    """A tensor, and where its first byte is: the file's number, and the offset in the file."""

    info: TensorInfo
    file: int
    begin: int


def is_weight_file_name(name: str) -> bool:
    """Whether this is the plain name of a safetensors file."""
    return name == Path(name).name and name.endswith(".safetensors") and not name.startswith(".")


def unit_bytes(dtype: Dtype) -> int:
    """Bytes of what is compared and written as one value."""
    return dtype.bits // 8 if dtype.bits in (8, 16, 32, 64) else 1


def most_bytes(info: TensorInfo, changed: int | None) -> int:
    """Bytes that a tensor takes in a journal at most if `changed` entries change. None if that is not known."""
    unit = unit_bytes(info.dtype)
    blocks = _RECORD.size * -(-info.nbytes // (unit * _BLOCK))
    return blocks + (info.nbytes if changed is None else min(info.nbytes, changed * (unit + 2)))


def _file_header(fd: int, begin: int) -> str:
    """A digest of a file's bytes before its first tensor."""
    return blake3(os.pread(fd, begin, 0)).hexdigest(16)


class PatchJournal:
    """Writes a journal. A context manager, like PartialFile: nothing of it stays unless it is committed."""

    def __init__(self, folder: Path, files: Sequence[Path], headers: Sequence[int], tensors: Sequence[Placed], sync: bool) -> None:
        """`headers` are the bytes before the data of each file, `tensors` are in the order in which changes come."""
        self._folder, self._tensors = folder, tensors
        self._files = []
        for path, begin in zip(files, headers, strict=True):
            with open(path, "rb") as file:
                self._files.append([path.name, os.fstat(file.fileno()).st_size, begin, _file_header(file.fileno(), begin)])
        self._file = PartialFile(folder / PATCH_MARKER, sync)
        self._hash, self.nbytes, self.changed = blake3(), 0, 0
        self._append(_MAGIC)

    def _append(self, *parts: bytes | memoryview) -> None:
        data = b"".join(parts)
        self._hash.update(data)
        self._file.write_at(self.nbytes, data)
        self.nbytes += len(data)

    def add(self, number: int, offset: int, new: memoryview, old: memoryview) -> None:
        """Record what changes of a tensor from byte `offset` on. In order."""
        unit = unit_bytes(self._tensors[number].info.dtype)
        after, before = (np.frombuffer(data, f"<u{unit}") for data in (new, old))
        changed = np.flatnonzero(after != before)
        if not len(changed):
            return
        self.changed += len(changed)
        first = offset // unit
        parts: list[bytes | memoryview] = []
        for block in range((first + int(changed[0])) // _BLOCK, (first + int(changed[-1])) // _BLOCK + 1):
            begin = block * _BLOCK - first  # counted from `offset`, like `changed`
            start, stop = max(begin, 0), min(begin + _BLOCK, len(after))
            found = changed[slice(*np.searchsorted(changed, (start, stop)))]
            if len(found) * (unit + 2) >= (stop - start) * unit:
                parts += [_RECORD.pack(number, first + start, stop - start, _DENSE), after[start:stop].tobytes()]
            elif len(found):
                positions = (found - begin).astype("<u2")
                parts += [_RECORD.pack(number, first + begin, len(found), _SPARSE), positions.tobytes(), after[found].tobytes()]
        self._append(*parts)

    def commit(self, digests: Mapping[str, bytes], side: Mapping[str, bytes], artifact: str) -> None:
        """Put it in place: from now on the checkpoint is half patched. `digests` are those of the tensors when it no longer is."""
        records = self.nbytes
        for content in side.values():
            self._append(content)
        told = {
            "files": self._files,
            "tensors": [[t.info.name, t.info.dtype.name, t.info.shape, t.file, t.begin, digests[t.info.name].hex()] for t in self._tensors],
            "side": [[name, len(content)] for name, content in side.items()],
            "records": records,
            "artifact": artifact,
        }
        text = json.dumps(told).encode()
        self._append(text, struct.pack("<Q", len(text)))
        self._append(self._hash.digest())
        self._file.commit()

    def __enter__(self) -> PatchJournal:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)


@dataclass(frozen=True)
class _Told:
    """What a journal says of itself: of each file its name, size, and the bytes and digest of its header; of each tensor its place and
    digest; of each side file its name and size."""

    files: list[tuple[str, int, int, str]]
    tensors: list[tuple[Placed, str]]
    side: list[tuple[str, int]]
    records: int  # where they end
    artifact: str


def _told(file: BinaryIO, path: Path) -> _Told:
    """What a journal says of itself. BadFile if it is damaged.

    A stranger may have put it there, with a digest of its own. It names plain files beside it, and places inside of them."""
    try:
        end = file.seek(-_TAIL.size, os.SEEK_END)
        length, _ = _TAIL.unpack(file.read(_TAIL.size))
        begin = file.seek(end - length)
        told = json.loads(file.read(length))
        files = [(str(name), int(size), int(header), str(digest)) for name, size, header, digest in told["files"]]
        sizes = [size if 0 <= header <= size and is_weight_file_name(name) else -1 for name, size, header, _ in files]
        tensors, side = [], [(str(name), int(size)) for name, size in told["side"]]
        for name, dtype, shape, number, at, digest in told["tensors"]:
            info = TensorInfo(str(name), BY_NAME[dtype], tuple(map(int, shape)))
            tensors.append((Placed(info, range(len(files))[number], int(at)), str(digest)))
        inside = all(0 <= placed.begin <= sizes[placed.file] - placed.info.nbytes for placed, _ in tensors)
        shaped = all(n >= 0 for placed, _ in tensors for n in placed.info.shape)
        small = all(is_side_file_name(name) and 0 <= size <= MAX_SIDE_FILE_BYTES for name, size in side)
        records = int(told["records"])
        if not (inside and shaped and small and min(sizes) >= 0 and len(_MAGIC) <= records == begin - sum(size for _, size in side)):
            raise _damaged(path)
        return _Told(files, tensors, side, records, str(told["artifact"]))
    except (OSError, ValueError, TypeError, LookupError, OverflowError, AttributeError, struct.error) as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> BadFile:
    return BadFile(
        f"{path}: the journal of an interrupted patch was altered, so the checkpoint beside it cannot be completed",
        f"put the checkpoint's files there again, and remove {path.name}",
    )


def refuse_half_patched(file: Path) -> None:
    """BadFile if a patch of this file was begun and not finished."""
    marker = file.parent / PATCH_MARKER
    if not marker.exists():
        return
    try:
        with marker.open("rb") as journal:
            patched = {name for name, *_ in _told(journal, marker).files}
    except FileNotFoundError:  # finished just now
        return
    except BadFile:
        patched = {file.name}
    if file.name in patched:
        raise BadFile(f"{file} is half patched: `peru unpack --in-place` was interrupted, or is still at work", AGAIN)


@dataclass(frozen=True)
class Finished:
    """What a journal did: the digest of its artifact, the patched files, and the side files that were written."""

    artifact: str
    files: list[Path]
    side: list[str]


def is_begun(folder: Path) -> bool:
    """Whether a folder holds a checkpoint that is half patched."""
    return (folder / PATCH_MARKER).exists()


def finish(folder: Path, sync: bool, advance: Callable[[int], None] = lambda entries: None) -> Finished:
    """Write what the journal in a folder holds, compare the result with its digests, and remove the journal.

    BadFile, with the journal left in place, if it or the checkpoint was altered by others meanwhile."""
    marker = folder / PATCH_MARKER
    console.unfinished.append(marker)
    try:
        with marker.open("rb") as journal, ExitStack() as stack:
            told = _told(journal, marker)
            _verify(journal, marker)
            paths = [folder / name for name, *_ in told.files]
            fds = [_open(folder / name, size, begin, header, stack) for name, size, begin, header in told.files]
            wrong = _patch(journal, marker, told, fds, advance)
            if sync:
                for fd in fds:
                    os.fsync(fd)
            if wrong:
                raise BadFile(
                    f"{folder} was changed by another program while it was patched: {listed(wrong)} differ from what the artifact gives",
                    f"put the checkpoint's files there again, remove {PATCH_MARKER}, and run the command again",
                )
            journal.seek(told.records)
            for name, size in told.side:
                _replace(folder / name, journal.read(size), sync)
        marker.unlink()
        if sync:
            sync_folder(folder)
    except OSError as error:
        what = f"{error.filename or folder}: {error.strerror or error}"
        raise PeruError(f"{what}: {folder} is half patched", f"when that is mended, {AGAIN}") from error
    return Finished(told.artifact, paths, [name for name, _ in told.side])


def _verify(journal: BinaryIO, path: Path) -> None:
    """BadFile unless a journal's digest is that of its bytes."""
    total, left = blake3(), os.fstat(journal.fileno()).st_size - blake3.digest_size
    journal.seek(0)
    while left > 0 and (data := journal.read(min(_READ, left))):
        total.update(data)
        left -= len(data)
    if journal.read(blake3.digest_size) != total.digest():
        raise _damaged(path)


def _open(path: Path, size: int, begin: int, header: str, stack: ExitStack) -> int:
    """Open a file to be patched. BadFile if it is not the one that the journal was written for, OSError if it is a symbolic link."""
    inputs.forget(path)
    fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0))
    stack.callback(os.close, fd)
    found = os.fstat(fd)
    if found.st_size != size or found.st_nlink > 1 or _file_header(fd, begin) != header:
        raise BadFile(
            f"{path} is not the file that `peru unpack --in-place` began to patch",
            f"if it was put there on purpose, remove {path.parent / PATCH_MARKER} and run the command again",
        )
    return fd


def _patch(journal: BinaryIO, path: Path, told: _Told, fds: Sequence[int], advance: Callable[[int], None]) -> list[str]:
    """Write all records; the tensors whose digests are not the expected ones."""
    records, wrong = _records(journal, path, told), list[str]()
    at = next(records, None)
    for number, (placed, digest) in enumerate(told.tensors):
        info, fd, begin = placed.info, fds[placed.file], placed.begin
        tree, unit = TensorDigest(info.dtype, info.shape), unit_bytes(info.dtype)
        for start in range(0, info.nbytes, _PIECE * unit):
            room = bytearray(os.pread(fd, min(_PIECE * unit, info.nbytes - start), begin + start))
            units, first, changed = np.frombuffer(room, f"<u{unit}"), start // unit, False
            while at is not None and at[0] == number and at[1] < first + len(units):
                _, where, positions, values = at
                units[positions + (where - first) if positions is not None else slice(where - first, where - first + len(values))] = values
                changed, at = True, next(records, None)
            if changed:
                _write(fd, room, begin + start)
            tree.add(leaves(memoryview(room), info.dtype))
        if tree.digest().hex() != digest:
            wrong.append(info.name)
        advance(info.entries)
    return wrong


_Record = tuple[int, int, Any, Any]  # tensor, first unit, positions from there (None if dense), values


def _records(journal: BinaryIO, path: Path, told: _Told) -> Iterator[_Record]:
    """The records, in order. BadFile for one that no journal has."""
    journal.seek(len(_MAGIC))
    last = (0, 0)
    while journal.tell() < told.records:
        number, first, count, kind = _RECORD.unpack(_exactly(journal, _RECORD.size, path, told))
        if number >= len(told.tensors) or (number, first) < last or kind not in (_DENSE, _SPARSE) or not 0 < count <= _BLOCK:
            raise _damaged(path)
        info = told.tensors[number][0].info
        unit = unit_bytes(info.dtype)
        positions = np.frombuffer(_exactly(journal, 2 * count, path, told), "<u2").astype(np.int64) if kind == _SPARSE else None
        final = first + (count - 1 if positions is None else int(positions.max()))
        if final * unit >= info.nbytes or final // _BLOCK != first // _BLOCK:
            raise _damaged(path)
        yield number, first, positions, np.frombuffer(_exactly(journal, unit * count, path, told), f"<u{unit}")
        last = number, first


def _exactly(journal: BinaryIO, nbytes: int, path: Path, told: _Told) -> bytes:
    if journal.tell() + nbytes > told.records:
        raise _damaged(path)
    return journal.read(nbytes)


def _replace(path: Path, content: bytes, sync: bool) -> None:
    """Replace a small file in one step."""
    inputs.forget(path)
    unfinished = partial_path(path)
    unfinished.unlink(missing_ok=True)
    with unfinished.open("xb") as file:  # never through a link that lies there
        file.write(content)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    os.replace(unfinished, path)


def _write(fd: int, data: bytearray, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
