"""Differences of a tile from the base: their keys, how many are in a window, and which are kept (methods/compact/delta.py, magnitude.py).

The key of an entry is the pattern of |fine - base| in float32 (float64 if wide), an integer that sorts like the magnitude. All
differences that are not finite tie as the largest, and entries with equal bits have -1. Both inputs are bits of one dtype, (n,)."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import Kernel, kernels
from peru_cli.kernels.compiling.instructions import TOGETHER, differing, lowest, reaching
from peru_cli.kernels.scalars import CODES, DTYPES, WIDTHS, Float, Key, magnitude, order, widen

Ints = np.ndarray[Any, np.dtype[Any]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
CHUNK = 1 << 14  # entries whose squares are summed together: a digest's chunk (checkpoints/digests.py)
_NOTHING = np.zeros(0)
_BLOCK = 1024  # entries whose keys are computed together, which vectorises, before some are picked, which does not
_EVERY = DTYPES | CODES
_WORD = 8  # flags read together


@kernels("*b *b i8 *k", _EVERY)
def _keys(base: Any, fine: Any, n: int, out: Any) -> None:
    for i in range(n):
        key = magnitude(widen(fine[i]) - widen(base[i]))
        out[i] = Key(-1) if base[i] == fine[i] else key


# A block's flags are read as words: most are 0 if few entries are wanted.
@kernels("*b *b i8 k k *k *u1 *u8 *k *i8", _EVERY)
def _count(
    base: Any, fine: Any, n: int, low: Any, high: Any, keys: Any, flags: Any, flag_words: Any, within: Any, counts: Any
) -> int:  # fmt: skip
    found: Any = 0
    above: Any = 0
    changed: Any = 0
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        higher, other = np.int32(0), np.int32(0)
        for i in range(size):
            a, b = base[start + i], fine[start + i]
            key = magnitude(widen(b) - widen(a))
            key = Key(-1) if a == b else key
            keys[i] = key
            higher = np.int32(higher + np.int32(key > high))
            other = np.int32(other + np.int32(a != b))
            flags[i] = np.uint8((key >= low) & (key <= high))
        for i in range(size, _BLOCK):
            flags[i] = np.uint8(0)
        above += higher
        changed += other
        for word in range(_BLOCK // _WORD):
            if flag_words[word] != np.uint64(0):
                for i in range(_WORD * word, _WORD * word + _WORD):
                    within[found] = keys[i]
                    found += np.int64(flags[i])
    counts[0], counts[1] = above, changed
    return found  # type: ignore[no-any-return]


def _fold(floats: Any, first: Any) -> None:
    """Add up a block by halving until 64 sums are left, an order that is the same on every processor. Overwrites the block."""
    for halvings in range(1, 5):
        half = _BLOCK >> halvings
        for i in range(half):
            floats[first + i] = Float(floats[first + i] + floats[first + half + i])


def _list(flags: Any, start: int, positions: Any, found: Any) -> Any:
    """Append the places of 64 entries' flags, from `start` on, to those `found` before. Returns how many there are now."""
    while flags != np.uint64(0):
        positions[found] = np.int32(start + lowest(flags))
        found += 1
        flags &= flags - np.uint64(1)
    return found


def _note(base: Any, fine: Any, positions: Any, first: Any, found: Any, ulps: Any, bits: Any) -> None:
    """The fine-tune's bits, and its ULPs from the base, at the positions from `first` to `found`."""
    for j in range(first, found):
        at = positions[j]
        bits[j] = fine[at]
        ulps[j] = order(fine[at]) - order(base[at])


