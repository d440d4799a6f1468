"""The engine: run one pass over planned tiles on several threads, with one ordered step.

Each thread takes the next tile, reads it into its own buffers, computes, waits for its turn to
commit, and finishes. A thread holds one tile at a time, so the number of threads bounds the memory
and slow writers hold back readers; the kernel reads ahead, so reading overlaps computing.
What depends on earlier tiles happens in `commit` alone, hence any number of threads gives the same
bytes.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from peru_cli.checkpoints.bundle import cut
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.streaming.tiles import Strip, Tile

T = TypeVar("T", bound=Tile | Strip, contravariant=True)
B = TypeVar("B")  # a thread's buffers
R = TypeVar("R")  # what apply makes of a tile
S = TypeVar("S")  # what commit hands to finish


class Pass(Protocol[T, B, R, S]):
    """One pass over tiles. Only `commit` sees the tiles in order; everything else runs in parallel."""

    def buffers(self) -> B:
        """Allocate what one thread needs."""
        ...

    def apply(self, tile: T, buffers: B) -> R:
        """Read the tile and compute."""
        ...

    def commit(self, tile: T, result: R) -> S:
        """In canonical order, one thread at a time: cheap."""
        ...

    def finish(self, tile: T, committed: S, buffers: B) -> None:
        """Whatever follows from the commit and needs no order."""
        ...


Reads = Iterable[tuple[Checkpoint, Callable[[int], TensorInfo | None]]]


@runtime_checkable
class Announcing(Protocol):
    """A pass that knows beforehand what it reads, so that it can be fetched ahead where bytes come over the network."""

    def reads(self) -> Reads:
        """Each source, and its tensor (if any) that the tiles of a tensor number read, as far as it goes."""
        ...


def announce(step: object, tiles: Sequence[Tile | Strip]) -> None:
    """Tell the sources of a pass what they will be asked for; `keeps` of a pass says whether it will be wanted again."""
    if not isinstance(step, Announcing):
        return
    for source, info_of in step.reads():
        if source.ranged:
            ranges = ((info, *run) for tile in tiles if (info := info_of(tile.tensor)) is not None for run in tile.runs)
            parts = (part for info, start, stop in ranges if start < info.entries for part in cut(info, start, min(stop, info.entries)))
            source.expect(
                ((info.name, info.dtype.nbytes(start), info.dtype.nbytes(stop - start)) for info, start, stop in parts),
                getattr(step, "keeps", False),
            )


class Aborted(Exception):
    """Another thread failed: this one stops. Never seen outside the engine."""


class Turnstile:
    """Lets threads through in the order of their tickets."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._turn = 0
        self._aborted = False

    def wait(self, ticket: int) -> None:
        """Block until it is this ticket's turn; Aborted if the run has failed."""
        with self._condition:
            while self._turn != ticket and not self._aborted:
                self._condition.wait()
            if self._aborted:
                raise Aborted

    def advance(self) -> None:
        """Let the next ticket through."""
        with self._condition:
            self._turn += 1
            self._condition.notify_all()

    def abort(self) -> None:
        """Wake everybody up to stop."""
        with self._condition:
            self._aborted = True
            self._condition.notify_all()


def available_threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(step: Pass[T, B, R, S], tiles: Sequence[T], threads: int, advance: Callable[[int], None] = lambda entries: None) -> None:
    """Run `step` over all tiles; re-raises the first error of any thread after all have stopped.

    `advance` is told the number of entries of each tile that is done, from the thread that did it.
    torch's own threads, if it is there, are switched off meanwhile: threads over tiles are faster than threads within.
    """
    torch = sys.modules.get("torch")
    inner = torch.get_num_threads() if torch is not None else 1
    announce(step, tiles)
    try:
        if torch is not None:
            torch.set_num_threads(1)
        _Run(step, tiles, min(threads, len(tiles)), advance).join()
        inputs.unchanged()
    finally:
        if torch is not None:
            torch.set_num_threads(inner)


class _Run(Generic[T, B, R, S]):
    def __init__(self, step: Pass[T, B, R, S], tiles: Sequence[T], threads: int, advance: Callable[[int], None]) -> None:
        self._step, self._tiles, self._advance = step, tiles, advance
        self._next = 0
        self._lock = threading.Lock()
        self._turnstile = Turnstile()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._work, name=f"tiles-{i}", daemon=True) for i in range(threads)]

    def join(self) -> None:
        if len(self._threads) <= 1:
            self._work()
        else:
            try:
                for thread in self._threads:
                    thread.start()
                for thread in self._threads:
                    while thread.is_alive():
                        thread.join(0.2)  # in slices, so that Ctrl-C is heard
            except BaseException as error:
                self._fail(error)
                for thread in self._threads:
                    if thread.ident is not None:  # else it was never started
                        thread.join()
        if self._error is not None:
            raise self._error

    def _take(self) -> T | None:
        with self._lock:
            if self._error is not None or self._next >= len(self._tiles):
                return None
            self._next += 1
            return self._tiles[self._next - 1]

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None:
                self._error = error
        self._turnstile.abort()

    def _work(self) -> None:
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)  # again: OpenMP, which linear algebra asks, counts for each thread of ours
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are data here; passes look at results where they matter
                buffers = self._step.buffers()
                while (tile := self._take()) is not None:
                    result = self._step.apply(tile, buffers)
                    self._turnstile.wait(tile.number)
                    committed = self._step.commit(tile, result)
                    self._turnstile.advance()
                    self._step.finish(tile, committed, buffers)
                    self._advance(tile.stop - tile.start)
        except Aborted:
            pass
        except BaseException as error:
            self._fail(error)
