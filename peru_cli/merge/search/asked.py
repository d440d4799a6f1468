"""The options of a search, as they are typed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Optional

import typer

from peru_cli import options
from peru_cli.errors import UsageError
from peru_cli.merge.search.metric import read_command
from peru_cli.methods.parameters import Value
from peru_cli.shown import listed

NORMALISED, ACCURACY, PERPLEXITY, KL = "normalised", "accuracy", "perplexity", "kl"
OBJECTIVES = {
    NORMALISED: "mean of accuracy / the fine-tune's accuracy",
    ACCURACY: "mean accuracy",
    PERPLEXITY: "perplexity, the geometric mean over tasks",
    KL: "mean KL divergence from the fine-tunes, in nats",
}
METRIC = "metric"  # of --metric-command
LARGER_IS_BETTER = (NORMALISED, ACCURACY, METRIC)
_HELD = Fraction(1, 5)


@dataclass(frozen=True)
class Searching:
    """How to search for the best values of options."""

    search: Annotated[
        Optional[str],
        typer.Option(
            "--search",
            metavar="OPTION=FROM:TO[:STEP],...",
            help="Find the best values of numeric options on --data: scale=0:1:0.05 tries each, weight.a=0:1,scale=0.2:2 needs --trials.",
        ),
    ] = None
    trials: Annotated[
        Optional[int],
        typer.Option("--trials", min=1, metavar="N", help="Try N points, chosen by TPE (needs optuna). Default: every step."),
    ] = None
    objective: Annotated[
        Optional[str], typer.Option("--objective", metavar="|".join(OBJECTIVES), help=f"What is best. Default: {NORMALISED}.")
    ] = None
    hold_out: Annotated[
        Optional[str],
        typer.Option(
            "--hold-out",
            metavar="SHARE",
            help="Share of the examples on which only the best is measured. Default: 20% with --trials, or 0.",
        ),
    ] = None
    study: Annotated[
        Optional[str],
        typer.Option("--study", metavar="FILE", help="Keep the trials here (optuna's journal): the same command continues them."),
    ] = None
    metric_command: Annotated[
        Optional[str],
        typer.Option(
            "--metric-command", metavar="CMD", help="Run CMD FOLDER on each trial's model. It prints a number; the largest is best."
        ),
    ] = None
    plot: Annotated[Optional[Path], typer.Option("--plot", metavar="FILE", help="Plot the trials: .png, .svg or .pdf.")] = None

    def check(self, data: bool) -> None:
        """UsageError for options that do not go together, or lack something. `data`: whether --data is given."""
        typed = ["--" + field.name.replace("_", "-") for field in fields(self) if getattr(self, field.name) is not None]
        if self.search is None:
            if typed:
                raise UsageError(f"{listed(typed)} {'is' if len(typed) == 1 else 'are'} for searches", "add --search OPTION=FROM:TO:STEP")
            return
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise UsageError(f"--objective {self.objective!r} is unknown", f"write {listed(OBJECTIVES)}".replace(", kl", " or kl"))
        if self.metric_command is not None:
            read_command(self.metric_command)
            both = [name for name in typed if name in ("--objective", "--hold-out")]
            if both or data:
                raise UsageError(
                    f"--metric-command cannot be combined with {listed([*both, *(['--data'] if data else [])])}: the command measures",
                    "leave one of the two out",
                )
        if self.study is not None and self.trials is None:
            raise UsageError("--study keeps trials, but --trials is missing", "add --trials N")
        self.held  # noqa: B018
        if self.plot is not None:
            from peru_cli.reports.plots import check_plot

            check_plot(self.plot)
        if self.trials is not None:
            need_optuna()

    @property
    def held(self) -> Fraction:
        """Share of the examples that are held out. UsageError if none would be left."""
        if self.hold_out is None:
            return _HELD if self.trials is not None and self.metric_command is None else Fraction(0)
        if self.hold_out.strip() in ("0", "0%"):
            return Fraction(0)
        share = options.parse_density(self.hold_out, "--hold-out")
        if share == 1:
            raise UsageError("--hold-out 100% leaves no example to search on", "write a smaller share, as 20%")
        return share

    @property
    def measure(self) -> str:
        """What is measured: a key of OBJECTIVES, or METRIC."""
        return METRIC if self.metric_command is not None else self.objective or NORMALISED


@dataclass(frozen=True)
class Examples:
    """What the command line says about the data of a search over a recipe. `most`: examples of each task."""

    files: list[str]
    batch_size: int
    most: Value | None
    seed: int
    trust: bool


def need_optuna() -> None:
    """UsageError if optuna is missing."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UsageError("--trials needs optuna", "pip install 'peru-cli[search]'") from error
