"""The one output sink: data on stdout, everything else on stderr, progress bars only on a terminal."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peru_cli import shown
from peru_cli.errors import ReportLost


class Console:
    """Prints what a command says. `quiet` drops notes and progress; `json` replaces tables with one JSON value."""

    def __init__(self) -> None:
        self.quiet = False
        self.json = False
        self.data_on_stderr = False  # when stdout carries the output file itself
        self.summary: Path | None = None  # tables, lines and the error are also written here, as Markdown
        self._summary: list[str] = []
        self._bar: Any = None  # the visible progress bar: lines are printed above it
        self.unfinished: list[Path] = []  # where unfinished outputs are, if they are still there when the command ends

    def note(self, text: str) -> None:
        """Something worth knowing while it happens."""
        if not self.quiet:
            self._say(text)

    def warn(self, text: str) -> None:
        """Something that a user should know or act on; shown even if quiet."""
        self._say(text, "warning:", 33)

    def error(self, text: str) -> None:
        """Why the command failed."""
        self._tell(f"**Error:** {_markdown(shown.message(text))}\n")
        self._say(text, "error:", 31)

    def trace(self, error: BaseException) -> None:
        """Where an exception came from, for --debug; without passwords and tokens."""
        with suppress(OSError):
            print(shown.lines("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)

    def _say(self, text: str, mark: str = "", colour: int = 0) -> None:
        line = (_marked(mark, colour) + " " if mark else "") + shown.message(text)
        with suppress(OSError):  # if nobody can read it, that is no reason to fail
            if self._bar is not None:
                self._bar.write(line, file=sys.stderr)
            else:
                print(line, file=sys.stderr, flush=True)

    def result(self, value: Any) -> None:
        """Print the machine-readable result if --json was given. Infinity and NaN, which JSON lacks, become null."""
        if self.json:
            self._out(shown.printable_json(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)))

    def line(self, text: str = "") -> None:
        """A line of human-readable data."""
        self._tell(f"{_markdown(shown.printable(text))}\n")
        if not self.json:
            self._out(shown.printable(text))

    def remark(self, text: str) -> None:
        """A sentence about a table. Between words, it is wrapped to the terminal."""
        self._tell(f"{_markdown(shown.printable(text))}\n")
        if not self.json:
            self._wrapped(shown.printable(text))

    def _wrapped(self, text: str) -> None:
        for line in textwrap.wrap(text, self._width() or sys.maxsize, break_long_words=False, break_on_hyphens=False):
            self._out(line)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
        """Print a table in plain columns; long names are cut. On a narrow terminal, columns are left out and words are wrapped.

        A column's name may begin with marks: `?` makes it optional (the last one is dropped first), `>` aligns it right."""
        if self.summary is not None:
            self._tell(_markdown_table(columns, rows, title))
        if self.json:
            return
        if title:
            self._out(shown.printable(title))
        rows = [[shown.printable(shown.cut(cell)) for cell in row] for row in rows]
        columns = [shown.printable(shown.cut(column)) for column in columns]
        names = [column.lstrip("?>") for column in columns]
        widths = [max(len(cell) for cell in cells) for cells in zip(names, *rows, strict=True)]
        kept, widths = _fit(columns, widths, self._width())
        lines = []
        for number, row in enumerate([names, *rows]):
            cells = [_wrap(row[i], widths[i], ">" in columns[i]) for i in kept]
            for line in range(max(map(len, cells))):
                parts = [cell[line] if line < len(cell) else " " * widths[i] for i, cell in zip(kept, cells, strict=True)]
                text = "  ".join(parts).rstrip()
                lines.append(f"\x1b[1m{text}\x1b[0m" if number == 0 and _is_coloured(self._stream()) else text)
        known = shown.secrets()  # once: looking for them costs more than a row
        self._print("\n".join(shown.masked(line, known) for line in lines))
        if len(kept) < len(columns):
            left = ", ".join(name for i, name in enumerate(names) if i not in kept)
            self._wrapped(f"(too narrow for: {left}; use a wider terminal or a pipe to see all columns)")

    def _tell(self, text: str) -> None:
        if self.summary is not None:
            self._summary.append(shown.masked(text))

    def close_summary(self, command: str) -> None:
        """Append what was printed to the summary file, under the command's name, if there is one. OSError if it cannot be written."""
        path, told, self.summary, self._summary = self.summary, self._summary, None, []
        if path is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(f"### {_markdown(shown.printable(shown.masked(command)))}\n\n" + "\n".join(told) + "\n")

    def _width(self) -> int | None:
        """Columns of the terminal. None in a pipe, which takes any width."""
        return shutil.get_terminal_size().columns if self._stream().isatty() else None

    def _stream(self) -> Any:
        return sys.stderr if self.data_on_stderr else sys.stdout

    def _out(self, text: str) -> None:
        self._print(shown.masked(text))

    def _print(self, text: str) -> None:
        stream = self._stream()
        if stream is sys.stderr:
            with suppress(OSError):
                print(text, file=stream, flush=True)
            return
        try:
            print(text, file=stream, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ReportLost(error.strerror or str(error)) from error

    @property
    def shows_progress(self) -> bool:
        """Whether progress bars are shown: only on a terminal."""
        return not self.quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

    @contextmanager
    def progress(self, total: int, what: str, unit: str = "entries") -> Iterator[Progress]:
        """A progress bar over `total` units; hidden unless stderr is a terminal."""
        progress = Progress(total, what, unit, show=self.shows_progress)
        before, self._bar = self._bar, progress.bar if progress.bar is not None else self._bar
        try:
            yield progress
        finally:
            self._bar = before
            progress.close()


class Progress:
    """A bar that any thread may advance. Its total may grow."""

    def __init__(self, total: int, what: str, unit: str, show: bool) -> None:
        self.bar: Any = None
        self._lock = threading.Lock()
        if show:
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, desc=shown.message(what), unit=" " + unit, unit_scale=True, leave=False, mininterval=0.2, dynamic_ncols=True
            )

    def advance(self, amount: int) -> None:
        """Count `amount` more units as done."""
        if self.bar is not None:
            with self._lock:
                if self.bar.n + amount > self.bar.total:
                    self.bar.total = self.bar.n + amount
                self.bar.update(amount)

    def expect(self, amount: int) -> None:
        """Add `amount` units to the total."""
        if self.bar is not None:
            with self._lock:
                self.bar.total += amount
                self.bar.refresh()

    def step(self, what: str) -> None:
        """Name the current step."""
        if self.bar is not None:
            with self._lock:
                self.bar.set_description(shown.message(what))

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()


