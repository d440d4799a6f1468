"""`peru verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from peru_cli import options
from peru_cli.console import console
from peru_cli.errors import EXIT_FAILED, UsageError


def verify(
    paths: Annotated[list[str], typer.Argument(metavar="PATH", help="Files and folders that peru wrote.")],
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check files that peru wrote against the digests they carry. Says which files cannot be checked. Reads everything once.

    peru verify a.safetensors

    peru verify merged/ adapter/

    The exit code is 1 if a file was changed. A file whose digests were changed along with it is not detected: see docs/trust.md.
    """
    from peru_cli.checkpoints.local import inputs
    from peru_cli.verify.run import CHANGED, UNKNOWN
    from peru_cli.verify.run import verify as compare

    found = []
    for path in paths:
        if not Path(path).exists():
            raise UsageError(f"{path}: no such file or folder", "verify reads only files on this machine")
        found += compare(Path(path))
    inputs.check()
    console.table(["file", "verdict", "what was checked"], [[f.file, f.verdict, f.said] for f in found])
    console.result([asdict(finding) for finding in found])
    changed = [f for f in found if f.verdict == CHANGED]
    unknown = sum(f.verdict == UNKNOWN for f in found)
    if unknown:
        console.note(f"{unknown} of {len(found)} files cannot be checked")
    if changed:
        console.error(f"{len(changed)} of {len(found)} files changed after they were written: {changed[0].file}")
        raise typer.Exit(EXIT_FAILED)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(verify)
