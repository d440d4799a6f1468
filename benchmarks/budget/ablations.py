"""What each part of a mixed artifact buys: each of them switched off alone, at equal bytes.

    python benchmarks/budget/ablations.py --images --out DIR [--bits 0.3]
    python benchmarks/budget/ablations.py CACHE --out DIR [--bits 0.06] [--tasks sst2 ...] [--examples 300]

CACHE and DIR are compare.py's. Prints a table.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from compare import rows
from images import ImageJudge
from judge import Judge, mean_kl, normalised
from methods import Make, Method, Shop, prune

from peru_cli import demo
from peru_cli.methods.mixed import directions, weights
from peru_cli.methods.mixed.rates import quantise
from peru_cli.methods.mixed.scales import scale_number, scale_of
from peru_cli.prune.mixed import represent

RATIO = 1.5  # of an entry's deviation to the step where all directions have one precision: about 2 bits
CHOOSE = directions.choose_scales


def same_weight(name: str, is_matrix: bool) -> float:
    """An error counts the same in all matrices."""
    return 1.0 if is_matrix else weights.VECTOR


def as_long(squared: float, kept: float) -> float:
    """Directions stay as they are."""
    return 1.0


def one_precision(values: Any, rows: int, columns: int, multiplier: float) -> tuple[Any, Any]:
    """Steps in proportion to the entries of all directions; a direction is kept if it pays for that."""
    numbers = scale_number(values / (np.sqrt(rows * columns) * RATIO**2))
    bits = directions.bits(np.sqrt(values / rows / scale_of(numbers))), directions.bits(np.sqrt(values / columns / scale_of(numbers)))
    missed = values * scale_of(numbers) * (rows + columns) / 12
    return numbers, missed + multiplier * (rows * bits[0] + columns * bits[1])


def by_value(values: Any, rows: int, columns: int, multiplier: float) -> tuple[Any, Any]:
    """Directions are kept by their singular values alone, however many bytes they take."""
    numbers, _ = CHOOSE(values, rows, columns, multiplier)
    return numbers, np.where(np.square(values) > multiplier * 300, 0.0, np.inf)


def once(spectrum: directions.Spectrum, keep: Any, numbers: Any, longer: bool) -> directions.LowRank:
    """Both factors are rounded, and neither is solved for again."""
    values, steps = spectrum.values[keep], np.sqrt(scale_of(numbers))
    root = np.sqrt(values)
    ratios = [root / np.sqrt(len(factor)) / steps for factor in (spectrum.left, spectrum.right)]
    length = directions.regain(spectrum.squared, float(np.square(values).sum())) if longer else 1.0
    left = quantise(spectrum.left[:, keep] * root, steps, ratios[0], directions.LARGEST)
    right = quantise(spectrum.right[:, keep] * root * length, steps, ratios[1], directions.LARGEST)
    factor = np.ascontiguousarray(right.T)
    return directions.LowRank(left, factor, numbers, directions.missed_by(spectrum, left, factor, numbers))


def choosing(function: Any) -> list[tuple[Any, str, Any]]:
    """In place of choose_scales."""
    return [(directions, "choose_scales", function), (represent, "choose_scales", function)]


PARTS: dict[str, list[tuple[Any, str, Any]]] = {
    "as shipped": [],
    "directions by singular value, not by energy a byte": choosing(by_value),
    "one precision for all directions": choosing(one_precision),
    "factors rounded once, not refined": [(directions, "_refined", once)],
    "not refined, lengths by the exponent 0.2": [(directions, "_refined", once), (weights, "REGAINED", 0.2)],
    "errors count the same in all matrices": [(represent, "weight_of", same_weight)],
    "kept directions as long as they are": [(directions, "regain", as_long), (represent, "regain", as_long)],
}


def patched(make: Make, parts: list[tuple[Any, str, Any]]) -> Make:
    """`make` with functions replaced."""

    def made(shop: Shop, task: str) -> Any:
        with ExitStack() as stack:
            for module, name, other in parts:
                stack.enter_context(mock.patch.object(module, name, other))
            return make(shop, task)

    return made


def main() -> None:
    """Judge what is not judged yet, and print all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, metavar="CACHE", nargs="?")
    parser.add_argument("--images", action="store_true", help="the demo's image models in place of CACHE")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", metavar="TASK")
    parser.add_argument("--bits", nargs="+", default=["0.3"])
    parser.add_argument("--examples", type=int)
    arguments = parser.parse_args()
    if (arguments.cache is None) is not arguments.images:
        parser.error("give CACHE, or --images in its place")
    torch.set_num_threads(1)
    store = arguments.out / "outputs"
    judge = ImageJudge(store, arguments.examples) if arguments.images else Judge(arguments.cache.resolve(), store, arguments.examples)
    all_tasks = demo.tasks() if arguments.images else sorted(path.stem for path in (arguments.cache / "full").glob("*.done"))
    tasks = arguments.tasks or all_tasks
    shop = Shop(judge, tasks, arguments.out / "made")
    methods = [
        Method(f"{bits} bits, {name}", "ablation", patched(prune("--bits", bits), parts))
        for bits in arguments.bits
        for name, parts in PARTS.items()
    ]
    print("| | bits/param | normalised accuracy | mean KL |\n| --- | ---: | ---: | ---: |")
    for method, nbytes, found in rows(judge, shop, tasks, methods, arguments.out):
        quality, kl = normalised(found), mean_kl(found)
        print(
            f"| {method.name} | {8 * nbytes / len(tasks) / judge.parameters:.3f} | {100 * quality.value:.2f} "
            f"({100 * quality.low:.2f} to {100 * quality.high:.2f}) | {kl.value:.4f} ({kl.low:.4f} to {kl.high:.4f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
