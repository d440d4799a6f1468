"""The array namespace on a GPU: torch under NumPy's names (streaming/arrays.py)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.kernels.deltas import CHUNK
from peru_cli.streaming.arrays import BITS, KIND, Host

Array = torch.Tensor
_TYPE = {
    "i2": torch.int16, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8,
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "bool": torch.bool,
}  # fmt: skip


def find_gpu(name: str) -> torch.device | None:
    """`auto`, `cuda` or `cuda:N` as a torch device. None if it does not exist."""
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError:
        return None
    return device if device.type == "cuda" and (device.index or 0) < torch.cuda.device_count() else None


def _float_type(dtype: Dtype) -> torch.dtype:
    return torch.bfloat16 if dtype.name == "BF16" else _TYPE[KIND[dtype.name]]


class OnDevice:
    """Differences (streaming/arrays.py) on a device."""

    def __init__(self, xp: Gpu, entries: int, wide: bool) -> None:
        self._xp, self._kind, self._infinite = xp, "i8" if wide else "i4", 0x7FF0_0000_0000_0000 if wide else 0x7F80_0000
        self._a, self._b = (xp.empty(entries, "f8" if wide else "f4") for _ in range(2))

    def _keys(self, base: Array, fine: Array, dtype: str) -> Array:
        xp, n, named = self._xp, len(base), BY_NAME[dtype]
        a = self._a[:n]
        torch.sub(xp.widen(fine, named, a), xp.widen(base, named, self._b[:n]), out=a)
        keys = xp.view(a.abs_(), self._kind)
        return keys.clamp_(max=self._infinite).masked_fill_(base == fine, -1)

    def keys(self, base: Array, fine: Array, dtype: str) -> Host:
        return self._xp.download(self._keys(base, fine, dtype))

    def count(self, base: Array, fine: Array, dtype: str, low: int, high: int) -> tuple[int, int, Host]:
        keys, high = self._keys(base, fine, dtype), min(high, self._infinite)
        within = keys[(keys >= low) & (keys <= high)]
        return self._xp.count(keys > high), self._xp.count(keys >= 0), self._xp.download(within)

    def changed(self, base: Array, fine: Array, dtype: str) -> tuple[Host, Host, Host]:
        where, _, ulps, bits = self.select(base, fine, dtype, 0)
        return where, ulps, bits

    def select(self, base: Array, fine: Array, dtype: str, least: int, sums: Host | None = None) -> tuple[Host, Host, Host, Host]:
        keys, download = self._keys(base, fine, dtype), self._xp.download
        positions = self._xp.where(keys >= least)
        if sums is not None:
            finite = keys.clamp(min=0).masked_fill(keys >= self._infinite, 0)
            room = torch.zeros(len(sums) * CHUNK, dtype=torch.float64, device=keys.device)
            for column, kept in enumerate((finite, finite.masked_fill(keys >= least, 0))):
                room[: len(keys)] = self._xp.view(kept, f"f{kept.element_size()}")
                sums[:, column] += download(room.view(-1, CHUNK).square().sum(1))
        chosen = fine[positions]
        ulps = _order(chosen) - _order(base[positions])
        return download(positions), download(keys[positions]), download(ulps), download(chosen)


def _order(bits: Array) -> Array:
    """Sign-magnitude patterns to integers in total order (methods/compact/delta.py)."""
    width = bits.element_size() * 8
    return bits ^ ((bits >> (width - 1)) & ((1 << (width - 1)) - 1))


def _vote(value: Array, flags: Array | None, factors: tuple[float, float]) -> Array:
    """The kept entries of a task's vector, times both factors."""
    value = value if flags is None else value * flags
    return value * factors[0] * factors[1]


