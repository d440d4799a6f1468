"""Superposition of task vectors by layer shuffling and random signs: many fine-tunes in the space of one.

Source: Zhou et al., published as RanDeS, https://arxiv.org/abs/2505.11204 (layer shuffling, task vector superposition).

    pack      S_l = sum_t (P_t tau_t)_l * c_{t,l}    for target tensors l; a plain sum for all others
    retrieve  tau_t^ = P_t^-1 (S * c_t);  theta_t^ = theta_0 + scale * tau_t^

Targets are tensors that repeat: their names differ only in a block number, and they have one shape and at least two
dimensions. P_t moves whole blocks: all groups of one prefix and depth share it. c has one sign for each column of (first
dimension, -1) and belongs to the tensor that a vector is moved to. Task vectors are rounded to a power-of-two step and
summed as integers, so adding and removing are exact and the order of tasks does not matter.

docs/random.md defines blocks and signs to the bit."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.kernels.random import words
from peru_cli.methods.philox import stream_key

DECORRELATE = ("shuffle", "shift", "none")
LARGEST = 1 << 23  # largest integer of one task: a float32 holds it, and 255 of them fit 32 bits
MOST_TASKS = 255
PRECISION, ALONE_PRECISION = 4, 10  # default bits; see `default_precision`
Floats = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Group:
    """Tensors that may be permuted among themselves: `members` by block number, `prefix` the part of the name before it."""

    prefix: str
    members: tuple[str, ...]

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.members)


def find_groups(
    tensors: Sequence[TensorInfo], target: re.Pattern[str] | None = None, exclude: re.Pattern[str] | None = None, skip: int = 1
) -> list[Group]:
    """Find targets by structure: repeated tensors, in order of their first member's name.

    If a name has several numbers (T5's `block.3.layer.0`, experts, ConvNeXt's stages), the block is the first of them under
    which tensors of one shape repeat.

    Args:
        target: takes all tensors with matching names instead of repeated ones with two dimensions. One that does not repeat
            is a group of its own, which has signs but is not moved.
        exclude: tensors never to take.
        skip: only every skip-th member of each group."""
    wanted = [
        t for t in tensors
        if t.entries and (len(t.shape) >= 2 if target is None else t.shape and target.search(t.name))
        and not (exclude is not None and exclude.search(t.name))
    ]  # fmt: skip
    alike: dict[tuple[str, str, tuple[int, ...]], list[tuple[int, str]]] = defaultdict(list)
    places = {t.name: list(re.finditer(r"(?<![^.])\d+(?![^.])", t.name)) for t in wanted}
    for info in wanted:
        for number in places[info.name]:
            alike[(*_around(number), info.shape)].append((int(number.group()), info.name))
    groups: dict[tuple[str, str, tuple[int, ...]], Group] = {}
    for info in sorted(wanted, key=lambda t: t.name):
        keys = [(*_around(number), info.shape) for number in places[info.name]]
        key = next((key for key in keys if len(alike[key]) > 1), None)
        if key is not None and key not in groups:
            groups[key] = Group(key[0], tuple(name for _, name in sorted(alike[key])[::skip]))
        elif key is None and target is not None:
            groups[info.name, "", info.shape] = Group(info.name, (info.name,))
    return list(groups.values())


def _around(number: re.Match[str]) -> tuple[str, str]:
    """The parts of a name before and after a block number."""
    return number.string[: number.start()], number.string[number.end() :]


def permutation(seed: int, task: str, prefix: str, depth: int) -> list[int]:
    """Where each block goes: Fisher-Yates from the last place down; a permutation of range(depth)."""
    order = list(range(depth))
    drawn = words(stream_key(seed, task, "order", prefix, str(depth)), 0, max(depth - 1, 0))
    for i, word in zip(range(depth - 1, 0, -1), drawn, strict=True):
        j = int(word) * (i + 1) >> 32
        order[i], order[j] = order[j], order[i]
    return order


def columns(shape: Sequence[int]) -> int:
    """The number of a tensor's signs: one for each column of (first dimension, -1). A vector counts as one row."""
    return math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)


