"""Ray in one process, as far as peru uses it: everything goes through pickle, and tasks run when they are submitted.

So orders are as old as on a cluster whose workers are fast, and replies are taken as late as on one whose workers are slow."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from contextlib import chdir
from types import ModuleType, SimpleNamespace
from typing import Any


class RayError(Exception):
    """As ray.exceptions.RayError."""


class RayTaskError(RayError):
    """As ray.exceptions.RayTaskError: an error outside of what peru catches."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class FakeRay(ModuleType):
    """A module to put in the place of ray."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, processors: int = 2) -> None:
        super().__init__("ray")
        self.processors = processors
        self.tasks = self.largest = 0  # tasks run, bytes of the largest message
        self.lost: Exception | None = None  # what `get` raises

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.processors)}

    def put(self, value: object) -> _Ref:
        return _Ref(self._sent(value))

    def remote(self, **options: object) -> Callable[[Callable[..., Any]], Any]:
        assert set(options) == {"num_cpus", "max_retries"}
        return lambda function: SimpleNamespace(remote=lambda *given: self._run(function, given))

    def get(self, ref: _Ref) -> Any:
        if self.lost is not None:
            raise self.lost
        return pickle.loads(ref.data)

    def _run(self, function: Callable[..., Any], given: tuple[object, ...]) -> _Ref:
        self.tasks += 1
        called = pickle.loads(pickle.dumps(function))
        with chdir("."):  # a worker's folder is its own
            return _Ref(self._sent(called(*(pickle.loads(x.data if isinstance(x, _Ref) else self._sent(x)) for x in given))))

    def _sent(self, value: object) -> bytes:
        data = pickle.dumps(value, protocol=5)
        self.largest = max(self.largest, len(data))
        return data


class _Ref:
    def __init__(self, data: bytes) -> None:
        self.data = data


def install(processors: int = 2) -> FakeRay:
    """Put it in the place of ray in this process, with small batches."""
    from peru_cli.streaming import cluster

    cluster.BATCH = 1 << 17
    ray = FakeRay(processors)
    sys.modules["ray"] = ray
    return ray
