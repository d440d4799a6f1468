"""The plan of `peru eval`: which model runs on which data, what it is compared with, and the gates. Reads no model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from peru_cli.errors import UsageError
from peru_cli.inference.data import Examples
from peru_cli.shown import listed

HIGHER = (
    "accuracy", "f1", "f1_micro", "f1_macro", "matthews", "pearson", "spearman", "normalised", "difference", "agreement", "cosine", "sign",
    "routed",
)  # fmt: skip
LOWER = ("kl", "kl99", "perplexity", "error", "mse", "distance")
# Metrics shown in per cent, and their maximum.
SHARES = dict.fromkeys(("accuracy", "f1", "f1_micro", "f1_macro", "agreement", "sign", "difference", "routed"), 1.0) | {"normalised": 2.0}
_CLASSES, _LABELS, _VALUES = ("accuracy", "f1", "matthews"), ("accuracy", "f1_micro", "f1_macro"), ("pearson", "spearman", "mse")
_NEEDS = dict.fromkeys((*_CLASSES, *_LABELS, *_VALUES), "labels of that kind") | {
    **dict.fromkeys(("normalised", "difference"), "labels and --against"),
    **dict.fromkeys(("error", "cosine", "sign"), "--against and --base"),
    "routed": "an artifact of routed experts",
    "perplexity": "--text, or data with targets",
}


@dataclass(frozen=True)
class Comparison:
    """One task: the model to evaluate, the examples, and what the model is compared with."""

    task: str
    model: str
    examples: Examples
    against: str | None = None


@dataclass(frozen=True)
class Gate:
    """A bound on a metric that every task must meet."""

    metric: str
    bound: float
    below: bool  # whether a value below the bound fails

    @property
    def option(self) -> str:
        """The option as it was typed."""
        return f"--fail-{'below' if self.below else 'above'} {self.metric}={in_words(self.metric, self.bound)}"

    def missed_by(self, value: float) -> bool:
        """Whether a value is on the wrong side. NaN always is."""
        return not (value >= self.bound if self.below else value <= self.bound)


def in_words(metric: str, value: float) -> str:
    """A metric's value as it is shown: shares in per cent."""
    return f"{100 * value:.6g}%" if metric in SHARES else f"{value:.6g}"


def parse_gate(text: str, below: bool) -> Gate:
    """Parse `METRIC=VALUE` or `METRIC=PERCENT%`. UsageError otherwise, with the option that was probably meant."""
    option, known, others = ("--fail-below", HIGHER, LOWER) if below else ("--fail-above", LOWER, HIGHER)
    metric, _, number = text.partition("=")
    if metric not in known:
        hint = (
            f"{metric} is better the {'smaller' if below else 'larger'} it is: --fail-{'above' if below else 'below'}"
            if metric in others
            else None
        )
        raise UsageError(f"{option} {text}: {metric!r} is not one of {', '.join(known)}", hint)
    try:
        bound = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
        if math.isnan(bound):
            raise ValueError
        most = SHARES.get(metric)
        if most is not None and abs(bound) > most and not number.endswith("%"):
            raise UsageError(
                f"{option} {text}: {metric} is a share, and {number} is more than {most:g}", f"did you mean {metric}={number}%?"
            )
        return Gate(metric, bound, below)
    except ValueError as error:
        raise UsageError(f"{option} {text}: {number!r} is not a number", f"write {option} {metric}=0.99 or {metric}=99%") from error


def check_gates(gates: list[Gate], examples: Mapping[str, Examples], compared: bool, has_base: bool) -> None:
    """UsageError for gates on metrics that will not be measured, if that shows before a model is read."""
    for gate in gates:
        for task, found in examples.items() or {"": None}.items():
            if gate.metric not in _expected(found, compared, has_base):
                where = f" for {task!r}" if task else ""
                raise UsageError(
                    f"{gate.option} will not be measured{where}", f"it needs {_NEEDS.get(gate.metric, '--against and --data')}"
                )


def _expected(examples: Examples | None, compared: bool, has_base: bool) -> set[str]:
    found = {"error", "cosine", "sign"} if compared and has_base else set()
    if examples is None:
        return found
    if compared:
        found |= {"agreement", "kl", "kl99", "distance"}
    if examples.labels is None:
        return found if examples.images is not None else found | {"perplexity"}
    if any(isinstance(label, list) for label in examples.labels):
        kinds: tuple[str, ...] = _LABELS
    elif any(isinstance(label, float) for label in examples.labels):
        return found | set(_VALUES)
    else:  # whole numbers and names can be anything: the model's head decides
        kinds = (*_CLASSES, *_LABELS, *_VALUES)
    return found | set(kinds) | ({"normalised", "difference"} if compared else set())


def check_comparisons(models: Mapping[str, str], data: Mapping[str, Examples], against: Mapping[str, str]) -> list[Comparison]:
    """Which model runs on which data, and what it is compared with.

    Args:
        models: by task. A single model, under any name, runs on all data. `data` and `against` may use the empty name for all.

    Raises UsageError for a task that has no model, no data or nothing to be compared with."""
    alone = next(iter(models)) if len(models) == 1 else None
    tasks = list(models) if "" in data and alone is None else list(data)
    unknown = [task for task in tasks if alone is None and task not in models]
    if unknown:
        raise UsageError(f"--data {unknown[0]}=...: no model is called {unknown[0]!r}", f"the models are {listed(models)}")
    idle = [task for task in models if alone is None and task not in tasks]
    if idle:
        raise UsageError(f"no --data for {idle[0]!r}", f"add --data {idle[0]}=FILE")
    if against and "" not in against:
        for task in against:
            if task not in tasks and not (task == alone and tasks == [""]):
                raise UsageError(
                    f"--against {task}=...: no data is called {task!r}", f"the tasks are {listed(t or '(one)' for t in tasks)}"
                )
        lacking = [task for task in tasks if task and task not in against]
        if lacking:
            raise UsageError(f"nothing to compare {lacking[0]!r} with", f"add --against {lacking[0]}=MODEL")
    found = []
    for task in tasks:
        name = task or (alone or "")
        model = models[alone] if alone is not None else models[task]
        chosen = against.get(task, against.get("", against.get(name)))
        found.append(Comparison(name, model, data[task] if task in data else data[""], chosen))
    return found


def weight_pairs(models: Mapping[str, str], against: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """By task, a model and what its weights are compared with. UsageError for a task without a model."""
    if len(models) == 1:
        ((alone, model),) = models.items()
        return {task or alone: (model, other) for task, other in against.items()}
    if "" in against:
        return {task: (model, against[""]) for task, model in models.items()}
    for task in against:
        if task not in models:
            raise UsageError(f"--against {task}=...: no model is called {task!r}", f"the models are {listed(models)}")
    return {task: (models[task], other) for task, other in against.items()}
