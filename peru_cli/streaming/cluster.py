"""Passes spread over a Ray cluster: workers compute batches of tiles, this process takes their replies in canonical order.

A worker opens the models itself, by a recipe. It gets tiles with an order, and replies what earlier tiles must be known for; once that
is settled, here and in order, the same worker is told how to finish (select, and then encode blocks). So the bytes are those of one
machine, and large parts of the results are made where the tiles were read. Only a few batches for each processor are under way at a time,
which bounds the memory.

Ray is imported only by who asks for it. Nothing at a module's top level here may need it."""

from __future__ import annotations

import logging
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from peru_cli.errors import PeruError, UsageError
from peru_cli.streaming.engine import Spread
from peru_cli.streaming.workers import ENVIRONMENT, Job, Recipe, Workers

BATCH = 1 << 27  # entries that one job reads at most, of all models together: half a second of work, where Ray takes 1 ms for a job
SHARES = 3  # batches that each worker would still get of what is left: the last ones are small, so that workers end at the same time
WINDOW = 4  # batches for each worker that are under way or wait for those before them


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: Any, recipe: Recipe) -> None:
        self.workers = Workers(ray, recipe)
        self.workers.hire()

    def run(self, step: Spread, tiles: Sequence[Any], advance: Callable[[int], None]) -> None:
        """Run a pass over all tiles. Re-raises the first error in canonical order. What is under way then ends with the connection."""
        workers = self.workers
        workers.hire()
        batches = _batches(tiles, BATCH // step.inputs, SHARES * workers.wanted)
        first: deque[tuple[Sequence[Any], Job | None]] = deque()
        second: deque[tuple[Sequence[Any], Job | None]] = deque()
        more = next(batches, None)
        while more is not None or first or second:
            while more is not None and len(first) + len(second) < WINDOW * workers.wanted and workers.idle:
                asked = step.order(more)
                first.append((more, workers.give(asked, more) if asked is not None else None))
                more = next(batches, None)
            with np.errstate(all="ignore"):
                if first and (first[0][1] is None or first[0][1].done):
                    batch, job = first.popleft()
                    order = step.take(batch, job.result() if job is not None else None)
                    worker = job.worker if job is not None else None
                    second.append((batch, workers.give(order, batch, worker) if order is not None else None))
                elif second and (second[0][1] is None or second[0][1].done):
                    batch, last = second.popleft()
                    step.done(batch, last.result() if last is not None else None)
                    advance(sum(tile.stop - tile.start for tile in batch))
                else:
                    workers.wait()


def _batches(tiles: Sequence[Any], most: int, parts: int) -> Iterator[list[Any]]:
    """Tiles in order, so many together that they have at most about `most` entries, or one of so many `parts` of those left.

    A batch rather ends with a tensor, where a journal can note something."""
    batch: list[Any] = []
    held, left = 0, sum(tile.stop - tile.start for tile in tiles)
    for number, tile in enumerate(tiles):
        batch.append(tile)
        held += tile.stop - tile.start
        wanted = max(min(most, left // parts), most // 16)
        ends = number + 1 < len(tiles) and tiles[number + 1].tensor != tile.tensor
        if held >= wanted or (ends and held >= wanted / 2):
            yield batch
            batch, left, held = [], left - held, 0
    if batch:
        yield batch


def cluster_at(address: str | None, recipe: Callable[[], Recipe]) -> AbstractContextManager[Cluster | None]:
    """The Ray cluster at an address, see `ray_cluster`. Without one nothing is described, and this machine computes."""
    return nullcontext() if address is None else ray_cluster(address, recipe())


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
