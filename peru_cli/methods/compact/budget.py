"""Ranks for a byte budget: the least total squared error over all matrices, exactly.

One more rank of a matrix costs a fixed number of bytes and gains its next squared singular value. Gains never grow, so this
is a knapsack in which matrices of equal cost share one list of gains. Its linear relaxation (most gain per byte first)
bounds what any choice can reach. Choices that differ from it by more than the bound's gap are settled at once (reduced-cost
fixing). A short dynamic programme over the number of ranks for each cost settles the others.
Source: Kellerer, Pferschy and Pisinger, Knapsack Problems (2004), chapters 2.2 and 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class _Class:
    """All steps of one cost, largest gain first (ties: the earlier matrix): the gain and the matrix of each step."""

    cost: int
    gains: Array
    owners: Array


def ranks_for_bytes(energies: Sequence[Array], costs: Sequence[int], budget: int) -> list[int]:
    """How many singular values of each matrix to keep so that the bytes fit and the least energy is dropped.

    Args:
        energies: squared singular values of each matrix, descending, float64.
        costs: bytes of one rank of each matrix.
        budget: bytes for all of them, with at least one rank each. Ranks that gain nothing are not taken."""
    ranks = np.array([min(len(values), 1) for values in energies])
    room = budget - int(sum(int(rank) * cost for rank, cost in zip(ranks, costs, strict=True)))
    if room < 0:
        raise ValueError("the budget does not hold one rank of each matrix")
    classes = _classes(energies, costs)
    for chosen, group in zip(_choose(classes, room), classes, strict=True):
        np.add.at(ranks, group.owners[:chosen], 1)
    return [int(rank) for rank in ranks]


def _classes(energies: Sequence[Array], costs: Sequence[int]) -> list[_Class]:
    classes = []
    for cost in sorted(set(costs)):
        members = [i for i, c in enumerate(costs) if c == cost]
        gains = np.concatenate([np.asarray(energies[i], np.float64)[1:] for i in members])
        owners = np.concatenate([np.full(max(len(energies[i]) - 1, 0), i) for i in members])
        order = np.argsort(-gains, kind="stable")
        order = order[gains[order] > 0]
        classes.append(_Class(cost, gains[order], owners[order]))
    return classes


def _choose(classes: list[_Class], room: int) -> list[int]:
    """How many steps of each class to take."""
    gains = np.concatenate([group.gains for group in classes])
    costs = np.concatenate([np.full(len(group.gains), group.cost) for group in classes])
    if int(costs.sum()) <= room:
        return [len(group.gains) for group in classes]
    order = np.argsort(-gains / costs, kind="stable")
    spent = np.cumsum(costs[order])
    first_out = int(np.searchsorted(spent, room, side="right"))
    price = float(gains[order[first_out]] / costs[order[first_out]])  # gain per byte at the edge
    bound = float(gains[order[:first_out]].sum()) + price * (room - int(spent[first_out - 1] if first_out else 0))
    reached = _fill(gains[order], costs[order], room)
    gap = bound - reached + 1e-12 * (bound + float(gains.max()))  # the second term covers rounding errors
    least, most = [], []
    for group in classes:
        reduced = group.gains - price * group.cost
        least.append(int(np.count_nonzero(reduced > gap)))
        most.append(int(np.count_nonzero(reduced >= -gap)))
    return _settle(classes, least, most, room)


def _fill(gains: Array, costs: Array, room: int) -> float:
    """The gain of taking each step that still fits, in order."""
    total = 0.0
    smallest = int(costs.min())
    for gain, cost in zip(gains.tolist(), costs.tolist(), strict=True):
        if cost <= room:
            total, room = total + gain, room - cost
            if room < smallest:
                break
    return total


def _settle(classes: list[_Class], least: list[int], most: list[int], room: int) -> list[int]:
    """The best numbers of steps between `least` and `most`: dynamic programming over the remaining bytes."""
    unit = math.gcd(*(group.cost for group in classes))
    left = (room - sum(n * group.cost for n, group in zip(least, classes, strict=True))) // unit
    left = min(left, sum((b - a) * group.cost for a, b, group in zip(least, most, classes, strict=True)) // unit)
    best = np.zeros(left + 1)  # the largest gain for at most this many units
    taken = []
    for group, low, high in zip(classes, least, most, strict=True):
        step = group.cost // unit
        now, choice = best.copy(), np.zeros(left + 1, np.int32)
        gained = 0.0
        for n in range(1, min(high - low, left // step) + 1):
            gained += float(group.gains[low + n - 1])
            candidate = best[: left + 1 - n * step] + gained
            better = candidate > now[n * step :]
            now[n * step :][better] = candidate[better]
            choice[n * step :][better] = n
        best = now
        taken.append(choice)
    at, result = left, []
    for group, low, choice in zip(reversed(classes), reversed(least), reversed(taken), strict=True):
        n = int(choice[at])
        result.append(low + n)
        at -= n * (group.cost // unit)
    return result[::-1]
