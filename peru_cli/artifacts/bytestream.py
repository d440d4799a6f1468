"""Encode numbers and names in artifact indexes: LEB128 varints, front-coded names (docs/format.md).

The reader trusts nothing: it checks every length against the bytes that are left."""

from __future__ import annotations

import math
from collections.abc import Iterator

from peru_cli.checkpoints.dtypes import BY_CODE, Dtype
from peru_cli.checkpoints.header import MAX_DIMENSIONS, MAX_ENTRIES, MAX_HEADER_BYTES, check_tensor_name
from peru_cli.errors import BadFile

MAX_NAMES_BYTES = MAX_HEADER_BYTES  # limit for all tensor names together: with front coding, a small index could expand to gigabytes


class Sink:
    """Writes numbers and names."""

    def __init__(self) -> None:
        self.data = bytearray()

    def byte(self, value: int) -> None:
        self.data.append(value)

    def number(self, value: int) -> None:
        while value >= 0x80:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def signed(self, value: int) -> None:
        """Write a signed number in zigzag coding: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
        self.number(2 * value if value >= 0 else -2 * value - 1)

    def text(self, value: bytes) -> None:
        self.number(len(value))
        self.data += value

    def shape(self, value: tuple[int, ...]) -> None:
        self.number(len(value))
        for size in value:
            self.number(size)

    def name(self, name: str, previous: bytes) -> bytes:
        """Write a name, front-coded against the previous one (empty for the first). Returns the encoded name for the next call."""
        encoded = name.encode("utf-8")
        shared = _shared(previous, encoded)
        self.number(shared)
        self.text(encoded[shared:])
        return encoded


class Cursor:
    """Reads an index. Every length is checked against the bytes that are left."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        self._shapes: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def take(self, n: int) -> bytes:
        if n > len(self._data) - self._at:
            raise BadFile("the artifact's index ends too early")
        self._at += n
        return self._data[self._at - n : self._at]

    def byte(self) -> int:
        at = self._at
        if at >= len(self._data):
            raise BadFile("the artifact's index ends too early")
        self._at = at + 1
        return self._data[at]

    def one_of(self, allowed: tuple[int, ...], what: str) -> int:
        value = self.byte()
        if value not in allowed:
            raise BadFile(f"the artifact's index has the {what} {value}, unknown to this version of peru", "pip install -U peru-cli")
        return value

    def number(self, most: int = MAX_ENTRIES) -> int:
        at = self._at
        if at < len(self._data) and (first := self._data[at]) < 0x80 and first <= most:  # most numbers, and there are many
            self._at = at + 1
            return first
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if value > most or shift > 56:
                raise BadFile(f"the artifact's index holds a number above {most}")
            if byte < 0x80:
                if byte == 0 and shift:
                    raise BadFile("the artifact's index holds an overlong number")
                return value
            shift += 7

    def count(self) -> int:
        """Read a number of records, each of which takes at least one byte."""
        return self.number(len(self._data) - self._at)

    def dtype(self) -> Dtype:
        dtype = BY_CODE.get(code := self.byte())
        if dtype is None:
            raise BadFile(f"the artifact's index has the unknown dtype code {code}")
        return dtype

    def text(self) -> str:
        try:
            return self.take(self.count()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadFile("the artifact's index holds a name that is not UTF-8") from error

    def signed(self, most: int) -> int:
        """Read a zigzag number whose magnitude is at most `most`."""
        value = self.number(2 * most)
        return -(value + 1) // 2 if value % 2 else value // 2

    def shape(self, name: str, dtype: Dtype) -> tuple[int, ...]:
        """Read a tensor's shape. BadFile if no tensor can have it."""
        shape = tuple([self.number() for _ in range(self.number(MAX_DIMENSIONS))])
        if (known := self._shapes.get((shape, dtype.bits))) is not None:  # each once in memory: most tensors share theirs with others
            return known
        if math.prod(max(size, 1) for size in shape) > MAX_ENTRIES:
            raise BadFile(f"tensor {name!r} has the impossible shape {list(shape)}")
        if math.prod(shape) * dtype.bits % 8:
            raise BadFile(f"tensor {name!r} does not fill whole bytes")
        self._shapes[shape, dtype.bits] = shape
        return shape

    def names(self) -> Iterator[str]:
        """Read a count and that many front-coded names. Each name precedes the rest of its record: read the record before the next name."""
        name, names_left = b"", MAX_NAMES_BYTES
        for number in range(self.count()):
            shared = self.number(len(name))
            following = name[:shared] + self.take(self.count())
            if number and following <= name:
                raise BadFile("the tensors of the artifact's index are not in order")
            name, names_left = following, names_left - len(following)
            if names_left < 0:
                raise BadFile(f"the tensor names of the artifact's index take more than {MAX_NAMES_BYTES} bytes")
            try:
                text = name.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadFile("a tensor name in the artifact's index is not UTF-8") from error
            check_tensor_name(text)
            yield text

    def done(self) -> bool:
        return self._at == len(self._data)


def _shared(a: bytes, b: bytes) -> int:
    """Length of the common prefix."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # a[:low] is common
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
