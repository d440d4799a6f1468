"""Find the price that meets a goal: all the bytes allowed, or as much error."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from peru_cli.errors import UsageError
from peru_cli.prune.mixed.decompose import Item
from peru_cli.prune.mixed.family import Family
from peru_cli.prune.mixed.represent import Price, estimate
from peru_cli.prune.mixed.search import Found, approach

_FIRST_RANK = 16  # least number of directions to compute
_BITS_A_DIRECTION = 3.0  # approximate bits for an entry of a factor
_WIDER = 8.0  # a tensor may get this many times the mean number of directions before it is decomposed again
_TOLERANCE = 0.004  # relative distance below the limit of bytes
_TRIALS = 14


def first_ranks(family: Family, limit: int | None) -> None:
    """How many directions to compute at first: several times what the budget pays for on average."""
    for item in family.items:
        if not item.columns:
            continue
        rows, columns = item.pair.entries // item.columns, item.columns
        if limit is None:
            item.rank = min(4 * _FIRST_RANK, item.most)
            continue
        share = 8 * max(limit - family.rest_bytes, 0) / family.entries
        mean = share * rows * columns / (rows + columns) / _BITS_A_DIRECTION
        item.rank = min(max(int(_WIDER * mean), _FIRST_RANK), item.most)


def estimated(family: Family, by_bytes: bool, target: float) -> float:
    """The logarithm of the multiplier at which an estimate meets the target. Decomposes further if directions run out."""
    start = math.log(max(family.energy, 1e-300) / max(family.entries, 1) / 0.3)
    short: list[int] = []

    def measure(log: float) -> float:
        nbytes, error, wanting = estimate(family.items, family.spill, family.price(log))
        short[:] = wanting
        return nbytes if by_bytes else error

    while True:
        found = approach(measure, target, start, -1.0 if by_bytes else 0.3, 0.02, 40)
        if found is None:
            return start
        measure(found.at)
        if not short:
            return found.at
        for number in short:
            family.items[number].rank = min(2 * family.items[number].rank, family.items[number].most)
        family.decompose(list(short))
        start = found.at


def supply(family: Family, items: Sequence[Item], price: Price) -> None:
    """Decompose further, until no tensor wants more directions at a price than are held."""
    while short := [items[number] for number in estimate(items, family.spill, price)[2]]:
        for item in short:
            item.rank = min(2 * item.rank, item.most)
        family.decompose([item.number for item in short])


def search_bytes(family: Family, limit: int, least: int, say: Callable[[str], None]) -> Price:
    """The price at which all artifacts take as much as is allowed; `least` bytes is what they take without changes."""
    if not family.energy:
        return family.price(0.0)
    room, tolerance = limit - least, int(_TOLERANCE * limit)
    tried: dict[float, int] = {}

    def measure(at: float) -> int:
        tried[at] = family.try_out(family.price(at))[0] - least
        return tried[at]

    log = estimated(family, True, max(room, 1))
    found = approach(measure, max(room, 1e-9), log, -1.0, tolerance / max(room, 1), _TRIALS)
    if found is None:
        found = Found(700.0, 0.0)
    price, taken = family.price(found.at), int(found.value)
    over = [at for at, nbytes in tried.items() if nbytes > room]
    if taken < room - tolerance and over:
        price, taken = _between(family, replace(price, lower=math.exp(max(over))), taken, room, least, tolerance)
    if not taken:
        say(f"no change fits into {limit:,} bytes: the artifact would equal the base; allow more")
    elif taken + least < 0.99 * limit:
        say(f"the artifact takes {taken + least:,} of {limit:,} bytes: more would not help, or the next step would exceed the limit")
    return price


def _between(family: Family, price: Price, taken: int, room: int, least: int, tolerance: int) -> tuple[Price, int]:
    """Give as many tensors as fit the lower multiplier, which is too low for all. Returns the price and its bytes.

    If one tensor's next direction takes more than what is left, that tensor stays as it is, and the others get a multiplier of their own.
    """
    fits, exceeds = 0, len(family.items)
    while exceeds - fits > 1 and taken < room - tolerance:
        mixed = replace(price, lowered=frozenset(range((fits + exceeds) // 2)))
        nbytes = family.try_out(mixed)[0] - least
        if nbytes > room:
            exceeds = len(mixed.lowered)
            continue
        fits = len(mixed.lowered)
        if nbytes >= taken:
            price, taken = mixed, nbytes
    if taken >= room - tolerance:
        return price, taken
    others = frozenset(range(len(family.items))) - {exceeds - 1}

    def priced(at: float) -> Price:
        return replace(price, lower=math.exp(at), lowered=others)

    found = approach(lambda at: family.try_out(priced(at))[0] - least, room, math.log(price.lower), -1.0, tolerance / room, _TRIALS)
    return (priced(found.at), int(found.value)) if found is not None and found.value > taken else (price, taken)


def search_quality(family: Family, target: float) -> Price:
    """The price at which so much of the energy is missed. UsageError if no price misses so little."""
    if not family.energy:
        return family.price(0.0)
    log = estimated(family, False, target * family.energy)
    found = approach(lambda at: family.try_out(family.price(at))[1], target * family.energy, log, 0.3, 0.01, _TRIALS)
    if found is None:
        raise UsageError(f"--min-quality {1 - target:.6g} is higher than quantised differences can reach", "use --lossless")
    return family.price(found.at)
