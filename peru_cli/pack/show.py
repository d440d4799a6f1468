"""The line about a pack as a whole, whichever kind it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peru_cli.console import console, plural, si_bytes

if TYPE_CHECKING:
    from peru_cli.pack.seal import PackResult


def say_size(result: PackResult) -> None:
    """Print tasks, bytes, and bits a parameter: of all tasks together, as in `inspect`, and of each."""
    bits, tasks = result.bits_per_parameter, len(result.all_tasks)
    shares = f"{bits:.3f} bits/param for all of them, {bits / tasks:.3f} for each" if tasks > 1 else f"{bits:.3f} bits/param"
    console.line(f"{result.path}: {plural(tasks, 'task')}, {si_bytes(result.file_bytes)}, {shares}, precision {result.precision}")
