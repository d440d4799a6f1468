"""Small tensors processed together: a hundred thousand of them must not cost a hundred thousand tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from peru_cli.checkpoints.digests import CHUNK
from peru_cli.checkpoints.header import TensorInfo

Ends = np.ndarray[Any, np.dtype[np.int64]]
T = TypeVar("T")
MOST = CHUNK  # entries of a bundle, which is one tile for any tile size; larger tensors are never bundled


@dataclass(frozen=True, slots=True)
class Bundle(TensorInfo):
    """Several tensors of one dtype as one, their entries one after another. Its shape is (entries,); its name belongs to no tensor."""

    members: tuple[TensorInfo, ...] = ()
    ends: Ends = field(default_factory=lambda: np.zeros(0, np.int64), compare=False)  # number of entries up to the end of each member


def bundle(members: Sequence[TensorInfo]) -> TensorInfo:
    """Bundle tensors of one dtype. A single one is returned as it is."""
    if len(members) == 1:
        return members[0]
    if any(info.dtype is not members[0].dtype for info in members):
        raise AssertionError(f"{members[0].name} shares a bundle with tensors of another dtype")  # their bytes would be misread
    ends = np.fromiter(accumulate(info.entries for info in members), np.int64, len(members))
    name = f"{members[0].name}\0and {len(members) - 1} more"  # tensor names contain no control characters
    return Bundle(name, members[0].dtype, (int(ends[-1]),), 0, tuple(members), ends)


def alike(items: Iterable[T], entries: Callable[[T], int], kind: Callable[[T], object]) -> Iterator[list[T]]:
    """Split items into runs that may share a bundle: of one kind, and at most MOST entries. What has the kind None stays alone."""
    run: list[T] = []
    before: object = None
    size = 0
    for item in items:
        n = entries(item)
        mine = kind(item) if n <= MOST else None
        if run and (mine is None or mine != before or size + n > MOST):
            yield run
            run, size = [], 0
        run.append(item)
        before, size = mine, size + n
    if run:
        yield run


def members(info: TensorInfo) -> Sequence[TensorInfo]:
    """The tensors of a bundle; for a tensor, the tensor itself."""
    return info.members if isinstance(info, Bundle) else (info,)


def cut(info: TensorInfo, start: int, stop: int) -> Iterator[tuple[TensorInfo, int, int]]:
    """The tensors that contain entries `start` to `stop`, each with its own first entry and the entry after its last one."""
    if not isinstance(info, Bundle):
        yield info, start, stop
        return
    first = int(np.searchsorted(info.ends, start, "right"))
    begin = int(info.ends[first - 1]) if first else 0
    for member in info.members[first:]:
        if begin >= stop:
            return
        end = begin + member.entries
        if member.entries:
            yield member, max(start, begin) - begin, min(stop, end) - begin
        begin = end


def pieces_of(info: TensorInfo, start: int, raw: memoryview) -> Iterator[tuple[TensorInfo, int, memoryview]]:
    """The bytes of a tile from entry `start` on, by tensor, each with its own first entry and its bytes."""
    at = 0
    for member, first, last in cut(info, start, start + len(raw) * 8 // info.dtype.bits):
        nbytes = info.dtype.nbytes(last - first)
        yield member, first, raw[at : at + nbytes]
        at += nbytes
