"""Choose points with optuna's TPE, and keep the trials in its journal.

A trial's random numbers depend on the seed and its number only, and the journal gets a trial when it is finished: a search that was
killed and continued is the search that was not. Source: Bergstra et al., Algorithms for hyper-parameter optimization (2011)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from peru_cli.errors import BadFile, UsageError
from peru_cli.merge.search.space import Dimension, Point
from peru_cli.methods.philox import stream_key

_NAME = "peru"
_STARTUP = 10  # random trials before the model is fitted
_WARMUP = 5  # finished trials before any is given up


@dataclass(frozen=True)
class Tried:
    """A finished trial. `score` is None if it was given up or is not a number."""

    number: int
    point: Point
    score: float | None
    figures: Mapping[str, float]


# What measures a point: it gets a function that takes the score so far after a task, and returns None if the trial was given up.
Evaluate = Callable[[Point, Callable[[float], bool]], tuple[float, Mapping[str, float]] | None]


class Study:
    """Trials so far, and where they are kept."""

    def __init__(self, dimensions: Sequence[Dimension], larger: bool, seed: int, path: Path | None, about: Mapping[str, str]) -> None:
        """Continues the study in the file, if there is one.

        Raises UsageError for a study of another search, BadFile for a file that is no study. `about` says what the trials depend on."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._dimensions, self._seed = optuna, dimensions, seed
        direction: Any = "maximize" if larger else "minimize"
        with _quiet():
            pruner = optuna.pruners.MedianPruner(n_startup_trials=_WARMUP)
            self._study = optuna.create_study(direction=direction, pruner=pruner)
            self._kept = self._open(path, direction, about) if path is not None else None
            if self._kept is not None:
                self._study.add_trials(self._kept.trials)
        self._distributions = {d.name: self._distribution(d) for d in dimensions}

    def _open(self, path: Path, direction: Any, about: Mapping[str, str]) -> Any:
        from optuna.storages import journal

        known = path.exists() and path.stat().st_size > 0
        try:
            if known:
                _cut_torn_line(path)
            backend = journal.JournalFileBackend(str(path), lock_obj=journal.JournalFileOpenLock(str(path)))
            storage = self._optuna.storages.JournalStorage(backend)
            study = self._optuna.create_study(storage=storage, study_name=_NAME, direction=direction, load_if_exists=True)
            before = study.user_attrs.get("about")
        except (ValueError, KeyError, TypeError, AssertionError, self._optuna.exceptions.OptunaError) as error:
            raise BadFile(f"{path} is not a study", "name another --study, or remove it") from error
        if before is None and not study.trials:
            study.set_user_attr("about", dict(about))
        elif (before or {}) != dict(about):
            differing = [name for name in about if (before or {}).get(name) != about[name]]
            raise UsageError(
                f"{path} holds trials of another search: {', '.join(differing) or 'its options'} differ{'s' * (len(differing) == 1)}",
                "name another --study, or remove it",
            )
        return study

    def _distribution(self, d: Dimension) -> Any:
        distributions = self._optuna.distributions
        if d.kind is int:
            return distributions.IntDistribution(int(d.low), int(d.high), step=int(d.step))
        return distributions.FloatDistribution(float(d.low), float(d.high), step=float(d.step))

    @property
    def tried(self) -> list[Tried]:
        """All finished trials, in order."""
        found = []
        for trial in self._study.trials:
            point = tuple(d.nearest(Fraction(repr(trial.params[d.name]))) for d in self._dimensions)
            complete = trial.state is self._optuna.trial.TrialState.COMPLETE
            found.append(Tried(trial.number, point, trial.value if complete else None, json.loads(trial.user_attrs.get("figures", "{}"))))
        return found

    def run(self, trials: int, evaluate: Evaluate, told: Callable[[Tried], None]) -> None:
        """Go on until there are so many trials. `told` is called with each new one."""
        states = self._optuna.trial.TrialState
        scores = {tried.point: tried for tried in self.tried if tried.score is not None}
        for number in range(len(self._study.trials), trials):
            with _quiet():
                self._study.sampler = self._optuna.samplers.TPESampler(
                    seed=stream_key(self._seed, "", "search", str(number))[0], n_startup_trials=_STARTUP, multivariate=True
                )
                if number == 0:
                    self._study.enqueue_trial({d.name: d.value(d.start) if d.kind is int else float(d.start) for d in self._dimensions})
                trial = self._study.ask(self._distributions)
            point = tuple(d.nearest(Fraction(repr(trial.params[d.name]))) for d in self._dimensions)
            reports: list[float] = []

            def report(score: float, trial: Any = trial, reports: list[float] = reports) -> bool:
                trial.report(score, len(reports))
                reports.append(score)
                return bool(trial.should_prune())

            known = scores.get(point)
            found = evaluate(point, report) if known is None else (known.score or 0.0, known.figures)
            finite = found is not None and abs(found[0]) < float("inf")
            if found is not None:
                trial.set_user_attr("figures", json.dumps(dict(found[1])))
            if found is not None and finite:
                self._study.tell(trial, found[0])
            else:
                self._study.tell(trial, state=states.PRUNED)
            if self._kept is not None:
                self._kept.add_trial(self._study.trials[-1])
            tried = self.tried[-1]
            if tried.score is not None:
                scores.setdefault(point, tried)
            told(tried)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings about options of optuna that may change: the constraints pin it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _cut_torn_line(path: Path) -> None:
    """Drop what a killed process left of a last line. ValueError, and nothing is dropped, if the other lines are not a journal's."""
    with path.open("rb+") as file:
        *lines, torn = file.read().split(b"\n")
        if not all(isinstance(found := json.loads(line), dict) and "op_code" in found for line in lines) or not (
            lines or torn[:2] == b'{"'
        ):
            raise ValueError("no journal")
        file.truncate(sum(len(line) + 1 for line in lines))
