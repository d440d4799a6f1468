"""The entries that a fine-tune changed, tensor by tensor and piece by piece: new values at flat positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.pairing import Pair, pair_checkpoints
from peru_cli.checkpoints.quantized.fp8 import Dequantized
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import Mismatch
from peru_cli.finetunes.delta import DeltaOnBase
from peru_cli.finetunes.fine_tune import FromArtifact, Origin
from peru_cli.finetunes.verify import Proven
from peru_cli.shown import listed
from peru_cli.streaming.tiles import CHUNK

Array = np.ndarray[Any, np.dtype[Any]]
_PIECE = 32 * CHUNK  # entries read at once: whole chunks, for their digests, but not many times a core's cache


@dataclass(frozen=True)
class Target:
    """One tensor of the fine-tune and the engine's tensor. None if the engine has none, or one of another shape or dtype."""

    name: str  # the base's name, if it has the tensor
    info: TensorInfo
    base: TensorInfo | None


@dataclass(frozen=True)
class Change:
    """The change of one tensor. `positions` are flat, ascending and unique, (k,) int64. None if `raw` is the whole tensor."""

    target: Target
    positions: Array | None
    raw: bytes  # k values, or all of them, in the tensor's dtype


class Changes:
    """The changes of a fine-tune against its base. Every byte is read once, in order, so that digests can prove it."""

    def __init__(self, fine: Checkpoint, base: Checkpoint, proven: bool = True) -> None:
        """Without `proven` no digests are compared, and tensors may be read several times."""
        self.fine, self.base = fine, base
        self._proven = Proven(fine, early=False) if proven and isinstance(fine, FromArtifact) else None
        pairing = pair_checkpoints(fine, base)
        pairs = {pair.fine.name: pair for pair in pairing.pairs}
        self.targets = [_target(info, pairs.get(name)) for name, info in sorted(fine.tensors.items())]
        self.entries = sum(target.info.entries for target in self.targets)

    def check_in_place(self) -> None:
        """Mismatch unless each tensor can be patched in the engine's own checkpoint."""
        if isinstance(self.base, Dequantized):
            raise Mismatch(
                f"{self.base.label} holds quantised weights, which engines keep as codes", "export between checkpoints of floats"
            )
        new = [target.name for target in self.targets if target.base is None]
        if new:
            raise Mismatch(
                f"{self.fine.label} has tensors that {self.base.label} lacks, or has in another shape or dtype: {listed(new)}",
                "engines patch only tensors that they have: send the whole model (peru unpack), or remove these from the fine-tune",
            )

    def pieces(self, target: Target) -> Iterator[tuple[int, memoryview, memoryview | None]]:
        """Pieces of a tensor in order: position, bytes of the fine-tune, bytes of the base (None if it has none).

        The bytes are valid until the next piece."""
        reader = self._proven or self.fine
        dtype, entries = target.info.dtype, target.info.entries
        rooms = [bytearray(dtype.nbytes(min(_PIECE, entries))) for _ in range(2)]
        for start in range(0, entries, _PIECE):
            nbytes = dtype.nbytes(min(_PIECE, entries - start))
            ours, theirs = (memoryview(room)[:nbytes] for room in rooms)
            reader.read_into(target.info.name, dtype.nbytes(start), ours)
            if target.base is None:
                yield start, ours, None
                continue
            self.base.read_into(target.base.name, dtype.nbytes(start), theirs)
            yield start, ours, theirs

    def change(self, target: Target, index_bytes: int, dense: bool | None = None) -> Change | None:
        """The change of a tensor. None if it has not changed.

        With `dense` None the smaller form is used, given that a position takes `index_bytes`. Memory: at most twice the tensor."""
        dtype = target.info.dtype
        bits = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}.get(dtype.bits)
        if target.base is None or bits is None or dense:
            return self._whole(target, always=target.base is None)
        places, values, whole = list[Array](), list[bytes](), bytearray()
        limit = target.info.nbytes if dense is None else None
        if limit is not None and (most := self._most(target)) is not None and most * (index_bytes + dtype.bits // 8) < limit:
            limit = None  # it cannot become larger
        found = 0
        for start, ours, changed in self._changed(target, bits):
            if limit is not None:
                whole += ours
            fine = np.frombuffer(ours, bits)
            found += len(changed)
            if limit is None or found * (index_bytes + dtype.bits // 8) < limit:
                places.append(changed + start)
                values.append(fine[changed].tobytes())
        if not found:
            return None
        if limit is not None and found * (index_bytes + dtype.bits // 8) >= limit:
            return Change(target, None, bytes(whole))
        return Change(target, np.concatenate(places), b"".join(values))

    def largest(self, index_bytes: int, dense: bool | None) -> int:
        """Bytes that the changes of all tensors take at most, given as in `change`."""
        total = 0
        for target in self.targets:
            most = None if dense else self._most(target)
            sparse = target.info.nbytes if most is None else most * (index_bytes + max(target.info.dtype.bits // 8, 1))
            total += sparse if dense is False else min(sparse, target.info.nbytes)
        return total

    def _origin(self, target: Target) -> Origin | None:
        """Where a fine-tune from an artifact says that the tensor is from, if that is the engine's tensor."""
        if self._proven is None or self._proven.source.base is not self.base:
            return None
        origin = self._proven.source.origins.get(target.info.name)
        if origin is None or origin.base is None or target.base is None:
            return None
        same = all(getattr(origin.base, what) == getattr(target.base, what) for what in ("name", "shape", "dtype"))
        return origin if same else None

    def _most(self, target: Target) -> int | None:
        """How many entries of a tensor may have changed, if the artifact says it."""
        origin = self._origin(target)
        return origin.kept if origin is not None and isinstance(self.fine, DeltaOnBase) else None

    def _changed(self, target: Target, bits: Any) -> Iterator[tuple[int, memoryview, Array]]:
        """As `pieces`, with the positions in each piece that have changed, (k,) int64, instead of the base. The base is read for that only
        if the fine-tune does not know them."""
        proven, dtype, entries = self._proven, target.info.dtype, target.info.entries
        if proven is None or self._origin(target) is None:
            for start, ours, theirs in self.pieces(target):
                yield start, ours, _differing(np.frombuffer(ours, bits), np.frombuffer(theirs or b"", bits))
            return
        assert target.base is not None
        room = memoryview(bytearray(dtype.nbytes(min(_PIECE, entries))))
        for start in range(0, entries, _PIECE):
            ours = room[: dtype.nbytes(min(_PIECE, entries - start))]
            changed = proven.read_changes(target.info.name, dtype.nbytes(start), ours)
            if changed is None:
                was = bytearray(len(ours))
                self.base.read_into(target.base.name, dtype.nbytes(start), memoryview(was))
                changed = _differing(np.frombuffer(ours, bits), np.frombuffer(was, bits))
            yield start, ours, changed

    def _whole(self, target: Target, always: bool) -> Change | None:
        room, changed = bytearray(target.info.nbytes), always
        for start, ours, theirs in self.pieces(target):
            at = target.info.dtype.nbytes(start)
            room[at : at + len(ours)] = ours
            changed = changed or ours != theirs
        return Change(target, None, bytes(room)) if changed else None

    def prove(self) -> None:
        """Call when everything was read. Mismatch if the base is another one, BadFile if the artifact was altered."""
        if self._proven is not None:
            self._proven.prove()


def _differing(a: Array, b: Array) -> Array:
    """Positions where two arrays of integers differ; (n,), (n,) -> (k,) int64, ascending. Compares eight bytes at once first:
    most are equal."""
    each = 8 // a.itemsize
    whole = len(a) // each * each
    words = np.flatnonzero(a[:whole].view(np.uint64) != b[:whole].view(np.uint64))
    near = (words[:, None] * each + np.arange(each)).ravel() if each > 1 else words
    near = np.concatenate((near, np.arange(whole, len(a))))
    found: Array = near[a[near] != b[near]]
    return found


def _target(info: TensorInfo, pair: Pair | None) -> Target:
    if pair is None:
        return Target(info.name, info, None)
    alike = (pair.base.shape, pair.base.dtype) == (info.shape, info.dtype)
    return Target(pair.base.name, info, pair.base if alike else None)
