"""Passes spread over a Ray cluster: workers compute batches of tiles, this process takes their replies in canonical order.

A worker opens the models itself, by a recipe that is sent to it once. It gets tiles with an order and sends back replies; what
follows from them and needs no order (encoding blocks) goes out again. So the bytes are those of one machine. Only a few batches
for each processor are under way at a time, which bounds the memory. Ray runs the tasks of a worker or node that died again.

Ray is imported only by who asks for it. Nothing at a module's top level here may need it."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from peru_cli.errors import PeruError, UsageError
from peru_cli.streaming.engine import Order, Spread
from peru_cli.version import __version__

BATCH = 1 << 24  # entries that one task reads, of all models together: 0.1 s of work, where Ray takes 1 ms here for a task
AHEAD = 2  # batches under way for each processor of the cluster
RETRIES = 3  # how often a task is run again whose worker died
_AGAIN = "look at `ray status` and the logs of the nodes, and run the command again: what is finished is kept"


class Recipe(Protocol):
    """How a worker opens what tiles are read from. Can be pickled."""

    def open(self) -> Any:
        """The station that orders get. PeruError if this machine lacks something."""
        ...


@dataclass
class _Failure:
    """An error of a worker on its way here."""

    error: Exception


_stations: dict[str, Any] = {}  # in a worker: by the run's key


def _compute(key: str, version: str, recipe: Recipe, order: Order, tiles: Sequence[Any]) -> Sequence[Any] | _Failure:
    """In a worker: the replies for some tiles."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    try:
        if version != __version__:
            raise PeruError(
                f"this is peru {version}, and the node {socket.gethostname()} has {__version__}", "install one version everywhere"
            )
        if key not in _stations:
            _stations.clear()
            _stations[key] = recipe.open()
        with np.errstate(all="ignore"):
            return order.compute(_stations[key], tiles)
    except Exception as error:
        return _sendable(error)


def _make(calls: Sequence[Callable[[], Any]]) -> list[Any] | _Failure:
    """In a worker: the results of some calls."""
    try:
        return [call() for call in calls]
    except Exception as error:
        return _sendable(error)


def _sendable(error: Exception) -> _Failure:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return _Failure(PeruError(f"{type(error).__name__} on the node {socket.gethostname()}: {error}"))
    return _Failure(error)


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: Any, recipe: Recipe) -> None:
        self._ray = ray
        self._key = uuid.uuid4().hex
        self._recipe = ray.put(recipe)
        self._compute = ray.remote(num_cpus=1, max_retries=RETRIES)(_compute)
        self._make = ray.remote(num_cpus=1, max_retries=RETRIES)(_make)

    @property
    def processors(self) -> int:
        """Processors of all nodes together."""
        found = int(self._ray.cluster_resources().get("CPU", 0))
        if not found:
            raise PeruError("the Ray cluster offers no processors", "start its nodes without --num-cpus=0")
        return found

    def run(self, step: Spread, tiles: Sequence[Any], advance: Callable[[int], None]) -> None:
        """Run a pass over all tiles. Re-raises the first error in canonical order. What is under way then ends with the connection."""
        pass_ = _Pass(step, advance)
        processors = self.processors
        entries = sum(tile.stop - tile.start for tile in tiles)
        batches = _batches(tiles, min(BATCH // step.inputs, entries // (AHEAD * processors)))
        computing: deque[tuple[Sequence[Any], Any]] = deque()
        making: deque[tuple[list[tuple[Any, int]], Any]] = deque()
        while True:
            while len(computing) < AHEAD * processors and (more := next(batches, None)) is not None:
                computing.append((more, self._compute.remote(self._key, __version__, self._recipe, step.order(more), more)))
            if not computing:
                break
            batch, ref = computing.popleft()
            calls, taken = pass_.take(batch, self._get(ref))
            making.append((taken, self._make.remote(calls) if calls else None))
            if len(making) > AHEAD * processors:
                self._finish(pass_, *making.popleft())
        while making:
            self._finish(pass_, *making.popleft())

    def _finish(self, pass_: _Pass, taken: list[tuple[Any, int]], ref: Any) -> None:
        pass_.done(taken, self._get(ref) if ref is not None else [])

    def _get(self, ref: Any) -> Any:
        try:
            found = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:  # ours come as failures: this one comes from before our code
            why = str(error.cause).strip().splitlines() or [type(error.cause).__name__]
            raise PeruError(
                f"a worker of the Ray cluster cannot run peru: {why[-1]}",
                f"every node needs the same Python and `pip install 'peru-cli[ray]=={__version__}'`",
            ) from error
        except self._ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [""]
            raise PeruError(f"the Ray cluster failed ({type(error).__name__}): {lines[0]}", _AGAIN) from error
        if isinstance(found, _Failure):
            raise found.error
        return found


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
    try:
        yield Cluster(ray, recipe)
    finally:
        if mine:
            ray.shutdown()
