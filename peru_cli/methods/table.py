"""The table of merge methods. The command, its options, `--list-methods`, the help and the docs are made from it.

A new method is one file in a folder beside this file and one entry here. An option that no other method has is declared in its entry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
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
    """An option as it is typed. `kind` is float, int, str, bool, or Fraction for a share of the entries."""

    kind: type[Value]
    metavar: str
    help: str
    least: int | None = None
    short: str | None = None


_SHARED: Mapping[str, Flag] = {
    "scale": Flag(float, "S", "Factor of the merged task vector. Negative values subtract the tasks.", short="-s"),
    "keep": Flag(Fraction, "DENSITY", "Share of each task vector to keep: 20% or 0.2.", short="-k"),
    "scope": Flag(str, "global|tensor", "Trim over the whole task vector, or in each tensor. adamerging: a scale per task, or tensor."),
    "reduce": Flag(str, "mean|sum", "How to combine entries that agree in sign."),
    "seed": Flag(int, "N", "Seed of everything random: dropped entries, sampled labels, order of examples.", least=0),
    "rescale": Flag(
        str, "density|l1|none",
        "How to make up for dropped entries: by 1 / density (papers), by the ratio of L1 norms in each tensor (mergekit), or not.",
    ),
    "gamma": Flag(Fraction, "SHARE", "Share of the largest entries to drop."),
    "epsilon": Flag(float, "E", "Half the range of keep probabilities in a row. ram: smaller changes count as none.", least=0),
    "normalize": Flag(bool, "", "Divide by the sum of the weights; for fisher, by each task's norm."),
    "max-samples": Flag(int, "N", "Use the first N examples of each task.", least=1),
    "alpha": Flag(float, "A", "regmean: factor of off-diagonal entries. ramplus-tl: the largest amplification.", least=0),
    "t": Flag(float, "T", "Point between the first model (0) and the second (1). nearswap: largest change that is taken in full."),
    "ridge": Flag(float, "R", "Added to each matrix before it is inverted, as a share of its mean diagonal.", least=0),
    "plain": Flag(str, "REGEX", "Average matrices whose names match, like vectors."),
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """An option of one method: its default (None: it is required), and its allowed words.

    `flag` declares an option that no other method has. Options that several methods have are shared."""

    default: Value | None
    choices: tuple[str, ...] = ()
    flag: Flag | None = None


@dataclass(frozen=True)
class Mergekit:
    """mergekit's method with the same formula; recipes and benchmarks/oracles/mergekit/methods.py read it.

    Lists mergekit's parameter for each of our options, by model (`own`) or for the whole merge. `fixed` are the options that make
    our method match. Our `reduce` is its `normalize`."""

    name: str
    own: Mapping[str, str] = field(default_factory=dict)
    whole: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One line of the table. `rule` is `module:class` below this package, imported when the method is used."""

    name: str
    title: str
    paper: str
    rule: str
    options: Mapping[str, Option]
    needs_base: bool = True
    tasks: tuple[int, int | None] = (1, None)  # least and largest number of models
    by_variant: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)  # defaults that depend on --variant
    statistics: str | None = None  # `module:class` of the collector of statistics from data
    collected_by: tuple[str, ...] = ()  # options that the statistics depend on
    mergekit: Mergekit | None = None
    take: str = ""  # when to take this one, and why: it is marked in --list-methods

    def build(self, parameters: Parameters) -> Rule:
        """The method with its parameters set. UsageError if they contradict each other."""
        rule: Rule = _load(self.rule)(parameters)
        return rule

    def collector(self, parameters: Parameters) -> Collector:
        """The collector of the method's statistics."""
        assert self.statistics is not None
        collector: Collector = _load(self.statistics)(parameters)
        return collector


def _load(name: str) -> Any:
    module, member = name.split(":")
    return getattr(import_module(f"peru_cli.methods.{module}"), member)