@kernels("*b *b i8 k k *k *f *i4 *k *b *b i8 *f8", _EVERY)
def _select(
    base: Any, fine: Any, n: int, least: Any, infinite: Any, keys: Any, squares: Any,
    positions: Any, found_keys: Any, ulps: Any, bits: Any, measured: int, sums: Any,
) -> int:  # fmt: skip
    found: Any = np.int64(0)
    for start in range(0, n, _BLOCK):
        size = min(_BLOCK, n - start)
        for i in range(size):
            a, b = base[start + i], fine[start + i]
            key = magnitude(widen(b) - widen(a))
            key = Key(-1) if a == b else key
            keys[i] = key
            length = key if (key >= Key(0)) & (key < infinite) else Key(0)
            square = Float(Key(length).view(Float) * Key(length).view(Float))
            squares[i] = square
            squares[_BLOCK + i] = Float(0.0) if key >= least else square
        for i in range(size, _BLOCK):
            keys[i] = Key(-1)
        first = found
        for i in range(0, _BLOCK, TOGETHER):
            found = _list(reaching(keys, least, i), start + i, positions, found)
        _note(base, fine, positions, first, found, ulps, bits)
        for j in range(first, found):
            found_keys[j] = keys[positions[j] - start]
        if measured:
            for i in range(size, _BLOCK):
                squares[i] = squares[_BLOCK + i] = Float(0.0)
            _fold(squares, np.int64(0))
            _fold(squares, np.int64(_BLOCK))
            energy, missed = 0.0, 0.0
            for i in range(64):
                energy += np.float64(squares[i])
                missed += np.float64(squares[_BLOCK + i])
            if energy == np.inf:
                energy, missed = 0.0, 0.0
                for i in range(size):
                    if (keys[i] >= Key(0)) & (keys[i] < infinite):
                        wide = np.float64(Key(keys[i]).view(Float))
                        energy += wide * wide
                        missed += 0.0 if keys[i] >= least else wide * wide
            chunk = start // CHUNK
            sums[2 * chunk] += energy
            sums[2 * chunk + 1] += missed
    return found  # type: ignore[no-any-return]


@kernels("*b *b i8 *i4 *b *b", _EVERY)
def _changed(base: Any, fine: Any, n: int, positions: Any, ulps: Any, bits: Any) -> int:
    found: Any = np.int64(0)
    whole = n // TOGETHER * TOGETHER
    for start in range(0, whole, TOGETHER):
        found = _list(differing(base, fine, start), start, positions, found)
    for i in range(whole, n):
        positions[found] = np.int32(i)
        found += np.int64(base[i] != fine[i])
    _note(base, fine, positions, np.int64(0), found, ulps, bits)
    return found  # type: ignore[no-any-return]


@kernels("*i8 *k i8 i8 i8", {"i4": {"k": "i4"}, "i8": {"k": "i8"}})
def _add_bins(bins: Any, keys: Any, n: int, low: int, shift: int) -> None:
    for i in range(n):
        bins[(np.int64(keys[i]) - low) >> shift] += 1


@kernels("*p i8 i8 *u4", {"4": {"p": "i4"}, "8": {"p": "i8"}})
def _gaps(positions: Any, n: int, first: int, out: Any) -> int:
    largest: Any = np.int64(positions[0]) + first
    out[0] = np.uint32(largest)
    for i in range(1, n):
        gap = np.int64(positions[i]) - np.int64(positions[i - 1]) - 1
        out[i] = np.uint32(gap)
        largest = max(largest, gap)
    return largest  # type: ignore[no-any-return]


_WIDTHS = {f"{size} {place}": {"b": f"u{size}", "p": f"i{place}"} for size in (1, 2, 4, 8) for place in (4, 8)}


@kernels("*b *p *b i8", _WIDTHS)
def _put(out: Any, positions: Any, values: Any, n: int) -> None:
    for i in range(n):
        out[positions[i]] = values[i]


@kernels("*b *i8 *b i8 *i8", WIDTHS)
def _add_ulps(out: Any, positions: Any, ulps: Any, n: int, moved: Any) -> int:
    found: Any = 0
    for i in range(n):
        at = positions[i]
        before = out[at]
        out[at] = order(before) + ulps[i]  # modulo 2^width, as it is stored
        out[at] = order(out[at])
        moved[found] = at
        found += np.int64(out[at] != before)
    return found  # type: ignore[no-any-return]


def add_bins(bins: Ints, keys: Ints, low: int, shift: int) -> None:
    """Count keys (int32 or int64) in bins of 2^shift keys each from `low` on; int64 bins, all keys within them."""
    _add_bins[f"i{keys.itemsize}"](bins, keys, len(keys), low, shift)


def put(out: Ints, positions: Ints, values: Ints) -> None:
    """out[positions] = values, of one dtype of 1, 2, 4 or 8 bytes; positions int32 or int64, all within."""
    _put[f"{out.itemsize} {positions.itemsize}"](out, positions, values, len(positions))


def gaps(positions: Ints, shift: int, out: Ints) -> int:
    """How many entries lie between neighbours: positions ascending, int32 or int64, (n,) with n > 0, into uint32 (n,).

    Before the first lie `shift` and its position. Returns the largest gap. If it is 2^32 or more, `out` is of no use."""
    return _gaps[str(positions.itemsize)](positions, len(positions), shift, out)


