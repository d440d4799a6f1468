"""The one output sink: data on stdout, everything else on stderr, progress bars only on a terminal."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Console:
    """What a command says. `quiet` drops notes and progress; `json` replaces tables by one JSON value."""

    def __init__(self) -> None:
        self.quiet = False
        self.json = False
        self.data_on_stderr = False  # when stdout carries the output file itself

    def note(self, text: str) -> None:
        """Something worth knowing while it happens."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """Something that a user should act on or know; shown even when quiet."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Why the command failed."""
        print(f"error: {text}", file=sys.stderr, flush=True)

    def result(self, value: Any) -> None:
        """The machine-readable result, if --json was given; null stands for infinity and NaN, which JSON has not."""
        if self.json:
            self._out(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))

    def line(self, text: str = "") -> None:
        """A line of human-readable data."""
        if not self.json:
            self._out(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """A table: drawn on a terminal, plain columns in a pipe (never cut off). Columns named `>X` align right."""
        if self.json:
            return
        if title:
            self._out(title)
        names = [column.lstrip(">") for column in columns]
        right = [column.startswith(">") for column in columns]
        widths = [max(len(cell) for cell in cells) for cells in zip(names, *rows, strict=True)]
        if self._stream().isatty():
            self._draw(names, right, rows, widths)
            return
        for row in [names, *rows]:
            cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
            self._out("  ".join(cells).rstrip())

    def _draw(self, names: list[str], right: list[bool], rows: Sequence[Sequence[str]], widths: list[int]) -> None:
        from rich import box
        from rich.console import Console as Rich
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, is_right in zip(names, right, strict=True):
            table.add_column(name, justify="right" if is_right else "left", overflow="fold", no_wrap=is_right)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Rich(file=self._stream(), highlight=False).print(table)

    def _stream(self) -> Any:
        return sys.stderr if self.data_on_stderr else sys.stdout

    def _out(self, text: str) -> None:
        print(text, file=self._stream(), flush=True)

    @property
    def shows_progress(self) -> bool:
        """Whether progress bars are shown: on a terminal only."""
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @contextmanager
    def progress(self, total: int, what: str, unit: str = "entries") -> Iterator[Progress]:
        """A progress bar over `total` units; silent unless stderr is a terminal."""
        progress = Progress(total, what, unit, show=self.shows_progress)
        try:
            yield progress
        finally:
            progress.close()


class Progress:
    """A bar that any thread may advance; its total may turn out larger."""

    def __init__(self, total: int, what: str, unit: str, show: bool) -> None:
        self._bar: Any = None
        self._lock = threading.Lock()
        if show:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=what, unit=" " + unit, unit_scale=True, leave=False, mininterval=0.2, dynamic_ncols=True)

    def advance(self, amount: int) -> None:
        """Count `amount` more units as done."""
        if self._bar is not None:
            with self._lock:
                if self._bar.n + amount > self._bar.total:
                    self._bar.total = self._bar.n + amount
                self._bar.update(amount)

    def expect(self, amount: int) -> None:
        """There are `amount` more units to do."""
        if self._bar is not None:
            with self._lock:
                self._bar.total += amount
                self._bar.refresh()

    def step(self, what: str) -> None:
        """Say what is being done now."""
        if self._bar is not None:
            with self._lock:
                self._bar.set_description(what)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


console = Console()


def _finite(value: Any) -> Any:
    """A JSON value with null in place of numbers that JSON has not."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def si_bytes(n: int) -> str:
    """Bytes for people: MB is 10^6."""
    if n < 1000:
        return f"{n} B"
    value, unit = float(n), "B"
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007 - the last unit tried is the result
        value /= 1000
        if value < 999.5:
            break
    return f"{value:.3g} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def count(n: int) -> str:
    """A number for people: 1,234,567."""
    return f"{n:,}"


def plural(n: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
