"""Draw compare.py's points: KL to the fine-tune over bits a parameter, both logarithmic, as SVG for light and dark pages.

    python benchmarks/budget/picture.py DIR/points.json docs/figures/budget.svg

Colours are of Okabe and Ito's palette, three only: peru's mixed artifacts, published methods, peru's older forms. Lines are told
apart by their labels, which are put where they cover the least.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from html import escape
from itertools import pairwise
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 500, 64, 24, 74, 52
LETTER, LINE = 7.3, 16.0  # of a label, pixels
BITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
OURS = ("peru, mixed", "peru, with data")
OLDER = ("Post-Pruning", "PERU-FFT", "low rank", "STA + Shuffle", "STA + Shuffle + 10%", "TALL-masks", "Post-Pruning, log2", "merge first")
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: 600 } .note, .tick { fill: #57606a; font-size: 12px }
.grid { stroke: #d0d7de; stroke-width: 1 } .line { fill: none; stroke-width: 2; stroke-linejoin: round }
.halo { fill: #ffffff; stroke: #ffffff; stroke-width: 4; stroke-linejoin: round }
.ours { stroke: #0072b2 } .theirs { stroke: #d55e00 } .older { stroke: #6e7781 }
.ours.line { stroke-width: 3.5 } circle { stroke: none } .bar { stroke-width: 1.2; opacity: .55 }
.ours.dot, .ours-label { fill: #0072b2 } .theirs.dot, .theirs-label { fill: #b34e00 } .older.dot, .older-label { fill: #57606a }
.ours-label { font-weight: 700 } .page { fill: #ffffff }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note, .tick { fill: #9198a1 } .grid { stroke: #30363d } .page { fill: #0d1117 }
.ours { stroke: #56b4e9 } .theirs { stroke: #e69f00 } .older { stroke: #8b949e }
.ours.dot, .ours-label { fill: #56b4e9 } .theirs.dot, .theirs-label { fill: #e69f00 } .older.dot, .older-label { fill: #9198a1 }
.halo { fill: #0d1117; stroke: #0d1117 }
}"""

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


class Axes:
    """Where bits and KL are on the page."""

    def __init__(self, points: list[dict[str, object]]) -> None:
        bits, kl = [float(p["bits"]) for p in points], [p["kl"][0] for p in points]  # type: ignore[arg-type, index]
        self.bits = (min(*bits, 0.02) / 1.15, max(*bits, 1.0) * 1.4)
        self.kl = (min(kl) / 1.5, max(kl) * 1.5)

    def at(self, bits: float, kl: float) -> Point:
        """Pixels from the upper left corner."""
        along, up = (math.log(value / low) / math.log(high / low) for value, (low, high) in ((bits, self.bits), (kl, self.kl)))
        return LEFT + along * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - min(1.0, max(0.0, up)) * (HEIGHT - TOP - BOTTOM)


def kind(line: str) -> str:
    """The class that colours a line."""
    return "ours" if line in OURS else "older" if line in OLDER else "theirs"


