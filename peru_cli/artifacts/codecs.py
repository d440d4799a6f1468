"""Codecs for streams of integers. An id names each for ever (docs/format.md, "Codecs")."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np

from peru_cli.errors import BadFile

# Ctrl-C waits until this is imported: its initialisation makes a panic of a KeyboardInterrupt.
_BLOCKED = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM}) if hasattr(signal, "pthread_sigmask") else None
try:
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped
finally:
    if _BLOCKED is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _BLOCKED)

RAW = 0  # little-endian integers
PCO = 1  # pcodec 1.x, wrapped format: header, metadata of one chunk, its one page

_LEVEL = 8  # higher levels gain under 0.3% here and take twice as long
_PCO_TYPE = {"int16": "i16", "int32": "i32", "int64": "i64", "uint32": "u32", "uint64": "u64"}

Integers = np.ndarray[Any, np.dtype[Any]]


def _config() -> ChunkConfig:
    # Order-0 on purpose: gaps and ULP differences have no trend, and searching for one costs time.
    return ChunkConfig(
        compression_level=_LEVEL,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.equal_pages_up_to(1 << 40),
    )


def encode(values: Integers, codec: int) -> bytes:
    """Encode a contiguous array of int16/32/64 or uint32/64, (n,), n > 0. Releases the GIL."""
    if codec == RAW:
        return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    chunk = wrapped.FileCompressor().chunk_compressor(values, _config())
    return bytes(wrapped.FileCompressor().write_header() + chunk.write_meta() + chunk.write_page(0))


def decode(data: bytes, codec: int, dtype: str, count: int) -> Integers:
    """Decode exactly `count` integers of NumPy type `dtype`; the room taken is ours, never the stream's claim.

    Raises BadFile for anything that is not such a stream.
    """
    if codec == RAW:
        if len(data) != count * np.dtype(dtype).itemsize:
            raise BadFile(f"a raw stream of {count} {dtype} has {len(data)} bytes")
        return np.frombuffer(data, dtype=np.dtype(dtype).newbyteorder("<")).astype(dtype, copy=False)
    if codec != PCO:
        raise BadFile(f"codec {codec} is unknown to this version of peru", "a newer peru may read it: pip install -U peru-cli")
    result = np.empty(count, dtype=dtype)
    try:
        file, used = wrapped.FileDecompressor.new(data)
        chunk, meta_used = file.chunk_decompressor(data[used:], _PCO_TYPE[dtype])
        progress, page_used = chunk.read_page_into(data[used + meta_used :], count, result)
    except (RuntimeError, TypeError) as error:
        raise BadFile(f"a compressed stream is damaged ({error})") from error
    if progress.n_processed != count or used + meta_used + page_used != len(data):
        raise BadFile(f"a compressed stream holds {progress.n_processed} of {count} numbers, or bytes that belong to none")
    return result
