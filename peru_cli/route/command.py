"""`peru route`."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peru_cli import options
from peru_cli.console import console
from peru_cli.errors import UsageError

if TYPE_CHECKING:
    from peru_cli.checkpoints.places import Place
    from peru_cli.inference.data import Examples
    from peru_cli.route.run import Answer


@options.shared(
    lacks=["force", "dry_run", "no_sync", "tile_entries", "json"],
    panels={"Inputs": "base text max_samples per_task rename", "Method": "gate_rank", "Running": "batch_size trust_remote_code as_json"},
)
def route(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK=]MODEL...",
            help="Models, PEFT LoRA adapters or peru artifacts; or one artifact of shuffle-pack --method smile.",
            show_default=False,
        ),
    ],
    base: options.Base,
    text: Annotated[
        str,
        typer.Option("--text", "--data", "-d", metavar="FILE", help="Inputs: .jsonl, .csv, .parquet, .npz or a folder of images."),
    ],
    gate_rank: Annotated[
        Optional[int], typer.Option("--gate-rank", min=1, metavar="R", help="Directions by which the router chooses. Default: 16.")
    ] = None,
    per_task: Annotated[
        Optional[str], typer.Option("--per-task", metavar="REGEX", help="Tensors whose names match belong to one task (heads).")
    ] = None,
    rename: options.Rename = None,
    max_samples: Annotated[Optional[int], typer.Option("--max-samples", min=1, metavar="N", help="Use the first N inputs.")] = None,
    batch_size: Annotated[Optional[int], typer.Option("--batch-size", min=1, metavar="N", help="Inputs per forward pass.")] = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object a line: task, share, and the shares of all tasks.")
    ] = False,
    *,
    run: options.Running,
) -> None:
    """Say which fine-tune should answer each input, and how sure that is. Only the base runs; no training, no labels.

    peru route a=MODEL b=MODEL --base BASE --text inputs.jsonl

    peru route a=ADAPTER b=ADAPTER c=ADAPTER --base BASE --text inputs.jsonl --json

    peru route smile.safetensors --base BASE --text inputs.jsonl

    One line an input, in the order of the file: the task, and its share of the router's votes.
    """
    from peru_cli.checkpoints.local import inputs
    from peru_cli.checkpoints.resolve import split_arguments
    from peru_cli.finetunes.open import find_routed
    from peru_cli.inference.reading import read_examples
    from peru_cli.inference.remote_code import trusting

    examples = read_examples(text, max_samples)
    arguments = split_arguments(models)
    place: Optional[Place] = find_routed(arguments[0].model) if len(arguments) == 1 else None
    if place is not None and (wrong := [o for o, v in {"--gate-rank": gate_rank, "--per-task": per_task, "--rename": rename}.items() if v]):
        raise UsageError(f"{', '.join(wrong)}: fixed when {place} was made", "leave it out, or name the fine-tunes")
    if place is None and len(arguments) == 1:
        raise UsageError("one fine-tune alone leaves nothing to choose", "name several, or an artifact of shuffle-pack --method smile")
    with TemporaryDirectory(prefix="peru-route-") as folder, trusting([base], trust_remote_code):
        try:
            if place is None:
                place = Path(folder) / "gates.safetensors"
                _make(models, base, place, gate_rank or 16, per_task, rename, run)
            answers = _answer(place, base, examples, run, batch_size)
            inputs.check()
        finally:
            inputs.forget(Path(folder))
    if as_json:
        for answer in answers:
            console.line(json.dumps({"task": answer.task, "share": answer.share, "shares": answer.shares}))
    else:
        console.table(["task", ">share", "input"], [[a.task, f"{100 * a.share:.1f}%", _shown(examples, i)] for i, a in enumerate(answers)])


def _shown(examples: Examples, number: int) -> str:
    if examples.texts is not None:
        return " ".join(examples.texts[number].split())
    return examples.place(number)


def _make(
    models: list[str], base: str, target: Path, gate: int, per_task: Optional[str], rename: Optional[list[str]], run: options.Running
) -> None:
    """Compute the routers of fine-tunes. The experts beside them are not used."""
    from peru_cli.checkpoints.names.translated import bring_together
    from peru_cli.checkpoints.resolve import default_task, open_model, split_arguments
    from peru_cli.finetunes.adapter import as_unpacked
    from peru_cli.finetunes.open import open_fine_tune
    from peru_cli.pack.routed.command import say
    from peru_cli.pack.routed.plan import Given
    from peru_cli.pack.routed.smile import Chosen
    from peru_cli.vectors.settings import streaming

    arguments = [(a.task or default_task(a.model), a.model) for a in split_arguments(models)]
    opened_base = open_model(base)
    together, said = bring_together([as_unpacked(open_fine_tune(model, opened_base)) for _, model in arguments], opened_base, rename or ())
    tasks = [(name, model) for (name, _), model in zip(arguments, together, strict=True)]
    smile = Chosen(Given({"--rank": gate, "--gate-rank": gate}, per_task=per_task))
    plan = smile.plan(opened_base, tasks)
    for warning in [*said, *plan.warnings]:
        console.note(warning)
    say(smile, plan)
    total = len(tasks) * plan.entries
    with console.progress(total, "routers") as progress, streaming(run.device, run.threads, None, progress.advance) as how:
        smile.make(plan, target, how, False, progress.step)


def _answer(place: Place, base: str, examples: Examples, run: options.Running, batch_size: Optional[int]) -> list[Answer]:
    from peru_cli.inference.models import pick_device
    from peru_cli.route.run import answer

    with console.progress(len(examples), "route", "inputs") as progress:
        return answer(place, base, examples, pick_device(run.device), run.threads, batch_size, progress.advance)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command(cls=options.Command)(route)
