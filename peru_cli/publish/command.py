"""`peru push`, and `--push` at the end of commands that write an output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from peru_cli import options
from peru_cli.console import console
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.publish.run import Destination


def destination(wanted: options.Publishing, force: bool, output: str) -> Optional[Destination]:
    """Where --push publishes, after asking the Hub whether it would accept. None without --push. Call it before any tensor is read."""
    if wanted == options.Publishing():
        return None
    from peru_cli.publish import run as job

    place = job.destination(wanted.push, wanted.private, wanted.revision, wanted.commit_message, force, output)
    if place is not None:
        job.check(place)
        console.note(f"will be published on the Hub: {place}")
    return place


def publish(place: Optional[Destination], outputs: Sequence[Path], command: str, bases: tuple[str, ...] = ()) -> dict[str, Any]:
    """Publish what `peru COMMAND` wrote, and return what --json says of it (empty without --push). Call it when the output is in place."""
    if place is None:
        return {}
    from peru_cli.publish import run as job

    done = job.publish(outputs, place, f"peru {command}", bases)
    console.note(f"published: {done.url}" if done.new else f"{place} already holds exactly this: {done.url}")
    return {"published": done.json()}


@options.shared(lacks=["push", "no_sync", "stream", "device", "threads", "tile_entries"], force=options.ForcePush)
def push(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="What peru wrote: artifacts, or one folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repo on the Hub; created if it is missing.")],
    *,
    publishing: options.Publishing,
    run: options.Running,
) -> None:
    """Publish an artifact, an adapter or a model on the Hugging Face Hub with its model card, in one commit.

    peru push a.safetensors org/name --private

    peru push deltas/ org/name --revision v2
    """
    if missing := [str(path) for path in paths if not path.exists()]:
        raise UsageError(f"{missing[0]}: no such file or folder")
    from peru_cli.publish import run as job

    job.collect(paths)
    place = job.destination(repo, publishing.private, publishing.revision, publishing.commit_message, run.force)
    assert place is not None
    job.check(place, taken=run.dry_run)
    if not run.dry_run:
        console.result(publish(place, paths, "push"))


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(push)
