"""The table of merge methods: the command, its options, `--list-methods`, the help and the documentation read it.

A new method is one file in this folder and one entry here; an option that no other method has is one of FLAGS.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import import_module
from typing import TYPE_CHECKING, Any

from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.methods.parameters import Parameters, Value
    from peru_cli.methods.rules import Rule
    from peru_cli.methods.statistics import Collector


@dataclass(frozen=True)
class Flag:
    """An option as it is typed: `kind` is float, int, str, bool, or Fraction for a share of the entries."""

    kind: type[Value]
    metavar: str
    help: str
    least: int | None = None
    short: str | None = None


FLAGS: Mapping[str, Flag] = {
    "scale": Flag(float, "S", "Factor of the merged task vector; below 0 is negation.", short="-s"),
    "keep": Flag(Fraction, "DENSITY", "Share of each task vector that stays: 20% or 0.2.", short="-k"),
    "scope": Flag(str, "global|tensor", "Trim over the whole task vector, or in each tensor. For adamerging: a scale a task, or a tensor."),
    "reduce": Flag(str, "mean|sum", "What becomes of entries that agree in sign."),
    "variant": Flag(str, "authors|peft|mergekit", "Whose TIES."),
    "seed": Flag(int, "N", "Of the entries that DARE drops, of sampled labels, of the order of examples.", least=0),
    "gamma": Flag(Fraction, "SHARE", "Share of largest entries that breadcrumbs drops: 1%."),
    "mask-lambda": Flag(float, "L", "Threshold of consensus' masks, 0.2 to 0.6.", least=0),
    "min-tasks": Flag(int, "K", "Tasks that must use an entry for consensus to keep it.", least=1),
    "t": Flag(float, "T", "Where slerp stops: 0 the first model, 1 the second."),
    "normalize": Flag(bool, "", "Whether linear divides by the sum of the weights, fisher by each task's norm."),
    "max-samples": Flag(int, "N", "The first N examples of each task, for methods with data and for --search.", least=1),
    "expectation": Flag(str, "exact|sampled", "Fisher's sum over all labels, or one label drawn for each example."),
    "floor": Flag(float, "F", "Least Fisher information of an entry.", least=0),
    "alpha": Flag(float, "A", "Factor of what is off the diagonal in regmean's matrices, 0 to 1.", least=0),
    "ridge": Flag(float, "R", "Share of the identity in regmean's matrices.", least=0),
    "steps": Flag(int, "N", "Steps of adamerging's optimiser.", least=0),
    "learning-rate": Flag(float, "R", "Of adamerging's optimiser.", least=0),
}


@dataclass(frozen=True)
class Option:
    """An option of one method: its value if it is not given (None: it must be), and the words that it may be."""

    default: Value | None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """One line of the table. `rule` is `module:class` below this package, imported when the method is used."""

    name: str
    title: str
    paper: str
    rule: str
    options: Mapping[str, Option]
    needs_base: bool = True
    tasks: tuple[int, int | None] = (1, None)  # fewest and most models
    by_variant: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)  # defaults that depend on --variant
    statistics: str | None = None  # `module:class` of what collects statistics from data
    collected_by: tuple[str, ...] = ()  # options that the statistics depend on

    def build(self, parameters: Parameters) -> Rule:
        """The method with its parameters set; UsageError if they contradict each other."""
        rule: Rule = _load(self.rule)(parameters)
        return rule

    def collector(self, parameters: Parameters) -> Collector:
        """What collects the method's statistics."""
        assert self.statistics is not None
        collector: Collector = _load(self.statistics)(parameters)
        return collector


def _load(name: str) -> Any:
    module, member = name.split(":")
    return getattr(import_module(f"peru_cli.methods.{module}"), member)


_WEIGHT = Option(1.0)
_SCALE = Option(1.0)
_SCOPE = Option("global", ("global", "tensor"))
_KEEP = Option(Fraction(1, 5))

