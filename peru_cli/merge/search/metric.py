"""`--metric-command`: a program of the user's own measures each trial's model."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
from pathlib import Path

from peru_cli.errors import BadFile, UsageError


def read_command(text: str) -> list[str]:
    """The words of a command. UsageError for open quotes, and for a program that is not there."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--metric-command {text!r} cannot be read: {str(error).lower()}", "close the quotes") from error
    if not words or shutil.which(words[0]) is None:
        what = f"{words[0]}: no such program" if words else "is empty"
        raise UsageError(f"--metric-command {what}", "name a program that prints a number, as 'python metric.py'")
    return words


def run_metric(command: list[str], folder: Path) -> float:
    """Run a command with a model's folder as its last argument, and read the number on the last line that it prints.

    Raises BadFile if it fails, or prints anything else."""
    shown = shlex.join(command)
    try:
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BadFile(f"--metric-command {shown}: {error.strerror}", "name a program that can be run, with its arguments") from error
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise BadFile(f"--metric-command {shown} ended with code {done.returncode}" + (f": {said[-1]}" if said else ""))
    try:
        number = float(lines[-1])
    except (ValueError, IndexError) as error:
        what = f"printed {lines[-1]!r}" if lines else "printed nothing"
        raise BadFile(f"--metric-command {shown} {what}, not a number", "print one number on the last line; the largest is best") from error
    if not math.isfinite(number):
        raise BadFile(f"--metric-command {shown} printed {number}", "print a finite number")
    return number
