"""Random words against Random123's vectors and a plain implementation on Python's integers."""

from __future__ import annotations

import numpy as np

from peru_cli.kernels.random import below, philox, words
from peru_cli.methods.philox import stream_key

LOW = 0xFFFFFFFF


def plain(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Philox-4x32-10 as in the paper, one counter at a time."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & LOW, (p0 >> 32) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return [c0, c1, c2, c3]


def test_philox_known_answers() -> None:
    """Random123's kat_vectors for philox4x32-10: counter, key, output."""
    cases = [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0), [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ]
    for counter, key, expected in cases:
        assert philox(counter, key).tolist() == expected == plain(counter, key)


def test_words_match_their_blocks() -> None:
    """Also beyond 2^32 blocks, where the counter's second word is used."""
    key = stream_key(7, "news", "layer.weight")
    for start, n in ((0, 131), ((1 << 34) - 6, 12)):
        expected = [plain([i // 4 & LOW, i // 4 >> 32, 0, 0], key)[i % 4] for i in range(start, start + n)]
        assert words(key, start, n).tolist() == expected
        limit = 1 << 30
        assert below(key, start, n, limit).tolist() == [word < limit for word in expected]


def test_random_words_do_not_depend_on_where_a_tile_begins() -> None:
    key = stream_key(7, "news", "layer.weight")
    whole = words(key, 0, 1000)
    for start, n in ((0, 1), (3, 5), (999, 1), (4, 996), (501, 0)):
        assert np.array_equal(words(key, start, n), whole[start : start + n])
        assert np.array_equal(below(key, start, n, 1 << 31), whole[start : start + n] < 1 << 31)
    assert stream_key(7, "news", "layer.weight") != stream_key(7, "news", "layer.bias")
