"""A tensor as an arrangement of the entries of others: what transformers' conversion operations make of stored tensors.

transformers fuses experts, splits and transposes matrices and permutes rows while it loads them. Its own operations are run on
`Layout` objects in place of tensors, so that they record where each entry comes from and nothing is read. `read` then gathers any
range of entries from the files."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np

Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
Read = Callable[[str, int, int], Bits]  # a source's name, first entry and number of entries -> entries
_DENSE = 4  # entries that may be read for each one that is used, where runs are short
_SHORT = 1 << 15  # entries that are always read at once


class Unknown(Exception):
    """An operation that is more than an arrangement of entries."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Indices `start`, `start + step`, ... (`count` of them) of a layout's axis, and the distance of their entries in the source."""

    start: int
    step: int
    count: int
    stride: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Entries of one source: the first is entry `offset` of it, in row-major order."""

    source: str
    offset: int
    axes: tuple[Axis, ...]

    @property
    def entries(self) -> int:
        """Number of entries."""
        return math.prod(axis.count for axis in self.axes)

    def clip(self, dim: int, begin: int, end: int) -> Piece:
        """The part with indices from `begin` to `end` along an axis, counted from `begin`. It may have no entries."""
        axis = self.axes[dim]
        first = max(0, -((axis.start - begin) // axis.step))
        last = min(axis.count, -((axis.start - end) // axis.step))
        new = Axis(axis.start + axis.step * first - begin, axis.step, max(last - first, 0), axis.stride)
        return replace(self, offset=self.offset + first * axis.stride, axes=(*self.axes[:dim], new, *self.axes[dim + 1 :]))


class Layout:
    """A shape and the pieces that fill it. It has the methods of a tensor that transformers' operations use."""

    _OPERATIONS: ClassVar[dict[str, Callable[..., Any]]] = {}

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]) -> None:
        self.shape, self.pieces = tuple(shape), tuple(piece for piece in pieces if piece.entries)

    @classmethod
    def of(cls, source: str, shape: Sequence[int]) -> Layout:
        """A tensor as it is stored."""
        strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        return cls(shape, [Piece(source, 0, tuple(Axis(0, 1, n, stride) for n, stride in zip(shape, strides, strict=True)))])

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """What torch calls when a layout is passed to one of its functions."""
        made = cls._OPERATIONS.get(getattr(function, "__name__", ""))
        if made is None:
            raise Unknown(f"{function} is no arrangement of entries")
        return made(*args, **(kwargs or {}))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def size(self, dim: int) -> int:
        """Length of an axis."""
        return self.shape[dim]

    def contiguous(self) -> Layout:
        """The same: a layout has no memory of its own."""
        return self

    def complete(self) -> bool:
        """Whether the pieces fill the shape. They never overlap."""
        return sum(piece.entries for piece in self.pieces) == math.prod(self.shape)

    def transpose(self, dim0: int, dim1: int) -> Layout:
        """Two axes exchanged."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        moved = [replace(piece, axes=tuple(piece.axes[dim] for dim in order)) for piece in self.pieces]
        return Layout([self.shape[dim] for dim in order], moved)

    def squeeze(self, dim: int) -> Layout:
        """Without an axis of length 1."""
        if self.shape[dim] != 1:
            return self
        pieces = [replace(piece, axes=(*piece.axes[:dim], *piece.axes[dim + 1 :])) for piece in self.pieces]
        return Layout((*self.shape[:dim], *self.shape[dim + 1 :]), pieces)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> tuple[Layout, ...]:
        """Consecutive parts along an axis, of one size (the last may be smaller) or of these sizes."""
        length = self.shape[dim]
        if isinstance(sizes, int):
            sizes = [min(sizes, length - at) for at in range(0, length, sizes)]
        parts, at = [], 0
        for size in sizes:
            shape = (*self.shape[:dim], size, *self.shape[dim + 1 :])
            parts.append(Layout(shape, [piece.clip(dim, at, at + size) for piece in self.pieces]))
            at += size
        return tuple(parts)

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Layout, ...]:
        """As torch.chunk: at most so many parts of equal size."""
        return self.split(-(-self.shape[dim] // chunks), dim)

    def reshape(self, *shape: Any) -> Layout:
        """The same entries in row-major order under another shape."""
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
        if math.prod(wanted) != math.prod(self.shape) or not all(wanted):
            raise Unknown(f"{self.shape} does not reshape to {wanted}")
        old, new = list(self.shape), list(wanted)
        made: list[tuple[list[int], list[int]]] = []  # axes that become others together
        while old or new:
            left, right = [old.pop(0)] if old else [1], [new.pop(0)] if new else [1]
            while math.prod(left) != math.prod(right):
                if math.prod(left) < math.prod(right):
                    left.append(old.pop(0))
                else:
                    right.append(new.pop(0))
            made.append((left, right))
        pieces = list(self.pieces)
        at = 0
        for left, right in made:
            padded = len(left) if at + len(left) <= len(pieces[0].axes) else 0  # a 1 that was added above has no axis
            pieces = [part for piece in pieces for part in _regroup(piece, at, left[:padded], right)]
            at += len(right)
        return Layout(wanted, [replace(piece, axes=piece.axes[: len(wanted)]) for piece in pieces])

    view = reshape

    def read(self, start: int, out: Bits, read: Read) -> None:
        """Fill `out` with the entries from `start` on."""
        at = 0
        for box in _boxes(self.shape, start, start + len(out)):
            sides = [end - begin for begin, end in box]
            target = out[at : at + math.prod(sides)].reshape(sides)
            at += target.size
            for piece in self.pieces:
                for dim, (begin, end) in enumerate(box):
                    piece = piece.clip(dim, begin, end)
                    if not piece.axes[dim].count:
                        break
                else:
                    where = tuple(slice(a.start, a.start + a.step * (a.count - 1) + 1, a.step) for a in piece.axes)
                    _gather(piece, target[where], read)


def _cat(tensors: Sequence[Layout], dim: int = 0) -> Layout:
    at, pieces = 0, []
    for part in tensors:
        if part.ndim != tensors[0].ndim or any(
            a != b for d, (a, b) in enumerate(zip(part.shape, tensors[0].shape, strict=True)) if d != dim
        ):
            raise Unknown("tensors of different shapes")
        for piece in part.pieces:
            moved = replace(piece.axes[dim], start=piece.axes[dim].start + at)
            pieces.append(replace(piece, axes=(*piece.axes[:dim], moved, *piece.axes[dim + 1 :])))
        at += part.shape[dim]
    return Layout((*tensors[0].shape[:dim], at, *tensors[0].shape[dim + 1 :]), pieces)


def _stack(tensors: Sequence[Layout], dim: int = 0) -> Layout:
    def grown(part: Layout) -> Layout:
        pieces = [replace(piece, axes=(*piece.axes[:dim], Axis(0, 1, 1, 0), *piece.axes[dim:])) for piece in part.pieces]
        return Layout((*part.shape[:dim], 1, *part.shape[dim:]), pieces)

    return _cat([grown(part) for part in tensors], dim)


Layout._OPERATIONS = {
    "cat": _cat, "stack": _stack, "chunk": Layout.chunk, "split": Layout.split, "transpose": Layout.transpose, "reshape": Layout.reshape,
}  # fmt: skip


def _regroup(piece: Piece, at: int, left: Sequence[int], right: Sequence[int]) -> Iterator[Piece]:
    """A piece whose axes from `at` on, of lengths `left`, are read as axes of lengths `right`."""
    if list(left) == list(right):
        yield piece
        return
    if not left:  # another axis of length 1
        yield replace(piece, axes=(*piece.axes[:at], Axis(0, 1, 1, 0), *piece.axes[at:]))
    elif len(left) > 1:
        first, second, length = piece.axes[at], piece.axes[at + 1], left[1]
        rest = piece.axes[at + 2 :]
        merged: list[tuple[int, Axis]] = []
        if second.count <= first.count:
            for i in range(second.count):
                start = first.start * length + second.start + i * second.step
                merged.append((i * second.stride, Axis(start, first.step * length, first.count, first.stride)))
        else:
            for i in range(first.count):
                start = (first.start + i * first.step) * length + second.start
                merged.append((i * first.stride, Axis(start, second.step, second.count, second.stride)))
        if len(merged) > 1 and first.step * length == second.step * second.count and first.stride == second.stride * second.count:
            merged = [(0, Axis(first.start * length + second.start, second.step, first.count * second.count, second.stride))]
        for more, axis in merged:
            one = replace(piece, offset=piece.offset + more, axes=(*piece.axes[:at], axis, *rest))
            yield from _regroup(one, at, [left[0] * length, *left[2:]], right)
    else:
        for part in _rows(piece, at, math.prod(right[1:])):
            if len(right) == 2:
                yield part
            else:
                yield from _regroup_tail(part, at + 1, right[1:])


def _regroup_tail(piece: Piece, at: int, right: Sequence[int]) -> Iterator[Piece]:
    yield from _regroup(piece, at, [math.prod(right)], right)


def _rows(piece: Piece, at: int, length: int) -> Iterator[Piece]:
    """A piece whose axis `at` becomes two, rows of `length`."""
    axis = piece.axes[at]
    before, after = piece.axes[:at], piece.axes[at + 1 :]
    if axis.step % length == 0:
        axes = (Axis(axis.start // length, axis.step // length, axis.count, axis.stride), Axis(axis.start % length, 1, 1, 0))
        yield replace(piece, axes=(*before, *axes, *after))
        return
    if length % axis.step:
        raise Unknown("entries whose distance does not divide the length of a row")
    each, i = length // axis.step, 0
    while i < axis.count:
        index = axis.start + i * axis.step
        whole = (axis.count - i) // each if index % length < axis.step else 0
        count = each if whole else min(axis.count - i, -(-(length - index % length) // axis.step))
        axes = (Axis(index // length, 1, max(whole, 1), axis.stride * each), Axis(index % length, axis.step, count, axis.stride))
        yield replace(piece, offset=piece.offset + i * axis.stride, axes=(*before, *axes, *after))
        i += count * max(whole, 1)


def inverse(layout: Layout, name: str, source: str, shape: Sequence[int]) -> Layout:
    """Where a source's entries lie in a layout: a layout of shape `shape` whose source is `name`. It may fill only a part.

    Raises Unknown if an axis of the layout runs over several axes of the source."""
    own = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    outer = [math.prod(layout.shape[dim + 1 :]) for dim in range(layout.ndim)]
    pieces = []
    for piece in layout.pieces:
        if piece.source != source:
            continue
        first = [piece.offset // stride % n for stride, n in zip(own, shape, strict=True)]
        axes = [Axis(start, 1, 1, 0) for start in first]
        for axis, stride in zip(piece.axes, outer, strict=True):
            if axis.count == 1:
                continue
            dim = next(d for d, each in enumerate(own) if axis.stride >= each and shape[d] > 1)
            step = axis.stride // own[dim]
            if axis.stride % own[dim] or axes[dim].count > 1 or first[dim] + step * (axis.count - 1) >= shape[dim]:
                raise Unknown("an axis that runs over several axes")
            axes[dim] = Axis(first[dim], step, axis.count, axis.step * stride)
        offset = sum(axis.start * stride for axis, stride in zip(piece.axes, outer, strict=True))
        pieces.append(Piece(name, offset, tuple(axes)))
    return Layout(shape, pieces)


def _boxes(shape: Sequence[int], start: int, end: int) -> Iterator[list[tuple[int, int]]]:
    """Boxes of indices that follow one another in row-major order and together are a range of entries."""
    if start >= end:
        return
    if not shape:
        yield []
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), end // inner
    if first > last:  # within one row
        yield from ([(last, last + 1), *box] for box in _boxes(shape[1:], start - last * inner, end - last * inner))
        return
    if start < first * inner:
        yield from ([(first - 1, first), *box] for box in _boxes(shape[1:], start - (first - 1) * inner, inner))
    if first < last:
        yield [(first, last), *((0, n) for n in shape[1:])]
    if last * inner < end:
        yield from ([(last, last + 1), *box] for box in _boxes(shape[1:], 0, end - last * inner))


def _gather(piece: Piece, out: Bits, read: Read) -> None:
    """Fill `out` with a piece's entries, in as few reads as possible."""
    order = sorted(range(len(piece.axes)), key=lambda dim: (piece.axes[dim].count > 1, piece.axes[dim].stride))
    span, used, inside = 1, 1, 0
    for dim in order:
        axis = piece.axes[dim]
        longer, more = span + axis.stride * (axis.count - 1) if axis.count > 1 else span, used * axis.count
        if longer > max(_DENSE * more, _SHORT):
            break
        span, used, inside = longer, more, inside + 1
    within, outer = order[:inside], order[inside:]
    target = out.transpose([*outer, *within])
    for index in product(*(range(piece.axes[dim].count) for dim in outer)):
        offset = piece.offset + sum(i * piece.axes[dim].stride for i, dim in zip(index, outer, strict=True))
        run = read(piece.source, offset, span)
        strides = [piece.axes[dim].stride * run.itemsize if piece.axes[dim].count > 1 else 0 for dim in within]
        target[index] = np.lib.stride_tricks.as_strided(run, [piece.axes[dim].count for dim in within], strides)
