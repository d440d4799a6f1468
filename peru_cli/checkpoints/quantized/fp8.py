"""An FP8 checkpoint read as floats: w = code * scale of its block, computed while it is read.

As in transformers' Fp8Dequantize and compressed-tensors: codes and scales to float32, one product, rounded once to the output
type (nearest, ties to even)."""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.quantized.layout import Layout, Scaled
from peru_cli.checkpoints.source import Checkpoint, Over
from peru_cli.console import plural
from peru_cli.kernels.codes import decode

_HELD = 4  # tensors whose scales are cached: each is read in many tiles

Floats = np.ndarray[Any, np.dtype[np.float32]]


def _minifloats(exponent: int, mantissa: int, bias: int, nan: str) -> Floats:
    """Values of all 256 codes of an 8-bit float. `nan` says which codes are NaN: fn, ieee or fnuz."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    e, m = (codes >> mantissa) & ((1 << exponent) - 1), codes & ((1 << mantissa) - 1)
    values = np.where(e == 0, m * 2.0 ** (1 - bias - mantissa), (1 + m / (1 << mantissa)) * 2.0 ** (e - bias)) * sign
    magnitude = codes & 0x7F
    if nan == "fnuz":
        values[0x80] = np.nan
    elif nan == "fn":
        values[magnitude == 0x7F] = np.nan
    else:
        infinite = ((1 << exponent) - 1) << mantissa
        values[magnitude == infinite] = np.copysign(np.inf, sign)[magnitude == infinite]
        values[magnitude > infinite] = np.nan
    return values.astype(np.float32)


VALUES = {
    "F8_E4M3": _minifloats(4, 3, 7, "fn"),
    "F8_E5M2": _minifloats(5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": _minifloats(4, 3, 8, "fnuz"),
    "F8_E5M2FNUZ": _minifloats(5, 2, 16, "fnuz"),
    "I8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
}
_POWERS = np.where(np.arange(256) == 255, np.nan, 2.0 ** (np.arange(256) - 127.0)).astype(np.float32)  # E8M0, also stored as bytes


def read_scales(raw: bytes, dtype: str) -> Floats:
    """Scales as float32, (n,)."""
    if dtype in ("F8_E8M0", "U8"):
        return _POWERS[np.frombuffer(raw, np.uint8)]
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f2" if dtype == "F16" else "<f4").astype(np.float32)


class Dequantized(Over):
    """Codes and scales of another checkpoint as floats, without companions; config.json without its `quantization_config`."""

    def __init__(self, stored: Checkpoint, layout: Layout) -> None:
        super().__init__(stored, f", {len(layout.weights)} {layout.kind} tensors dequantised")
        self.layout, self.part, self.warnings = layout, "dequantised", list(stored.warnings)
        self.expanded = True  # the maker of the model did not choose the float type
        plain = [name for name, weight in layout.weights.items() if weight.scale is None]
        if plain:
            self.warnings.append(
                f"{stored.label}: no scale for {plural(len(plain), f'{layout.kind} tensor')}, read as they are: {plain[0]}"
            )
        self.tensors = {
            name: layout.weights[name].info if name in layout.weights else info
            for name, info in stored.tensors.items()
            if name not in layout.companions
        }
        self.side_files = self._side_files()
        self._cache: OrderedDict[str, Floats] = OrderedDict()
        self._lock = threading.Lock()

    def _side_files(self) -> dict[str, Place]:
        """The stored side files. A config.json with quantisation settings is rewritten into a temporary folder of this object."""
        files = dict(self.below.side_files)
        config = self.below.config()
        if _without_quantization(config):
            folder = TemporaryDirectory(prefix="peru-config-")
            weakref.finalize(self, folder.cleanup)
            path = Path(folder.name) / "config.json"
            path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
            files["config.json"] = path
        return files

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        weight = self.layout.weights.get(name)
        if weight is None:
            self.below.read_into(name, offset, buffer)
            return
        width = weight.info.dtype.bits // 8
        start, n = offset // width, len(buffer) // width
        codes = np.empty(n, np.uint8)
        self.below.read_into(name, start, codes.data)
        scales = np.ones(1, np.float32) if weight.scale is None else self._scales(weight)
        one = (1, max(weight.codes.entries, 1))
        matrix, block = (weight.matrix, weight.block) if scales.size > 1 else (one, one)
        values, dtype = VALUES[weight.codes.dtype.name], weight.info.dtype.name
        if dtype == "F64":
            single = np.empty(n, np.float32)
            decode(codes, start, values, scales, matrix, block, "F32", single)
            np.frombuffer(buffer, np.float64)[:] = single
        else:
            decode(codes, start, values, scales, matrix, block, dtype, np.frombuffer(buffer, f"u{width}"))

    def _scales(self, weight: Scaled) -> Floats:
        """All scales of a tensor as float32, (n,): at most one for 32 of its entries."""
        assert weight.scale is not None
        with self._lock:
            if (found := self._cache.get(weight.info.name)) is not None:
                self._cache.move_to_end(weight.info.name)
                return found
            found = read_scales(self.below.read(weight.scale.name), weight.scale.dtype.name)
            self._cache[weight.info.name] = found
            if len(self._cache) > _HELD:
                self._cache.popitem(last=False)
            return found

    def expect(self, ranges: Iterable[tuple[str, int, int]], keep: bool = False) -> None:
        self.below.expect(self._stored_ranges(ranges), keep)

    def _stored_ranges(self, ranges: Iterable[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
        announced = set()
        for name, offset, nbytes in ranges:
            weight = self.layout.weights.get(name)
            if weight is None:
                yield name, offset, nbytes
                continue
            if weight.scale is not None and name not in announced:
                announced.add(name)
                yield weight.scale.name, 0, weight.scale.nbytes
            width = weight.info.dtype.bits // 8
            yield name, offset // width, nbytes // width


def _without_quantization(config: dict[str, Any]) -> bool:
    """Remove `quantization_config` from a config and its inner tables. Returns whether there was one."""
    found = config.pop("quantization_config", None) is not None
    for value in config.values():
        if isinstance(value, dict):
            found |= _without_quantization(value)
    return found
