"""The dtypes that safetensors knows, and which of them peru compresses.

`code` is the number that the artifact index stores (docs/format.md, "Dtype codes"): never renumber.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """One safetensors dtype: its name, bits per entry, code in peru's index, and torch's name."""

    name: str
    bits: int
    code: int
    torch_name: str | None
    compressible: bool = False

    @property
    def is_code(self) -> bool:
        """Whether entries are bytes whose differences `prune --lossless` stores: codes of quantised weights and their scales."""
        return self.name in _CODES

    def __reduce__(self) -> tuple[object, ...]:  # another process's copy is its own dtype: `is` compares them
        return _named, (self.name,)

    def nbytes(self, entries: int) -> int:
        """Bytes that `entries` consecutive entries take (sub-byte types are packed)."""
        return (entries * self.bits + 7) // 8


def _named(name: str) -> Dtype:
    return BY_NAME[name]


_ALL = (
    Dtype("BOOL", 8, 1, "bool"),
    Dtype("F4", 4, 2, None),
    Dtype("F6_E2M3", 6, 3, None),
    Dtype("F6_E3M2", 6, 4, None),
    Dtype("U8", 8, 5, "uint8"),
    Dtype("I8", 8, 6, "int8"),
    Dtype("F8_E5M2", 8, 7, "float8_e5m2"),
    Dtype("F8_E4M3", 8, 8, "float8_e4m3fn"),
    Dtype("F8_E8M0", 8, 9, "float8_e8m0fnu"),
    Dtype("I16", 16, 10, "int16"),
    Dtype("U16", 16, 11, "uint16"),
    Dtype("F16", 16, 12, "float16", compressible=True),
    Dtype("BF16", 16, 13, "bfloat16", compressible=True),
    Dtype("I32", 32, 14, "int32"),
    Dtype("U32", 32, 15, "uint32"),
    Dtype("F32", 32, 16, "float32", compressible=True),
    Dtype("C64", 64, 17, "complex64"),
    Dtype("F64", 64, 18, "float64", compressible=True),
    Dtype("I64", 64, 19, "int64"),
    Dtype("U64", 64, 20, "uint64"),
    Dtype("F8_E4M3FNUZ", 8, 21, "float8_e4m3fnuz"),
    Dtype("F8_E5M2FNUZ", 8, 22, "float8_e5m2fnuz"),
)
_CODES = frozenset({"U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})

BY_NAME = {dtype.name: dtype for dtype in _ALL}
BY_CODE = {dtype.code: dtype for dtype in _ALL}
BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in _ALL if dtype.torch_name}
