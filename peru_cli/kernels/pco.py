"""Encode 16-bit steps and small gaps as pcodec 1.1 does, byte for byte, in one loop that counts values where pcodec sorts them.

Source: pcodec 1.1.0 (https://github.com/pcodec/pcodec, pco/src), classic mode without delta encoding, level 8: histograms.rs,
bin_optimization.rs, ans/, chunk_latent_compressor.rs. A number is the symbol of its bin, coded by a table-driven asymmetric numeral
system, and its offset in the bin.

What pcodec alone decides is left to it: blocks of few numbers or of parts of a batch, numbers of 2^16 or more, blocks of a single bin,
and histograms that depend on the order in which its quicksort meets the numbers."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import Kernel, kernel, kernels

Integers = np.ndarray[Any, np.dtype[Any]]
LEAST = 4096  # numbers from which level 8 means 256 bins at first
_VALUES = 1 << 16  # numbers must be below
_BATCH = 256  # numbers whose symbols are written before their offsets
_STATES = 1024  # of the numeral system
_LOG = 10  # bits of a state

_Z = np.float32(0.674)
_Z_REST = np.uint32(_Z.view(np.uint32) & np.uint32(0x7F_FFFF))
_B = np.float32(np.float32(2) / _Z)
_C = np.float32(-_B / np.float32(np.float32(6) * _Z))
_A = np.float32(-_B - _C)
_WORTH = np.float32(0.1)  # bits a number that a simpler table may cost more

FLIP: Any = 0  # each kind of number substitutes its own: what makes it unsigned
_KINDS = {"int16": {"l": "u2", "FLIP": 0x8000}, "uint32": {"l": "u4", "FLIP": 0}}
_WIDTHS = {"int16": (16, 5), "uint32": (32, 6)}  # the bits of a bin's lower end, and of the number of its offsets' bits


def _log2(number: Any) -> Any:
    """pcodec's approximation of the logarithm of a float32."""
    bits = np.float32(number).view(np.uint32)
    rest = np.uint32(bits & np.uint32(0x7F_FFFF))
    high = np.uint32(rest > _Z_REST)
    whole = np.float32(np.int32(np.uint32(bits >> np.uint32(23)) + high) - np.int32(127))
    near = np.uint32(np.uint32(np.uint32(np.uint32(0x7F) ^ high) << np.uint32(23)) | rest).view(np.float32)
    return np.float32(np.float32(whole + _A) + np.float32(near * np.float32(_B + np.float32(_C * near))))


def _length(number: Any) -> Any:
    """The bits of a number from 0 to 2^24."""
    return max(np.int32(0), np.int32(np.uint32(np.float32(number).view(np.uint32) >> np.uint32(23))) - np.int32(126))


def _cost(lower: Any, upper: Any, count: Any, total: Any, about: Any) -> Any:
    """The bits that a bin takes: its description (`about`), and its numbers' symbols and offsets."""
    times = np.float32(count)
    each = np.float32(np.float32(total - _log2(times)) + np.float32(_length(np.int32(upper - lower))))
    return np.float32(about + np.float32(each * times))


