"""The container of format 1: a safetensors file with sorted metadata and one U8 tensor for each role.

Roles: `blocks` (kept entries), `whole` (tensors stored whole), `files` (side files), `index`. Their sizes are known only
at the end, so space for the header is reserved and filled in last. docs/format.md defines the bytes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from blake3 import blake3

from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import MAX_ENTRIES, TensorInfo, build_header
from peru_cli.checkpoints.local.atomic import PartialFile
from peru_cli.checkpoints.local.files import BytesFile, RandomAccess, open_random, read_header
from peru_cli.checkpoints.places import Place, children
from peru_cli.checkpoints.source import digest_of, pieces
from peru_cli.errors import BadFile, UsageError
from peru_cli.shown import listed

FORMAT = "1"
ROLES = ("blocks", "whole", "files", "index")
MAX_INDEX_BYTES = 1 << 30
_DIGEST = "peru.digest"
_BLANK = "0" * 64  # stands in for the digest while it is computed
_U8 = BY_NAME["U8"]


def _header(sizes: Mapping[str, int], metadata: Mapping[str, str], reserve: int = 0) -> bytes:
    at, tensors = 0, []
    for role in ROLES:
        if sizes.get(role):
            tensors.append(TensorInfo(role, _U8, (sizes[role],), at))
            at += sizes[role]
    return build_header(tensors, metadata, reserve)


def _seal(blank_header: bytes, index: bytes) -> str:
    """The digest of a file's header and index. The header is taken with its padding and with the digest itself blank."""
    return blake3(b"peru header 1\0" + blank_header + index).hexdigest()


