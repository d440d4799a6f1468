"""Look for signs of a wrong base before anything is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import isfinite, sqrt

import numpy as np

from peru_cli.checkpoints.bundle import alike, bundle
from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.checkpoints.pairing import Pair
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.methods.compact.delta import Bits, cast_bits
from peru_cli.streaming.aligned import read_bytes, read_entries
from peru_cli.streaming.arrays import CPU, doubles
from peru_cli.vectors.family import TaskVector

_CHUNKS, _ENTRIES = 128, 1 << 12  # at most this many runs of this many entries: under a tenth of a second
_AT_ONCE = 1 << 16  # entries compared at once
_TOO_LARGE = 0.5  # of the base's norm; fine-tunes have 0.001 to 0.1


def find_doubts(base: Checkpoint, vector: TaskVector) -> list[str]:
    """What looks wrong, as sentences; empty if nothing does. Reads a sample of local files, and nothing over the network."""
    pairs = [pair for pair in vector.pairing.pairs if pair.is_delta and pair.entries]
    if base.ranged or vector.fine.ranged or not pairs:
        return []
    found = []
    lengths = []
    for bits, other, dtype in _samples(base, vector.fine, [pair for pair in pairs if not pair.coded]):
        weights = doubles(other, dtype)
        with np.errstate(all="ignore"):
            delta = doubles(bits, dtype) - weights
            lengths.append((float(np.square(delta).sum()), float(np.square(weights).sum())))
    lengths = [pair for pair in lengths if isfinite(pair[0]) and isfinite(pair[1])]
    change, norm = (sqrt(sum(pair[side] for pair in lengths)) for side in (0, 1))
    if change == 0:
        if not any(is_changed(vector.fine, base, pair) for pair in pairs):
            found.append("base and fine-tune are equal in all shared tensors: is this the right base?")
    elif norm and change > _TOO_LARGE * norm:
        share = f"{100 * change / norm:.0f}% of the base's norm; fine-tunes usually have 0.1 to 10%"
        found.append(f"the task vector is as large as the weights ({share}, in a sample): is this the base that the model was made from?")
    if vector.pairing.base_only and not vector.pairing.whole:
        names = ", ".join(info.name for info in vector.pairing.base_only[:3])
        found.append(f"the base has tensors that the fine-tune lacks ({names}): are the two swapped?")
    return found


def _samples(base: Checkpoint, fine: Checkpoint, pairs: list[Pair]) -> Iterator[tuple[Bits, Bits, Dtype]]:
    """Runs of both, spread over all tensors: the fine-tune's bits, the base's cast to its dtype, and that dtype."""
    total = sum(pair.entries for pair in pairs)
    step, at = max(total // _CHUNKS, 1), 0
    for pair in pairs:
        begin = at
        for wanted in range(-(-begin // step) * step, begin + pair.entries, step):
            start = min(wanted - begin, max(pair.entries - _ENTRIES, 0))
            n = min(_ENTRIES, pair.entries - start)
            mine = read_entries(fine, pair.fine, start, n)
            theirs = read_entries(base, pair.base, start, n)
            yield mine, cast_bits(CPU, theirs, pair.base.dtype, pair.fine.dtype), pair.fine.dtype
        at = begin + pair.entries


def changed(fine: Checkpoint, base: Checkpoint, pairs: Sequence[Pair]) -> set[str]:
    """Names of the fine-tune's tensors of which any shared entry differs, with the base cast to the fine-tune's dtype."""

    def kind(pair: Pair) -> object:
        whole = pair.entries == pair.fine.entries > 0 and pair.fine.dtype.bits >= 8
        return (pair.fine.dtype, pair.base.dtype) if whole and (pair.is_delta or pair.fine.dtype is pair.base.dtype) else None

    found: set[str] = set()
    for run in alike(pairs, lambda pair: pair.entries, kind):
        if len(run) == 1:
            found.update(pair.fine.name for pair in run if is_changed(fine, base, pair))
            continue
        mine, theirs = bundle([pair.fine for pair in run]), bundle([pair.base for pair in run])
        other = read_entries(base, theirs, 0, theirs.entries)
        if mine.dtype is not theirs.dtype:
            other = cast_bits(CPU, other, theirs.dtype, mine.dtype)
        differ = read_entries(fine, mine, 0, mine.entries) != other
        begins = [0, *accumulate(pair.entries for pair in run[:-1])]
        found.update(pair.fine.name for pair, is_so in zip(run, np.logical_or.reduceat(differ, begins).tolist(), strict=True) if is_so)
    return found


def is_changed(fine: Checkpoint, base: Checkpoint, pair: Pair) -> bool:
    """Whether any shared entry differs, with the base cast to the fine-tune's dtype. Stops at the first difference."""
    same_dtype = pair.fine.dtype is pair.base.dtype
    if not (same_dtype or pair.is_delta):
        return True
    for start in range(0, pair.entries, _AT_ONCE):
        n = min(_AT_ONCE, pair.entries - start)
        if same_dtype:
            changed = read_bytes(fine, pair.fine, start, n) != read_bytes(base, pair.base, start, n)
        else:
            cast = cast_bits(CPU, read_entries(base, pair.base, start, n), pair.base.dtype, pair.fine.dtype)
            changed = not np.array_equal(read_entries(fine, pair.fine, start, n), cast)
        if changed:
            return True
    return False