def _sum(parts: Sequence[Array]) -> Array:
    """Sum of the arrays, in order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


class Gpu:
    """torch on one device. On the device "cpu" it gives the same bytes, which is how it is tested without a GPU."""

    compiled = False
    add, subtract, multiply, divide = torch.add, torch.sub, torch.mul, torch.div
    absolute = torch.abs
    equal, not_equal, greater, greater_equal, less = torch.eq, torch.ne, torch.gt, torch.ge, torch.lt
    logical_and, logical_or = torch.logical_and, torch.logical_or

    def __init__(self, device: torch.device) -> None:
        self.device, self.name = device, str(device)

    def empty(self, entries: int, kind: str) -> Array:
        return torch.empty(entries, dtype=_TYPE[kind], device=self.device)

    def room(self, nbytes: int) -> Host:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda").numpy()

    def upload(self, host: Host) -> Array:
        return torch.from_numpy(host).to(self.device)

    def download(self, array: Array) -> Host:
        return array.cpu().numpy()

    def view(self, array: Array, kind: str) -> Array:
        return array.view(_TYPE[kind])

    def copy(self, source: Array, out: Array) -> Array:
        return out.copy_(source)

    def fill(self, out: Array, value: float, where: Array | None = None) -> Array:
        return out.fill_(value) if where is None else out.masked_fill_(where, value)

    def clip(self, array: Array, low: float | None, high: float | None, out: Array) -> Array:
        return torch.clamp(array, low, high, out=out)

    def count(self, flags: Array) -> int:
        return int(torch.count_nonzero(flags))

    def largest_magnitude(self, bits: Array) -> int:
        return int((bits & torch.iinfo(bits.dtype).max).max()) if len(bits) else -1

    def where(self, flags: Array) -> Array:
        return torch.nonzero(flags).view(-1)

    def take(self, array: Array, positions: Array) -> Array:
        return array[positions]

    def put(self, array: Array, positions: Array, values: Host) -> None:
        array[positions] = torch.from_numpy(np.ascontiguousarray(values)).to(array.device)

    def differences(self, entries: int, wide: bool) -> OnDevice:
        return OnDevice(self, entries, wide)

    def running_count(self, flags: Array) -> Array:
        return torch.cumsum(flags, 0, dtype=torch.int64)

    def accumulate(
        self, total: Array, bits: Array, dtype: str, base: Array | None, flags: Array | None, factors: tuple[float, float], first: bool
    ) -> None:
        floats = self.widen(bits, BY_NAME[dtype], torch.empty_like(total))
        part = _vote(floats if base is None else floats - base, flags, factors)
        total.copy_(part if first else total + part)

    def trim(self, values: Array, threshold: int) -> tuple[Array, Array, int]:
        keys = self.view(values.abs(), f"i{values.element_size()}")
        above, at_least = keys > threshold, keys >= threshold
        return above, at_least, self.count(at_least) - self.count(above)

    def disjoint(
        self, values: Sequence[Array], flags: Sequence[Array | None], before: Sequence[tuple[float, float]], after: Sequence[float],
        shares: Sequence[float] | None, strict: bool, out: Array,
    ) -> Array:  # fmt: skip
        votes = [_vote(*vote) for vote in zip(values, flags, before, strict=True)]
        total = _sum(votes)
        signs = (total > 0 if strict else total >= 0).to(out.dtype) * 2 - 1
        parts = [(vote * signs).clamp_(min=0.0) for vote in votes]  # |entry| if it agrees
        merged = _sum([part * weight for part, weight in zip(parts, after, strict=True)])
        if shares is not None:
            divisor = _sum([(part > 0).to(out.dtype) * share for part, share in zip(parts, shares, strict=True)])
            merged = merged / divisor.masked_fill_(divisor.abs() < 1e-8, 1.0)
        return torch.mul(merged, signs, out=out)

    def elected(self, values: Sequence[Array], flags: Sequence[Array | None], before: Sequence[tuple[float, float]]) -> int:
        total = _sum([_vote(*vote) for vote in zip(values, flags, before, strict=True)])
        return self.count(total > 0) - self.count(total < 0)

    def onto_base(self, vector: Array, base: Array, scale: float) -> Array:
        return vector.mul_(scale).add_(base)

    def rounded_sum(
        self, bits: Sequence[Array], dtype: Dtype, base: Array | None, flags: Sequence[Array | None],
        factors: Sequence[tuple[float, float]], factor: float, scale: float,
    ) -> tuple[Host, bool]:  # fmt: skip
        room = torch.empty(len(bits[0]), dtype=torch.float32, device=self.device)
        whole = None if base is None else self.widen(base, dtype, torch.empty_like(room))
        total = torch.empty_like(room)
        for task, (mine, kept, both) in enumerate(zip(bits, flags, factors, strict=True)):
            self.accumulate(total, mine, dtype.name, whole, kept, both, not task)
        total.mul_(factor)
        return self._rounded(total if whole is None else self.onto_base(total, whole, scale), dtype)

    def rounded_onto(self, vector: Array, dtype: Dtype, base: Array, scale: float) -> tuple[Host, bool]:
        return self._rounded(self.onto_base(vector, self.widen(base, dtype, torch.empty_like(vector)), scale), dtype)

    def _rounded(self, floats: Array, dtype: Dtype) -> tuple[Host, bool]:
        rounded = floats.to(_float_type(dtype))
        return self.download(rounded.view(_TYPE[BITS[dtype.bits]])), bool(torch.isfinite(rounded).all())

    def widen(self, bits: Array, dtype: Dtype, out: Array) -> Array:
        floats = bits if dtype.is_code else bits.view(_float_type(dtype))
        return floats if floats.dtype == out.dtype else out.copy_(floats)

    def narrow(self, floats: Array, dtype: Dtype) -> Array:
        if dtype.bits == 16:
            floats = floats.to(torch.float32)
        return floats.to(_float_type(dtype)).view(_TYPE[BITS[dtype.bits]])