def add_ulps(out: Ints, positions: Ints, ulps: Ints) -> Ints:
    """Move the bits at these positions (int64, each listed once, all within) by so many ULPs, modulo 2^width. Both (k,), of `out`'s
    width: 2, 4 or 8 bytes. Returns the positions that have changed."""
    moved = np.empty(len(positions) + 1, np.int64)
    return moved[: _add_ulps[str(out.itemsize)](out, positions, ulps, len(positions), moved)]


def counts(dtype: str, kind: str) -> list[Kernel]:
    """The loops that find a threshold of a dtype's differences, for `compile_beside`."""
    return [_keys[f"{dtype} {kind}"], _count[f"{dtype} {kind}"]]


def selects(dtype: str, kind: str) -> list[Kernel]:
    """The loops that select entries of a dtype, for `compile_beside`."""
    return [_select[f"{dtype} {kind}"]]


def places(dtype: str, kind: str) -> list[Kernel]:
    """The loops that put them into the base and code where they are, for `compile_beside`."""
    return [_put[f"{np.dtype(_EVERY[f'{dtype} {kind}']['b']).itemsize} 4"], _gaps["4"]]


class Room:
    """One thread's buffers for tiles of this many entries, of one kind of float (`f4` or `f8`)."""

    def __init__(self, entries: int, kind: str) -> None:
        self._kind, key = kind, f"i{kind[1]}"
        self._infinite = int(np.array(np.inf, kind).view(key))
        self._block, self._flags = np.empty(_BLOCK, key), np.empty(_BLOCK, np.uint8)
        self._keys, self._found = np.empty(entries, key), np.empty(entries + _WORD, key)
        self._positions = np.empty(entries + _WORD, np.int32)
        self._squares = np.empty(2 * _BLOCK, kind)
        self._rooms: tuple[Ints, Ints] | None = None

    def _of(self, dtype: Any) -> tuple[Ints, Ints]:
        """Room for ULP differences and bits: memory that is new for each tile costs more than what is put there."""
        if self._rooms is None or self._rooms[0].dtype != dtype:
            self._rooms = np.empty(len(self._positions), dtype), np.empty(len(self._positions), dtype)
        return self._rooms

    def keys(self, base: Ints, fine: Ints, dtype: str) -> Ints:
        """The key of every entry; (n,), valid until the next call of this."""
        out = self._keys[: len(base)]
        _keys[f"{dtype} {self._kind}"](base, fine, len(base), out)
        return out

    def count(self, base: Ints, fine: Ints, dtype: str, low: int, high: int) -> tuple[int, int, Ints]:
        """The number of keys above `high`, the number of entries that differ, and the keys from `low` to `high`, (k,)."""
        counts, flags = np.empty(2, np.int64), self._flags
        low, high = min(low, self._infinite + 1), min(high, self._infinite)  # no key is larger
        loop = _count[f"{dtype} {self._kind}"]
        found = loop(base, fine, len(base), low, high, self._block, flags, flags.view(np.uint64), self._found, counts)
        return int(counts[0]), int(counts[1]), self._found[:found].copy()

    def changed(self, base: Ints, fine: Ints, dtype: str) -> tuple[Ints, Ints, Ints]:
        """All entries whose bits differ: positions (int32, ascending), ULP differences and bits; all (k,).

        What `select` finds with a least key of 0, without a key of any entry."""
        ulps, bits = self._of(fine.dtype)
        found = _changed[f"{dtype} {self._kind}"](base, fine, len(base), self._positions, ulps, bits)
        return self._positions[:found].copy(), ulps[:found].copy(), bits[:found].copy()

    def select(self, base: Ints, fine: Ints, dtype: str, least: int, sums: Doubles | None = None) -> tuple[Ints, Ints, Ints, Ints]:
        """Of the entries with a key of at least `least`: positions (int32, ascending), keys, ULP differences and bits.

        All (k,). Keys are valid until the next call. With 0: all entries that differ. To `sums`, (chunks, 2), are added the squared
        norm of the differences in each CHUNK of the tile, and of those with a smaller key; both of what is finite.
        """
        n = len(base)
        assert sums is None or len(sums) * CHUNK >= n
        ulps, bits = self._of(fine.dtype)
        found = _select[f"{dtype} {self._kind}"](
            base, fine, n, least, self._infinite, self._block, self._squares,
            self._positions, self._found, ulps, bits, int(sums is not None), _NOTHING if sums is None else sums,
        )  # fmt: skip
        return self._positions[:found].copy(), self._found[:found], ulps[:found].copy(), bits[:found].copy()
