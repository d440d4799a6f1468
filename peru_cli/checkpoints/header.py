"""The safetensors header, read strictly and written in one canonical way.

Against its own specification, the reference reader accepts duplicate names, leading spaces, empty names, names with `../`
and absurd shapes. A checkpoint comes from strangers, so all of these are refused.
Source: https://github.com/huggingface/safetensors (README, "Format")."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from operator import add, is_
from types import MappingProxyType
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
_WHOLE = "(?:0|[1-9][0-9]{0,18})"
_ENTRY = re.compile(  # one tensor as the reference and peru write it, and what follows: name, form, begin, end
    rf'"([^"\\\x00-\x1f\x7f-\x9f]+)":\{{("dtype":"\w+","shape":\[(?:{_WHOLE}(?:,{_WHOLE})*)?\]),'
    rf'"data_offsets":\[({_WHOLE}),({_WHOLE})\]\}}(,|\}} *\Z)'
)
_CONSTANT = '"":{,"data_offsets":[,]}'  # the part of an entry that is no group of the pattern
_SUSPECT = ("..", "\n/", f"\n{METADATA_KEY}")  # in names, one a line: to be looked at one by one
_TOGETHER = 1 << 16  # characters


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


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


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
    plain = name.isascii() and name.isprintable()
    if not plain and _CONTROL.search(name):
        raise BadFile(f"the tensor name {_named(name)} holds a control character")
    if name[0] in "/\\" or (".." in name and ".." in name.replace("\\", "/").split("/")):
        raise BadFile(f"the tensor name {_named(name)} looks like a path out of its folder")
    if not plain and not _is_unicode(name):
        raise BadFile(f"the tensor name {_named(name)} is not valid Unicode")


def _tensor(name: str, entry: Any) -> TensorInfo:
    """One entry of the table."""
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
    return TensorInfo(name, dtype, tuple(shape), offsets[0])


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


def parse_header(text: bytes | bytearray, file_bytes: int, known: Mapping[str, TensorInfo] = MappingProxyType({})) -> Header:
    """Parse the JSON of a safetensors header (without its eight length bytes).

    `known` are another file's tensors. Those that are the same here are the same objects: fine-tunes of one base often agree in all.

    Raises BadFile for any deviation from the format, including gaps between offsets."""
    if not text.startswith(b"{"):
        raise BadFile("the header does not begin with '{': not a safetensors file")
    try:
        characters = text.decode("utf-8")
        tensors, metadata, nbytes = _as_written(characters, known) or _as_json(characters, known)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"the header is not valid JSON ({error})") from error
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise BadFile(f"the header's {METADATA_KEY} is not a table of strings")
    if not all(_is_unicode(text) for pair in metadata.items() for text in pair):
        raise BadFile(f"the header's {METADATA_KEY} is not valid Unicode")
    data_offset = 8 + len(text)
    if data_offset + nbytes != file_bytes:
        raise BadFile(f"the tensors end at byte {data_offset + nbytes}, the file has {file_bytes}: truncated or overlong")
    same = len(tensors) == len(known) and all(map(is_, tensors.values(), known.values()))
    return Header(known if same else tensors, metadata, data_offset, file_bytes)


_Parsed = tuple[dict[str, TensorInfo], Any, int]  # tensors, metadata, and bytes of all tensors


def _as_json(text: str, known: Mapping[str, TensorInfo]) -> _Parsed:
    """The contents of any header."""
    raw = _DECODER.decode(text)
    metadata = raw.pop(METADATA_KEY, {})
    tensors: dict[str, TensorInfo] = {}
    raw = dict(reversed(raw.items()))
    while raw:  # removed one by one: all raw entries together are larger than the parsed ones
        name, entry = raw.popitem()
        check_tensor_name(name)
        info = _tensor(name, entry)
        tensors[name] = _known(known.get(name), name, info, info.begin)
    at = 0
    for info in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes, t.name)):
        if info.begin != at:
            raise BadFile(f"tensor {_named(info.name)} begins at byte {info.begin} of the data, {at} was expected")
        at += info.nbytes
    return tensors, metadata, at


def _as_written(text: str, known: Mapping[str, TensorInfo]) -> _Parsed | None:
    """The contents of a header as the reference and peru write it: no spaces, plain names, fields and tensors in their usual order.

    None for any other, sound or not. A JSON parser takes several times as long, and much memory for what is not kept."""
    metadata: Any = {}
    place, opening = 1, f'{{"{METADATA_KEY}":'
    if text.startswith(opening):
        try:
            metadata, place = _DECODER.raw_decode(text, len(opening))
        except (ValueError, RecursionError):
            return None
        if text[place : place + 1] != ",":
            return None
        place += 1
    forms: dict[str, TensorInfo] = {}  # by dtype and shape as written: a tensor like that
    tensors: dict[str, TensorInfo] = {}
    number, end, follows = 0, "0", ""
    while place < len(text):  # many entries at a time, which functions in C take together, but never all: they are larger than the result
        mark = text.find('},"', place + _TOGETHER) if len(text) - place > 2 * _TOGETHER else -1
        stop = len(text) if mark < 0 else mark + 2
        rows = _ENTRY.findall(text, place, stop)
        place += len(_CONSTANT) * len(rows) + sum(map(len, map("".join, rows)))
        if place != stop or not rows:
            return None
        names, written, begins, ends, (*_, follows) = zip(*rows, strict=True)
        listed = "\n".join(("", *names))
        if begins != (end, *ends[:-1]) or any(found in listed for found in _SUSPECT):
            return None
        for name, form, begin, last in zip(names, written, begins, ends, strict=True):
            if form not in forms:
                forms[form] = _tensor(name, json.loads(f'{{{form},"data_offsets":[{begin},{last}]}}'))
        starts, sizes = list(map(int, begins)), {form: like.nbytes for form, like in forms.items()}
        if list(map(int, ends)) != list(map(add, starts, map(sizes.__getitem__, written))):
            return None
        for name, form, start, same in zip(names, written, starts, map(known.get, names), strict=True):
            info = _known(same, name, forms[form], start)
            tensors[info.name] = info
        number, end = number + len(rows), ends[-1]
    return (tensors, metadata, int(end)) if len(tensors) == number and follows.startswith("}") else None


def _known(known: TensorInfo | None, name: str, like: TensorInfo, begin: int) -> TensorInfo:
    """A tensor of that name and place, in dtype and shape like another: the known one if it is the same, and else with its name."""
    if known is None:
        return TensorInfo(name, like.dtype, like.shape, begin)
    if known.begin == begin and known.dtype is like.dtype and known.shape == like.shape:
        return known
    return TensorInfo(known.name, like.dtype, like.shape, begin)


def build_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str], reserve: int = 0) -> bytes:
    """Serialise a header: eight length bytes and JSON, padded with spaces to a multiple of 8.

    Metadata comes first, sorted, then tensors in the order of their data. `reserve` is the least total size in bytes, for
    headers that are filled in after the data was written."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    text = BytesIO()  # which gives its bytes away without a copy
    text.write(bytes(8) + b"{")
    text.write(f"{encode(METADATA_KEY)}:{encode(dict(sorted(metadata.items())))}".encode() if metadata else b"")
    comma = "," if metadata else ""
    for info in sorted(tensors, key=lambda t: (t.begin, t.nbytes, t.name)):  # one by one: a table of all would be far larger
        begin, shape = info.begin, ",".join(map(str, info.shape))
        entry = f'{{"dtype":"{info.dtype.name}","shape":[{shape}],"data_offsets":[{begin},{begin + info.nbytes}]}}'
        text.write(f"{comma}{encode(info.name)}:{entry}".encode())
        comma = ","
    text.write(b"}")
    total = max(text.tell(), reserve)
    total += -total % 8
    if total > MAX_WRITTEN_HEADER_BYTES:
        raise BadFile(f"the header would take {total / 1e6:.1f} MB, above the {MAX_WRITTEN_HEADER_BYTES / 1e6:g} MB that readers take")
    text.write(b" " * (total - text.tell()))
    text.seek(0)
    text.write((total - 8).to_bytes(8, "little"))
    return text.getvalue()
