"""The table of merge methods: the command, `--list-methods`, the help and the documentation read it.

A new method is one file in this folder and one entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import import_module
from typing import TYPE_CHECKING

from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.methods.rules import Parameters, Rule, Value


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

    def build(self, parameters: Parameters) -> Rule:
        """The method with its parameters set; UsageError if they contradict each other."""
        module, name = self.rule.split(":")
        rule: Rule = getattr(import_module(f"peru_cli.methods.{module}"), name)(parameters)
        return rule


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
