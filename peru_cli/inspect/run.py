"""`peru inspect`: what a checkpoint or an artifact holds."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peru_cli.artifacts.index import EXACT, ROUNDED, SIGN, STORED, Mode, Stream, TensorRecord
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.artifacts.sparse_delta import Array
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.source import Checkpoint

BINS = 1 << 16  # symbols of 16-bit values; wider values are grouped by sign and exponent


@dataclass(frozen=True)
class TensorGroup:
    """Tensors that differ only in their layer number: `layers.*.mlp.weight`."""

    pattern: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    nbytes: int


def group_tensors(tensors: list[TensorInfo]) -> list[TensorGroup]:
    """Group tensors of one shape and dtype whose names differ only in numbers, in order of first name."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[TensorInfo]] = defaultdict(list)
    alone = Counter(_pattern(info) for info in tensors)
    for info in sorted(tensors, key=lambda t: t.name):
        pattern = _pattern(info)
        groups[(info.name, *pattern[1:]) if alone[pattern] == 1 else pattern].append(info)
    return [TensorGroup(key[0], key[1], key[2], len(members), sum(i.nbytes for i in members)) for key, members in groups.items()]


def _pattern(info: TensorInfo) -> tuple[str, str, tuple[int, ...]]:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", info.name), info.dtype.name, info.shape


# -- entropy bounds -----------------------------------------------------------------------------------


def binary_entropy(share: float) -> float:
    """H(share) in bits."""
    return 0.0 if share in (0.0, 1.0) else -share * math.log2(share) - (1 - share) * math.log2(1 - share)


def symbols(values: Array) -> tuple[Array, int]:
    """Symbols of an order-0 code for values, below BINS, and the number of raw bits after each.

    16-bit values are their own symbols. Wider values are coded as sign and exponent of the (ULP) difference, with raw low
    bits: these are as good as random."""
    if values.dtype.itemsize == 2:
        return values.view(np.uint16), 0
    magnitudes = np.abs(values.astype(np.float64))  # exact enough: only the exponent is used
    exponents = np.frexp(magnitudes)[1].astype(np.int64)
    return np.where(values < 0, exponents + 128, exponents), int(np.maximum(exponents - 1, 0).sum())


def entropy_bits(histogram: Array) -> float:
    """Bits that an ideal order-0 code takes for the symbols that the histogram counts."""
    counts = histogram[histogram > 0].astype(np.float64)
    return float((counts * (math.log2(counts.sum()) - np.log2(counts))).sum()) if len(counts) else 0.0


@dataclass
class Bound:
    """Order-0 entropy of a sparse delta's streams, in bits."""

    positions: float = 0.0
    values: float = 0.0

    @property
    def total(self) -> float:
        """Sum of both."""
        return self.positions + self.values


def artifact_bound(artifact: SparseDelta) -> Bound:
    """The bound for an artifact's streams. Decodes all of them."""
    bound = Bound()
    for number, stream in enumerate(artifact.index.streams):
        n = sum(r.base_entries for r in artifact.index.tensors if r.mode == Mode.DELTA and r.info.dtype is stream.dtype)
        bound.positions += n * binary_entropy(stream.kept / n)
        histogram, raw = np.zeros(BINS, np.int64), 0
        for values in artifact.values_of(number):
            found, low_bits = symbols(values)
            histogram += np.bincount(found, minlength=BINS)
            raw += low_bits
        bound.values += entropy_bits(histogram) + raw
    return bound


# -- artifacts ------------------------------------------------------------------------------------------


@dataclass
class ArtifactReport:
    """The content of `peru inspect ARTIFACT`."""

    metadata: dict[str, str]
    file_bytes: int
    parts: dict[str, int]  # bytes by part; they add up to the file
    bound: Bound
    entries: int
    records: list[TensorRecord] = field(repr=False)
    streams: list[Stream] = field(repr=False)

    @property
    def delta_bytes(self) -> int:
        """Bytes that count as the delta: without whole tensors and side files."""
        return self.file_bytes - self.parts["whole tensors"] - self.parts["side files"]

    @property
    def stream_bytes(self) -> int:
        """Bytes of positions and values."""
        return self.parts["positions"] + self.parts["values"]


def inspect_artifact(artifact: SparseDelta) -> ArtifactReport:
    """Bytes by part, density by tensor, distance to the entropy bound."""
    index, container = artifact.index, artifact.container
    values = sum(b.nbytes(index.streams[b.stream].dtype) - b.positions_bytes for b in index.blocks)
    parts = {
        "positions": sum(b.positions_bytes for b in index.blocks),
        "values": values,
        "index": container.sizes["index"],
        "header": container.header_bytes,
        "whole tensors": container.sizes["whole"],
        "side files": container.sizes["files"],
    }
    entries = sum(r.base_entries for r in index.tensors if r.mode == Mode.DELTA)
    return ArtifactReport(artifact.metadata, container.file_bytes, parts, artifact_bound(artifact), entries, index.tensors, index.streams)


def value_kind(stream: Stream) -> str:
    """How a stream's values are stored, in words."""
    kinds = {EXACT: "exact ULP differences", ROUNDED: "differences rounded to bf16", SIGN: "signs, one scale a tensor"}
    return kinds[stream.values]


def side_file_names(artifact: SparseDelta) -> list[str]:
    """Side files and where they come from."""
    return [f.name if f.origin == STORED else f"{f.name} (the base's)" for f in artifact.index.files]


def describe_record(record: TensorRecord) -> str:
    """How an artifact stores a tensor, in words."""
    if record.mode == Mode.DELTA:
        return "delta, new rows whole" if record.base_rows else "delta"
    return "whole" if record.mode == Mode.WHOLE else "the base's"


# -- checkpoints ----------------------------------------------------------------------------------------


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Totals of a checkpoint, from its headers."""
    by_dtype: dict[str, int] = defaultdict(int)
    for info in checkpoint.tensors.values():
        by_dtype[info.dtype.name] += info.entries
    return {
        "kind": checkpoint.kind,
        "tensors": len(checkpoint.tensors),
        "entries": sum(info.entries for info in checkpoint.tensors.values()),
        "bytes": checkpoint.nbytes,
        "entries_by_dtype": dict(sorted(by_dtype.items())),
        "side_files": sorted(checkpoint.side_files),
    }
