"""Passes spread over a Ray cluster: workers compute batches of tiles, this process takes their replies in canonical order.

A worker opens the models itself, by a recipe that comes with every batch and is used once. It gets tiles with an order and sends back
replies; what follows from them and needs no order (encoding blocks) goes out again. So the bytes are those of one machine. Only a few
batches for each processor are under way at a time, which bounds the memory.

Ray is imported only by who asks for it. Nothing at a module's top level here may need it."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from peru_cli.errors import PeruError, UsageError
from peru_cli.streaming.engine import Spread
from peru_cli.streaming.workers import ENVIRONMENT, Job, Recipe, Workers

BATCH = 1 << 24  # entries that one job reads, of all models together: 0.1 s of work, where Ray takes 1 ms here for a job
WINDOW = 4  # batches for each worker that are under way or wait for those before them


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: Any, recipe: Recipe) -> None:
        self.workers = Workers(ray, recipe)
        self.workers.hire()

    def run(self, step: Spread, tiles: Sequence[Any], advance: Callable[[int], None]) -> None:
        """Run a pass over all tiles. Re-raises the first error in canonical order. What is under way then ends with the connection."""
        pass_, workers = _Pass(step, advance), self.workers
        workers.hire()
        entries = sum(tile.stop - tile.start for tile in tiles)
        batches = _batches(tiles, min(BATCH // step.inputs, entries // (2 * workers.wanted)))
        computing: deque[tuple[Sequence[Any], Job]] = deque()
        making: deque[tuple[list[tuple[Any, int]], Job | None]] = deque()
        more = next(batches, None)
        while more is not None or computing or making:
            while more is not None and len(computing) + len(making) < WINDOW * workers.wanted and workers.idle:
                computing.append((more, workers.give("compute", step.order(more), more)))
                more = next(batches, None)
            if computing and computing[0][1].done:
                batch, job = computing.popleft()
                calls, taken = pass_.take(batch, job.result())
                making.append((taken, workers.give("make", calls) if calls else None))
            elif making and (making[0][1] is None or making[0][1].done):
                taken, made = making.popleft()
                pass_.done(taken, made.result() if made is not None else [])
            else:
                workers.wait()


class _Pass:
    """A pass whose replies are taken in order."""

    def __init__(self, step: Spread, advance: Callable[[int], None]) -> None:
        self._step, self._advance = step, advance

    def take(self, batch: Sequence[Any], replies: Sequence[Any]) -> tuple[list[Callable[[], Any]], list[tuple[Any, int]]]:
        """Take a batch's replies. Returns all calls, and for each tile how many of them are its own."""
        calls: list[Callable[[], Any]] = []
        taken = []
        with np.errstate(all="ignore"):
            for tile, reply in zip(batch, replies, strict=True):
                mine = self._step.take(tile, reply)
                calls += mine
                taken.append((tile, len(mine)))
        return calls, taken

    def done(self, taken: list[tuple[Any, int]], made: Sequence[Any]) -> None:
        """Hand out the calls' results."""
        at = 0
        for tile, number in taken:
            self._step.done(tile, made[at : at + number])
            at += number
            self._advance(tile.stop - tile.start)


def _batches(tiles: Sequence[Any], entries: int) -> Iterator[list[Any]]:
    """Tiles in order, so many together that they have about `entries`."""
    batch: list[Any] = []
    held = 0
    for tile in tiles:
        batch.append(tile)
        held += tile.stop - tile.start
        if held >= entries:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


@contextmanager
def ray_cluster(address: str, recipe: Recipe) -> Iterator[Cluster]:
    """Connect to a Ray cluster: `auto` for the one that this machine belongs to, HOST:PORT, or `local` for one of its own.

    Raises UsageError if ray is not installed or the address is none, PeruError if nothing answers."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # Ray reads them when it is loaded
    try:
        import ray
    except ImportError as error:
        raise UsageError("--executor ray needs the package ray", "pip install 'peru-cli[ray]'") from error
    if address.startswith("ray://"):
        raise UsageError(
            f"--ray-address {address}: peru does not go through Ray's client", "run it on a node of the cluster, with --ray-address auto"
        )
    mine = not ray.is_initialized()
    if mine:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of what runs here
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False if address == "local" else None)
        except (ConnectionError, ValueError, RuntimeError, OSError, ray.exceptions.RayError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            hint = "start one with `ray start --head`, or let peru start one here with --ray-address local"
            if "Authentication" in "".join(traceback.format_exception(error)):
                hint = "the cluster asks for a token: set RAY_AUTH_MODE=token, with the head's ~/.ray/auth_token here, too"
            raise PeruError(f"--ray-address {address}: no connection to a Ray cluster ({lines[0]})", hint) from error
        for number, handler in handlers.items():  # Ray sets its own
            signal.signal(number, handler)
    cluster = Cluster(ray, recipe)
    try:
        yield cluster
    finally:
        if mine:
            ray.shutdown()  # ends the workers, too
        else:
            cluster.workers.dismiss()
