"""A weight update that a trainer published for an engine, on its base: SGLang's, prime-rl's or TRL's (docs/engines.md)."""

from __future__ import annotations

import json
import threading
import zlib
from abc import abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.checkpoint import open_file
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, Mismatch, UsageError
from peru_cli.finetunes.fine_tune import FineTune, Witness

Array = np.ndarray[Any, np.dtype[Any]]
_MANIFEST, _INDEX, _TRL = "sparse_update_manifest.json", "model.safetensors.index.json", "patch.safetensors"
_INSTALL = "pip install 'peru-cli[export]'"
_HELD = 4  # tensors whose changes are cached: threads read neighbours at once


class Update(FineTune):
    """The base with some tensors changed. Names, shapes and dtypes are the base's."""

    base: Checkpoint

    def __init__(self, path: Place, label: str, base: Checkpoint, kind: str, step: str) -> None:
        super().__init__()
        self.label, self.kind, self.base, self.path = label, f"weight update ({kind}, {step})", base, path
        self.heading = f"base {base.label}: {base.kind}; {label}: {self.kind},"
        self.tensors, self.metadata, self.side_files = base.tensors, {}, base.side_files
        self.files = [*base.files]
        self._held, self._lock = OrderedDict[str, tuple[Array | None, Array]](), threading.Lock()
        self.changed = set[str]()

    def wants(self, name: str, dtype: str | None = None, shape: list[int] | None = None) -> TensorInfo:
        """The base's tensor that the update changes. Mismatch if there is none."""
        info = self.base.tensors.get(name)
        if info is None:
            raise Mismatch(f"{self.label} changes {name}, which {self.base.label} lacks", "name the base that the update was made for")
        if (shape is not None and tuple(shape) != info.shape) or (dtype is not None and dtype != info.dtype.torch_name):
            there = f"{info.dtype.torch_name} {list(info.shape)}"
            raise Mismatch(
                f"{self.label}: {name} is {dtype} {shape}, in {self.base.label} {there}", "name the base that the update was made for"
            )
        self.changed.add(name)
        return info

    @abstractmethod
    def load(self, info: TensorInfo) -> tuple[Array | None, Array]:
        """Byte offsets of changed entries, ascending, and their bytes, (k, bytes of an entry); or None and all bytes, (n,)."""

    def read_watched(self, name: str, offset: int, buffer: memoryview, witness: Witness | None) -> None:
        if name not in self.changed:
            self.base.read_into(name, offset, buffer)
            return
        places, new = self._change(name)
        if places is None:
            buffer[:] = new[offset : offset + len(buffer)].data
            return
        self.base.read_into(name, offset, buffer)
        first, last = np.searchsorted(places, (offset, offset + len(buffer)))
        room = np.frombuffer(buffer, np.uint8).reshape(-1, new.shape[1])
        room[(places[first:last] - offset) // new.shape[1]] = new[first:last]

    def _change(self, name: str) -> tuple[Array | None, Array]:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
                return self._held[name]
            found = self._held[name] = self.load(self.base.tensors[name])
            while len(self._held) > _HELD:
                self._held.popitem(last=False)
            return found

    def sparse(self, info: TensorInfo, positions: Array, values: Array) -> tuple[Array, Array]:
        """Entries at positions in any order, in the form of `load`. BadFile for invalid positions."""
        order = np.argsort(positions, kind="stable")
        places = positions[order].astype(np.int64)
        if len(places) != len(values) or (len(places) and (places[0] < 0 or places[-1] >= info.entries or not np.all(np.diff(places)))):
            raise BadFile(f"{self.label}: positions of {info.name} are outside the tensor or stand twice", "publish the update again")
        return places * values.shape[1], values[order]


class _Sparse(Update):
    """Indices and values as tensors of one file: prime-rl and TRL."""

    def __init__(self, path: Place, label: str, base: Checkpoint, kind: str, step: str, file: Place | None) -> None:
        super().__init__(path, label, base, kind, step)
        self.patch = _plain(file) if file is not None else None
        self.files = [*base.files, *(self.patch.files if self.patch is not None else ())]
        self.warnings = [f"nothing in {label} proves that {base.label} is the step it was made for: peru takes your word for it"]
        self.keys = dict[str, tuple[str, str]]()

    def found(self, key: str) -> TensorInfo:
        """A tensor of the patch file. BadFile if it is missing."""
        info = self.patch.tensors.get(key) if self.patch is not None else None
        if info is None:
            raise BadFile(f"{self.label}: {key} is missing", "publish the update again")
        return info

    def load(self, info: TensorInfo) -> tuple[Array | None, Array]:
        assert self.patch is not None
        places, values = (self.found(key) for key in self.keys[info.name])
        raw = np.frombuffer(self.patch.read(values.name), np.uint8).reshape(-1, max(info.dtype.bits // 8, 1))
        kind = {"I32": np.int32, "I64": np.int64, "U16": np.uint16, "U32": np.uint32}.get(places.dtype.name)
        if kind is None or values.dtype is not info.dtype:
            raise BadFile(f"{self.label}: {info.name} has indices of {places.dtype.name} and values of {values.dtype.name}")
        return self.sparse(info, self.positions(np.frombuffer(self.patch.read(places.name), kind)), raw)

    def positions(self, stored: Array) -> Array:
        """Flat positions from the stored ones; (k,) -> (k,)."""
        return stored

    def close(self) -> None:
        if self.patch is not None:
            self.patch.close()


class PrimeRl(_Sparse):
    """prime-rl's `sparse_update_manifest.json` and patch file."""

    def __init__(self, path: Place, label: str, base: Checkpoint) -> None:
        manifest = _json(path / _MANIFEST)
        if (manifest.get("format"), manifest.get("version")) != ("prime-rl-sparse-update", 1):
            raise BadFile(
                f"{label}: an update of format {manifest.get('format')!r}, version {manifest.get('version')!r}, is unknown to peru"
            )
        if manifest.get("compressed"):
            raise UsageError(f"{label} is compressed", "decompress its patch file with zstd, and set `compressed` to false")
        name = manifest.get("patch_file")
        if name is not None and (not isinstance(name, str) or Path(name).name != name):
            raise BadFile(f"{label}: the patch file is called {name!r}")
        step = f"step {manifest.get('step')} after {manifest.get('base_step')}"
        super().__init__(path, label, base, "prime-rl", step, path / name if name is not None else None)
        for entry in _of(manifest, "tensors", list):
            info = self.wants(_of(entry, "name", str), _of(entry, "dtype", str), _of(entry, "shape", list))
            self.keys[info.name] = _of(entry, "indices", str), _of(entry, "values", str)
            for key in self.keys[info.name]:
                self.found(key)


class Trl(_Sparse):
    """TRL's file of gaps (`NAME.idx`) and values (`NAME.val`)."""

    def __init__(self, path: Place, label: str, base: Checkpoint) -> None:
        file = path / _TRL if path.is_dir() else path
        super().__init__(path, label, base, "TRL", "sparse weight patch", file)
        assert self.patch is not None
        about = self.patch.metadata
        self.gaps = about.get("encoding") == "gap_delta"
        if about.get("sparse") != "True" or about.get("encoding") not in ("gap_delta", "raw"):
            raise UsageError(f"{label} is a patch that peru does not read: sparse {about.get('sparse')}, encoding {about.get('encoding')}")
        for key in self.patch.tensors:
            name, _, part = key.rpartition(".")
            if part not in ("idx", "val"):
                raise BadFile(f"{label}: {key} is neither positions nor values")
            self.wants(name)
            self.keys[name] = f"{name}.idx", f"{name}.val"
        for pair in self.keys.values():
            for key in pair:
                self.found(key)

    def positions(self, stored: Array) -> Array:
        return np.cumsum(stored.astype(np.int64) + 1) - 1 if self.gaps else stored


class SgLang(Update):
    """SGLang's `weight_v000042/`: compressed differences of bytes, with a checksum of each new tensor."""

    def __init__(self, path: Place, label: str, base: Checkpoint) -> None:
        index = _json(path / _INDEX)
        about, where = _of(index, "metadata", dict), _of(index, "weight_map", dict)
        super().__init__(path, label, base, "SGLang", f"version {about.get('version')} after {about.get('base_version')}")
        self.encoding, self.algorithm = about.get("delta_encoding"), about.get("checksum_format")
        if about.get("compression_format") != "zstd" or self.encoding not in ("xor", "overwrite"):
            raise UsageError(f"{label}: {self.encoding} in {about.get('compression_format')} is unknown to peru")
        _hash(self.algorithm, b"")
        try:
            import zstandard  # noqa: F401
        except ImportError as error:
            raise UsageError(f"{label} is compressed with zstandard, which is not installed", _INSTALL) from error
        names = sorted({name for name in where.values() if isinstance(name, str) and Path(name).name == name})
        self.shards = {name: _plain(path / name) for name in names}
        self.files = [*base.files, *(file for shard in self.shards.values() for file in shard.files)]
        self.where = where
        for name, shard in where.items():
            if shard not in self.shards or name not in self.shards[shard].tensors:
                raise BadFile(f"{label}: the index places {name} in {shard}, which lacks it", "publish the update again")
            self.wants(name)

    def load(self, info: TensorInfo) -> tuple[Array | None, Array]:
        import zstandard

        shard = self.shards[self.where[info.name]]
        new = np.empty(info.nbytes, np.uint8)
        self.base.read_into(info.name, 0, new.data)
        delta = np.empty(info.nbytes if self.encoding == "xor" else 4 + 5 * info.nbytes, np.uint8)
        filled = 0
        try:
            with zstandard.ZstdDecompressor().stream_reader(shard.read(info.name)) as reader:
                while filled < len(delta) and (got := reader.readinto(delta[filled:].data)):
                    filled += got
                delta, more = delta[:filled], reader.read(1)
        except zstandard.ZstdError as error:
            raise BadFile(f"{self.label}: {info.name} cannot be decompressed: {error}", "publish the update again") from error
        if self.encoding == "xor" and len(delta) == info.nbytes and not more:
            new ^= delta
        elif self.encoding == "overwrite" and not more:
            self._overwrite(info, new, delta)
        else:
            raise BadFile(f"{self.label}: {info.name} has {len(delta)}{'+' if more else ''} bytes of differences, not {info.nbytes}")
        if _hash(self.algorithm, new.data) != shard.metadata.get(info.name):
            raise Mismatch(
                f"{self.label}: {info.name} has another checksum than was published",
                f"{self.base.label} is not the version before, or the update was altered",
            )
        return None, new

    def _overwrite(self, info: TensorInfo, new: Array, delta: Array) -> None:
        count = int.from_bytes(delta[:4].tobytes(), "little")
        places = np.frombuffer(delta[4 : 4 + 4 * count].tobytes(), "<u4") if len(delta) == 4 + 5 * count else np.empty(0, "<u4")
        if len(places) != count or (count and int(places.max()) >= len(new)):
            raise BadFile(f"{self.label}: positions of {info.name} are outside the tensor", "publish the update again")
        new[places] = delta[4 + 4 * count :]

    def close(self) -> None:
        for shard in self.shards.values():
            shard.close()


def is_update(path: Place) -> bool:
    """Whether a path holds a weight update."""
    return _kind(path) is not None


def open_update(path: Place, label: str, base: Checkpoint) -> Update:
    """Open the update at a path, on its base.

    Raises BadFile if it is damaged, Mismatch if it changes tensors that the base lacks, UsageError for kinds that peru does not read."""
    kind = _kind(path)
    assert kind is not None
    return kind(path, label, base)


def _kind(path: Place) -> type[PrimeRl | Trl | SgLang] | None:
    if not isinstance(path, Path):
        return None
    if path.is_dir():
        if (path / _MANIFEST).is_file():
            return PrimeRl
        if (path / _INDEX).is_file() and b'"delta_encoding"' in (path / _INDEX).read_bytes():
            return SgLang
        path = path / _TRL
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    with path.open("rb") as file:
        head = file.read(1 << 12)
    if b'"sparse_weight_patch"' not in head:
        return None
    with _plain(path) as opened:
        return Trl if opened.metadata.get("format") == "sparse_weight_patch" else None


def _plain(path: Place) -> Checkpoint:
    """A safetensors file without any interpretation."""
    return open_file(path, str(path))


def _json(path: Place) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadFile(f"{path}: not a table")
    return parsed


def _of(table: Any, key: str, kind: type[Any]) -> Any:
    value = table.get(key) if isinstance(table, dict) else None
    if not isinstance(value, kind):
        raise BadFile(f"an update's {key!r} is {type(value).__name__}, not {kind.__name__}", "publish the update again")
    return value


def _hash(algorithm: Any, data: bytes | memoryview) -> str:
    if algorithm == "blake3":
        return blake3(data).hexdigest()
    if algorithm == "adler32":
        return f"{zlib.adler32(data):08x}"
    if algorithm == "xxh3-128":
        try:
            import xxhash
        except ImportError as error:
            raise UsageError(
                "the update's checksums are xxh3-128, and xxhash is not installed", "pip install 'peru-cli[export]'"
            ) from error
        return str(xxhash.xxh3_128_hexdigest(data))
    raise UsageError(f"checksums of the kind {algorithm!r} are unknown to peru")