_ALL = (
    Method(
        "task-arithmetic", "base + scale x sum of weighted task vectors", "https://arxiv.org/abs/2212.04089",
        "task_arithmetic:TaskArithmetic", {"weight": _WEIGHT, "scale": Option(0.3)},
    ),
    Method(
        "linear", "weighted average of the models (model soup, WiSE-FT)", "https://arxiv.org/abs/2203.05482",
        "linear:Linear", {"weight": _WEIGHT, "normalize": Option(True)}, needs_base=False, tasks=(2, None),
    ),
    Method(
        "slerp", "spherical interpolation of two models", "https://doi.org/10.1145/325334.325242",
        "slerp:Slerp", {"t": Option(0.5)}, needs_base=False, tasks=(2, 2),
    ),
    Method(
        "ties", "trim, elect signs, merge what agrees", "https://arxiv.org/abs/2306.01708", "ties:Ties",
        {
            "weight": _WEIGHT, "scale": _SCALE, "keep": _KEEP, "scope": _SCOPE,
            "reduce": Option("mean", ("mean", "sum")), "variant": Option("authors", ("authors", "peft", "mergekit")),
        },
        by_variant={"peft": {"scope": "tensor"}, "mergekit": {"scope": "tensor"}},
    ),
    Method(
        "dare", "drop entries at random, rescale, add", "https://arxiv.org/abs/2311.03099", "dare:Dare",
        {"weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(1, 10)), "seed": Option(0)},
    ),
    Method(
        "dare-ties", "drop entries at random, rescale, elect signs", "https://arxiv.org/abs/2311.03099", "dare:DareTies",
        {
            "weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(1, 10)), "seed": Option(0),
            "reduce": Option("sum", ("mean", "sum")),
        },
    ),
    Method(
        "breadcrumbs", "drop the largest and the smallest entries, add the rest", "https://arxiv.org/abs/2312.06795",
        "breadcrumbs:Breadcrumbs",
        {"weight": _WEIGHT, "scale": Option(0.3), "keep": Option(Fraction(9, 10)), "gamma": Option(Fraction(1, 100)), "scope": _SCOPE},
    ),
    Method(
        "consensus", "keep what several tasks use (TALL-masks)", "https://arxiv.org/abs/2405.07813", "consensus:Consensus",
        {"weight": _WEIGHT, "scale": Option(0.3), "mask-lambda": Option(0.4), "min-tasks": Option(2)}, tasks=(2, None),
    ),
    Method(
        "fisher", "average by how much each task's output depends on an entry", "https://arxiv.org/abs/2111.09832", "fisher:Fisher",
        {
            "weight": _WEIGHT, "normalize": Option(False), "floor": Option(1e-6), "expectation": Option("exact", ("exact", "sampled")),
            "seed": Option(0), "max-samples": Option(256),
        },
        needs_base=False, tasks=(2, None), statistics="fisher:FisherCollector", collected_by=("expectation", "seed"),
    ),
    Method(
        "regmean", "linear layers closest to all models' outputs on their inputs", "https://arxiv.org/abs/2212.09849", "regmean:RegMean",
        {"weight": _WEIGHT, "alpha": Option(0.9), "ridge": Option(1e-6), "max-samples": Option(1000)},
        needs_base=False, tasks=(2, None), statistics="regmean:RegMeanCollector",
    ),
    Method(
        "adamerging", "task arithmetic with scales learned on unlabelled data", "https://arxiv.org/abs/2310.02575", "adamerging:AdaMerging",
        {
            "scale": Option(0.3), "scope": Option("tensor", ("global", "tensor")), "steps": Option(500), "learning-rate": Option(1e-3),
            "seed": Option(0), "max-samples": Option(1000),
        },
        statistics="adamerging:LambdaCollector", collected_by=("scale", "scope", "steps", "learning-rate", "seed"),
    ),
)  # fmt: skip

METHODS = {method.name: method for method in _ALL}


def find_method(name: str) -> Method:
    """The method of a name; UsageError lists those there are."""
    if name not in METHODS:
        raise UsageError(f"--method {name!r} is unknown", f"peru knows {', '.join(METHODS)}")
    return METHODS[name]


def effective_values(method: Method, given: Mapping[str, Value]) -> dict[str, Value]:
    """All options of a method but the weights, the given ones over the defaults.

    Raises UsageError for an option that the method does not know, or a word that an option does not.
    """
    strangers = [f"--{name}" for name in given if name not in method.options]
    if strangers:
        known = ", ".join(f"--{name}" for name in method.options)
        raise UsageError(f"{method.name} does not know {', '.join(strangers)}", f"its options are {known}")
    values: dict[str, Value] = {}
    variant = given.get("variant", method.options["variant"].default if "variant" in method.options else None)
    special = method.by_variant.get(str(variant), {})
    for name, option in method.options.items():
        if name == "weight":
            continue
        value = given.get(name, special.get(name, option.default))
        assert value is not None
        if option.choices and value not in option.choices:
            raise UsageError(f"--{name} {value!r} is not {' or '.join(option.choices)}")
        values[name] = value
    if variant == "peft" and values.get("reduce") == "sum":
        raise UsageError("--variant peft has no --reduce sum", "peft's program always takes the mean")
    return values
