"""The safetensors header, read strictly and written in one canonical way.

Against its own specification, the reference reader accepts duplicate names, leading spaces, empty names, names with `../`
and absurd shapes. A checkpoint comes from strangers, so all of these are refused.
Source: https://github.com/huggingface/safetensors (README, "Format")."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.errors import BadFile
from peru_cli.shown import cut

MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit
MAX_WRITTEN_HEADER_BYTES = 25_000_000  # huggingface_hub's limit
MAX_ENTRIES = 1 << 62
MAX_DIMENSIONS = 64
METADATA_KEY = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's entry in a header; `begin` counts bytes from the end of the header."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    begin: int = 0
    entries: int = field(init=False, compare=False, repr=False)  # 1 for a scalar

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.dtype.nbytes(self.entries)


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors by name, metadata, and the offset of the data in the file (bytes)."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_offset: int
    file_bytes: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise BadFile(f"the name {_named(twice)} appears twice in the header")
    return table


def _refuse_constant(text: str) -> Any:
    raise BadFile(f"the header holds {text}, which is not JSON")


def _named(name: str) -> str:
    return cut(repr(name))


def _is_unicode(text: str) -> bool:
    """False for lone surrogates, which JSON can express and UTF-8 cannot."""
    return _SURROGATE.search(text) is None


def check_tensor_name(name: str) -> None:
    """Refuse names that are empty, hold control characters, or could climb out of a folder."""
    if not name:
        raise BadFile("a tensor has an empty name")
    if name == METADATA_KEY:
        raise BadFile(f"a tensor is named {name}, which a header reserves")
    if _CONTROL.search(name):
        raise BadFile(f"the tensor name {_named(name)} holds a control character")
    if name[0] in "/\\" or (".." in name and ".." in name.replace("\\", "/").split("/")):
        raise BadFile(f"the tensor name {_named(name)} looks like a path out of its folder")
    if not _is_unicode(name):
        raise BadFile(f"the tensor name {_named(name)} is not valid Unicode")


def _tensor(name: str, entry: Any, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> TensorInfo:
    """One entry of the table. Loops are unrolled: there may be a hundred thousand entries."""
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise BadFile(f"the entry of tensor {_named(name)} is not dtype, shape and data_offsets")
    dtype = BY_NAME.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise BadFile(f"tensor {_named(name)} has the unknown dtype {cut(repr(entry['dtype']))}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    entries = least = 1
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        for n in numbers if type(numbers) is list else (None,):
            if type(n) is not int or n < 0:
                raise BadFile(f"the {what} of tensor {_named(name)} is not a list of whole numbers: {numbers!r}"[:300])
    if len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise BadFile(f"tensor {_named(name)} has {len(offsets)} offsets and {len(shape)} dimensions")
    for n in shape:
        entries *= n
        least *= n or 1
    if least > MAX_ENTRIES or any(n > MAX_ENTRIES for n in shape):
        raise BadFile(f"tensor {_named(name)} has the impossible shape {cut(str(shape))}")
    if entries * dtype.bits % 8:
        raise BadFile(f"tensor {_named(name)} does not fill whole bytes")
    if offsets[1] - offsets[0] != (nbytes := dtype.nbytes(entries)):
        raise BadFile(
            f"tensor {_named(name)} says {offsets[1] - offsets[0]} bytes, its shape {cut(str(shape))} in {dtype.name} needs {nbytes}"
        )
    return TensorInfo(sys.intern(name), dtype, shapes.setdefault(key := tuple(shape), key), offsets[0])


def header_length(prefix: bytes, file_bytes: int) -> int:
    """Length of the JSON in bytes, from the file's first eight bytes. BadFile if it is impossible."""
    if len(prefix) < 8:
        raise BadFile(f"the file has only {len(prefix)} bytes: it is empty or truncated")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise BadFile(f"the header claims {length} bytes (at most {MAX_HEADER_BYTES}): not a safetensors file")
    if 8 + length > file_bytes:
        raise BadFile(f"the header claims {length} bytes, the file has {file_bytes}: it is truncated")
    return length


def parse_header(text: bytes, file_bytes: int) -> Header:
    """Parse the JSON of a safetensors header (without its eight length bytes).

    Raises BadFile for any deviation from the format, including gaps between offsets."""
    if not text.startswith(b"{"):
        raise BadFile("the header does not begin with '{': not a safetensors file")
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"the header is not valid JSON ({error})") from error
    metadata = raw.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise BadFile(f"the header's {METADATA_KEY} is not a table of strings")
    if not all(_is_unicode(text) for pair in metadata.items() for text in pair):
        raise BadFile(f"the header's {METADATA_KEY} is not valid Unicode")
    tensors: dict[str, TensorInfo] = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # each once in memory: most tensors share theirs with others
    raw = dict(reversed(raw.items()))
    while raw:  # removed one by one: all raw entries together are larger than the parsed ones
        name, entry = raw.popitem()
        check_tensor_name(name)
        info = _tensor(name, entry, shapes)
        tensors[info.name] = info
    at = 0
    for info in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes, t.name)):
        if info.begin != at:
            raise BadFile(f"tensor {_named(info.name)} begins at byte {info.begin} of the data, {at} was expected")
        at += info.nbytes
    data_offset = 8 + len(text)
    if data_offset + at != file_bytes:
        raise BadFile(f"the tensors end at byte {data_offset + at}, the file has {file_bytes}: truncated or overlong")
    return Header(tensors, metadata, data_offset, file_bytes)


def build_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str], reserve: int = 0) -> bytes:
    """Serialise a header: eight length bytes and JSON, padded with spaces to a multiple of 8.

    Metadata comes first, sorted, then tensors in the order of their data. `reserve` is the least total size in bytes, for
    headers that are filled in after the data was written."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    text = bytearray(8)
    text += b"{"
    text += f"{encode(METADATA_KEY)}:{encode(dict(sorted(metadata.items())))},".encode() if metadata else b""
    for info in sorted(tensors, key=lambda t: (t.begin, t.nbytes, t.name)):  # one by one: a table of all would be far larger
        begin, shape = info.begin, ",".join(map(str, info.shape))
        entry = f'{{"dtype":"{info.dtype.name}","shape":[{shape}],"data_offsets":[{begin},{begin + info.nbytes}]}}'
        text += f"{encode(info.name)}:{entry},".encode()
    if text.endswith(b","):
        del text[-1:]
    text += b"}"
    total = max(len(text), reserve)
    total += -total % 8
    if total > MAX_WRITTEN_HEADER_BYTES:
        raise BadFile(f"the header would take {total / 1e6:.1f} MB, above the {MAX_WRITTEN_HEADER_BYTES / 1e6:g} MB that readers take")
    text[:8] = (total - 8).to_bytes(8, "little")
    text += b" " * (total - len(text))
    return bytes(text)
