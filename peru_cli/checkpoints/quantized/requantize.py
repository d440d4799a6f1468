"""Write floats as FP8 in the layout of another checkpoint: a writer that takes floats and writes codes and scales.

There are two ways to compute them; the name of the scales decides. Both take float32, bound the codes and round once:

- `weight_scale_inv`: as transformers' Fp8Quantize. factor = 1 / largest * most, scale = 1 / factor, code = weight * factor.
- every other name: as compressed-tensors' calculate_qparams and quantize. scale = largest / most, code = weight / scale, the scale
  rounded to its type first.

Scales that are powers of two, by their type or because the config says `scale_fmt: ue8m0`, are rounded up."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.checkpoints.architectures import is_embedding, is_output
from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local.writer import CheckpointWriter
from peru_cli.checkpoints.quantized.fp8 import Dequantized, read_scales
from peru_cli.checkpoints.quantized.layout import CODES, Scaled, quantization
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile, UsageError
from peru_cli.kernels.codes import MOST, encode, largest
from peru_cli.kernels.merging.verbs import narrowed
from peru_cli.shown import listed

FLOAT = BY_NAME["F32"]  # the dtype that the writer takes
_GROUP = 1 << 18  # entries encoded at once, if their scales allow it
_HELD = 1 << 22  # entries of a group held in memory; a larger one, a whole matrix with one scale, waits in a file

_POWERS_OF_TWO = ("F8_E8M0", "U8")
_TINY = np.finfo(np.float32).tiny
_STEP = {"F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}  # distance from 1 to the next number of the type

Floats = np.ndarray[Any, np.dtype[np.float32]]


class Requantized:
    """The FP8 weights of a checkpoint as a layout for others of the same names and shapes."""

    def __init__(self, model: Dequantized) -> None:
        """UsageError for codes that are not FP8."""
        self.model, self.weights = model, model.layout.weights
        other = next((w.codes for w in self.weights.values() if w.codes.dtype.name not in CODES), None)
        if other is not None:
            raise UsageError(
                f"--dtype fp8: the weights of {model.label} are {other.dtype.name}, not FP8 ({other.name})",
                "write bf16 instead: --dtype bf16",
            )
        said = quantization(model.below.config())
        self.powers = said.get("scale_fmt") == "ue8m0"
        scales = {weight.scale.name for weight in self.weights.values() if weight.scale is not None}
        self.kept = [model.below.tensors[name] for name in sorted(model.layout.companions - scales)]  # scales of activations, markers

    def stored(self, outputs: Iterable[TensorInfo]) -> list[TensorInfo]:
        """The tensors to write for tensors of floats. UsageError for one whose shape differs from its codes'."""
        written = [TensorInfo(info.name, info.dtype, info.shape) for info in self.kept]
        for output in outputs:
            weight = self.weights.get(output.name)
            if weight is None:
                written.append(output)
                continue
            if weight.codes.shape != output.shape:
                raise UsageError(
                    f"--dtype fp8: {output.name} has the shape {list(output.shape)}, and {list(weight.codes.shape)} in {self.model.label}",
                    "write bf16 instead: --dtype bf16",
                )
            written.append(TensorInfo(output.name, weight.codes.dtype, weight.codes.shape))
            if weight.scale is not None:
                written.append(TensorInfo(weight.scale.name, weight.scale.dtype, weight.scale.shape))
        return written

    def vocabulary(self) -> str | None:
        """An FP8 weight whose rows are tokens. None if there is none."""
        return next((name for name in self.weights if is_output(name) or is_embedding(name.removesuffix(".weight"))), None)

    def config(self, content: bytes) -> bytes:
        """config.json with the layout's `quantization_config`, in the place where the layout's config has it."""
        config = json.loads(content)
        _put(config, self.model.below.config())
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _put(config: dict[str, Any], stored: Mapping[str, Any]) -> None:
    for key, value in stored.items():
        if key == "quantization_config" and value is not None:
            config[key] = value
        elif isinstance(value, dict) and isinstance(inner := config.get(key), dict):
            _put(inner, value)


