"""Checkpoints in files, on this machine's disk or on the Hub: safetensors, sharded directories, pytorch_model.bin."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from peru_cli.checkpoints.bundle import Bundle, Ends
from peru_cli.checkpoints.header import Header, TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.local.files import RandomAccess, RandomAccessFile, open_random, read_header
from peru_cli.checkpoints.local.patch import refuse_half_patched
from peru_cli.checkpoints.local.readahead import Echo, ReadAhead
from peru_cli.checkpoints.local.sealed import Sealed, file_digest, is_sealed, read_digests, told_files
from peru_cli.checkpoints.local.torch_files import TorchCheckpoint
from peru_cli.checkpoints.places import Place, children
from peru_cli.checkpoints.sidefiles import find_side_files
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.console import plural
from peru_cli.errors import BadFile, UsageError
from peru_cli.shown import listed

_INDEX = "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*")
_SIDE_BY_SIDE = 8  # files on the Hub opened at once
_GAP = 4096  # gaps up to this many bytes are read too, which is cheaper than a second request


class SafetensorsCheckpoint(Checkpoint):
    """One or several safetensors files that together hold each tensor once."""

    def __init__(self, label: str, kind: str, files: Sequence[Place], side_files: Mapping[str, Place]) -> None:
        self.label, self.kind, self.side_files, self.warnings, self.files = label, kind, side_files, [], files
        self._files: list[RandomAccess] = []
        self._file_of: dict[str, int] = {}  # file indices; empty if there is one file
        self._seal_of: dict[str, Sealed] = {}
        tensors: Mapping[str, TensorInfo] = {}
        metadata: dict[str, str] = {}
        for path in files:
            if isinstance(path, Path):
                refuse_half_patched(path)
        try:
            self._files += _open_all(files)
            self._begins = [read_header(file).data_offset for file in self._files]
            for number, (path, file) in enumerate(zip(files, self._files, strict=True)):
                header = read_header(file)
                if twice := header.tensors.keys() & tensors.keys():
                    raise BadFile(f"{path}: tensor {min(twice)!r} is in another shard, too")
                tensors = {**tensors, **header.tensors} if number else header.tensors
                if len(files) > 1:
                    self._file_of.update(dict.fromkeys(header.tensors, number))
                metadata.update(header.metadata)
                self._unseal(path, file, header)
        except BaseException:
            for file in self._files:
                file.close()
            raise
        self.tensors, self.metadata = tensors, metadata
        self._infos = tensors
        self.ranged = any(not isinstance(file, RandomAccessFile) for file in self._files)
        self._ahead: ReadAhead | Echo = ReadAhead()

    def _unseal(self, place: Place, file: RandomAccess, header: Header) -> None:
        """Look for digests that peru wrote, to compare with what is read. BadFile if the header was altered."""
        if not is_sealed(header.metadata):
            return
        raw = bytearray(header.data_offset)
        file.read_into(0, memoryview(raw))
        try:
            seal = Sealed(place, header.tensors, read_digests(header, bytes(raw)), lambda: _Again(place))
        except BadFile as error:
            raise BadFile(f"{place}: {error.message}", error.hint) from error
        self._seal_of.update(dict.fromkeys(header.tensors, seal))
        if (watch := inputs.current()) is not None:
            watch.expect(seal)

    def digests(self) -> dict[str, bytes] | None:
        """The expected digest of each tensor, 16 bytes. None unless peru wrote all weights with digests."""
        if any(name not in self._seal_of for name in self.tensors):
            return None
        return {name: self._seal_of[name].digests[name] for name in self.tensors}

    def told_digest(self, name: str) -> bytes | None:
        return self._seal_of[name].digests[name] if name in self._seal_of else None

    def agree(self, found: Mapping[str, bytes]) -> None:
        for name, digest in found.items():
            if name in self._seal_of:
                self._seal_of[name].agree(name, digest)

    def verify(self) -> None:
        """Check all tensors that carry digests, reading what has not been read. BadFile names the first that was altered."""
        for name in self.tensors:
            if name in self._seal_of:
                self._seal_of[name].verify([name])

    def _where(self, name: str) -> tuple[RandomAccess, int]:
        """The file that contains a tensor, and the offset of the tensor's first byte."""
        number = self._file_of[name] if self._file_of else 0
        return self._files[number], self._begins[number] + self._infos[name].begin

    def place_of(self, name: str) -> tuple[int, int]:
        """The number of the file (in `files`) that contains a tensor, and the offset of its first byte there."""
        return self._file_of[name] if self._file_of else 0, self._where(name)[1]

    def header_bytes(self, number: int) -> int:
        """Bytes before the data of a file, by its number."""
        return self._begins[number]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        file, begin = self._where(name)
        if self.ranged:
            self._ahead.read_into(file, begin + offset, buffer)
        else:
            file.read_into(begin + offset, buffer)
        if self._seal_of and name in self._seal_of:
            self._seal_of[name].saw(name, offset, buffer)

    def read_bundle(self, info: Bundle, start: int, buffer: memoryview) -> None:
        if self.ranged or info.dtype.bits % 8 or not len(buffer):
            super().read_bundle(info, start, buffer)
            return
        width = info.dtype.bits // 8
        first, last = np.searchsorted(info.ends, (start, start + len(buffer) // width - 1), "right").tolist()
        members = info.members[first : last + 1]
        skipped = (start - int(info.ends[first - 1]) if first else start) * width  # bytes of the first one
        ends = np.minimum((info.ends[first : last + 1] - start) * width, len(buffer))  # in the buffer
        begins = np.concatenate([[0], ends[:-1]])
        places = np.array([self._infos[member.name].begin for member in members])
        numbers = np.array([self._file_of[member.name] for member in members]) if self._file_of else np.zeros(len(members), np.int64)
        places += np.array(self._begins)[numbers]
        places[0] += skipped
        for number in np.unique(numbers).tolist():
            mine = (numbers == number) & (ends > begins)
            if mine.any():
                _gather(self._files[number], places[mine], begins[mine], ends[mine], buffer)
        for member, begin, end in zip(members, begins.tolist(), ends.tolist(), strict=True) if self._seal_of else ():
            if member.name in self._seal_of:
                self._seal_of[member.name].saw(member.name, 0 if begin else skipped, buffer[begin:end])

    def expect(self, ranges: Iterable[tuple[str, int, int]], keep: bool = False) -> None:
        places = ((*self._where(name), offset, nbytes) for name, offset, nbytes in ranges)
        self._ahead.expect(((file, begin + offset, begin + offset + nbytes) for file, begin, offset, nbytes in places), keep)

    def echo(self) -> None:
        if isinstance(self._ahead, ReadAhead):
            self._ahead = Echo(self._ahead)

    def forget(self) -> None:
        self._ahead.forget()

    def keep_only(self, weight_map: Mapping[str, str], index: Place) -> None:
        """Keep exactly the tensors that a shard index lists, in the listed files."""
        absent = [n for n, shard in weight_map.items() if self._file_name(n) != shard]
        if absent:
            raise BadFile(
                f"{index}: lists {plural(len(absent), 'tensor')} that its shards lack: {', '.join(absent[:3])}",
                "the checkpoint is incomplete: fetch or save it again",
            )
        extra = [name for name in self.tensors if name not in weight_map]
        if extra:
            self.warnings.append(f"{plural(len(extra), 'tensor')} that {index.name} does not list, left out: {', '.join(extra[:3])}")
            self.tensors = {name: info for name, info in self.tensors.items() if name in weight_map}

    def _file_name(self, name: str) -> str | None:
        return self._where(name)[0].path.name if name in self._infos else None

    def close(self) -> None:
        self.forget()
        for file in self._files:
            file.close()


def _gather(file: RandomAccess, places: Ends, begins: Ends, ends: Ends, buffer: memoryview) -> None:
    """Fill parts of a buffer, from `begins` to `ends`, with bytes of a file from `places` on; each (n,).

    What lies close together in the file is read at once: small gaps are read too."""
    sizes = ends - begins
    breaks = np.flatnonzero((places[1:] != places[:-1] + sizes[:-1]) | (begins[1:] != ends[:-1])) + 1  # elsewhere parts are one
    firsts, lasts = np.concatenate([[0], breaks]), np.concatenate([breaks, [len(places)]]) - 1
    places, begins, ends = places[firsts], begins[firsts], ends[lasts]
    order = np.argsort(places, kind="stable")
    places, begins, ends = places[order], begins[order], ends[order]
    stops = places + ends - begins
    cuts = np.flatnonzero(places[1:] > stops[:-1] + _GAP) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(places)], strict=True):
        if last == first + 1:
            file.read_into(int(places[first]), buffer[int(begins[first]) : int(ends[first])])
            continue
        at = int(places[first])
        room = memoryview(bytearray(int(stops[last - 1]) - at))
        file.read_into(at, room)
        for place, stop, begin, end in zip(*(array[first:last].tolist() for array in (places, stops, begins, ends)), strict=True):
            buffer[begin:end] = room[place - at : stop - at]