def header_room(largest_metadata: Mapping[str, str]) -> int:
    """Bytes to reserve before the data of an artifact whose metadata is at most this long."""
    worst = _header(dict.fromkeys(ROLES, MAX_ENTRIES // 8), {**largest_metadata, _DIGEST: _BLANK})
    return -(-len(worst) // 64) * 64


class ContainerWriter:
    """Appends roles in order, then seals the file with its header. A context manager, like PartialFile."""

    def __init__(
        self, target: Path, largest_metadata: Mapping[str, str], sync: bool, resume: bool = False, file: PartialFile | None = None
    ) -> None:  # fmt: skip
        """`largest_metadata` has every key that `finish` will get, with a value at least as long.

        With `resume`, the bytes that an earlier run left are kept for `skip`."""
        self.file = PartialFile(target, sync, resume) if file is None else file
        self._sizes = dict.fromkeys(ROLES, 0)
        self._data_offset = header_room(largest_metadata)
        self._at = self._data_offset
        self._last = 0

    def append(self, role: str, data: bytes | memoryview) -> None:
        """Append to a role. Roles must come in the order of ROLES."""
        number = ROLES.index(role)
        assert number >= self._last, f"{role} after {ROLES[self._last]}"
        self._last = number
        self.file.write_at(self._at, data)
        self._at += len(data)
        self._sizes[role] += len(data)

    def skip(self, role: str, nbytes: int) -> None:
        """Count bytes of a role that an earlier run has already written."""
        self.append(role, b"")
        self._at += nbytes
        self._sizes[role] += nbytes

    def holds(self, nbytes: int) -> bool:
        """Whether an earlier run left at least this many bytes of roles."""
        return os.fstat(self.file.fd).st_size >= (self._data_offset + nbytes if nbytes else 0)

    def read_first(self, offset: int, nbytes: int) -> bytes:
        """Read bytes of the first role that are already written."""
        return self.file.read_at(self._data_offset + offset, nbytes)

    def digest_next(self, info: TensorInfo) -> bytes:
        """The digest of a tensor whose bytes an earlier run left where the next ones go."""

        def read(offset: int, buffer: memoryview) -> None:
            buffer[:] = self.file.read_at(self._at + offset, len(buffer))

        return digest_of(info, pieces(info, read))

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each role so far."""
        return dict(self._sizes)

    def finish(self, metadata: Mapping[str, str], index: bytes, before: Callable[[], None] = lambda: None) -> int:
        """`seal` and `commit`. Returns the size of the file in bytes.

        `before` is called when everything is written and only the rename is left."""
        self.seal(metadata, index)
        before()
        self.commit()
        return self._at

    def seal(self, metadata: Mapping[str, str], index: bytes) -> tuple[int, str]:
        """Append the index and write the header. Returns the size of the file in bytes and the digest in its header."""
        self.append("index", index)
        digest = _seal(_header(self._sizes, {**metadata, _DIGEST: _BLANK}, reserve=self._data_offset), index)
        header = _header(self._sizes, {**metadata, _DIGEST: digest}, reserve=self._data_offset)
        if len(header) != self._data_offset:
            raise AssertionError(f"header of {len(header)} bytes in room for {self._data_offset}")
        self.file.write_at(0, header)
        os.ftruncate(self.file.fd, self._at)
        return self._at, digest

    def commit(self) -> None:
        """Rename the sealed file into place."""
        self.file.commit()

    def __enter__(self) -> ContainerWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.__exit__(*exc)


@contextmanager
def opening(path: Place, close: Callable[[], None]) -> Iterator[None]:
    """If opening fails, close the file and name it in the error."""
    try:
        yield
    except BadFile as error:
        close()
        message = error.message if str(path) in error.message else f"{path}: {error.message}"
        raise BadFile(message, error.hint) from error
    except BaseException:
        close()
        raise


class Container:
    """An artifact opened for reading: metadata, the verified index, and roles read by range."""

    def __init__(self, source: Place | BytesFile) -> None:
        self.path: Place = source.path if isinstance(source, BytesFile) else source
        self._file: RandomAccess = source if isinstance(source, BytesFile) else open_random(source)
        with opening(self.path, self.close):
            self._open()

    def _open(self) -> None:
        header = read_header(self._file)
        metadata = dict(header.metadata)
        if "peru.format" not in metadata:
            raise BadFile("not a peru artifact", "this is a checkpoint, but an artifact is needed: `peru prune` makes one")
        if metadata["peru.format"] != FORMAT:
            raise BadFile(f"artifact format {metadata['peru.format']!r}, this peru reads {FORMAT}", "pip install -U peru-cli")
        if not set(header.tensors) <= set(ROLES):
            raise BadFile(f"holds tensors that format {FORMAT} does not have: {sorted(set(header.tensors) - set(ROLES))[:3]}")
        self.sizes = {role: header.tensors[role].nbytes if role in header.tensors else 0 for role in ROLES}
        self._begin = {role: header.data_offset + (header.tensors[role].begin if role in header.tensors else 0) for role in ROLES}
        if self.sizes["index"] > MAX_INDEX_BYTES:
            raise BadFile(f"its index claims {self.sizes['index']} bytes")
        self.index = self.read("index", 0, self.sizes["index"])
        digest = metadata.pop(_DIGEST, "")
        expected = _header(self.sizes, {**metadata, _DIGEST: digest}, reserve=header.data_offset)
        raw = bytearray(header.data_offset)
        self._file.read_into(0, memoryview(raw))
        blank = _header(self.sizes, {**metadata, _DIGEST: _BLANK}, reserve=header.data_offset)
        if bytes(raw) != expected or digest != _seal(blank, self.index):
            raise BadFile("its header or index was altered after it was written", "fetch or make it again")
        self.metadata = metadata

    @property
    def header_bytes(self) -> int:
        """Bytes before the data."""
        return self._file.size - sum(self.sizes.values())

    @property
    def file_bytes(self) -> int:
        """Size of the file in bytes."""
        return self._file.size

    def read_into(self, role: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from a role. BadFile beyond its end."""
        if offset < 0 or offset + len(buffer) > self.sizes[role]:
            raise BadFile(f"{self.path}: reads past the end of its role {role!r}")
        self._file.read_into(self._begin[role] + offset, buffer)

    def read(self, role: str, offset: int, nbytes: int) -> bytes:
        """Read bytes of a role. BadFile beyond its end, which is checked before memory is allocated."""
        if nbytes < 0 or offset < 0 or offset + nbytes > self.sizes[role]:
            raise BadFile(f"{self.path}: reads past the end of its role {role!r}")
        data = bytearray(nbytes)
        self._file.read_into(self._begin[role] + offset, memoryview(data))
        return bytes(data)

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def find_artifact(place: Place, task: str | None = None) -> Place:
    """Find a task's artifact in a folder or repo, or the one artifact if there are no other weights. Otherwise returns the place itself.

    UsageError if several files could be meant, or if none belongs to the task."""
    files = [file for file in children(place, "*.safetensors") if not file.name.startswith(".")]
    if task is not None and place.is_dir():
        mine = [file for file in files if file.name.removesuffix(".safetensors") == task] or (files if len(files) == 1 else [])
        if not mine or not is_artifact(mine[0]):
            tasks = listed(file.name.removesuffix(".safetensors") for file in files)
            raise UsageError(f"{place} has no artifact of the task {task!r}", f"it holds {tasks or 'none'}: name one of these, or its file")
        return mine[0]
    if len(files) > 1 and not (place / "model.safetensors.index.json").is_file() and is_artifact(files[0]):
        raise UsageError(
            f"{place} holds {len(files)} artifacts: {', '.join(file.name.removesuffix('.safetensors') for file in files[:8])}",
            f"name the file, such as {getattr(files[0], 'public_name', files[0])}; `peru unpack` takes --task, too",
        )
    return files[0] if len(files) == 1 and is_artifact(files[0]) else place


def artifact_kind(path: Place) -> str | None:
    """The kind that an artifact claims, damaged or not. None for any other file."""
    if not path.is_file() or path.suffix != ".safetensors":
        return None
    file = open_random(path)
    try:
        metadata = read_header(file).metadata
        return metadata.get("peru.kind", "") if "peru.format" in metadata else None
    except BadFile:
        return None
    finally:
        file.close()


def seal_of(path: Place) -> str | None:
    """The digest in an artifact's header. None for any other file."""
    try:
        file = open_random(path)
    except OSError:
        return None
    try:
        return read_header(file).metadata.get(_DIGEST)
    except BadFile:
        return None
    finally:
        file.close()


def is_artifact(path: Place) -> bool:
    """Whether a file is a peru artifact, damaged or not. False if it is not a safetensors file."""
    return artifact_kind(path) is not None