class RequantizingWriter(CheckpointWriter):
    """Takes weights as float32, in any order and from any thread, and passes codes and scales to another writer."""

    def __init__(self, writer: CheckpointWriter, layout: Requantized, folder: Path) -> None:
        """Large matrices with a single scale wait in `folder` until the scale is known."""
        self.order, self.journal, self._writer, self._layout, self._folder = writer.order, writer.journal, writer, layout, folder
        self._tensors: dict[str, _Tensor] = {}
        self._lock = threading.Lock()
        for info in layout.kept:
            writer.copy(info.name, layout.model.below, info.name)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        weight = self._layout.weights.get(name)
        if weight is None:
            self._writer.write(name, offset, data)
            return
        with self._lock:
            if name not in self._tensors:
                self._tensors[name] = _Tensor(weight, self._folder)
            tensor = self._tensors[name]
        for group in tensor.add(offset // 4, np.frombuffer(data, np.float32)):
            self._encode(weight, group)
        if tensor.is_done:
            with self._lock:
                self._tensors.pop(name, None)

    def _encode(self, weight: Scaled, group: _Group) -> None:
        """Write codes and scales of some rows, which share no block with others."""
        dtype, scale = weight.codes.dtype.name, weight.scale
        sizes = group.sizes()
        if not np.isfinite(sizes).all():
            raise BadFile(
                f"the merged {weight.info.name!r} is NaN or infinite in places, which FP8 with scales cannot hold",
                "write bf16: --dtype bf16",
            )
        factors, divide = np.ones(len(sizes), np.float32), True
        if scale is not None:
            divide = not scale.name.endswith("_scale_inv")
            raw, factors = scales_of(sizes, scale.dtype, MOST[dtype], divide, self._layout.powers)
            self._writer.write(scale.name, scale.dtype.nbytes(group.first_block), memoryview(raw))
        for at, numbers, block in group.pieces():
            self._writer.write(weight.info.name, at, encode(numbers, block, factors, divide, dtype).data)

    def copy(self, name: str, source: Checkpoint, source_name: str) -> None:
        """Tensors that the layout stores in FP8 are copied as stored."""
        weight, stored = self._layout.weights.get(name), self._layout.model.below
        if weight is None:
            self._writer.copy(name, source, source_name)
            return
        for info in (weight.codes, weight.scale):
            if info is not None:
                self._writer.copy(info.name, stored, info.name)

    def claim(self, name: str, note: Any, parts: Sequence[str] | None = None) -> None:
        written: list[str] = []
        for part in parts or [name]:
            weight = self._layout.weights.get(part)
            written += [part] if weight is None else [info.name for info in (weight.codes, weight.scale) if info is not None]
        self._writer.claim(name, note, written)

    def commit(self) -> None:
        if self._tensors:
            raise AssertionError(f"entries of {listed(sorted(self._tensors))} are missing")
        self._writer.commit()

    def __enter__(self) -> RequantizingWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Tensor:
    """The entries of one tensor so far, in groups of rows that are encoded once they are complete."""

    def __init__(self, weight: Scaled, folder: Path) -> None:
        rows, columns = weight.matrix
        down, self._across = weight.grid[1:]
        single = weight.scale is None or weight.scale.entries == 1
        if single:
            rows = weight.codes.entries // max(columns, 1)
        self._matrix = rows, columns
        self._block = (1, columns) if weight.scale is None else self._matrix if single else weight.block
        self._down = 1 if single else down
        self._whole = self._block == self._matrix and weight.scale is not None
        height = self._block[0]
        self._rows = min(self._matrix[0], height * max(1, _GROUP // max(height * columns, 1)))
        self._groups: dict[int, _Group] = {}
        self._folder, self._lock, self._left = folder, threading.Lock(), weight.codes.entries

    @property
    def is_done(self) -> bool:
        """Whether all of it was encoded."""
        return not self._left

    def add(self, start: int, numbers: Floats) -> Iterator[_Group]:
        """Add entries. Yields the groups that are now complete."""
        (height, columns), at = self._matrix, 0
        while at < len(numbers):
            matrix, inside = divmod((start + at) // columns, height)
            above = inside // self._rows * self._rows
            first, rows = matrix * height + above, min(self._rows, height - above)
            stop = min(len(numbers), (first + rows) * columns - start)
            with self._lock:
                if first not in self._groups:
                    block = (matrix * self._down + above // self._block[0]) * self._across
                    self._groups[first] = _Group((rows, columns), first * columns, block, self._block, self._whole, self._folder)
                group = self._groups[first]
            group.put(start + at, numbers[at:stop])
            with self._lock:
                group.left -= stop - at
                if complete := not group.left:
                    del self._groups[first]
            if complete:
                yield group
            with self._lock:
                self._left -= stop - at
            at = stop


class _Group:
    """Rows of a matrix that wait for each other: in memory, or in an unnamed file if there are many with one scale."""

    def __init__(
        self, shape: tuple[int, int], begin: int, first_block: int, block: tuple[int, int], single: bool, folder: Path
    ) -> None:  # fmt: skip
        """`begin` is the first entry's index in the tensor, `first_block` that of the first scale."""
        self.left = self._size = shape[0] * shape[1]
        self.first_block = first_block
        self._shape, self._begin, self._block, self._single = shape, begin, block, single
        self._largest, self._lock = np.zeros(1, np.float32), threading.Lock()
        self._file = tempfile.TemporaryFile(dir=folder) if single and self._size > _HELD else None  # noqa: SIM115 - closed by `pieces`
        self._numbers: Floats = np.empty(0 if self._file else self._size, np.float32)

    def put(self, at: int, numbers: Floats) -> None:
        """Add entries from an index in the tensor on; from any thread."""
        if self._single:
            found = largest(numbers.reshape(1, -1), (1, len(numbers)))
            with self._lock:
                np.maximum(self._largest, found, out=self._largest)
        if self._file is None:
            self._numbers[at - self._begin : at - self._begin + len(numbers)] = numbers
            return
        data, place = numbers.data.cast("B"), 4 * (at - self._begin)
        while data:
            written = os.pwrite(self._file.fileno(), data, place)
            data, place = data[written:], place + written

    def sizes(self) -> Floats:
        """The largest magnitude of each block; (blocks,)."""
        return self._largest if self._single else largest(self._numbers.reshape(self._shape), self._block)

    def pieces(self) -> Iterator[tuple[int, Floats, tuple[int, int]]]:
        """Numbers as matrices: the first one's index in the tensor, the matrix, and the range of its blocks."""
        if self._file is None:
            yield self._begin, self._numbers.reshape(self._shape), self._block
            return
        with self._file:
            for at in range(0, self._size, _GROUP):
                n = min(_GROUP, self._size - at)
                numbers = np.frombuffer(os.pread(self._file.fileno(), 4 * n, 4 * at), np.float32)
                yield self._begin + at, numbers.reshape(1, n), (1, n)


def scales_of(sizes: Floats, dtype: Dtype, most: float, divide: bool, powers: bool) -> tuple[bytes, Floats]:
    """Scales as bytes of their type, and the divisors of the weights, or without `divide` their factors; (blocks,).

    Args:
        sizes: the largest magnitude of each block.
        most: the largest number that the codes can represent.
        powers: round scales up to powers of two, whatever their type."""
    with np.errstate(over="ignore", divide="ignore"):
        factors: Floats = np.where(sizes == 0, 1, np.float32(1) / sizes * np.float32(most)).astype(np.float32)
        scales: Floats = sizes / np.float32(most) if divide else np.float32(1) / factors
        if powers or dtype.name in _POWERS_OF_TWO:
            fraction, exponent = np.frexp(np.maximum(scales, _TINY))
            scales[:] = (np.minimum(exponent - (fraction == 0.5), 127) + 127 << 23).astype(np.uint32).view(np.float32)
        raw = _as_bytes(scales, dtype)
        if divide and (lost := read_scales(raw, dtype.name) == 0).any():
            raw = _as_bytes(np.where(lost, np.float32(_STEP[dtype.name]), scales), dtype)
        stored = read_scales(raw, dtype.name)
        if not divide and (powers or dtype.name != "F32"):
            factors = np.float32(1) / stored
    return raw, stored if divide else factors


def _as_bytes(scales: Floats, dtype: Dtype) -> bytes:
    if dtype.name in _POWERS_OF_TWO:
        return (scales.view(np.uint32) >> 23).astype(np.uint8).tobytes()
    return narrowed(scales, dtype.name).tobytes() if dtype.bits == 16 else scales.tobytes()
