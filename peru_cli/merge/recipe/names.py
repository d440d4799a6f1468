"""mergekit's methods with their parameters and defaults (version 0.1.5), and peru's names for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from peru_cli.methods.parameters import Value
from peru_cli.methods.table import METHODS, Method

KINDS = {"number": "no number", "share": "no number", "flag": "neither true nor false", "whole": "not a whole number", "word": "no word"}
IGNORED = ("int8_mask",)  # mergekit accepts it, and it changes nothing


@dataclass(frozen=True)
class Parameter:
    """A parameter: its kind (a key of KINDS), its default (None: it is required), and whether each model has its own."""

    kind: str
    default: Value | None = None
    own: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """A method of mergekit. `inputs`: least and largest number of models besides the base; `base`: required, optional, or one
    of the inputs."""

    name: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    base: str = "needed"
    inputs: tuple[int, int | None] = (1, None)


_WEIGHT = Parameter("number", own=True)
_ONE = Parameter("number", 1.0, own=True)
_DENSITY = Parameter("share", Fraction(1), own=True)
_LAMBDA = Parameter("number", 1.0)
_GAMMA = Parameter("share", Fraction(1, 100), own=True)
_EPSILON = Parameter("number", 0.15, own=True)
_EPS = Parameter("number", 1e-8)


def _sum(normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    """Parameters of the task arithmetic family."""
    return {
        "weight": _WEIGHT, "density": _DENSITY, "lambda": _LAMBDA, "normalize": Parameter("flag", normalize),
        "rescale": Parameter("flag", rescale), "rescale_norm": Parameter("word", "l1", choices=("l1", "l2", "linf", "default")), **more,
    }  # fmt: skip


_PLAIN = {"weight": _WEIGHT, "lambda": _LAMBDA, "normalize": Parameter("flag", False)}
_FLATTEN = {"nuslerp_flatten": Parameter("flag", True), "nuslerp_row_wise": Parameter("flag", False)}

KNOWN = {
    known.name: known
    for known in (
        Known("linear", {"weight": _WEIGHT, "normalize": Parameter("flag", True)}, "input"),
        Known("slerp", {"t": Parameter("number")}, "input", (2, 2)),
        Known("nuslerp", {"weight": _WEIGHT, **_FLATTEN}, "possible", (2, 2)),
        Known("multislerp", {"weight": _WEIGHT, "normalize_weights": Parameter("flag", True), "eps": _EPS}, "possible", (2, None)),
        Known("karcher", {"max_iter": Parameter("whole", 10), "tol": Parameter("number", 1e-5)}, "input", (2, None)),
        Known("task_arithmetic", _PLAIN),
        Known("ties", _sum(True, False)),
        Known("dare_linear", _sum(False, True)),
        Known("dare_ties", _sum(False, True)),
        Known("breadcrumbs", _sum(False, False, gamma=_GAMMA)),
        Known("breadcrumbs_ties", _sum(False, False, gamma=_GAMMA)),
        Known("della", _sum(True, True, epsilon=_EPSILON)),
        Known("della_linear", _sum(False, True, epsilon=_EPSILON)),
        Known("sce", {"select_topk": Parameter("share", Fraction(1)), "int8_mask": Parameter("flag", False)}),
        Known("model_stock", {"filter_wise": Parameter("flag", False)}, inputs=(2, None)),
        Known("nearswap", {"t": Parameter("number")}, inputs=(1, 1)),
        Known("arcee_fusion", {}, inputs=(1, 1)),
        Known("ram", {"epsilon": Parameter("number", 1e-5)}),
        Known(
            "ramplus_tl",
            {"epsilon": Parameter("number", 1e-5), "r": Parameter("number", 0.1), "alpha": Parameter("number", 0.2)},
        ),
        Known("passthrough", {"scale": Parameter("number", 1.0, own=True)}, "none", (1, 1)),
    )
}


def ours(known: Known) -> Method | None:
    """The method of peru's table with the same formula. None if there is none yet."""
    return next((method for method in METHODS.values() if method.mergekit is not None and method.mergekit.name == known.name), None)