_LEAST_TEXT = 12  # characters that a text column keeps on a narrow terminal

console = Console()


def _is_coloured(stream: Any) -> bool:
    """Whether to use colours: on a terminal, unless NO_COLOR (no-color.org) or TERM say otherwise."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _marked(word: str, colour: int) -> str:
    """A word in bold and colour (31 red, 33 yellow) if stderr shows colours."""
    return f"\x1b[1;{colour}m{word}\x1b[0m" if _is_coloured(sys.stderr) else word


def _fit(columns: Sequence[str], widths: list[int], room: int | None) -> tuple[list[int], list[int]]:
    """Which columns to show, and how wide. Optional columns are dropped first, from the right; then the widest text is wrapped."""
    kept, widths = list(range(len(columns))), list(widths)

    def too_wide() -> int:
        return 0 if room is None else sum(widths[i] for i in kept) + 2 * (len(kept) - 1) - room

    for i in [i for i in reversed(kept) if columns[i].startswith("?")]:
        if too_wide() > 0:
            kept.remove(i)
    while too_wide() > 0 and (texts := [i for i in kept if ">" not in columns[i] and widths[i] > _LEAST_TEXT]):
        widest = max(texts, key=lambda i: widths[i])
        widths[widest] = max(_LEAST_TEXT, widths[widest] - too_wide())
    while too_wide() > 0 and len(kept) > 2:  # numeric columns are dropped whole before numbers are cut
        kept.pop()
    return kept, widths


def _wrap(cell: str, width: int, right: bool) -> list[str]:
    """The lines of a cell. Names break at dots and slashes, or anywhere if they must; numbers are never wrapped."""
    if len(cell) <= width or right:
        return [cell.rjust(width) if right else cell.ljust(width)]
    breakable = cell.replace(".", ".\0").replace("/", "/\0").replace("_", "_\0").replace(" ", " \0")
    lines, line = [], ""
    for piece in breakable.split("\0"):
        if line and len(line) + len(piece.rstrip()) > width:
            lines.append(line)
            line = ""
        line += piece
        while len(line.rstrip()) > width:
            lines.append(line[:width])
            line = line[width:]
    return [text.rstrip().ljust(width) for text in [*lines, line]]


def _markdown(text: str) -> str:
    """Plain text as Markdown: escaped, on one line."""
    return re.sub(r"([\\`*_<>|#\[\]~])", r"\\\1", " ".join(text.split()))


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> str:
    lines = [[_markdown(shown.printable(shown.cut(cell))) for cell in row] for row in ([c.lstrip("?>") for c in columns], *rows)]
    lines.insert(1, ["---:" if ">" in column else "---" for column in columns])
    head = f"{_markdown(shown.printable(title))}\n\n" if title else ""
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _finite(value: Any) -> Any:
    """A JSON value in which numbers that JSON lacks are null."""
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
