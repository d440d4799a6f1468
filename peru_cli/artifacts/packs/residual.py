"""Residuals of packs: a sparse delta that corrects what superposition lost of a task (index version 2).

Byte layout: docs/packs.md, "Residuals"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from peru_cli.artifacts.bytestream import Cursor, Sink
from peru_cli.artifacts.index import Block, Mode, Stream, TensorRecord, check_streams, decode_streams, encode_streams
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.errors import BadFile

_DENSITY = "1|[1-9][0-9]*/[1-9][0-9]*"


@dataclass
class Residual:
    """One task's residual: how many entries of each tensor are kept, by base name, and their streams."""

    density: Fraction  # the requested share of entries
    error: str  # ||retrieved - tau|| / ||tau|| with the residual, measured when it was made
    kept: list[int]
    streams: list[Stream] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Size of its blocks."""
        return sum(block.nbytes(self.streams[block.stream].dtype) for block in self.blocks)

    def records(self, infos: Sequence[TensorInfo]) -> list[TensorRecord]:
        """The tensors as deltas of the retrieved ones, whose dtype they have."""
        return [TensorRecord(info, Mode.DELTA, base_dtype=info.dtype, kept=kept) for info, kept in zip(infos, self.kept, strict=True)]


def encode_residual(sink: Sink, residual: Residual) -> None:
    """Serialise one task's residual."""
    sink.text(str(residual.density).encode("ascii"))
    sink.text(residual.error.encode("ascii"))
    for kept in residual.kept:
        sink.number(kept)
    encode_streams(sink, residual.streams, residual.blocks)


def decode_residual(cursor: Cursor, infos: Sequence[TensorInfo], decimal: str) -> Residual:
    """Parse and check one task's residual. `infos` are the floating tensors, `decimal` is the form of an error."""
    density, error = cursor.text(), cursor.text()
    if not re.fullmatch(_DENSITY, density) or not 0 < Fraction(density) <= 1 or str(Fraction(density)) != density:
        raise BadFile(f"a residual of the pack has the density {density[:80]!r}")
    if not re.fullmatch(decimal, error):
        raise BadFile(f"a residual of the pack has the error {error[:80]!r}")
    residual = Residual(Fraction(density), error, [cursor.number(info.entries) for info in infos])
    residual.streams, residual.blocks = decode_streams(cursor)
    check_streams(residual.records(infos), residual.streams, residual.blocks)
    return residual
