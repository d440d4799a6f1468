"""The engine: what a pass holds is free as soon as the pass has run."""

from __future__ import annotations

import gc
import weakref

import pytest

from peru_cli.checkpoints.digests import CHUNK
from peru_cli.streaming.engine import run
from peru_cli.streaming.tiles import Tile, TilePlan


class _Adds:
    """Adds up the entries of its tiles."""

    def __init__(self) -> None:
        self.entries = 0

    def buffers(self) -> None:
        return None

    def apply(self, tile: Tile, buffers: None) -> int:
        return tile.stop - tile.start

    def commit(self, tile: Tile, result: int) -> None:
        self.entries += result

    def finish(self, tile: Tile, committed: None, buffers: None) -> None:
        pass


@pytest.mark.parametrize("tiles", [0, 1, 2, 5])
def test_a_pass_is_freed_when_it_has_run_without_waiting_for_the_garbage_collector(tiles: int) -> None:
    """A search for every tensor's threshold otherwise piles up what hundreds of passes held."""
    gc.collect()
    gc.disable()
    try:
        step = _Adds()
        run(step, TilePlan([tiles * CHUNK], CHUNK), threads=2)
        assert step.entries == tiles * CHUNK
        alive = weakref.ref(step)
        del step
        assert alive() is None
    finally:
        gc.enable()
