"""Random numbers that are the same on every machine: Philox-4x32-10, addressed by task, tensor and entry.

kernels/random.py generates them. Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011),
https://doi.org/10.1145/2063384.2063405;
tests use the known-answer vectors of its authors' Random123 library. To the bit (docs/random.md):

    digest  = SHA-256("peru random 1" 0x00, seed as a decimal, 0x00, task, 0x00, what the numbers are for; UTF-8)
    key     = the digest's first 8 bytes as two little-endian u32
    counter = (b mod 2^32, b div 2^32, 0, 0) for block b = i div 4 of the flat index i
    word(i) = output word number i mod 4 of Philox-4x32-10(counter, key)

For merges the purpose is a tensor's name in the merged checkpoint. Nothing else matters: no tile, thread, hash seed or clock."""

from __future__ import annotations

import hashlib


def stream_key(seed: int, task: str, *what: str) -> tuple[int, int]:
    """The key of one task's numbers for one purpose (a tensor's name; docs/random.md lists others): two u32."""
    text = b"\0".join([b"peru random 1", str(seed).encode(), *(part.encode("utf-8") for part in (task, *what))])
    digest = hashlib.sha256(text).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