def draw(about: dict[str, object]) -> Iterator[str]:
    """The elements of the picture, in order."""
    points: list[dict[str, object]] = about["points"]  # type: ignore[assignment]
    axes = Axes(points)
    yield f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    yield f'<text class="title" x="{LEFT - 44}" y="28">How far a stored fine-tune is from the original, at every size</text>'
    tasks, examples = len(about["tasks"]), about["examples"]  # type: ignore[arg-type]
    note = f"mean KL divergence of the answers, nats: lower is better; MiniLM, {tasks} tasks, {examples:,} test texts; bars: 95%"
    yield f'<text class="note" x="{LEFT - 44}" y="49">{note}</text>'
    yield from _grid(axes)
    lines: dict[str, list[dict[str, object]]] = {}
    for point in points:
        lines.setdefault(str(point["line"]), []).append(point)
    places = {line: sorted(axes.at(float(p["bits"]), p["kl"][0]) for p in found) for line, found in lines.items()}  # type: ignore[arg-type, index]
    for line in sorted(lines, key=lambda name: name in OURS):
        yield f'<polyline class="{kind(line)} line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places[line])}"/>'
        for point in lines[line]:
            low, high = (axes.at(float(point["bits"]), max(float(v), axes.kl[0])) for v in point["kl"][1:])  # type: ignore[arg-type, index]
            yield f'<path class="{kind(line)} bar" d="M{low[0]:.1f} {low[1]:.1f}V{high[1]:.1f}"/>'
    labels: list[tuple[str, Box]] = []
    for line in sorted(lines, key=lambda name: name not in OURS):
        labels.append((line, _place(line, places, [box for _, box in labels])))
    for line, box in labels:  # a halo first, not by paint-order, which some viewers do not know
        yield f'<text class="halo" x="{box[0] + 2:.1f}" y="{box[3] - 4:.1f}">{escape(line)}</text>'
    for line, found in places.items():
        for x, y in found:
            yield f'<circle class="{kind(line)} dot" cx="{x:.1f}" cy="{y:.1f}" r="{4.5 if line in OURS else 3.5}"/>'
    for line, box in labels:
        yield f'<text class="{kind(line)}-label" x="{box[0] + 2:.1f}" y="{box[3] - 4:.1f}">{escape(line)}</text>'


def _grid(axes: Axes) -> Iterator[str]:
    for bits in BITS:
        if axes.bits[0] <= bits <= axes.bits[1]:
            x = axes.at(bits, axes.kl[0])[0]
            yield f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
            yield f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{bits:g}</text>'
    for power in range(-5, 2):
        for digit in (1, 3):
            kl = digit * 10.0**power
            if axes.kl[0] <= kl <= axes.kl[1]:
                y = axes.at(axes.bits[0], kl)[1]
                yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                yield f'<text class="tick" text-anchor="end" x="{LEFT - 8}" y="{y + 4:.1f}">{kl:g}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    label = "bits a parameter and task (the checkpoint has 16)"
    yield f'<text class="note" text-anchor="middle" x="{middle}" y="{HEIGHT - 12}">{label}</text>'


def _place(line: str, places: dict[str, list[Point]], taken: list[Box]) -> Box:
    """Where a line's label covers the least: beside, above or below one of its points."""
    width = len(line) * LETTER + 4
    best, least = (0.0, 0.0, 0.0, 0.0), math.inf
    for x, y in places[line]:
        for dx, dy in ((10, -LINE / 2), (-width - 10, -LINE / 2), (6, -LINE - 5), (6, 5), (-width - 6, -LINE - 5), (-width - 6, 5)):
            box = (x + dx, y + dy, x + dx + width, y + dy + LINE)
            outside = box[0] < LEFT or box[2] > WIDTH - 4 or box[1] < TOP or box[3] > HEIGHT - BOTTOM
            cost = 100.0 * outside + 20 * sum(_overlap(box, other) for other in taken)
            cost += sum(box[0] - 4 < px < box[2] + 4 and box[1] - 3 < py < box[3] + 3 for px, py in _along(places))
            if cost < least:
                best, least = box, cost
    return best


def _overlap(ours: Box, theirs: Box) -> bool:
    return ours[0] < theirs[2] and theirs[0] < ours[2] and ours[1] < theirs[3] and theirs[1] < ours[3]


def _along(places: dict[str, list[Point]]) -> Iterator[Point]:
    """Points along all lines, close together."""
    for found in places.values():
        yield from found
        for (x, y), (end_x, end_y) in pairwise(found):
            for step in range(1, 16):
                yield x + (end_x - x) * step / 16, y + (end_y - y) * step / 16


def main() -> None:
    """Read points.json, write the SVG."""
    source, target = map(Path, sys.argv[1:])
    elements = "\n".join(draw(json.loads(source.read_text())))
    title = "<title>KL to the fine-tune over bits a parameter</title>"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"{head}\n{title}\n<style>{STYLE}\n</style>\n{elements}\n</svg>\n", encoding="utf-8")


if __name__ == "__main__":
    main()