def _bins(counts: Any, low: int, high: int, n: int, lowers: Any, uppers: Any, sums: Any) -> Any:
    """At most 256 bins of about as many numbers each, and how many numbers there are up to each. Returns their number, -1 if in doubt.

    pcodec partitions as quicksort does, and sorts what it divides badly. Both give the same bins unless a run of equal numbers ends where a
    bin should, and bins before it were left out."""
    made: Any = 0
    applied: Any = 0
    free: Any = 0  # the first bin that has no numbers yet
    size: Any = 0
    sums[0] = 0
    for value in range(low, high + 1):
        count = np.int64(counts[value])
        if count == 0:
            continue
        target = (applied << 8) // n
        limit = ((target + 1) * n + 255) >> 8
        end = applied + count
        if end <= limit:
            if end == limit and end < n and target != free:
                return -1
            at, full = target, end == limit
        else:
            at = ((applied + count // 2) << 8) // n
            if at > free:
                if size > 0:
                    made += 1
                    sums[made] = applied
                    free, size = at, 0
                else:
                    at -= 1
            full = end >= ((at + 1) * n + 255) >> 8
        if size == 0:
            lowers[made] = value
        uppers[made] = value
        size += count
        applied = end
        if full:
            made += 1
            sums[made] = applied
            free, size = at + 1, 0
    return made


def _joined(made: int, lowers: Any, uppers: Any, sums: Any, costs: Any, trial: Any, best: Any, about: Any) -> Any:
    """Join neighbouring bins so that all take the fewest bits; `best` gets each joined bin's first bin. Returns their number."""
    total = _log2(np.float32(sums[made]))
    costs[0] = np.float32(0)
    for i in range(made):
        upper, upto = uppers[i], sums[i + 1]
        for j in range(i + 1):
            trial[j] = np.float32(costs[j] + _cost(lowers[j], upper, np.int32(upto - sums[j]), total, about))
        least, first = trial[i], i
        for j in range(i - 1, -1, -1):
            if trial[j] < least:
                least, first = trial[j], j
        costs[i + 1] = least
        best[i] = first
    slack = np.float32(costs[made] + np.float32(_WORTH * np.float32(sums[made])))
    if _cost(lowers[0], uppers[made - 1], sums[made], total, about) < slack:
        return 1
    single = True
    alone = np.float32(0)
    for i in range(made):
        single = single and lowers[i] == uppers[i]
        alone = np.float32(alone + _cost(lowers[i], uppers[i], np.int32(sums[i + 1] - sums[i]), total, about))
    if single and alone < slack:
        for i in range(made):
            best[i] = i
        return made
    found: Any = 0
    at: Any = made - 1
    while at >= 0:
        trial[found] = np.float32(at)  # the last bin of each, from the last on
        found += 1
        at = np.int64(best[at]) - 1
    for k in range(found):  # best[k] of the k-th is at most k, so nothing is overwritten before it is read
        last = np.int64(trial[found - 1 - k])
        begin = np.int64(trial[found - k]) + 1 if k > 0 else np.int64(0)
        lowers[k], uppers[k], sums[k + 1] = lowers[begin], uppers[last], sums[last + 1]
    return found


def _weigh(found: int, sums: Any, weights: Any, wanted: Any) -> Any:
    """Each bin's share of the states, at least 1, in `weights`. Returns the bits of a state."""
    factor = np.float32(np.float32(_STATES) / np.float32(sums[found]))
    desired = np.float32(0)
    for k in range(found):
        surplus = max(np.float32(np.float32(np.float32(sums[k + 1] - sums[k]) * factor) - np.float32(1)), np.float32(0))
        wanted[k] = surplus
        desired = np.float32(desired + surplus)
    share = np.float32(0) if desired == np.float32(0) else np.float32(np.float32(_STATES - found) / desired)
    given: Any = 0
    for k in range(found):
        wanted[k] = np.float32(np.float32(1) + np.float32(wanted[k] * share))
        weights[k] = np.int32(np.floor(np.float64(wanted[k]) + 0.5))
        given += np.int64(weights[k])
    at: Any = 0
    while given > _STATES:
        if weights[at] > 1 and np.float32(weights[at]) > wanted[at]:
            weights[at] -= 1
            given -= 1
        at += 1
    at = 0
    while given < _STATES:
        if np.float32(weights[at]) < wanted[at]:
            weights[at] += 1
            given += 1
        at += 1
    together: Any = 0
    for k in range(found):
        together |= np.int64(weights[k])
    log: Any = _LOG
    while together & 1 == 0:
        together >>= 1
        log -= 1
    for k in range(found):
        weights[k] >>= np.int32(_LOG - log)
    return log


def _states(found: int, log: int, weights: Any, spread: Any, place: Any, steps: Any, turns: Any) -> None:
    """Tables of the numeral system: for each symbol, what tells the bits to write (`steps`) and where its next states begin (`place`)."""
    size = 1 << log
    stride = 3 * size // 5
    stride += 1 - (stride & 1)
    step: Any = 0
    at: Any = 0
    for k in range(found):
        weight = np.int64(weights[k])
        for _ in range(weight):
            spread[(stride * step) & (size - 1)] = k
            step += 1
        least = np.int64(log) - (np.int64(_length(np.int32(2 * weight - 1))) - 1)
        steps[k] = ((least + 1) << 16) - ((2 * weight) << least)
        place[k] = at
        at += weight
    for state in range(size):
        symbol = np.int64(spread[state])
        turns[place[symbol]] = size + state
        place[symbol] += 1
    for k in range(found):
        place[k] -= 2 * weights[k]  # back to its first state, which the number `weight` stands for


def _put(out: Any, at: Any, word: Any, filled: Any, number: Any, bits: Any) -> Any:
    """Append the bits of a number to a word that has some, and the word to `out` if it is full. At most 32 bits."""
    word |= np.uint64(number) << np.uint64(filled)
    filled += bits
    out[at] = np.uint32(word & np.uint64(0xFFFF_FFFF))
    full = filled >> 5
    return at + full, word >> np.uint64(full << 5), filled & 31


def _turn(state: Any, i: int, symbols: Any, steps: Any, place: Any, turns: Any, codes: Any) -> Any:
    """Code a symbol: note which bits of the state are written, and how many. Returns the next state."""
    k = np.int64(symbols[i])
    bits = (state + np.int64(steps[k])) >> 16
    codes[i] = np.uint16((state & ((1 << bits) - 1)) | bits << _LOG)
    return np.int64(turns[np.int64(place[k]) + (state >> bits)])


@kernels("*l i8 *i4 *u2 *i8", _KINDS)
def _count_latents(values: Any, n: int, counts: Any, latents: Any, bounds: Any) -> int:
    low: Any = np.int64(1 << 40)
    high: Any = np.int64(-1)
    for i in range(n):
        latent = np.int64(values[i]) ^ FLIP
        latents[i] = np.uint16(latent)
        low = min(low, latent)
        high = max(high, latent)
    bounds[0], bounds[1] = low, high
    if high < _VALUES:
        for value in range(low, high + 1):
            counts[value] = 0
        for i in range(n):
            counts[latents[i]] += 1
    return high < _VALUES  # type: ignore[no-any-return]


@kernel("*u2 i8 i8 i8 i8 i8 *i4 *u1 *u1 *u2 *i4 *i4 *i4 *i4 *i4 *i4 *i4 *i4 *i4 *f4 *f4 *u4")
def _encode_latents(
    latents: Any, n: int, low: int, high: int, lower_bits: int, length_bits: int, counts: Any, symbol_of: Any, symbols: Any, codes: Any,
    lowers: Any, uppers: Any, sums: Any, lengths: Any, weights: Any, spread: Any, place: Any, steps: Any, turns: Any,
    costs: Any, trial: Any, out: Any,
) -> int:  # fmt: skip
    made = _bins(counts, low, high, n, lowers, uppers, sums)
    if made < 2:
        return -1
    found = _joined(made, lowers, uppers, sums, costs, trial, lengths, np.float32(_LOG + lower_bits + length_bits))
    if found < 2:
        return -1
    log = _weigh(found, sums, weights, costs)
    _states(found, log, weights, spread, place, steps, turns)
    for k in range(found):
        for value in range(lowers[k], uppers[k] + 1):
            symbol_of[value] = k
        lengths[k] = _length(np.int32(uppers[k] - lowers[k]))
    for i in range(n):
        symbols[i] = symbol_of[latents[i]]
    # four states take turns, from the last number on, since the bits that they write are read the other way round
    a = b = c = d = np.int64(1) << log
    for i in range(n - 4, -1, -4):
        d = _turn(d, i + 3, symbols, steps, place, turns, codes)
        c = _turn(c, i + 2, symbols, steps, place, turns, codes)
        b = _turn(b, i + 1, symbols, steps, place, turns, codes)
        a = _turn(a, i, symbols, steps, place, turns, codes)
    states = uppers
    states[0], states[1], states[2], states[3] = a, b, c, d
    at, word, filled = np.int64(0), np.uint64(0), np.int64(0)
    # what precedes the numbers: versions, bins, last states
    number: Any
    bits: Any
    for field in range(3 + 3 * found + 6):
        k, part = field // 3 - 1, field % 3
        if field < 3:
            number, bits = (0x0104, 24) if part == 0 else (log, 4) if part == 1 else (found, 15)
        elif k < found:
            number = weights[k] - 1 if part == 0 else lowers[k] if part == 1 else lengths[k]
            bits = log if part == 0 else lower_bits if part == 1 else length_bits
        else:
            last = field - 3 - 3 * found
            number = states[last - 1] - (1 << log) if 0 < last < 5 else 0
            bits = log if 0 < last < 5 else -filled & 7
        at, word, filled = _put(out, at, word, filled, number, bits)
    for start in range(0, n, _BATCH):
        for i in range(start, start + _BATCH, 2):
            one, two = np.int64(codes[i]), np.int64(codes[i + 1])
            bits = one >> _LOG
            both = (one & (_STATES - 1)) | (two & (_STATES - 1)) << bits
            at, word, filled = _put(out, at, word, filled, both, bits + (two >> _LOG))
        for i in range(start, start + _BATCH, 2):
            first, second = np.int64(symbols[i]), np.int64(symbols[i + 1])
            bits = np.int64(lengths[first])
            both = (np.int64(latents[i]) - np.int64(lowers[first])) | (np.int64(latents[i + 1]) - np.int64(lowers[second])) << bits
            at, word, filled = _put(out, at, word, filled, both, bits + np.int64(lengths[second]))
    out[at] = np.uint32(word)
    size: Any = 4 * at + (filled + 7) // 8
    return size  # type: ignore[no-any-return]


class _Room(threading.local):
    """One thread's tables."""

    def __init__(self) -> None:
        self.counts, self.symbol_of = np.empty(_VALUES, np.int32), np.empty(_VALUES, np.uint8)
        self.bounds = np.empty(2, np.int64)
        self.tables = [np.empty(size, np.int32) for size in (256, 256, 257, 256, 256, _STATES, 256, 256, _STATES)]
        self.costs, self.trial = np.empty(257, np.float32), np.empty(256, np.float32)
        self.entries = 0

    def grow(self, n: int) -> None:
        """Make room for this many numbers."""
        if n > self.entries:
            self.entries = n
            self.latents, self.codes = np.empty(n, np.uint16), np.empty(n, np.uint16)
            self.symbols = np.empty(n, np.uint8)
            self.out = np.empty(2500 + n, np.uint32)  # at most 10 bits of a state and 16 of an offset each, and the description


_room = _Room()


def loops(values: Integers) -> list[Kernel]:
    """The loops that encode these values; none if they are left to pcodec."""
    return [_count_latents[values.dtype.name], _encode_latents] if values.dtype.name in _KINDS else []


def encode(values: Integers) -> bytes | None:
    """The bytes that pcodec makes of a contiguous array of int16 or uint32, (n,): header, description of one chunk, its single page.

    None if they must be left to pcodec."""
    n, kind = len(values), values.dtype.name
    if n < LEAST or n % _BATCH or kind not in _KINDS:
        return None
    _room.grow(n)
    r = _room
    if not _count_latents[kind](values, n, r.counts, r.latents, r.bounds):
        return None
    low, high = r.bounds.tolist()
    size = _encode_latents(
        r.latents, n, low, high, *_WIDTHS[kind], r.counts, r.symbol_of, r.symbols, r.codes, *r.tables, r.costs, r.trial, r.out
    )  # fmt: skip
    return r.out.view(np.uint8)[:size].tobytes() if size >= 0 else None
