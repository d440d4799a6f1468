"""Write artifacts of kind `mixed`, or only count their bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.artifacts.container import FORMAT, ContainerWriter
from peru_cli.artifacts.index import STORED, SideFile
from peru_cli.artifacts.mixed.index import (
    CONTEXTS,
    DENSE,
    LEFT,
    LOW_RANK,
    RIGHT,
    ROWS,
    SCALES,
    ULPS,
    ULPS_OF,
    MixedIndex,
    MixedRecord,
    encode_mixed,
)  # fmt: skip
from peru_cli.artifacts.mixed.streams import IntegerWriter
from peru_cli.artifacts.sparse_delta import METADATA as SPARSE_METADATA
from peru_cli.errors import BadFile

KIND = "mixed"
_DECIMAL = SPARSE_METADATA["peru.largest_error"]
_SAME = ("peru.format", "peru.task", "peru.prefix", "peru.entries", "peru.result", "peru.base", "peru.base.files")
METADATA = {key: SPARSE_METADATA[key] for key in _SAME} | {
    "peru.kind": KIND,
    "peru.goal": r"(bytes [1-9][0-9]{0,18}|(bits|quality|agreement) (0|[1-9][0-9]*)(\.[0-9]+)?(e[+-][0-9]+)?)",
    "peru.energy": _DECIMAL,
    "peru.error": _DECIMAL,
    "peru.data": r"[0-9a-f]{64} [1-9][0-9]* [1-9][0-9]* (0|[1-9][0-9]*|(DECIMAL) (DECIMAL))".replace("DECIMAL", _DECIMAL),
}
OPTIONAL = {"peru.base", "peru.base.files", "peru.data"}
Integers = np.ndarray[Any, np.dtype[Any]]


def check_mixed_metadata(metadata: Mapping[str, str]) -> None:
    """Reject metadata that is invalid for this kind. Unknown keys are ignored."""
    for key, form in METADATA.items():
        if key not in metadata and key not in OPTIONAL:
            raise BadFile(f"its metadata lacks {key!r}")
        if key in metadata and not re.fullmatch(form, metadata[key]):
            raise BadFile(f"its metadata has {key!r} as {metadata[key][:80]!r}")


def context_of(integers: Integers) -> int:
    """The stream for integers of this magnitude: two streams per octave of the root mean square. Any shape, not empty."""
    mean = float(np.square(integers, dtype=np.float64).mean())
    return int(np.clip(np.rint(np.log2(max(mean, 2.0**-12))) + 8, 0, CONTEXTS - 1))


@dataclass
class Represented:
    """A tensor's parts. Factors: left (rows, k) and right (k, columns) int16, scales (k,). `rows` are ascending, None for all."""

    left: Integers | None = None
    right: Integers | None = None
    scales: Integers | None = None
    rows: Integers | None = None
    dense: Integers | None = None
    dense_scale: int = 0
    ulps: Integers | None = None


class MixedStreams:
    """Appends represented tensors to streams, in canonical order."""

    def __init__(self, append: Callable[[bytes], None]) -> None:
        self._writer = IntegerWriter(append)

    def add(self, record: MixedRecord, parts: Represented) -> None:
        """Write a tensor's integers and set the fields of its record."""
        put = self._writer.put
        record.parts = 0
        if parts.left is not None and parts.right is not None and parts.scales is not None:
            record.parts |= LOW_RANK
            record.rank, record.columns = parts.right.shape
            record.kept_rows = 0 if parts.rows is None else len(parts.rows)
            if parts.rows is not None:
                put(ROWS, np.diff(parts.rows, prepend=-1) - 1)
            contexts = [(context_of(a), context_of(b)) for a, b in zip(parts.left.T, parts.right, strict=True)]
            put(LEFT, np.array([a for a, _ in contexts]))
            put(RIGHT, np.array([b for _, b in contexts]))
            put(SCALES, np.diff(parts.scales, prepend=0))
            for (a, b), left, right in zip(contexts, parts.left.T, parts.right, strict=True):
                put(a, left)
                put(b, right)
        if parts.dense is not None:
            record.parts |= DENSE
            record.context, record.scale = context_of(parts.dense), parts.dense_scale
            put(record.context, parts.dense)
        if parts.ulps is not None:
            record.parts |= ULPS
            put(ULPS_OF[record.info.dtype.bits], parts.ulps)

    def index(self, records: list[MixedRecord], files: list[SideFile]) -> MixedIndex:
        """Write the remaining blocks and return the index."""
        return MixedIndex(records, *self._writer.finish(), files)


class MixedCounter(MixedStreams):
    """Only counts the bytes of blocks and index."""

    def __init__(self) -> None:
        self.block_bytes = 0
        super().__init__(self._count)

    def _count(self, data: bytes) -> None:
        self.block_bytes += len(data)

    def nbytes(self, records: list[MixedRecord], files: list[SideFile]) -> int:
        """Bytes of blocks and index together."""
        index = encode_mixed(self.index(records, files))
        return self.block_bytes + len(index)


class MixedWriter(MixedStreams):
    """Writes one artifact: `add` each tensor, then `append_whole`, `seal`, `container.commit`. A context manager."""

    def __init__(self, target: Path, largest_metadata: Mapping[str, str], sync: bool) -> None:
        self.container = ContainerWriter(target, {"peru.format": FORMAT, "peru.kind": KIND, **largest_metadata}, sync)
        super().__init__(partial(self.container.append, "blocks"))

    def append_whole(self, data: memoryview) -> None:
        """Append bytes of tensors stored whole, in index order, after every `add`."""
        self.container.append("whole", data)

    def flush(self, records: list[MixedRecord], files: list[SideFile]) -> MixedIndex:
        """Write the last blocks, after every `add`."""
        return self.index(records, files)

    def seal(self, metadata: Mapping[str, str], index: MixedIndex, files: list[tuple[SideFile, bytes]]) -> int:
        """Write side files, index and header. Returns the artifact's size in bytes."""
        for file, content in files:
            if file.origin == STORED:
                self.container.append("files", content)
        return self.container.seal({"peru.format": FORMAT, "peru.kind": KIND, **metadata}, encode_mixed(index))[0]

    def __enter__(self) -> MixedWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.container.__exit__(*exc)
