"""Streaming settings from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from peru_cli.jobs.taskvectors import How
from peru_cli.streaming.arrays import pick_arrays
from peru_cli.streaming.engine import available_threads
from peru_cli.streaming.tiles import DEFAULT_TILE, TilePlan


@contextmanager
def streaming(device: str, threads: int | None, tile_entries: int | None, advance: Callable[[int], None]) -> Iterator[How]:
    """Check the settings and bundle them."""
    tile = DEFAULT_TILE if tile_entries is None else tile_entries
    TilePlan([], tile)  # refuses a bad size
    yield How(pick_arrays(device), threads or available_threads(), tile, advance)
