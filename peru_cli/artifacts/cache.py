"""A cache of decoded blocks: one thread decodes a block for all threads whose tiles lie in it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")


class BlockCache(Generic[V]):
    """The last few values by key. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size, self._lock = size, threading.Lock()
        self._futures: OrderedDict[Hashable, Future[V]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key. The first caller makes it, the others wait. Errors are cached like values."""
        with self._lock:
            future = self._futures.get(key)
            mine = future is None
            if future is None:
                future = self._futures[key] = Future()
                while len(self._futures) > self._size:
                    self._futures.popitem(last=False)
            else:
                self._futures.move_to_end(key)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                if not future.done():  # Ctrl-C can come after the result
                    future.set_exception(error)
                raise
        return future.result()
