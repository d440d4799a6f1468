"""The arrays that tile code computes with: NumPy on the CPU, torch on CUDA, under NumPy's names. Results have the same bits.

A function that takes such a namespace, `xp` as in the array API standard, runs on both. The CPU uses NumPy rather than torch
because importing torch takes longer than pruning a small model, and NumPy's loops are as fast on tiles that fit the cache.
Arrays are 1-D runs of entries. Kinds are NumPy's names: i2, i4, i8, u1, f4, f8, bool.

Floating entries of a checkpoint are "bits": integers of the dtype's width, since NumPy has no bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from peru_cli.checkpoints.dtypes import Dtype
from peru_cli.kernels import rounding
from peru_cli.kernels.deltas import Room, put
from peru_cli.kernels.merging import verbs

Array = Any  # np.ndarray, or torch.Tensor on a GPU
Host = np.ndarray[Any, np.dtype[Any]]
KIND = {"F16": "f2", "F32": "f4", "F64": "f8"}
BITS = {8: "i1", 16: "i2", 32: "i4", 64: "i8"}
_SPARSE, _BRANCHLESS = 1 / 25, 1 / 10


class Differences(Protocol):
    """Compares a fine-tune's tile with the base's: bits of one named dtype, both (n,). kernels/deltas.py defines keys."""

    def keys(self, base: Array, fine: Array, dtype: str) -> Host:
        """The key of every entry; (n,), valid until the next call."""
        ...

    def count(self, base: Array, fine: Array, dtype: str, low: int, high: int) -> tuple[int, int, Host]:
        """The number of keys above `high`, the number of entries that differ, and the keys from `low` to `high`, (k,)."""
        ...

    def changed(self, base: Array, fine: Array, dtype: str) -> tuple[Host, Host, Host]:
        """All entries whose bits differ: positions (int32 or int64), ULP differences and bits, all (k,)."""
        ...

    def select(self, base: Array, fine: Array, dtype: str, least: int, sums: Host | None = None) -> tuple[Host, Host, Host, Host]:
        """Of the entries with a key of at least `least`: positions (int32 or int64, ascending), keys, ULP differences and bits.

        All (k,). Keys are valid until the next call. With 0: all entries that differ. To `sums`, (chunks, 2) float64, are added the
        squared norm of the differences in each CHUNK of the tile, and of those with a smaller key; both of what is finite.
        """
        ...


class Arrays(Protocol):
    """The operations. Those with `out` write there and return it; `out` may be an operand."""

    name: str
    compiled: bool  # whether compiled loops (kernels/) take its arrays
    add: Any  # (a, b or number, out=)
    subtract: Any
    multiply: Any
    divide: Any
    absolute: Any  # (a, out=)
    equal: Any  # (a, b or number, out=): bool
    not_equal: Any
    greater: Any
    greater_equal: Any
    less: Any
    logical_and: Any
    logical_or: Any

    def empty(self, entries: int, kind: str) -> Array:
        """An uninitialised array."""
        ...

    def room(self, nbytes: int) -> Host:
        """Bytes on the host from which `upload` copies, uint8."""
        ...

    def upload(self, host: Host) -> Array:
        """Host memory as an array. On the CPU it is the same memory."""
        ...

    def download(self, array: Array) -> Host:
        """An array as host memory. On the CPU it is the same memory."""
        ...

    def view(self, array: Array, kind: str) -> Array:
        """The same memory as another kind of the same width."""
        ...

    def copy(self, source: Array, out: Array) -> Array:
        """Copy with conversion to the kind of `out`."""
        ...

    def fill(self, out: Array, value: float, where: Array | None = None) -> Array:
        """Set all entries, or those selected by a bool array."""
        ...

    def clip(self, array: Array, low: float | None, high: float | None, out: Array) -> Array:
        """Bound entries below and above."""
        ...

    def count(self, flags: Array) -> int:
        """The number of true bools."""
        ...

    def largest_magnitude(self, bits: Array) -> int:
        """The largest pattern of bits (signed integers) without the sign; -1 if there are no entries."""
        ...

    def where(self, flags: Array) -> Array:
        """Ascending positions of the true bools, int64."""
        ...

    def take(self, array: Array, positions: Array) -> Array:
        """array[positions]."""
        ...

    def put(self, array: Array, positions: Array, values: Host) -> None:
        """array[positions] = values."""
        ...

    def differences(self, entries: int, wide: bool) -> Differences:
        """One thread's buffers for tiles of this many entries, compared in float32, or float64 if wide."""
        ...

    def running_count(self, flags: Array) -> Array:
        """The number of true bools up to and including each entry, int64."""
        ...

    # Operations of merges. On the CPU each is one compiled loop (kernels/merging/ defines them).

    def accumulate(
        self, total: Array, bits: Array, dtype: str, base: Array | None, flags: Array | None, factors: tuple[float, float], first: bool
    ) -> None:
        """total (+)= (bits of a dtype - base) * flags * both factors; `first` overwrites the total."""
        ...

    def trim(self, values: Array, threshold: int) -> tuple[Array, Array, int]:
        """Entries whose magnitude pattern is above a threshold, those at or above it, and the number of equals; bools (n,)."""
        ...

    def disjoint(
        self,
        values: Sequence[Array],
        flags: Sequence[Array | None],
        before: Sequence[tuple[float, float]],
        after: Sequence[float],
        shares: Sequence[float] | None,
        strict: bool,
        out: Array,
    ) -> Array:
        """TIES' election and disjoint merge, into `out`."""
        ...

    def elected(self, values: Sequence[Array], flags: Sequence[Array | None], before: Sequence[tuple[float, float]]) -> int:
        """The number of entries that elect + minus the number that elect -."""
        ...

    def onto_base(self, vector: Array, base: Array, scale: float) -> Array:
        """base + scale * vector, in the vector's memory."""
        ...

    def rounded_sum(
        self,
        bits: Sequence[Array],
        dtype: Dtype,
        base: Array | None,
        flags: Sequence[Array | None],
        factors: Sequence[tuple[float, float]],
        factor: float,
        scale: float,
    ) -> tuple[Host, bool]:
        """sum of (bits - base) * flags * both factors, times `factor` and `scale`, + base, all of one dtype of at most 32 bits.

        As bits of that dtype on the host, and whether all are finite."""
        ...

    def rounded_onto(self, vector: Array, dtype: Dtype, base: Array, scale: float) -> tuple[Host, bool]:
        """base + scale * vector, float32, rounded to the base's dtype, on the host, and whether all is finite."""
        ...

    def widen(self, bits: Array, dtype: Dtype, out: Array) -> Array:
        """Bits as floats of the kind of `out` (f4 or f8), exactly. If the bits have that kind, a view of them."""
        ...

    def narrow(self, floats: Array, dtype: Dtype) -> Array:
        """Floats (f4 or f8) rounded to a dtype, nearest even, as bits; f8 to 16 bits by way of f4. NaNs stay NaN, with any payload.

        If the floats already have that kind, a view of them."""
        ...


