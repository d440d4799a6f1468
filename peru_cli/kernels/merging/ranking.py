"""Which entries of a row stay, if the limit of an entry's random word depends on the rank of its magnitude in the row.

Few entries need their exact rank. A row's magnitudes are counted in bins. An entry's rank lies between the first and the last of its
bin, and nearly all words are below both limits or below neither. If all magnitudes of a bin are equal, as differences of bf16 weights
often are, then rank follows from the order in the row. The few entries that remain are compared with the row. Rows of which too many
remain are sorted."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import Kernel, kernel

Floats = np.ndarray[Any, np.dtype[Any]]
Ints = np.ndarray[Any, np.dtype[Any]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
_SIGN = np.uint32(0x7FFF_FFFF)
_SIZES = ((512, 17, 1024), (1, 20, 128))  # from so many columns on: bits of a pattern within a bin, and bins. They reach over 2^16
_MOST = 200  # comparisons with a whole row, from which on sorting is cheaper
_DIGITS = ((1024, 11), (128, 8), (1, 5))  # bits by which a row is sorted at once, from so many columns on: bins cost time, too


# A row's indices are sorted by its magnitudes: stably, by digits from the lowest on. A digit that is the same in all is skipped.
def _sort(patterns: Any, start: int, columns: int, digit: int, order: Any, other: Any, counts: Any) -> None:
    bins = 1 << digit
    mask = np.uint32(bins - 1)
    for i in range(columns):
        order[i] = i
    for low in range(0, 31, digit):
        shift = np.uint32(low)
        for i in range(bins):
            counts[i] = 0
        for i in range(start, start + columns):
            counts[np.int64(((patterns[i] & _SIGN) >> shift) & mask)] += 1
        if counts[np.int64(((patterns[start] & _SIGN) >> shift) & mask)] != columns:
            total = np.int32(0)
            for i in range(bins):
                here = counts[i]
                counts[i] = total
                total = np.int32(total + here)
            for i in range(columns):
                index = order[i]
                at = np.int64(((patterns[start + index] & _SIGN) >> shift) & mask)
                other[counts[at]] = index
                counts[at] += 1
            for i in range(columns):
                order[i] = other[i]


def _largest(patterns: Any, start: int, columns: int) -> Any:
    largest = np.int32(0)
    for i in range(start, start + columns):
        largest = max(largest, np.int32(patterns[i] & _SIGN))
    return largest


def _before(patterns: Any, start: int, columns: int, index: Any) -> Any:
    """The rank of an entry: how many magnitudes of the row are smaller, or equal and before it."""
    found, key = np.int32(0), np.uint32(patterns[start + index] & _SIGN)
    for i in range(start, start + index):
        found = np.int32(found + np.int32((patterns[i] & _SIGN) <= key))
    for i in range(start + index, start + columns):
        found = np.int32(found + np.int32((patterns[i] & _SIGN) < key))
    return found


def _place(pattern: Any, low: Any, shift: Any) -> Any:
    """The bin of a magnitude, and 2^15 if it is not the smallest of its bin."""
    key = np.int32(pattern & _SIGN)
    bin = np.int32(max(np.int32(key >> shift), low) - low)
    smallest = np.int32((key >> shift) << shift) if bin > 0 else np.int32(0)
    return np.uint16(bin | (np.int32(key != smallest) << np.int32(15)))


@kernel("*u4 *u4 *i8 i8 i8 i8 i4 i8 *i4 *i4 *i4 *i8 *u2 *u1")
def _rank_rows(
    patterns: Any, draws: Any, limits: Any, rows: int, columns: int, digit: int, shift: Any, size: int,
    order: Any, within: Any, counts: Any, found: Any, bins: Any, out: Any,
) -> None:  # fmt: skip
    least, most = np.uint32(limits[0]), np.uint32(min(limits[columns - 1], np.int64(0xFFFF_FFFF)))
    other, low_half = np.int64(1 << 32), np.int64(0xFFFF_FFFF)
    for row in range(rows):
        start = row * columns
        low = np.int32(max(np.int32(_largest(patterns, start, columns) >> shift) - np.int32(size - 1), np.int32(0)))
        for i in range(columns):
            bins[i] = _place(patterns[start + i], low, shift)
        for i in range(size):
            found[i] = 0  # entries of a bin, and 2^32 times those that are not the smallest of it
        for i in range(columns):
            bin = bins[i]
            here = found[np.int64(bin & np.uint16(0x7FFF))]
            within[i] = np.int32(here & low_half)
            found[np.int64(bin & np.uint16(0x7FFF))] = here + 1 + (other if bin >= np.uint16(0x8000) else 0)
        total = np.int32(0)
        for i in range(size):
            counts[i] = total
            total = np.int32(total + np.int32(found[i] & low_half))
        counts[size] = total
        waiting: Any = 0
        for i in range(columns):
            draw = draws[start + i]
            out[start + i] = np.uint8(draw < least)
            order[waiting] = i
            waiting += np.int64((draw >= least) & (draw <= most))
        compared = 0
        for number in range(waiting):
            at: Any = np.int64(order[number])
            bin = np.int64(bins[at] & np.uint16(0x7FFF))
            draw = np.int64(draws[start + at])
            rank: Any = np.int64(counts[bin] + within[at])
            doubtful = (draw >= limits[np.int64(counts[bin])]) & (draw < limits[np.int64(counts[bin + 1]) - 1]) & (found[bin] >= other)
            if doubtful and compared <= _MOST:
                rank = np.int64(_before(patterns, start, columns, at))
                compared += 1
            out[start + at] = np.uint8(draw < limits[rank])
        if compared > _MOST:
            _sort(patterns, start, columns, digit, order, within, counts)
            for place in range(columns):
                at = start + np.int64(order[place])
                out[at] = np.uint8(np.int64(draws[at]) < limits[place])


def ranks() -> list[Kernel]:
    """The loops of `stay_by_rank`, for `compile_beside`."""
    return [_rank_rows]


def stay_by_rank(vector: Floats, draws: Ints, limits: Floats) -> Flags:
    """draw < limits[rank], the rank of an entry among its row's magnitudes, equals in order; bools (rows, columns).

    Args:
        vector: float32 (rows, columns), finite.
        draws: uint32, one of each entry; (rows * columns,).
        limits: integers from 0 to 2^32 that do not fall; (columns,)."""
    rows, columns = vector.shape
    out = np.empty((rows, columns), np.bool_)
    digit = next(bits for least, bits in _DIGITS if columns >= least)
    shift, size = next(sizes for least, *sizes in _SIZES if columns >= least)
    room = np.empty(columns, np.int32), np.empty(columns, np.int32), np.empty(max(size + 1, 1 << digit), np.int32)
    given = np.ascontiguousarray(vector), draws, limits.astype(np.int64), rows, columns, digit, shift, size
    _rank_rows(*given, *room, np.empty(size, np.int64), np.empty(columns, np.uint16), out)
    return out
