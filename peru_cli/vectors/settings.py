"""Streaming settings from the command line."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from peru_cli.streaming.devices import pick_arrays
from peru_cli.streaming.engine import Elsewhere, available_threads
from peru_cli.streaming.tiles import DEFAULT_TILE, TilePlan
from peru_cli.vectors.family import StreamSettings

_M_ARENA_MAX = -8


def _share_one_heap() -> None:
    """Let all threads allocate from one glibc heap. With a heap for each, peak memory varies by 15% with the order of frees."""
    with suppress(OSError, AttributeError, TypeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


@contextmanager
def streaming(
    device: str,
    threads: int | None,
    tile_entries: int | None,
    advance: Callable[[int], None],
    elsewhere: Elsewhere | None = None,
) -> Iterator[StreamSettings]:
    """Check the settings and bundle them."""
    tile = DEFAULT_TILE if tile_entries is None else tile_entries
    TilePlan([], tile)  # rejects an invalid size
    _share_one_heap()
    yield StreamSettings(pick_arrays(device), threads or available_threads(), tile, advance, elsewhere)
