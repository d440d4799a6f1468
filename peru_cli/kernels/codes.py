"""Convert FP8 codes to floats and back: the product with the scale of each block, rounded once.

A weight is a matrix (rows, columns), or several stacked, with one scale for each block of rows and columns. The last blocks of a
matrix may be smaller."""

from __future__ import annotations

from typing import Any

import numpy as np

from peru_cli.kernels.compiling.build import kernel, kernels
from peru_cli.kernels.scalars import ROUNDED, narrow

Codes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
_WORTH = 1024  # entries in a block from which a table of its 256 code values pays


def _pattern(number: Any) -> Any:
    return np.float32(number).view(np.uint32)


_OUT: dict[str, dict[str, Any]] = {
    **{dtype: {"b": "u2", **bound} for dtype, bound in ROUNDED.items()},
    "F32": {"b": "u4", "narrow": _pattern},
}


@kernels("*u1 i8 i8 *f4 *f4 i8 i8 i8 i8 i8 i8 *b *b", _OUT)
def _decode(
    codes: Any, n: int, start: int, values: Any, scales: Any, rows: int, columns: int, height: int, width: int, down: int, across: int,
    tables: Any, out: Any,
) -> None:  # fmt: skip
    at: Any = 0
    held: Any = -1
    while at < n:
        row = (start + at) // columns
        column = (start + at) % columns
        end = min(columns, column + n - at)
        place = ((row // rows) * down + (row % rows) // height) * across
        if place != held and height * width >= _WORTH:
            for block in range(across):
                for code in range(256):
                    tables[256 * block + code] = narrow(np.float32(values[code] * scales[place + block]))
            held = place
        while column < end:
            block = column // width
            stop = min((block + 1) * width, end)
            if held == place:
                for i in range(stop - column):
                    out[at + i] = tables[256 * block + np.int64(codes[at + i])]
            else:
                scale = scales[place + block]
                for i in range(stop - column):
                    out[at + i] = narrow(np.float32(values[codes[at + i]] * scale))
            at += stop - column
            column = stop


@kernel("*f4 i8 i8 i8 i8 *i4")
def _largest(numbers: Any, rows: int, columns: int, height: int, width: int, out: Any) -> None:
    across = (columns + width - 1) // width
    for row in range(rows):
        for block in range(across):
            found = np.int32(0)
            for i in range(row * columns + block * width, row * columns + min((block + 1) * width, columns)):
                found = max(found, np.int32(np.float32(numbers[i]).view(np.int32) & np.int32(0x7FFF_FFFF)))
            place = (row // height) * across + block
            out[place] = max(out[place], found)


def _quotient(number: Any, scale: Any) -> Any:
    return np.float32(number / scale)


def _product(number: Any, scale: Any) -> Any:
    return np.float32(number * scale)


# For an 8-bit float: the number of bits that a float32's mantissa has more, the difference of the exponents' biases, what is added to a
# subnormal number so that its last bit is the sum's, the largest number, and whether there is no -0.
def _format(mantissa: int, bias: int, most: float, unsigned_zero: bool) -> dict[str, Any]:
    return {
        "LOST": np.uint32(23 - mantissa),
        "SHIFTED": np.uint32((127 - bias) << 23),
        "HALF": np.uint32((1 << (22 - mantissa)) - 1),
        "SMALL": np.float32(2.0 ** (24 - bias - mantissa)),
        "BELOW": np.float32(2.0 ** (24 - bias - mantissa)).view(np.uint32),
        "LEAST": np.float32(2.0 ** (1 - bias)),
        "MOST": np.float32(most),
        "SIGN_OF_ZERO": np.uint32(0 if unsigned_zero else 0x80),
    }


_FORMATS = {
    "F8_E4M3": _format(3, 7, 448, False),
    "F8_E5M2": _format(2, 15, 57344, False),
    "F8_E4M3FNUZ": _format(3, 8, 240, True),
    "F8_E5M2FNUZ": _format(2, 16, 57344, True),
}
MOST = {name: float(bound["MOST"]) for name, bound in _FORMATS.items()}
LOST: Any = np.uint32(0)  # each format substitutes its own
SHIFTED: Any = np.uint32(0)
HALF: Any = np.uint32(0)
SMALL: Any = np.float32(0)
BELOW: Any = np.uint32(0)
LEAST: Any = np.float32(0)
LARGEST: Any = np.float32(0)
SIGN_OF_ZERO: Any = np.uint32(0)
scaled: Any = _quotient


@kernels(
    "*f4 i8 i8 i8 i8 *f4 *u1",
    {
        f"{name} {word}": {**bound, "LARGEST": bound["MOST"], "scaled": function}
        for name, bound in _FORMATS.items()
        for word, function in (("quotient", _quotient), ("product", _product))
    },
)
def _encode(numbers: Any, rows: int, columns: int, height: int, width: int, factors: Any, out: Any) -> None:
    across = (columns + width - 1) // width
    for row in range(rows):
        for block in range(across):
            factor = factors[(row // height) * across + block]
            for i in range(row * columns + block * width, row * columns + min((block + 1) * width, columns)):
                number = np.float32(scaled(numbers[i], factor)).view(np.uint32)
                sign = np.uint32(np.uint32(number >> np.uint32(24)) & np.uint32(0x80))
                size = np.float32(min(np.uint32(number & np.uint32(0x7FFF_FFFF)).view(np.float32), LARGEST))
                pattern = np.uint32(np.float32(size).view(np.uint32) - SHIFTED)
                odd = np.uint32(np.uint32(pattern >> LOST) & np.uint32(1))
                normal = np.uint32(np.uint32(pattern + HALF + odd) >> LOST)
                small = np.uint32(np.float32(size + SMALL).view(np.uint32) - BELOW)
                found = small if size < LEAST else normal
                sign = sign if found else np.uint32(sign & SIGN_OF_ZERO)
                out[i] = np.uint8(found | sign)


def decode(
    codes: Codes, start: int, values: Floats, scales: Floats, matrix: tuple[int, int], block: tuple[int, int], dtype: str, out: Any
) -> None:
    """Codes of a run of entries as floats: value * scale in float32, rounded to nearest, ties to even.

    Args:
        codes: (n,); `start` is the first one's index in the weight.
        values: the values of the 256 codes, (256,).
        scales: of all blocks of all matrices, in order.
        matrix, block: rows and columns.
        dtype: BF16, F16 or F32; `out` gets their bits, (n,)."""
    down, across = -(-matrix[0] // block[0]), -(-matrix[1] // block[1])
    tables = np.empty(256 * across if block[0] * block[1] >= _WORTH else 1, out.dtype)
    _decode[dtype](codes, len(codes), start, values, scales, *matrix, *block, down, across, tables, out)


def largest(numbers: Floats, block: tuple[int, int]) -> Floats:
    """The largest magnitude in each block of a matrix, NaN above infinity; (rows, columns) to (blocks down * across,)."""
    rows, columns = numbers.shape
    out = np.zeros(-(-rows // block[0]) * -(-columns // block[1]), np.int32)
    _largest(numbers, rows, columns, *block, out)
    return out.view(np.float32)


def encode(numbers: Floats, block: tuple[int, int], factors: Floats, divide: bool, dtype: str) -> Codes:
    """Codes of a matrix: each number times its block's factor, or divided by it, clipped, rounded to nearest, ties to even.

    Args:
        numbers: finite, (rows, columns).
        factors: one for each block, in order.
        dtype: F8_E4M3, F8_E5M2, or these with FNUZ."""
    out = np.empty(numbers.size, np.uint8)
    _encode[f"{dtype} {'quotient' if divide else 'product'}"](numbers, *numbers.shape, *block, factors, out)
    return out
