"""Ray in one process, as far as peru uses it: everything goes through pickle, and actors do what they are told at once.

So orders are as old as on a cluster whose workers are fast, and replies are taken as late as on one whose workers are slow."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Container
from contextlib import chdir
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from peru_cli.streaming import cluster


class RayError(Exception):
    """As ray.exceptions.RayError."""


class RayTaskError(RayError):
    """As ray.exceptions.RayTaskError: an error outside of what peru catches."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class RayActorError(RayError):
    """As ray.exceptions.RayActorError: the worker died."""


class FakeRay(ModuleType):
    """A module to put in the place of ray."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, RayActorError=RayActorError)

    def __init__(self, processors: int = 2) -> None:
        super().__init__("ray")
        self.processors = processors
        self.tasks = self.largest = self.actors = 0  # calls made, bytes of the largest message, actors started
        self.deadly: Container[int] = ()  # the numbers of calls in which the actor dies
        self.lost: Exception | None = None  # what `get` raises

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.processors)}

    def remote(self, **options: object) -> Callable[[type], Any]:
        assert set(options) == {"num_cpus", "max_restarts", "runtime_env"}
        return lambda kind: SimpleNamespace(remote=lambda: _Actor(self, pickle.loads(pickle.dumps(kind))()))

    def wait(self, refs: list[_Ref], num_returns: int, timeout: float | None = None) -> tuple[list[_Ref], list[_Ref]]:
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref: _Ref) -> Any:
        if self.lost is not None:
            raise self.lost
        if ref.data is None:
            raise RayActorError("the actor died")
        return pickle.loads(ref.data)

    def kill(self, actor: _Actor) -> None:
        actor.alive = False

    def sent(self, value: object) -> bytes:
        data = pickle.dumps(value, protocol=5)
        self.largest = max(self.largest, len(data))
        return data


class _Actor:
    """An actor that does each call at once."""

    def __init__(self, ray: FakeRay, state: Any) -> None:
        self._ray, self._state, self.alive = ray, state, True
        ray.actors += 1

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *given: self._call(method, given))

    def _call(self, method: str, given: tuple[object, ...]) -> _Ref:
        ray = self._ray
        ray.tasks += 1
        self.alive = self.alive and ray.tasks not in ray.deadly
        if not self.alive:
            return _Ref(None)
        with chdir("."):  # a worker's folder is its own
            return _Ref(ray.sent(getattr(self._state, method)(*(pickle.loads(ray.sent(value)) for value in given))))


class _Ref:
    def __init__(self, data: bytes | None) -> None:
        self.data = data


def install(processors: int = 2) -> FakeRay:
    """Put it in the place of ray in this process, with small batches."""
    from peru_cli.streaming import cluster

    cluster.BATCH = 1 << 17
    ray = FakeRay(processors)
    sys.modules["ray"] = ray
    return ray


def installed(monkeypatch: pytest.MonkeyPatch, batch: int) -> FakeRay:
    """Let peru find this Ray, and give batches of so many entries of all models."""
    fake = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(cluster, "BATCH", batch)
    return fake
