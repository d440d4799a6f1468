"""Workers of a Ray cluster: one actor for each processor, which keeps its models open and has its next jobs waiting.

Why actors, and why results do not go through Ray's object stores: a result there takes a tenth to a whole second from one node to
another, much longer than a job. `ENVIRONMENT` lets Ray put results into the answer of the call. And an actor has the next job
before it has finished this one, where tasks of several kinds ask for a processor again each time.

An actor that died is replaced, and its jobs are given to others. Ray is not imported here."""

from __future__ import annotations

import pickle
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from peru_cli.errors import PeruError
from peru_cli.streaming.engine import Order
from peru_cli.version import __version__

AHEAD = 2  # jobs that a worker has at a time
RETRIES = 3  # how often a job is given out again whose worker died, and how often in a row a worker may fail to start
_LARGEST = str(1 << 28)  # bytes of a result that Ray still puts into an answer; its limit for an answer is twice that
ENVIRONMENT = {"RAY_max_direct_call_object_size": _LARGEST, "RAY_task_rpc_inlined_bytes_limit": _LARGEST}
_AGAIN = "look at `ray status` and the logs of the nodes, and run the command again: what is finished is kept"


class Recipe(Protocol):
    """How a worker opens what tiles are read from. Can be pickled."""

    def open(self) -> Any:
        """The station that orders get. PeruError if this machine lacks something."""
        ...


@dataclass
class Failure:
    """An error of a worker on its way here."""

    error: Exception


class Worker:
    """What runs on a node, as an actor."""

    def __init__(self) -> None:
        self._station: Any = None

    def begin(self, version: str, recipe: bytes) -> Failure | None:
        """Open the models, if this node has the same peru."""
        node = socket.gethostname()
        if version != __version__:
            return Failure(PeruError(f"this is peru {version}, and the node {node} has {__version__}", "install one version everywhere"))
        try:
            self._station = pickle.loads(recipe).open()
        except Exception as error:
            return _sendable(error)
        return None

    def compute(self, order: Order, tiles: Sequence[Any]) -> Any | Failure:
        """The reply for some tiles."""
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)
        try:
            with np.errstate(all="ignore"):
                return order.compute(self._station, tiles)
        except Exception as error:
            return _sendable(error)


def _sendable(error: Exception) -> Failure:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return Failure(PeruError(f"{type(error).__name__} on the node {socket.gethostname()}: {error}"))
    return Failure(error)


@dataclass
class _Hired:
    """An actor. `began` is its first answer, until that is here."""

    actor: Any
    began: Any
    jobs: list[Job] = field(default_factory=list)


@dataclass
class Job:
    """Tiles with an order for a worker; it may be given out several times."""

    given: tuple[Order, Sequence[Any]] | None
    worker: _Hired | None = None  # who does it, or is to do it if it is still there
    ref: Any = None
    tries: int = 0
    done: bool = False
    found: Any = None

    def result(self) -> Any:
        """What the worker returned. Raises its error."""
        if isinstance(self.found, Failure):
            raise self.found.error
        return self.found


class Workers:
    """The actors of this process: they start to open the models as soon as they are hired."""

    def __init__(self, ray: Any, recipe: Recipe) -> None:
        self._ray, self._recipe = ray, pickle.dumps(recipe)
        self._kind = ray.remote(num_cpus=1, max_restarts=0, runtime_env={"env_vars": ENVIRONMENT})(Worker)
        self._hired: list[_Hired] = []
        self._homeless: list[Job] = []  # their worker died
        self._failed = 0  # starts in a row
        self.wanted = 0  # processors of all nodes together

    def hire(self) -> None:
        """Ask for one worker for each processor that the cluster has now."""
        self.wanted = int(self._ray.cluster_resources().get("CPU", 0))
        if not self.wanted:
            raise PeruError("the Ray cluster offers no processors", "start its nodes without --num-cpus=0")
        while len(self._hired) < self.wanted:
            self._hire_one()

    def _hire_one(self) -> None:
        actor = self._kind.remote()
        self._hired.append(_Hired(actor, actor.begin.remote(__version__, self._recipe)))

    def dismiss(self) -> None:
        """End all of them."""
        for worker in self._hired:
            self._ray.kill(worker.actor)
        self._hired.clear()

    @property
    def idle(self) -> bool:
        """Whether a worker could take one more job at once."""
        return any(worker.began is None and len(worker.jobs) < AHEAD for worker in self._hired)

    def give(self, order: Order, tiles: Sequence[Any], to: _Hired | None = None) -> Job:
        """Give a job to this worker, or to whoever has the fewest."""
        job = Job((order, tiles), to)
        self._give(job)
        return job

    def _give(self, job: Job) -> None:
        ready = [worker for worker in self._hired if worker.began is None]
        if not ready:
            self._homeless.append(job)
            return
        assert job.given is not None
        worker = next((worker for worker in ready if worker is job.worker), None) or min(ready, key=lambda worker: len(worker.jobs))
        job.worker, job.ref = worker, worker.actor.compute.remote(*job.given)
        worker.jobs.append(job)

    def wait(self) -> None:
        """Wait until a job is done or a worker has started. The jobs of workers that died are given to others."""
        refs = [job.ref for worker in self._hired for job in worker.jobs]
        refs += [worker.began for worker in self._hired if worker.began is not None]
        self._ray.wait(refs, num_returns=1)
        ended = set(self._ray.wait(refs, num_returns=len(refs), timeout=0)[0])
        for worker in list(self._hired):
            try:
                self._look(worker, ended)
            except self._ray.exceptions.RayTaskError as error:  # ours come as failures: this one comes from before our code
                raise _cannot_run(error.cause) from error
            except self._ray.exceptions.RayActorError as error:
                self._replace(worker, error)
            except self._ray.exceptions.RayError as error:
                raise _failed(error) from error
        homeless, self._homeless = self._homeless, []
        for job in homeless:
            self._give(job)

    def _look(self, worker: _Hired, ended: set[Any]) -> None:
        """Take what a worker has finished."""
        if worker.began in ended:
            failure = self._ray.get(worker.began)
            if failure is not None:
                raise failure.error
            worker.began, self._failed = None, 0
        while worker.jobs and worker.jobs[0].ref in ended:  # it does them in order
            job = worker.jobs[0]
            job.found, job.done = self._ray.get(job.ref), True
            job.given = job.ref = None
            worker.jobs.pop(0)

    def _replace(self, worker: _Hired, error: Exception) -> None:
        """Hire another one for a worker that died. Raises PeruError if a job, or starting, keeps killing them."""
        if worker.began is not None:
            self._failed += 1
            if self._failed > RETRIES:
                raise _cannot_run(error) from error
        if worker.jobs:
            worker.jobs[0].tries += 1
            if worker.jobs[0].tries > RETRIES:
                raise _failed(error) from error
        self._homeless += worker.jobs
        self._hired.remove(worker)
        self._hire_one()


def _cannot_run(error: Exception) -> PeruError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return PeruError(
        f"a worker of the Ray cluster cannot run peru: {lines[-1].strip()}",
        f"every node needs the same Python and `pip install 'peru-cli[ray]=={__version__}'`",
    )


def _failed(error: Exception) -> PeruError:
    lines = str(error).strip().splitlines() or [""]
    return PeruError(f"the Ray cluster failed ({type(error).__name__}): {lines[0]}", _AGAIN)