_SCALE = Option(1.0)
_SCOPE = Option("global", ("global", "tensor"))
_KEEP = Option(Fraction(1, 5))
_SEED = Option(0)
_REDUCE = ("mean", "sum")
_RESCALE = Option("density", ("density", "l1", "none"))
_WEIGHT = Option(1.0)
_PLAIN = Option("")

_OWN = {"weight": "weight", "keep": "density"}
_WHOLE = {"scale": "lambda", "reduce": "normalize"}

_ALL = (
    Method(
        "task-arithmetic", "base + scale x sum of weighted task vectors", "https://arxiv.org/abs/2212.04089",
        "weighted.task_arithmetic:TaskArithmetic", {"weight": _WEIGHT, "scale": Option(0.3)},
        mergekit=Mergekit("task_arithmetic", {"weight": "weight"}, {"scale": "lambda"}),
    ),
    Method(
        "linear", "weighted average of the models (model soup, WiSE-FT)", "https://arxiv.org/abs/2203.05482",
        "weighted.linear:Linear", {"weight": _WEIGHT, "normalize": Option(True)}, needs_base=False, tasks=(2, None),
        mergekit=Mergekit("linear", {"weight": "weight"}, {"normalize": "normalize"}),
    ),
    Method(
        "slerp", "spherical interpolation of two models", "https://doi.org/10.1145/325334.325242",
        "angles.slerp:Slerp", {"t": Option(0.5)}, needs_base=False, tasks=(2, 2), mergekit=Mergekit("slerp", {}, {"t": "t"}),
    ),
    Method(
        "nuslerp", "weighted slerp of two models, on task vectors if there is a base", "https://doi.org/10.1145/325334.325242",
        "angles.nuslerp:nuslerp",
        {
            "weight": _WEIGHT,
            "flatten": Option(True, flag=Flag(bool, "", "One angle for each tensor. --no-flatten: one for each row.")),
            "row-wise": Option(False, flag=Flag(bool, "", "With --no-flatten: one angle for each column.")),
        },
        needs_base=False, tasks=(2, 2),
        mergekit=Mergekit("nuslerp", {"weight": "weight"}, {"flatten": "nuslerp_flatten", "row-wise": "nuslerp_row_wise"}),
    ),
    Method(
        "multislerp", "the mean direction of several models, on task vectors if there is a base", "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea/",
        "angles.multislerp:MultiSlerp", {"weight": _WEIGHT, "normalize": Option(True)}, needs_base=False, tasks=(2, None),
        mergekit=Mergekit("multislerp", {"weight": "weight"}, {"normalize": "normalize_weights"}),
    ),
    Method(
        "karcher", "the point of the sphere closest to all models", "https://arxiv.org/abs/2603.04972", "angles.karcher:Karcher",
        {
            "max-iter": Option(10, flag=Flag(int, "N", "Most iterations.", least=1)),
            "tol": Option(1e-5, flag=Flag(float, "L", "Stop when a step is shorter than this.", least=0)),
        },
        needs_base=False, tasks=(2, None), mergekit=Mergekit("karcher", {}, {"max-iter": "max_iter", "tol": "tol"}),
    ),
    Method(
        "model-stock", "from the base towards the mean, as far as the fine-tunes agree", "https://arxiv.org/abs/2403.19522",
        "angles.model_stock:model_stock",
        {"filter-wise": Option(False, flag=Flag(bool, "", "Find the step for each row, not for each tensor."))},
        tasks=(2, None), mergekit=Mergekit("model_stock", {}, {"filter-wise": "filter_wise"}),
    ),
    Method(
        "passthrough", "one model, its weights times a factor", "https://github.com/arcee-ai/mergekit", "weighted.passthrough:Passthrough",
        {"scale": _SCALE}, needs_base=False, tasks=(1, 1), mergekit=Mergekit("passthrough", {"scale": "scale"}),
    ),
    Method(
        "nearswap", "take weights that are close, move a step towards the others", "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        "entries.nearswap:NearSwap", {"t": Option(0.0001)}, tasks=(1, 1), mergekit=Mergekit("nearswap", {}, {"t": "t"}),
    ),
    Method(
        "train-difference", "add what the second model learned, less where the first has learned it", "https://github.com/hako-mikan/sd-webui-supermerger",
        "entries.train_difference:TrainDifference", {"scale": _SCALE}, tasks=(2, 2),
    ),
    Method(
        "arcee-fusion", "take only the most important changes", "https://github.com/arcee-ai/mergekit", "entries.arcee_fusion:ArceeFusion",
        {}, tasks=(1, 1), mergekit=Mergekit("arcee_fusion"),
    ),
    Method(
        "ties", "trim, elect signs, merge what agrees", "https://arxiv.org/abs/2306.01708", "entries.ties:Ties",
        {
            "weight": _WEIGHT, "scale": _SCALE, "keep": _KEEP, "scope": _SCOPE, "reduce": Option("mean", _REDUCE),
            "variant": Option("authors", ("authors", "peft", "mergekit"), Flag(str, "authors|peft|mergekit", "Whose TIES.")),
        },
        by_variant={"peft": {"scope": "tensor"}, "mergekit": {"scope": "tensor"}},
        mergekit=Mergekit("ties", _OWN, _WHOLE, {"variant": "mergekit", "scope": "tensor"}),
    ),
    Method(
        "dare", "drop entries at random, rescale, add", "https://arxiv.org/abs/2311.03099", "entries.dare:dare",
        {"weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(1, 10)), "seed": _SEED, "rescale": _RESCALE},
        mergekit=Mergekit("dare_linear", _OWN, {"scale": "lambda"}, {"rescale": "l1"}),
    ),
    Method(
        "dare-ties", "drop entries at random, rescale, elect signs", "https://arxiv.org/abs/2311.03099", "entries.dare:dare_ties",
        {
            "weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(1, 10)), "seed": _SEED, "reduce": Option("sum", _REDUCE),
            "rescale": _RESCALE,
        },
        mergekit=Mergekit("dare_ties", _OWN, _WHOLE, {"rescale": "l1"}),
    ),
    Method(
        "della", "drop small entries of a row more often than large ones, rescale, elect signs", "https://arxiv.org/abs/2406.11617",
        "entries.della:Della",
        {
            "weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(1, 2)), "epsilon": Option(0.15), "seed": _SEED,
            "reduce": Option("mean", _REDUCE), "rescale": _RESCALE,
        },
        mergekit=Mergekit("della", _OWN | {"epsilon": "epsilon"}, _WHOLE, {"rescale": "l1"}),
    ),
    Method(
        "della-linear", "della without an election", "https://arxiv.org/abs/2406.11617", "entries.della:DellaLinear",
        {
            "weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(1, 2)), "epsilon": Option(0.15), "seed": _SEED,
            "reduce": Option("sum", _REDUCE), "rescale": _RESCALE,
        },
        mergekit=Mergekit("della_linear", _OWN | {"epsilon": "epsilon"}, _WHOLE, {"rescale": "l1"}),
    ),
    Method(
        "breadcrumbs", "drop the largest and the smallest entries, add the rest", "https://arxiv.org/abs/2312.06795",
        "entries.breadcrumbs:Breadcrumbs",
        {"weight": _WEIGHT, "scale": Option(0.3), "keep": Option(Fraction(9, 10)), "gamma": Option(Fraction(1, 100)), "scope": _SCOPE},
        mergekit=Mergekit("breadcrumbs", _OWN | {"gamma": "gamma"}, {"scale": "lambda"}, {"scope": "tensor"}),
    ),
    Method(
        "breadcrumbs-ties", "drop the largest and the smallest entries, elect signs", "https://arxiv.org/abs/2312.06795",
        "entries.breadcrumbs:BreadcrumbsTies",
        {
            "weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(9, 10)), "gamma": Option(Fraction(1, 100)), "scope": _SCOPE,
            "reduce": Option("mean", _REDUCE),
        },
        mergekit=Mergekit("breadcrumbs_ties", _OWN | {"gamma": "gamma"}, _WHOLE, {"scope": "tensor"}),
    ),
    Method(
        "sce", "select what differs, weight tasks by energy, erase the minority's sign", "https://arxiv.org/abs/2408.07990",
        "entries.sce:Sce",
        {"scale": _SCALE, "keep": Option(Fraction(1, 10))}, tasks=(2, None), mergekit=Mergekit("sce", {}, {"keep": "select_topk"}),
    ),
    Method(
        "ram", "keep what one task changed, average what several changed", "https://arxiv.org/abs/2601.13572", "entries.ram:Ram",
        {"epsilon": Option(1e-5)}, tasks=(2, None), mergekit=Mergekit("ram", {}, {"epsilon": "epsilon"}),
    ),
    Method(
        "ramplus-tl", "ram, amplifying what only one task changed", "https://arxiv.org/abs/2601.13572", "entries.ram:RamPlus",
        {
            "epsilon": Option(1e-5), "alpha": Option(0.2),
            "amplify": Option(0.1, flag=Flag(float, "R", "How strongly to amplify what only one task changed.", least=0)),
        },
        tasks=(2, None), mergekit=Mergekit("ramplus_tl", {}, {"epsilon": "epsilon", "alpha": "alpha", "amplify": "r"}),
    ),
    Method(
        "pcb", "entries compete within and between tasks, the losers are dropped", "https://arxiv.org/abs/2410.02396", "entries.pcb:Pcb",
        {"weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(1, 10))}, tasks=(2, None),
    ),
    Method(
        "tsv-m", "each task's top singular directions, orthogonalised against the others'", "https://arxiv.org/abs/2412.00081",
        "spectral.tsv_m:TsvM", {"weight": _WEIGHT, "scale": _SCALE, "plain": _PLAIN}, tasks=(2, None),
        take="without data: it kept 96% of eight text models' accuracy and 89% of four small image models', within 1% of the best; "
        "97% of the texts' with --search scale=0.6:2:0.2",
    ),
    Method(
        "iso-c", "the sum of the task vectors with equal singular values", "https://arxiv.org/abs/2502.04959", "spectral.iso:IsoC",
        {"weight": _WEIGHT, "scale": _SCALE, "plain": _PLAIN}, tasks=(2, None),
    ),
    Method(
        "iso-cts", "common directions and each task's own, with equal singular values", "https://arxiv.org/abs/2502.04959",
        "spectral.iso:IsoCts",
        {
            "weight": _WEIGHT, "scale": _SCALE,
            "common": Option(Fraction(4, 5), flag=Flag(Fraction, "SHARE", "Share of directions taken from the sum of all tasks.")),
            "plain": _PLAIN,
        },
        tasks=(2, None),
    ),
    Method(
        "wudi", "least interference with every task vector (RegMean without data)", "https://arxiv.org/abs/2503.08099",
        "spectral.wudi:Wudi", {"weight": _WEIGHT, "scale": _SCALE, "ridge": Option(1e-3), "plain": _PLAIN}, tasks=(2, None),
    ),
    Method(
        "star", "cut off small singular values, restore the nuclear norm, average", "https://arxiv.org/abs/2502.10339",
        "spectral.star:Star",
        {"weight": _WEIGHT, "scale": _SCALE, "keep": Option(Fraction(2, 5)), "plain": _PLAIN}, tasks=(2, None),
    ),
    Method(
        "consensus", "keep what several tasks use (TALL-masks)", "https://arxiv.org/abs/2405.07813", "entries.consensus:Consensus",
        {
            "weight": _WEIGHT, "scale": Option(0.3),
            "mask-lambda": Option(0.4, flag=Flag(float, "L", "Threshold of the masks, usually 0.2 to 0.6.", least=0)),
            "min-tasks": Option(2, flag=Flag(int, "K", "Keep entries that at least K tasks use.", least=1)),
        },
        tasks=(2, None),
    ),
    Method(
        "fisher", "average by how much each task's output depends on an entry", "https://arxiv.org/abs/2111.09832",
        "examples.fisher:Fisher",
        {
            "weight": _WEIGHT, "normalize": Option(False),
            "floor": Option(1e-6, flag=Flag(float, "F", "Smallest Fisher information of an entry.", least=0)),
            "expectation": Option(
                "exact", ("exact", "sampled"),
                Flag(str, "exact|sampled", "Sum over all labels, or draw one label for each example."),
            ),
            "seed": _SEED, "max-samples": Option(256),
        },
        needs_base=False, tasks=(2, None), statistics="examples.fisher:FisherCollector", collected_by=("expectation", "seed"),
    ),
    Method(
        "regmean", "linear layers closest to all models' outputs on their inputs", "https://arxiv.org/abs/2212.09849",
        "examples.regmean:RegMean",
        {
            "weight": _WEIGHT, "alpha": Option(0.9),
            "ridge": Option(1e-6),
            "max-samples": Option(1000),
        },
        needs_base=False, tasks=(2, None), statistics="examples.regmean:RegMeanCollector",
    ),
    Method(
        "adamerging", "task arithmetic with scales learned on unlabelled data", "https://arxiv.org/abs/2310.02575",
        "examples.adamerging:AdaMerging",
        {
            "scale": Option(0.3), "scope": Option("tensor", ("global", "tensor")),
            "steps": Option(500, flag=Flag(int, "N", "Steps of the optimiser.", least=0)),
            "learning-rate": Option(1e-3, flag=Flag(float, "R", "Learning rate of the optimiser.", least=0)),
            "seed": _SEED, "max-samples": Option(1000),
        },
        statistics="examples.adamerging:LambdaCollector", collected_by=("scale", "scope", "steps", "learning-rate", "seed"),
    ),
)  # fmt: skip

METHODS = {method.name: method for method in _ALL}


def _flags() -> dict[str, Flag]:
    """Every option of any method, by name: the shared ones first."""
    found = dict(_SHARED)
    for method in _ALL:
        for name, option in method.options.items():
            assert name in found or option.flag is not None or name == "weight", f"{method.name}: declare --{name} in its line"
            if option.flag is not None:
                assert name not in found, f"{method.name} declares --{name} again: move it to the shared ones"
                found[name] = option.flag
    return found


FLAGS: Mapping[str, Flag] = _flags()


def shown(value: Value | None) -> str:
    """A default value as it would be typed."""
    if value is None:
        return ""
    if isinstance(value, Fraction):
        return f"{100 * float(value):g}%"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value) or "none"


def flag_help(name: str) -> str:
    """An option's help, with its default in each method. Methods with the same default are listed together."""
    methods: dict[str, list[str]] = {}
    for method in _ALL:
        if name in method.options and (default := method.options[name].default) is not None:
            methods.setdefault(shown(default), []).append(method.name)
    defaults = "; ".join(f"{value} ({', '.join(names)})" for value, names in methods.items())
    return f"{FLAGS[name].help} Default: {defaults}."


def find_method(name: str) -> Method:
    """The method of a name. UsageError lists the known ones."""
    if name not in METHODS:
        close = get_close_matches(name, METHODS, 1)
        hint = f"did you mean {close[0]}?" if close else "`peru merge --list-methods` shows them all"
        raise UsageError(f"--method {name!r} is unknown", hint)
    return METHODS[name]


def effective_values(method: Method, given: Mapping[str, Value]) -> dict[str, Value]:
    """All options of a method except the weights: the given ones over the defaults.

    Raises UsageError for an option that the method does not have, or a word that the option does not allow."""
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
        raise UsageError("--variant peft has no --reduce sum", "peft always takes the mean")
    return values
