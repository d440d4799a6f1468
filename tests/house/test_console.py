"""What a person sees: tables that fit, errors in one style, colours only if wanted."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

import pytest

from peru_cli.console import Console
from tests.conftest import run_peru

COLUMNS = ["task", "artifact", ">size", "?>kept", ">bits/param", "?>stored whole"]
ROWS = [["sst2", "a/very/long/folder/name/that/does/not/fit/anywhere/sst2.safetensors", "4.15 MB", "4,147,088", "0.532", "1.2 kB"]]


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, width: int, **env: str) -> list[str]:
    """Lines of the table on a terminal of this width."""
    for name, value in {"COLUMNS": str(width), "TERM": "xterm", "NO_COLOR": "1", **env}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    Console().table(COLUMNS, ROWS)
    return screen.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_a_table_fits_the_terminal_and_keeps_its_first_column_and_whole_numbers(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    lines = drawn(monkeypatch, width)
    assert max(map(len, lines)) <= width
    end = next((i for i, line in enumerate(lines) if line.startswith("(")), len(lines))
    table = lines[:end]
    words = " ".join(table).split()
    assert "sst2" in words and "4.15" in words
    left = " ".join(lines[end:])
    for number, name in (("4,147,088", "kept"), ("0.532", "bits/param"), ("1.2", "stored whole")):
        assert (number in words) != (name in left)  # either shown whole or listed as left out
    assert "".join(line[6:].split("  ")[0].strip() for line in table[1:]).startswith("a/very/long/folder/name")  # wrapped, not cut


def test_optional_columns_go_before_others(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = drawn(monkeypatch, 60)
    assert lines[-2:] == ["(too narrow for: kept, stored whole; use a wider terminal or", "a pipe to see all columns)"]


def test_a_remark_is_wrapped_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "KL in nats, from the predictions of --against to those of the model"
    Console().remark(text)
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    Console().remark(text)
    assert screen.getvalue().splitlines() == ["KL in nats, from the predictions of", "--against to those of the model"]


def test_a_pipe_gets_all_columns_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Console().table(COLUMNS, ROWS)
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "artifact", "size", "kept", "bits/param", "stored", "whole"]
    assert ROWS[0][1] in row and "\x1b" not in header


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, 200, NO_COLOR="")[0].startswith("\x1b[1mtask")
    assert not any("\x1b" in line for line in drawn(monkeypatch, 200))
    assert not any("\x1b" in line for line in drawn(monkeypatch, 200, NO_COLOR="", TERM="dumb"))


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["prnue"], "no such command 'prnue'. Did you mean 'prune', 'route'?"),
        (["prune", "x", "--bse", "y"], "did you mean --base?"),
        (["prune"], "missing argument '[TASK=]MODEL'"),
        (["merge", "-m"], "option '-m' requires an argument"),
    ],
)
def test_a_wrong_command_line_is_reported_in_one_style(arguments: list[str], says: str) -> None:
    done = run_peru(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and says in done.stderr and "--help` shows how it is used" in done.stderr


def test_an_error_is_red_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    environment.pop("NO_COLOR", None)
    subprocess.run([sys.executable, "-m", "peru_cli", "prnue"], stderr=theirs, env=environment, timeout=60)
    os.close(theirs)
    assert os.read(ours, 1000).startswith(b"\x1b[1;31merror:\x1b[0m no such command")
    os.close(ours)


def test_notes_are_printed_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    console = Console()
    with console.progress(10, "work") as progress:
        progress.advance(3)
        console.note("a note\x1b[2J")
        console.warn("a warning")
    console.note("after")
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert any(line.startswith("work:") for line in lines) and "after" in lines
    note = next(line for line in lines if "a note" in line)
    assert note.startswith("a note") and "\x1b" not in note
    assert any(line.endswith("a warning") and "work:" not in line for line in lines)
