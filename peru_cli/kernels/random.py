"""Random words: Philox-4x32-10, each block of four words from its number (methods/philox.py assigns the numbers)."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import Kernel, kernel

Words = np.ndarray[Any, np.dtype[np.uint32]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)


# Words lie in the low halves of u64, so that loops over blocks multiply several at once. What is in the high halves does not matter.
def _round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    p0, p1 = np.uint64((c0 & _LOW) * _M0), np.uint64((c2 & _LOW) * _M1)
    return np.uint64((p1 >> _HALF) ^ c1 ^ k0), p1, np.uint64((p0 >> _HALF) ^ c3 ^ k1), p0


def _philox(number: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """The four words of a block. Ten rounds, written out: loops within loops are not vectorised."""
    c0, c1 = number & _LOW, number >> _HALF
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + _W0, k1 + _W1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(2) * _W0, k1 + np.uint64(2) * _W1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(3) * _W0, k1 + np.uint64(3) * _W1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(4) * _W0, k1 + np.uint64(4) * _W1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(5) * _W0, k1 + np.uint64(5) * _W1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(6) * _W0, k1 + np.uint64(6) * _W1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(7) * _W0, k1 + np.uint64(7) * _W1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(8) * _W0, k1 + np.uint64(8) * _W1)
    c0, c1, c2, c3 = _round(c0, c1, c2, c3, k0 + np.uint64(9) * _W0, k1 + np.uint64(9) * _W1)
    return c0 & _LOW, c1 & _LOW, c2 & _LOW, c3 & _LOW


@kernel("u8 u8 u8 u8 u8 i8 *u8")
def _words(k0: Any, k1: Any, first: Any, c2: Any, c3: Any, blocks: int, out: Any) -> None:
    for i in range(blocks):
        a, b, c, d = _philox(np.uint64(first + np.uint64(i)), c2, c3, k0, k1)
        out[2 * i] = a | (b << _HALF)
        out[2 * i + 1] = c | (d << _HALF)


def _less(word: Any, limit: Any, shift: Any) -> Any:
    """Bit 2^shift if the word is below the limit."""
    return ((word - limit) >> np.uint64(63)) << np.uint64(shift)


@kernel("u8 u8 u8 i8 u8 *u4")
def _below(k0: Any, k1: Any, first: Any, blocks: int, limit: Any, out: Any) -> None:
    for i in range(blocks):
        a, b, c, d = _philox(np.uint64(first + np.uint64(i)), np.uint64(0), np.uint64(0), k0, k1)
        out[i] = np.uint32(_less(a, limit, 0) | _less(b, limit, 8) | _less(c, limit, 16) | _less(d, limit, 24))


def draws() -> list[Kernel]:
    """The loops of `words`, for `compile_beside`."""
    return [_words]


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> Words:
    """The four words of one counter; u32 (4,)."""
    c0, c1, c2, c3 = counter
    out = np.empty(2, np.uint64)
    _words(*key, c0 | c1 << 32, c2, c3, 1, out)
    return out.view(np.uint32)


def words(key: tuple[int, int], start: int, n: int) -> Words:
    """word(start), ..., word(start + n - 1); uint32 (n,)."""
    first, last = start // 4, -(-(start + n) // 4)
    out = np.empty(2 * (last - first), np.uint64)
    _words(*key, first, 0, 0, last - first, out)
    return out.view(np.uint32)[start - 4 * first : start - 4 * first + n]


def below(key: tuple[int, int], start: int, n: int, limit: int) -> Flags:
    """word(i) < limit, a number below 2^32, for the same words; bool (n,)."""
    first, last = start // 4, -(-(start + n) // 4)
    out = np.empty(last - first, np.uint32)
    _below(*key, first, last - first, limit, out)
    return out.view(np.bool_)[start - 4 * first : start - 4 * first + n]