class Cpu:
    """NumPy."""

    name = "cpu"
    compiled = True
    add, subtract, multiply, divide = np.add, np.subtract, np.multiply, np.divide
    absolute = np.absolute
    equal, not_equal, greater, greater_equal, less = np.equal, np.not_equal, np.greater, np.greater_equal, np.less
    logical_and, logical_or = np.logical_and, np.logical_or

    def empty(self, entries: int, kind: str) -> Array:
        return np.empty(entries, kind)

    def room(self, nbytes: int) -> Host:
        return np.empty(nbytes, np.uint8)

    def upload(self, host: Host) -> Array:
        return host

    def download(self, array: Array) -> Host:
        return array  # type: ignore[no-any-return]

    def view(self, array: Array, kind: str) -> Array:
        return array.view(kind)

    def copy(self, source: Array, out: Array) -> Array:
        np.copyto(out, source, casting="unsafe")
        return out

    def fill(self, out: Array, value: float, where: Array | None = None) -> Array:
        np.copyto(out, out.dtype.type(value), where=True if where is None else where)
        return out

    def clip(self, array: Array, low: float | None, high: float | None, out: Array) -> Array:
        if low is not None:
            array = np.maximum(array, array.dtype.type(low), out=out)
        return array if high is None else np.minimum(array, array.dtype.type(high), out=out)

    def count(self, flags: Array) -> int:
        return int(np.count_nonzero(flags))

    def where(self, flags: Array) -> Array:
        # If at most a tenth of the flags are set, NumPy jumps from one to the next, which processors predict badly. Above that
        # its loop has no
        # branch. So between these densities we append set flags.
        found = np.count_nonzero(flags)
        if not _SPARSE * len(flags) < found <= _BRANCHLESS * len(flags):
            return np.flatnonzero(flags)
        more = np.ones(len(flags) // 8 + 1, np.bool_)
        return np.flatnonzero(np.concatenate((flags, more)))[:found]

    def take(self, array: Array, positions: Array) -> Array:
        return array.take(positions)

    def put(self, array: Array, positions: Array, values: Host) -> None:
        put(array, positions, values)

    def differences(self, entries: int, wide: bool) -> Differences:
        return Room(entries, "f8" if wide else "f4")

    def running_count(self, flags: Array) -> Array:
        return np.cumsum(flags, dtype=np.int64)

    accumulate, trim, disjoint = staticmethod(verbs.accumulate), staticmethod(verbs.trim), staticmethod(verbs.disjoint)
    elected, onto_base = staticmethod(verbs.elected), staticmethod(verbs.onto_base)
    largest_magnitude = staticmethod(verbs.largest_magnitude)

    def rounded_sum(
        self, bits: Sequence[Array], dtype: Dtype, base: Array | None, flags: Sequence[Array | None],
        factors: Sequence[tuple[float, float]], factor: float, scale: float,
    ) -> tuple[Host, bool]:  # fmt: skip
        return rounding.rounded_sum(bits, dtype.name, base, flags, factors, factor, scale)

    def rounded_onto(self, vector: Array, dtype: Dtype, base: Array, scale: float) -> tuple[Host, bool]:
        return rounding.rounded_onto(vector, dtype.name, base, scale)

    def widen(self, bits: Array, dtype: Dtype, out: Array) -> Array:
        if dtype.name in ("F32", "F64"):
            floats = bits.view(KIND[dtype.name])
            return floats if floats.dtype == out.dtype else self.copy(floats, out)
        if out.dtype == np.float64:
            return self.copy(self.widen(bits, dtype, np.empty(len(bits), np.float32)), out)
        return verbs.widened(bits, dtype.name, out)

    def narrow(self, floats: Array, dtype: Dtype) -> Array:
        if dtype.bits == 16:
            single = floats if floats.dtype == np.float32 else floats.astype(np.float32)
            return verbs.narrowed(single, dtype.name)
        return floats.astype(KIND[dtype.name], copy=False).view(BITS[dtype.bits])


CPU = Cpu()


def doubles(bits: Host, dtype: Dtype) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Bits of a floating dtype as float64, exactly; (n,). NumPy alone: plans look at samples before any loop is compiled."""
    wide = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32) if dtype.name == "BF16" else bits.view(KIND[dtype.name])
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return wide.astype(np.float64)