class _Again:
    """The tensors of a file that is opened again for what a command did not read of it."""

    def __init__(self, place: Place) -> None:
        self._file = open_random(place)
        self._header = read_header(self._file)

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with bytes of a tensor."""
        self._file.read_into(self._header.data_offset + self._header.tensors[name].begin + offset, buffer)

    def __enter__(self) -> _Again:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def _open_all(files: Sequence[Place]) -> list[RandomAccess]:
    """Open files and read their headers. Files read by ranges are opened in parallel, since each waits for answers."""

    def open_one(place: Place) -> RandomAccess:
        file = open_random(place)
        try:
            read_header(file)
        except BaseException:
            file.close()
            raise
        return file

    # Whole files are downloaded one at a time anyway (hub/download.py), in this thread, which receives Ctrl-C.
    if len(files) == 1 or not any(not isinstance(file, Path) and file.streams for file in files):
        return [open_one(file) for file in files]
    with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
        return list(pool.map(open_one, files))


def _read_index(path: Place) -> dict[str, str]:
    """The weight map of a shard index. Shard names must stay in their folder."""
    try:
        parsed = json.loads(inputs.read_small(path))
        weight_map = parsed["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadFile(f"{path}: not a shard index ({error})") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{path}: its weight_map is empty or no table")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise BadFile(f"{path}: the shard of {name!r} is {shard!r}, which is not a plain file name")
    return weight_map


def _open_sharded(label: str, index: Place) -> Checkpoint:
    weight_map = _read_index(index)
    files = [index.parent / shard for shard in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadFile(
            f"{index}: {len(missing)} of its {len(files)} shards are not there: {', '.join(missing[:3])}",
            "the download is incomplete: fetch the missing files into the same folder",
        )
    side_files = find_side_files(index.parent)
    if index.name.endswith(".bin.index.json"):
        checkpoint: Checkpoint = TorchCheckpoint(label, f"PyTorch checkpoint in {len(files)} shards", files, side_files)
        absent = sorted(set(weight_map) - set(checkpoint.tensors))
        if absent:
            raise BadFile(f"{index}: lists {plural(len(absent), 'tensor')} that its shards lack: {', '.join(absent[:3])}")
        return checkpoint
    sharded = SafetensorsCheckpoint(label, f"checkpoint in {len(files)} shards", files, side_files)
    try:
        sharded.keep_only(weight_map, index)
    except BaseException:
        sharded.close()
        raise
    return _told(sharded)


def _told(checkpoint: SafetensorsCheckpoint) -> SafetensorsCheckpoint:
    """Warn of side files that differ from those peru wrote beside the weights: people edit them, and files get damaged."""
    for name, digest in told_files(checkpoint.metadata).items():
        place = checkpoint.side_files.get(name)
        if isinstance(place, Path) and file_digest(inputs.read_small(place)) != digest:
            checkpoint.warnings.append(f"{place} was changed after the weights beside it were written")
    return checkpoint


def open_directory(folder: Place, label: str) -> Checkpoint:
    """Open the checkpoint in a folder: an index with shards, one safetensors file, or pytorch_model.bin."""
    indices = [f for f in children(folder, "*.safetensors.index*.json") if not f.name.startswith(".")]
    index = next((f for f in indices if f.name == _INDEX), indices[0] if len(indices) == 1 else None)
    if indices and index is None:
        raise UsageError(f"{label} holds several shard indices: {listed(f.name for f in indices)}", "keep the one that you mean")
    single = folder / "model.safetensors"
    others = [f.name for f in indices if f is not index]
    if index is not None and not (single.is_file() and single.name not in _read_index(index).values()):
        sharded = _open_sharded(label, index)
        if others:
            sharded.warnings.append(f"{label} holds several shard indices: {index.name} is taken, not {listed(others)}")
        return sharded
    files = [f for f in children(folder, "*.safetensors") if not f.name.startswith(".")]
    preferred = [f for f in files if f.name == "model.safetensors"] or files
    if any(f.name == "adapter_config.json" for f in children(folder)):
        raise UsageError(
            f"{label} is a PEFT adapter, but a full checkpoint is needed here",
            "fold it into its base first: peru unpack ADAPTER -b BASE -o DIR",
        )
    if len(preferred) == 1:
        checkpoint = SafetensorsCheckpoint(label, "checkpoint directory", preferred, find_side_files(folder))
        if indices:
            taken = f"{label} holds model.safetensors and shards of {indices[0].name}"
            checkpoint.warnings.append(f"{taken}: the single file is read, as in transformers; remove it if you mean the shards")
        return _told(checkpoint)
    if preferred:
        names = ", ".join(f.name for f in preferred[:4])
        raise UsageError(f"{label} holds {len(preferred)} safetensors files and no index: {names}", "name the file that you mean")
    torch_index = folder / "pytorch_model.bin.index.json"
    if (single := folder / "pytorch_model.bin").is_file():
        loaded = TorchCheckpoint(label, "PyTorch checkpoint", [single], find_side_files(folder))
        if torch_index.is_file() and single.name not in _read_index(torch_index).values():
            loaded.warnings.append(f"{label} holds {single.name} and shards: the single file is read, as in transformers")
        return loaded
    if torch_index.is_file():
        return _open_sharded(label, torch_index)
    raise UsageError(
        f"{label} is a folder without model.safetensors, a shard index or pytorch_model.bin",
        "name the folder that transformers' save_pretrained wrote, or a .safetensors file",
    )


def open_file(path: Place, label: str) -> Checkpoint:
    """Open one .safetensors, .bin or .pt file, with the config.json beside it."""
    side_files = find_side_files(path.parent)
    if path.suffix in {".bin", ".pt", ".pth"}:
        return TorchCheckpoint(label, "PyTorch file", [path], side_files)
    return SafetensorsCheckpoint(label, "safetensors file", [path], side_files)