def signs(seed: int, task: str, tensor: str, count: int) -> Floats:
    """+1 or -1 for each column; float32 (count,). Bit j mod 32 of word j div 32: 1 means -1."""
    drawn = words(stream_key(seed, task, "signs", tensor), 0, -(-count // 32))
    bits = np.unpackbits(drawn.astype("<u4").view(np.uint8), bitorder="little")[:count]
    return (1 - 2 * bits.astype(np.int8)).astype(np.float32)


def flip(values: Floats, row: Floats, start: int) -> Floats:
    """values * signs (or multiples of them), in place, for entries from `start` on of a tensor whose columns have the signs `row`; (n,)."""
    width, n = len(row), len(values)
    head = min(-start % width, n)
    if head:
        at = start % width
        values[:head] *= row[at : at + head]
    whole = (n - head) // width * width
    if whole:
        values[head : head + whole].reshape(-1, width)[...] *= row
    tail = n - head - whole
    if tail:
        values[n - tail :] *= row[:tail]
    return values


@dataclass(frozen=True)
class Arrangement:
    """How tasks are moved apart: the variant and the seed."""

    groups: Sequence[Group]
    seed: int
    decorrelate: str = "shuffle"
    signs: bool = True

    def sources(self, task: str, shift: int) -> dict[str, str]:
        """For each target tensor, the tensor whose vector a task puts there."""
        found: dict[str, str] = {}
        for group in self.groups:
            for block, place in enumerate(self.moves(task, shift, group)):
                found[group.members[place]] = group.members[block]
        return found

    def moves(self, task: str, shift: int, group: Group) -> list[int]:
        """Where each block of a group goes."""
        if self.decorrelate == "shuffle":
            return permutation(self.seed, task, group.prefix, group.depth)
        by = shift if self.decorrelate == "shift" else 0
        return [(block + by) % group.depth for block in range(group.depth)]

    def row(self, task: str, info: TensorInfo) -> Floats | None:
        """Signs of a target tensor's columns. None without signs."""
        return signs(self.seed, task, info.name, columns(info.shape)) if self.signs else None


def free_shift(taken: Sequence[int]) -> int:
    """The smallest shift that is free."""
    return next(shift for shift in range(len(taken) + 1) if shift not in taken)


def default_precision(tasks: int) -> int:
    """The fewest bits that leave the retrieval error unchanged to three digits.

    For independent task vectors the error is sqrt(T - 1). T roundings to a step s (in units of their RMS) add T s^2 / 12
    to its square, which is under 0.1% for s = 2^-4 from T = 2 on. A single task has only the rounding error: under 0.0005 for 2^-10."""
    return PRECISION if tasks > 1 else ALONE_PRECISION


def step_exponent(mean_square: float, precision: int) -> int:
    """e of the step 2^e: `precision` bits below the power of two at or below the root mean square; 0 if that is 0."""
    if not mean_square:
        return 0
    return (math.frexp(mean_square)[1] - 1) // 2 - precision


@dataclass(frozen=True)
class Quality:
    """For one task: ||retrieved - tau|| / ||tau||, and the cosine between them."""

    error: float
    cosine: float


def quality(own: float, square: float, product: float, scale: float) -> Quality:
    """From ||tau||^2, ||S||^2 and <S, tau>, S the unscaled retrieved vector."""
    missed = max(scale * scale * square - 2 * scale * product + own, 0.0)
    error = math.sqrt(missed / own) if own else (0.0 if not missed else math.inf)
    return Quality(error, product / math.sqrt(own * square) if own and square else 0.0)


def predicted_products(decorrelated: Floats, plain: Floats, rounding: float) -> tuple[list[float], float]:
    """Inner products <S, tau_t> of each task and ||S||^2, with arguments as for `predict`."""
    energies, tasks = np.diag(decorrelated), len(plain)
    square = float(energies.sum() + plain.sum()) + tasks * rounding
    return [float(energies[t] + plain[t].sum()) for t in range(tasks)], square


def predict(decorrelated: Floats, plain: Floats, rounding: float, scale: float) -> list[Quality]:
    """Predict the retrieval error before anything is packed.

    Args:
        decorrelated: inner products of the tasks' vectors over tensors in which they are moved apart, (T, T). What they have
            in common becomes independent, so only the diagonal counts.
        plain: the same over tensors that are a plain sum.
        rounding: what rounding one task adds to the squared distance."""
    products, square = predicted_products(decorrelated, plain, rounding)
    return [quality(float(decorrelated[t, t] + plain[t, t]), square, product, scale) for t, product in enumerate(products)]


def best_scale(products: Sequence[float], square: float) -> float:
    """The single scale with the least squared error over all tasks: sum <S, tau_t> / (T ||S||^2); 0 if S is 0."""
    return sum(products) / (len(products) * square) if square else 0.0


def choose(predicted: Mapping[str, float], limit: float) -> str | None:
    """The task with the largest error, if that exceeds `limit`: leave it out. None otherwise. Ties: the last name."""
    worst = max(predicted, key=lambda task: (predicted[task], task))
    return worst if predicted[worst] > limit else None
