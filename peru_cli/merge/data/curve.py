"""The curve of a search, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peru_cli.console import console

if TYPE_CHECKING:
    from peru_cli.merge.data.collect import Looked


def print_curve(looked: Looked, names: tuple[str, ...]) -> None:
    """Print the searched values with accuracies in %, the best one marked."""
    from peru_cli.merge.output import show

    best = looked.parameters.values[looked.searched]
    rows = [["fine-tunes", *(f"{100 * looked.fine[name]:.2f}" for name in names), "100.00", ""]]
    for point in looked.points:
        cells = [f"{100 * point.accuracies[name]:.2f}" for name in names]
        rows.append([show(point.value), *cells, f"{100 * point.normalised:.2f}", "best" if point.value == best else ""])
    console.table([looked.searched, *(f">{name}" for name in names), ">normalised", ""], rows)
