"""`peru demo`."""

from __future__ import annotations

import contextlib
import io
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peru_cli import options
from peru_cli.console import console, count, si_bytes
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.demo.run import Row


def demo(
    context: typer.Context,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", metavar="DIR", help="Keep the artifacts and the restored models here.")
    ] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compress and merge shipped fine-tunes with the real commands; print bytes and accuracies computed here and now.

    peru demo

    peru demo -o demo/
    """
    from peru_cli import demo as family
    from peru_cli.demo.run import run_demo

    if output is not None and output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty", "choose another -o")
    with contextlib.ExitStack() as stack:
        work = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peru-demo-")))
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        names = family.tasks()
        console.note(f"base: {family.BASE}\nfine-tunes: {', '.join(names)}")
        for row in run_demo(work, _Commands(context)):
            rows.append(row)
            console.note(f"{row.method}: mean accuracy {100 * row.mean:.2f}%")
    _table(rows, names, (family.BASE / "model.safetensors").stat().st_size)


class _Commands:
    """Runs peru command lines in this process; their tables are not repeated, and one `unpack` is shown for all."""

    def __init__(self, context: typer.Context) -> None:
        self._main = context.find_root().command.main
        self._shown = False

    def __call__(self, arguments: list[str]) -> None:
        is_unpack = arguments[0] == "unpack"
        if not (is_unpack and self._shown):
            console.note(f"$ peru {shlex.join(arguments)}")
        self._shown |= is_unpack
        quiet, as_json = console.quiet, console.json
        with contextlib.redirect_stdout(io.StringIO()):
            self._main([*arguments, "--quiet", "--no-sync"], prog_name="peru", standalone_mode=False)
        console.quiet, console.json = quiet, as_json


def _table(rows: list[Row], names: list[str], base_bytes: int) -> None:
    fine_tuned = rows[1]
    cells = [
        [
            row.method,
            count(row.nbytes),
            f"{row.bits_per_parameter:.3f}",
            *(f"{100 * row.accuracies[name]:.1f}" for name in names),
            f"{100 * row.mean:.2f}",
            f"{100 * row.normalised(fine_tuned):.2f}",
        ]
        for row in rows
    ]
    console.table(["method", ">bytes", ">bits/param", *(f">{name}" for name in names), ">mean", ">normalised"], cells)
    console.line(
        f"accuracies in %; bytes for all {len(names)} tasks, on top of the base's {si_bytes(base_bytes)}, heads and configs included"
    )
    console.result(
        {
            "base_bytes": base_bytes,
            "rows": [
                {
                    "method": row.method,
                    "bytes": row.nbytes,
                    "bits_per_parameter": row.bits_per_parameter,
                    "accuracies": row.accuracies,
                    "mean": row.mean,
                    "normalised": row.normalised(fine_tuned),
                }
                for row in rows
            ],
        }
    )


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(demo)
