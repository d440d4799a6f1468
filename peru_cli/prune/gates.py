"""`peru prune --fail-above`: bounds that are checked on the finished artifacts, before they are renamed into place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from peru_cli import options
from peru_cli.errors import GateMissed, UsageError


class Sealed(Protocol):
    """What a gate needs of one finished artifact."""

    @property
    def task(self) -> str:
        """The fine-tune's name."""
        ...

    @property
    def file_bytes(self) -> int:
        """Its size."""
        ...

    @property
    def relative_error(self) -> float:
        """Norm of what is lost over the norm of the task vector."""
        ...


@dataclass(frozen=True)
class Gate:
    """`error`: the relative error of no task may exceed the bound. `bytes`: all artifacts together may not exceed it."""

    metric: str
    bound: float
    text: str

    @property
    def option(self) -> str:
        """The option as it was typed."""
        return f"--fail-above {self.metric}={self.text}"

    def found(self, results: Sequence[Sealed]) -> tuple[float, str]:
        """The value that the gate compares, and its wording."""
        if self.metric == "bytes":
            total = sum(result.file_bytes for result in results)
            return total, f"{total:,} bytes" + (f" in {len(results)} artifacts" if len(results) > 1 else "")
        worst = max(results, key=lambda result: result.relative_error)
        return worst.relative_error, f"relative error {worst.relative_error:.4g}" + (
            f" at worst ({worst.task})" if len(results) > 1 else ""
        )


def parse_gates(given: Iterable[str]) -> tuple[Gate, ...]:
    """Parse each of `error=0.3`, `error=30%` or `bytes=3MB`. UsageError otherwise."""
    return tuple(_parse(text) for text in given)


def _parse(text: str) -> Gate:
    metric, _, value = text.partition("=")
    if metric == "bytes":
        return Gate(metric, options.parse_size(value, "--fail-above bytes"), value)
    if metric != "error":
        raise UsageError(f"--fail-above {text}: {metric!r} is neither error nor bytes", "write --fail-above error=0.3 or bytes=3MB")
    if not re.fullmatch(r"(\d+(\.\d*)?|\.\d+)%?", value):
        raise UsageError(f"--fail-above {text}: {value!r} is not a number", "write --fail-above error=0.3 or error=30%")
    return Gate(metric, float(value.removesuffix("%")) / (100 if value.endswith("%") else 1), value)


def check(gates: Sequence[Gate], results: Sequence[Sealed]) -> list[str]:
    """A line for each gate that was passed. GateMissed, listing all missed gates, if any was."""
    passed, missed = [], []
    for gate in gates:
        value, said = gate.found(results)
        if value <= gate.bound:
            passed.append(f"passed {gate.option}: {said}")
        else:
            missed.append(f"missed {gate.option}: {said}")
    if missed:
        raise GateMissed("\n".join(missed), "no artifact was written: keep more, or move the bound")
    return passed
