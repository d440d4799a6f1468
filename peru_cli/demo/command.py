"""`peru demo`."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.console import console, si_bytes
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.demo.run import Row


@options.shared(lacks=["summary", "force", "dry_run", "no_sync", "stream", "device", "threads", "tile_entries"])
def demo(
    context: typer.Context,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="DIR", help="Keep the artifacts and the rebuilt models here. Default: a scratch folder."),
    ] = None,
    plot: Annotated[
        Optional[Path], typer.Option("--plot", metavar="FILE", help="Draw accuracy over bytes into a .png, .svg or .pdf file.")
    ] = None,
    *,
    run: options.Running,
) -> None:
    """Compress and merge four shipped fine-tunes with the real commands, and measure what that costs.

    peru demo

    peru demo --plot demo.svg

    Bytes and accuracies are computed here and now, in about half a minute.
    """
    from peru_cli import demo as family
    from peru_cli.demo.run import MODELS, NAMES, run_demo

    if plot is not None:
        from peru_cli.reports.plots import check_plot

        check_plot(plot)
        plot = plot.absolute()
    if output is not None and output.exists() and any(output.iterdir()):
        raise UsageError(f"{output} is not empty", "choose another -o")
    with contextlib.ExitStack() as stack:
        work = output or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peru-demo-")))
        work.mkdir(parents=True, exist_ok=True)
        rows = []
        progress = stack.enter_context(console.progress(MODELS * len(NAMES), "demo", "models"))
        for row in run_demo(work, _Commands(context), progress.advance):
            rows.append(row)
    base_bytes = (family.BASE / "model.safetensors").stat().st_size
    if plot is not None:
        from peru_cli.reports.plots import plot_frontier

        points = [(row.method, row.nbytes, row.normalised(rows[1])) for row in rows[1:]]
        plot_frontier(plot, points, f"Four fine-tunes of a base of {si_bytes(base_bytes)}")
    _table(rows, base_bytes)


class _Commands:
    """Runs peru command lines in this process. Shows each as it would be typed; the `unpack` of one task stands for all."""

    def __init__(self, context: typer.Context) -> None:
        self._main = context.find_root().command.main
        self._shown: list[str] = []

    def __call__(self, arguments: list[str]) -> None:
        if arguments[0] != "unpack" or self._shown[-1] != "unpack":
            console.note(f"$ peru {' '.join(arguments)}")
        self._shown.append(arguments[0])
        quiet, as_json = console.quiet, console.json
        with contextlib.redirect_stdout(io.StringIO()):
            self._main([*arguments, "--quiet", "--no-sync"], prog_name="peru", standalone_mode=False)
        console.quiet, console.json = quiet, as_json


def _table(rows: list[Row], base_bytes: int) -> None:
    fine_tuned = rows[1]
    best = {id(row) for row in rows[2:] if not any(other.nbytes <= row.nbytes and other.mean > row.mean for other in rows[2:])}
    cells = [
        [
            row.method + (" *" if id(row) in best else ""),
            si_bytes(row.nbytes),
            f"{row.bits_per_parameter:.3f}",
            f"{100 * row.mean:.2f}",
            f"{100 * row.normalised(fine_tuned):.2f}",
        ]
        for row in rows
    ]
    console.table(["method", ">size", ">bits/param", ">accuracy %", ">of fine-tunes %"], cells)
    console.remark("* no smaller row is more accurate")
    console.remark(
        f"Sizes are for all {len(fine_tuned.accuracies)} tasks, heads and configs included, on top of the base's {si_bytes(base_bytes)}."
    )
    console.remark("bits/param leave out heads and configs, as in all commands.")
    result: dict[str, Any] = {
        "base_bytes": base_bytes,
        "rows": [
            {
                "method": row.method,
                "bytes": row.nbytes,
                "delta_bytes": row.delta_bytes,
                "bits_per_parameter": row.bits_per_parameter,
                "accuracies": row.accuracies,
                "mean": row.mean,
                "normalised": row.normalised(fine_tuned),
                "best": id(row) in best,
            }
            for row in rows
        ],
    }
    console.result(result)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(demo)
