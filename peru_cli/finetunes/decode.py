"""From an artifact's kept entries to the fine-tune's bits."""

from __future__ import annotations

from peru_cli.artifacts.index import ROUNDED
from peru_cli.artifacts.sparse_delta import Entries
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.methods.delta import Bits, add_rounded, add_ulps


def decode_bits(base: Bits, entries: Entries, values: int, dtype: Dtype) -> Bits:
    """The fine-tune's bits at kept positions from the base's bits there, cast to its dtype; (k,) -> (k,)."""
    if values != ROUNDED:
        return add_ulps(base, entries.values)
    bits, apart = add_rounded(base, entries.values, dtype)
    bits[apart] = add_ulps(base[apart], entries.apart)
    return bits
