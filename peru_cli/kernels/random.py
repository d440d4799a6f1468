"""Random words: Philox-4x32-10, each block of four words from its number (methods/philox.py assigns the numbers)."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.kernels.build import kernel

Words = np.ndarray[Any, np.dtype[np.uint32]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]
ROUNDS = 10
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_HALF = np.uint64(32)


def _philox(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """Four u32 words for a counter of four u32 and a key of two."""
    for _ in range(ROUNDS):
        p0, p1 = np.uint64(c0) * _M0, np.uint64(c2) * _M1
        c0, c1 = np.uint32(np.uint32(p1 >> _HALF) ^ c1 ^ k0), np.uint32(p1)
        c2, c3 = np.uint32(np.uint32(p0 >> _HALF) ^ c3 ^ k1), np.uint32(p0)
        k0, k1 = np.uint32(k0 + _W0), np.uint32(k1 + _W1)
    return c0, c1, c2, c3


@kernel("u4 u4 u4 u4 u4 u4 *u4")
def _block(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, out: Any) -> None:
    out[0], out[1], out[2], out[3] = _philox(c0, c1, c2, c3, k0, k1)


@kernel("u4 u4 u8 i8 *u4")
def _words(k0: Any, k1: Any, first: Any, blocks: int, out: Any) -> None:
    for i in range(blocks):
        number = np.uint64(first + np.uint64(i))
        words = _philox(np.uint32(number), np.uint32(number >> _HALF), np.uint32(0), np.uint32(0), k0, k1)
        out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3] = words


@kernel("u4 u4 u8 i8 u4 *u1")
def _below(k0: Any, k1: Any, first: Any, blocks: int, limit: Any, out: Any) -> None:
    for i in range(blocks):
        number = np.uint64(first + np.uint64(i))
        a, b, c, d = _philox(np.uint32(number), np.uint32(number >> _HALF), np.uint32(0), np.uint32(0), k0, k1)
        out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3] = a < limit, b < limit, c < limit, d < limit


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> Words:
    """The four words of one counter; u32 (4,)."""
    out = np.empty(4, np.uint32)
    _block(*counter, *key, out)
    return out


def words(key: tuple[int, int], start: int, n: int) -> Words:
    """word(start), ..., word(start + n - 1); uint32 (n,)."""
    first, last = start // 4, -(-(start + n) // 4)
    out = np.empty(4 * (last - first), np.uint32)
    _words(*key, first, last - first, out)
    return out[start - 4 * first : start - 4 * first + n]


def below(key: tuple[int, int], start: int, n: int, limit: int) -> Flags:
    """word(i) < limit, a number below 2^32, for the same words; bool (n,)."""
    first, last = start // 4, -(-(start + n) // 4)
    out = np.empty(4 * (last - first), np.bool_)
    _below(*key, first, last - first, limit, out)
    return out[start - 4 * first : start - 4 * first + n]
