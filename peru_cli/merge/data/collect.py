"""Build rules of methods, with statistics of every task's examples for those that look at data."""

from __future__ import annotations

from pathlib import Path

from peru_cli.inference.task_models import Running
from peru_cli.merge.data.statistics import Progress, Statistics, open_folder
from peru_cli.merge.plan import MergePlan
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.rules import Rule
from peru_cli.methods.table import Method


class Builder:
    """Builds a method's rules. Statistics are collected when they are first needed, and kept in the folder."""

    def __init__(self, plan: MergePlan, method: Method, running: Running | None, folder: Path, progress: Progress) -> None:
        self._method = method
        self._statistics = None
        if method.statistics is not None:
            assert running is not None
            self._statistics = Statistics(plan, method, running, open_folder(folder), progress)

    def build(self, parameters: Parameters) -> Rule:
        """A rule. Raises BadFile or Mismatch for examples and models that do not fit together."""
        rule = self._method.build(parameters)
        if self._statistics is not None:
            rule.statistics = self._statistics.take(parameters)
        return rule

    def keys(self, parameters: Parameters) -> tuple[str, ...]:
        """The keys of the statistics, by task. Empty for methods without data."""
        return tuple(self._statistics.keys(parameters)) if self._statistics is not None else ()
