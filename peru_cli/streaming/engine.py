"""The engine: run one pass over planned tiles on several threads, with one ordered step.

Each thread takes the next tile, reads it into its own buffers, computes, waits for its turn to commit, and finishes. A thread
holds one tile at a time, so the number of threads bounds the memory, and slow writers hold back readers. The kernel reads
ahead, so reading overlaps computing. Only `commit` depends on earlier tiles, so any number of threads gives the same bytes."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from peru_cli.checkpoints.bundle import cut
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.streaming.tiles import Strip, Tile

T = TypeVar("T", bound=Tile | Strip, contravariant=True)
B = TypeVar("B")  # a thread's buffers
R = TypeVar("R")  # the result of apply
S = TypeVar("S")  # what commit passes to finish


class Pass(Protocol[T, B, R, S]):
    """One pass over tiles. Only `commit` sees the tiles in order; everything else runs in parallel."""

    def buffers(self) -> B:
        """Allocate what one thread needs."""
        ...

    def apply(self, tile: T, buffers: B) -> R:
        """Read the tile and compute."""
        ...

    def commit(self, tile: T, result: R) -> S:
        """Called in canonical order, one thread at a time; must be cheap."""
        ...

    def finish(self, tile: T, committed: S, buffers: B) -> None:
        """Do whatever follows from the commit and needs no order."""
        ...


Reads = Iterable[tuple[Checkpoint, Callable[[int], TensorInfo | None]]]


@runtime_checkable
class Announcing(Protocol):
    """A pass that knows in advance what it reads, so that network data can be fetched ahead."""

    def reads(self) -> Reads:
        """For each source, the tensor (if any) that a tile's tensor number refers to, and how far it is read."""
        ...


def announce(step: object, tiles: Sequence[Tile | Strip]) -> None:
    """Tell the sources of a pass what it will read. `keeps` of a pass says whether the data will be needed again."""
    if isinstance(step, Announcing):
        expect(step.reads(), tiles, getattr(step, "keeps", False))


def expect(reads: Reads, tiles: Sequence[Tile | Strip], keep: bool = False) -> None:
    """Tell sources what will be read of them. `keep` says that it will be needed again."""
    for source, info_of in reads:
        if source.ranged:
            ranges = ((info, *run) for tile in tiles if (info := info_of(tile.tensor)) is not None for run in tile.runs)
            parts = (part for info, start, stop in ranges if start < info.entries for part in cut(info, start, min(stop, info.entries)))
            source.expect(
                ((info.name, info.dtype.nbytes(start), info.dtype.nbytes(stop - start)) for info, start, stop in parts),
                keep,
            )


@runtime_checkable
class Spread(Protocol):
    """A pass whose tiles other machines can compute: they follow orders, and what they reply is taken here in canonical order.

    Then `apply`, `commit` and `finish` are not called."""

    @property
    def inputs(self) -> int:
        """Models that each tile is read from; more for replies that are large."""
        ...

    def order(self, tiles: Any) -> Order | None:
        """What to do with some tiles, as far as it is known now; None if there is nothing to learn before `take`."""
        ...

    def take(self, tiles: Any, reply: Any) -> Order | None:
        """Settle what depends on earlier tiles; without an order the reply is None. Called in canonical order.

        Returns what their worker does next, None if nothing is left."""
        ...

    def done(self, tiles: Any, reply: Any) -> None:
        """Commit the tiles: that has been done, too; without such an order the reply is None. Called in canonical order."""
        ...


class Order(Protocol):
    """What a worker does with tiles. Can be pickled."""

    def compute(self, station: Any, tiles: Any) -> Any:
        """The reply for these tiles. A second order may use what the first one left at the station, but must do without it, too: another
        worker gets it if the first one has died."""
        ...


class Elsewhere(Protocol):
    """Other machines."""

    def run(self, step: Spread, tiles: Sequence[Any], advance: Callable[[int], None]) -> None:
        """Run a pass over all tiles."""
        ...


class Aborted(Exception):
    """Another thread failed, so this one stops. Never leaves the engine."""


class Turnstile:
    """Lets threads pass in the order of their tickets."""

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
        """Wake all threads so that they stop."""
        with self._condition:
            self._aborted = True
            self._condition.notify_all()


def available_threads() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(
    step: Pass[T, B, R, S],
    tiles: Sequence[T],
    threads: int,
    advance: Callable[[int], None] = lambda entries: None,
    elsewhere: Elsewhere | None = None,
) -> None:
    """Run `step` over all tiles, `elsewhere` if there is such a place. Re-raises the first error of any thread after all have stopped.

    Each thread calls `advance` with the number of entries of every tile that it finishes.
    torch's own threads are switched off meanwhile, if torch is loaded: threads over tiles are faster than threads within tiles."""
    if elsewhere is not None and isinstance(step, Spread):
        elsewhere.run(step, tiles, advance)
        inputs.unchanged()
        return
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
        # A single thread is the caller's. One that never starts would refer to this run, and the run to it: Python frees such circles
        # late, and with them all that the pass holds.
        wanted = threads if threads > 1 else 0
        self._threads = [threading.Thread(target=self._work, name=f"tiles-{i}", daemon=True) for i in range(wanted)]

    def join(self) -> None:
        if not self._threads:
            self._work()
        else:
            try:
                for thread in self._threads:
                    thread.start()
                for thread in self._threads:
                    while thread.is_alive():
                        thread.join(0.2)  # in short waits, so that Ctrl-C is handled
            except BaseException as error:
                self._fail(error)
                for thread in self._threads:
                    if thread.ident is not None:  # otherwise it was never started
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
            torch.set_num_threads(1)  # again: OpenMP, which linear algebra uses, has its own count for each of our threads
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are data here; passes check results where it matters
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
