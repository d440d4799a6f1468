"""Random numbers that are the same on every machine: Philox-4x32-10, addressed by task, tensor and entry.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011), https://doi.org/10.1145/2063384.2063405;
tests use the known-answer vectors of its authors' Random123 library. To the bit (docs/random.md):

    digest  = SHA-256("peru random 1" 0x00, seed as a decimal, 0x00, task, 0x00, what the numbers are for; UTF-8)
    key     = the digest's first 8 bytes as two little-endian u32
    counter = (b mod 2^32, b div 2^32, 0, 0) for block b = i div 4 of the flat index i
    word(i) = output word number i mod 4 of Philox-4x32-10(counter, key)

For merges they are for a tensor, by its name in the merged checkpoint. Nothing else enters: no tile, thread, hash seed
or clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

Halves = np.ndarray[Any, np.dtype[np.uint64]]
Words = np.ndarray[Any, np.dtype[np.uint32]]
ROUNDS = 10
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def stream_key(seed: int, task: str, *what: str) -> tuple[int, int]:
    """The key of one task's numbers for one purpose (a tensor's name; see docs/random.md for others): two u32."""
    text = b"\0".join([b"peru random 1", str(seed).encode(), *(part.encode("utf-8") for part in (task, *what))])
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox(counters: Sequence[Halves], key: tuple[int, int]) -> list[Halves]:
    """Ten rounds over counters, four u32 held in uint64, (n,) each; their memory is used."""
    c0, c1, c2, c3 = counters
    k0, k1 = key
    high = np.empty_like(c0)
    for _ in range(ROUNDS):
        c0 *= _M0  # 64-bit products; the halves are taken below
        c2 *= _M1
        c1 ^= np.right_shift(c2, _HALF, out=high)
        c1 ^= np.uint64(k0)
        c3 ^= np.right_shift(c0, _HALF, out=high)
        c3 ^= np.uint64(k1)
        c0 &= _LOW
        c2 &= _LOW
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def words(key: tuple[int, int], start: int, n: int) -> Words:
    """word(start), ..., word(start + n - 1); uint32 (n,)."""
    first, last = start // 4, -(-(start + n) // 4)
    blocks = np.arange(first, last, dtype=np.uint64)
    drawn = philox([blocks & _LOW, blocks >> _HALF, np.zeros_like(blocks), np.zeros_like(blocks)], key)
    flat = np.empty((last - first, 4), dtype=np.uint32)
    for number, word in enumerate(drawn):
        flat[:, number] = word
    return flat.reshape(-1)[start - 4 * first : start - 4 * first + n]
