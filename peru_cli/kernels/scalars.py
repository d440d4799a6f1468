"""Convert bits of each checkpoint dtype to floats and back, one entry at a time, in functions for loops.

A loop made by `kernels(over=DTYPES)` uses `widen`, `magnitude`, `order` and `Key`; each dtype substitutes its own."""

from __future__ import annotations

from typing import Any

import numpy as np

_BIAS = np.float32(2.0**112)  # between the exponent biases of float16 and float32


def _widen_bf16(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


def _widen_f16(bits: Any) -> Any:
    """Shift into place, then multiply to correct the exponent's bias: exact, also for subnormal numbers."""
    sign = np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16))
    rest = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
    finite = np.float32(np.uint32(rest | sign).view(np.float32) * _BIAS)
    infinite = np.uint32(rest | sign | np.uint32(0x7F80_0000)).view(np.float32)
    return infinite if rest >= np.uint32(0x0F80_0000) else finite


def _widen_f32(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


def _doubled_bf16(bits: Any) -> Any:
    return np.float64(_widen_bf16(bits))


def _doubled_f16(bits: Any) -> Any:
    return np.float64(_widen_f16(bits))


def _doubled_f32(bits: Any) -> Any:
    return np.float64(_widen_f32(bits))


def _widen_f64(bits: Any) -> Any:
    return np.uint64(bits).view(np.float64)


def _magnitude_single(number: Any) -> Any:
    """The pattern of |number|, with infinity for anything not finite; int32."""
    return np.int32(min(np.int32(np.float32(number).view(np.int32) & np.int32(0x7FFF_FFFF)), np.int32(0x7F80_0000)))


def _magnitude_double(number: Any) -> Any:
    """The same for a float64; int64."""
    return np.int64(min(np.float64(number).view(np.int64) & np.int64(0x7FFF_FFFF_FFFF_FFFF), np.int64(0x7FF0_0000_0000_0000)))


def _number(bits: Any) -> Any:
    """A number for each byte: codes are compared, nothing is computed with them."""
    return np.float32(bits)


def _doubled_number(bits: Any) -> Any:
    return np.float64(bits)


def _order_8(bits: Any) -> Any:
    return np.uint8(bits ^ np.uint8(0x7F)) if bits >= np.uint8(0x80) else np.uint8(bits)


def _order_16(bits: Any) -> Any:
    """Sign-magnitude pattern to an integer in total order (methods/compact/delta.py)."""
    return np.uint16(bits ^ np.uint16(0x7FFF)) if bits >= np.uint16(0x8000) else np.uint16(bits)


def _order_32(bits: Any) -> Any:
    return np.uint32(bits ^ np.uint32(0x7FFF_FFFF)) if bits >= np.uint32(0x8000_0000) else np.uint32(bits)


def _order_64(bits: Any) -> Any:
    return np.uint64(bits ^ np.uint64(0x7FFF_FFFF_FFFF_FFFF)) if bits >= np.uint64(1 << 63) else np.uint64(bits)


def _narrow_bf16(number: Any) -> Any:
    """Round to nearest even: add just less than half a unit, and one more if the last bit is odd."""
    pattern = np.float32(number).view(np.uint32)
    rounded = np.uint16(np.uint32(pattern + np.uint32((pattern >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)) >> np.uint32(16))
    quiet = np.uint16(np.uint32(pattern >> np.uint32(16)) | np.uint32(0x0040))
    return rounded if number == number else quiet


def _narrow_f16(number: Any) -> Any:
    """The same for float16. Subnormal numbers are rounded by adding 1/2; all NaNs become one."""
    pattern = np.float32(number).view(np.uint32)
    rest = np.uint32(pattern & np.uint32(0x7FFF_FFFF))
    odd = np.uint32(np.uint32(rest >> np.uint32(13)) & np.uint32(1))
    normal = np.uint32(np.uint32(rest - np.uint32(0x3800_0000) + np.uint32(0xFFF) + odd) >> np.uint32(13))
    half = np.float32(np.uint32(rest).view(np.float32) + np.float32(0.5))
    small = np.uint32(np.float32(half).view(np.uint32) - np.uint32(0x3F00_0000))
    found = small if rest < np.uint32(0x3880_0000) else min(normal, np.uint32(0x7C00))
    found = found if rest <= np.uint32(0x7F80_0000) else np.uint32(0x7E00)
    return np.uint16(found | np.uint32(np.uint32(pattern >> np.uint32(16)) & np.uint32(0x8000)))


def narrow(number: Any) -> Any:
    """A float32 rounded to 16 bits; each dtype substitutes its own."""
    raise NotImplementedError


def widen(bits: Any) -> Any:
    """Bits as a float32, or a float64 in wide loops; each dtype substitutes its own."""
    raise NotImplementedError


def magnitude(number: Any) -> Any:
    """The pattern of |number|; each width substitutes its own."""
    raise NotImplementedError


def order(bits: Any) -> Any:
    """Bits as an integer in total order; each width substitutes its own."""
    raise NotImplementedError


Float: Any = np.float32  # a loop's floats: float64 in wide loops
Key: Any = np.int32  # the integer of the same width
MAGNITUDE: Any = np.int32(2**31 - 1)  # all its bits except the sign
_SINGLE = {"f": "f4", "k": "i4", "Float": np.float32, "Key": np.int32, "MAGNITUDE": np.int32(2**31 - 1), "magnitude": _magnitude_single}
_DOUBLE = {"f": "f8", "k": "i8", "Float": np.float64, "Key": np.int64, "MAGNITUDE": np.int64(2**63 - 1), "magnitude": _magnitude_double}
FLOATS: dict[str, dict[str, Any]] = {"f4": _SINGLE, "f8": _DOUBLE}
ROUNDED = {"BF16": {"narrow": _narrow_bf16}, "F16": {"narrow": _narrow_f16}}
_BITS_16 = {"b": "u2", "order": _order_16}
_BITS_32 = {"b": "u4", "order": _order_32}
_BITS_64 = {"b": "u8", "order": _order_64}

WIDTHS: dict[str, dict[str, Any]] = {"2": _BITS_16, "4": _BITS_32, "8": _BITS_64}  # by bytes, for loops that only order bits

_BITS_8 = {"b": "u1", "order": _order_8}
CODES: dict[str, dict[str, Any]] = {  # of 8 bits, which are only compared
    f"{dtype} {kind}": {**_BITS_8, **FLOATS[kind], "widen": number}
    for dtype in ("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
    for kind, number in (("f4", _number), ("f8", _doubled_number))
}

# By dtype and computing kind. `b` are bits, `f` floats, `k` integers of a float's width.
DTYPES: dict[str, dict[str, Any]] = {
    "BF16 f4": {**_BITS_16, **_SINGLE, "widen": _widen_bf16},
    "F16 f4": {**_BITS_16, **_SINGLE, "widen": _widen_f16},
    "F32 f4": {**_BITS_32, **_SINGLE, "widen": _widen_f32},
    "BF16 f8": {**_BITS_16, **_DOUBLE, "widen": _doubled_bf16},
    "F16 f8": {**_BITS_16, **_DOUBLE, "widen": _doubled_f16},
    "F32 f8": {**_BITS_32, **_DOUBLE, "widen": _doubled_f32},
    "F64 f8": {**_BITS_64, **_DOUBLE, "widen": _widen_f64},
}
