"""Codecs for streams of integers. Ids never change (docs/format.md, "Codecs")."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from peru_cli.errors import BadFile
from peru_cli.kernels import pco
from peru_cli.kernels.compiling.build import at_once


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM until the end. Blocking them in this thread is not enough: another thread would receive them."""
    caught: list[int] = []
    mine = threading.current_thread() is threading.main_thread()  # only the main thread can set handlers, and handlers run in it
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if mine else {}
    for number, handler in before.items():
        if handler is not None:  # None: the handler was set from C and could not be put back
            signal.signal(number, lambda number, frame: caught.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


with _interrupts_wait():  # pcodec's initialisation turns a KeyboardInterrupt into a panic
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped

RAW = 0  # little-endian integers
PCO = 1  # pcodec 1.x, wrapped format: header, metadata of one chunk, its single page

_LEVEL = 8  # higher levels gain less than 0.3% here and take twice as long
_COMPILED = 1 << 17  # numbers from which a loop of our own encodes them. pcodec does it, too, until the loop has been compiled
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
    if len(values) >= _COMPILED and at_once(pco.loops(values)) and (data := pco.encode(values)) is not None:
        return data
    chunk = wrapped.FileCompressor().chunk_compressor(values, _config())
    return bytes(wrapped.FileCompressor().write_header() + chunk.write_meta() + chunk.write_page(0))


def decode(data: bytes, codec: int, dtype: str, count: int) -> Integers:
    """Decode exactly `count` integers of NumPy type `dtype`. The buffer has our size, whatever the stream claims.

    Raises BadFile if the data is not such a stream."""
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
