"""Decode an artifact's kept entries into the fine-tune's bits."""

from __future__ import annotations

from collections.abc import Callable

from peru_cli.artifacts.index import EXACT, SIGN, TensorRecord
from peru_cli.artifacts.kept import KeptEntries
from peru_cli.artifacts.reader import SparseDelta
from peru_cli.artifacts.sparse_delta import Array, Entries
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.methods.compact.delta import Bits, add_rounded, add_signs, add_ulps


def decode_bits(base: Bits, entries: Entries, values: int, dtype: Dtype) -> Bits:
    """The fine-tune's bits at kept positions from the base's bits there, cast to its dtype; (k,) -> (k,)."""
    if values == EXACT:
        return add_ulps(base, entries.values.astype(base.dtype, copy=False))
    if values == SIGN:
        bits, apart = add_signs(base, entries.values, dtype, entries.scale)
    else:
        bits, apart = add_rounded(base, entries.values, dtype)
    bits[apart] = add_ulps(base[apart], entries.apart)
    return bits


def kept_bits(
    kept: KeptEntries | SparseDelta, record: TensorRecord, start: int, stop: int, take: Callable[[Array], Bits]
) -> tuple[Array, Bits] | None:
    """Kept positions from entry `start` to `stop`, counted from `start`, (k,), and the fine-tune's bits there, (k,). None if k is 0.

    `take` returns the base's bits at positions, cast to the fine-tune's dtype."""
    stream, entries = kept.entries(record, start, stop)
    if stream is None or not len(entries.positions):
        return None
    return entries.positions, decode_bits(take(entries.positions), entries, stream.values, record.info.dtype)
