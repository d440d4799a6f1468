"""`peru eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from peru_cli import options
from peru_cli.console import console
from peru_cli.errors import EXIT_GATE, UsageError

if TYPE_CHECKING:
    from peru_cli.checkpoints.places import Place
    from peru_cli.evaluate.plan import Comparison, Gate
    from peru_cli.evaluate.run import Score
    from peru_cli.evaluate.show import Row
    from peru_cli.evaluate.weights import WeightsReport
    from peru_cli.inference.data import Examples

COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@options.shared(
    lacks=["dry_run", "no_sync", "tile_entries"],
    panels={
        "Inputs": "base against data text max_samples context",
        "What to measure": "tau_jp scale negate scales",
        "Gates": "fail_below fail_above",
        "Output": "every csv plot report",
        "Running": "batch_size dtype trust_remote_code",
    },
)
def evaluate_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="[TASK=]X...", help="Artifacts, adapters, merges or checkpoints. A single one runs on all data.", show_default=False
        ),
    ],
    base: options.OptionalBase = None,
    against: Annotated[
        Optional[list[str]], typer.Option("--against", "-a", metavar="[TASK=]MODEL", help="The fine-tune to compare with. Repeatable.")
    ] = None,
    data: Annotated[
        Optional[list[str]],
        typer.Option(
            "--data",
            "-d",
            metavar="[TASK=]FILE",
            help="Examples: .jsonl, .csv, .parquet, .npz, a folder of images, NAME@SPLIT of `datasets`. Repeatable.",
        ),
    ] = None,
    text: Annotated[
        Optional[list[str]], typer.Option("--text", metavar="[TASK=]FILE", help="Plain text for language models. Repeatable.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every tensor. Default: repeated layers share a row.")] = False,
    tau_jp: Annotated[
        bool, typer.Option("--tau-jp", help="Measure how much each task vector disturbs each task: tau-Jp and the disentanglement error.")
    ] = False,
    scale: Annotated[
        float, typer.Option("--scale", "-s", metavar="S", help="With --tau-jp: scale of the task vectors in the disentanglement error.")
    ] = 1.0,
    negate: Annotated[
        bool, typer.Option("--negate", help="Subtract the task vector: accuracy on --data target=FILE and --data control=FILE.")
    ] = False,
    scales: Annotated[str, typer.Option("--scales", metavar="FROM:TO:STEP", help="With --negate: scales to try.")] = "0:1:0.05",
    fail_below: Annotated[
        Optional[list[str]],
        typer.Option(
            "--fail-below",
            metavar="METRIC=VALUE",
            help="Exit with 3 if any task is below: accuracy, f1, f1_micro, f1_macro, matthews, pearson, spearman, normalised, difference, "
            "agreement, cosine, sign, routed. Write shares as 95%. Repeatable.",
        ),
    ] = None,
    fail_above: Annotated[
        Optional[list[str]],
        typer.Option(
            "--fail-above",
            metavar="METRIC=VALUE",
            help="Exit with 3 if any task is above: kl, kl99, perplexity, error, mse, distance. Repeatable.",
        ),
    ] = None,
    max_samples: Annotated[
        Optional[int], typer.Option("--max-samples", min=1, metavar="N", help="Use the first N examples of each file.")
    ] = None,
    batch_size: Annotated[Optional[int], typer.Option("--batch-size", min=1, metavar="N", help="Examples per forward pass.")] = None,
    context: Annotated[
        Optional[int],
        typer.Option("--context", min=2, metavar="N", help="With --text: tokens per window. Default: 1024, or the model's maximum."),
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", metavar="fp32|bf16|fp16", help="Data type to compute in.")] = "fp32",
    trust_remote_code: options.TrustRemoteCode = False,
    csv: Annotated[Optional[Path], typer.Option("--csv", metavar="FILE", help="Write all numbers as a table, one metric per line.")] = None,
    plot: Annotated[
        Optional[Path],
        typer.Option("--plot", metavar="FILE.png|svg", help="Plot accuracy over bytes and errors by tensor, or tau-Jp."),
    ] = None,
    report: Annotated[
        Optional[Path], typer.Option("--report", metavar="FILE.html", help="Write tables and plots as one self-contained page.")
    ] = None,
    *,
    run: options.Running,
) -> None:
    """Measure how close an artifact, an adapter or a merge is to the fine-tune: weights, outputs, accuracy.

    peru eval a.safetensors --base BASE --against MODEL

    peru eval a.safetensors --base BASE --against MODEL --data test.jsonl --fail-below normalised=99%

    peru eval merged/ --data a=a.jsonl --data b=b.jsonl --against a=MODEL_A --against b=MODEL_B

    peru eval lm.safetensors --base BASE --against MODEL --text wiki.txt

    peru eval smile.safetensors --base BASE --data a=a.jsonl --data b=b.jsonl

    peru eval a=MODEL_A b=MODEL_B --base BASE --tau-jp --data a=a.jsonl --data b=b.jsonl

    peru eval a=MODEL_A --base BASE --negate --data target=a.jsonl --data control=b.jsonl --against control=MODEL_B
    """
    if dtype not in COMPUTE:
        raise UsageError(f"--dtype {dtype!r} is not one of {', '.join(COMPUTE)}")
    _check_output(csv, "--csv", run.force)
    _check_output(report, "--report", run.force)
    if plot is not None or report is not None:
        from peru_cli.reports.plots import check_plot, need_matplotlib

        need_matplotlib("--report") if plot is None else check_plot(plot)

    from peru_cli.checkpoints.local import inputs
    from peru_cli.checkpoints.resolve import default_task, split_arguments
    from peru_cli.evaluate import show as evalshow
    from peru_cli.evaluate.plan import check_comparisons, check_gates, parse_gate, weight_pairs
    from peru_cli.finetunes.open import find_routed, only_task
    from peru_cli.inference.reading import split_data
    from peru_cli.inference.remote_code import trusting

    gates = [parse_gate(given, True) for given in fail_below or []] + [parse_gate(given, False) for given in fail_above or []]
    named = {a.task or only_task(a.model) or default_task(a.model): a.model for a in split_arguments(models)}
    others = split_data(against or [], "--against")
    files = split_data([*(data or []), *(text or [])], "--data")
    if trust_remote_code and not files:
        raise UsageError("--trust-remote-code is for models that run on --data or --text", "leave it out: no model is run")
    everyone = [*named.values(), *others.values(), *([base] if base is not None else [])]
    if len(named) == 1 and (place := find_routed(next(iter(named.values())))) is not None:
        refused = {"--against": against, "--text": text, "--tau-jp": tau_jp, "--negate": negate, "--plot": plot, "--report": report}
        if wrong := [option for option, value in refused.items() if value]:
            raise UsageError(f"{', '.join(wrong)}: no meaning with routed experts", "leave it out: they take --data, gates and --csv")
        if base is None or not files:
            raise UsageError("routed experts run on their base, on the data of their tasks", "add --base BASE --data TASK=FILE")
        with trusting(everyone, trust_remote_code):
            _evaluate_routed(
                next(iter(named.values())),
                place,
                base,
                _read(files, [], max_samples),
                gates,
                csv,
                (dtype, run.device, run.threads, batch_size),
            )
        return
    if tau_jp or negate:
        if tau_jp and negate:
            raise UsageError("--tau-jp and --negate exclude each other", "use one of them")
        if gates or csv is not None or dtype != "fp32":
            raise UsageError("--tau-jp and --negate cannot be combined with gates, --csv or --dtype", "use --json; they compute in float32")
        from peru_cli.evaluate import interference_command as interference
        from peru_cli.merge.search.space import parse_range

        read = _read(files, text or [], max_samples)
        with trusting(everyone, trust_remote_code):
            if tau_jp:
                drawing = interference.tau_jp(named, base, read, scale, run.device, run.threads, batch_size)
            else:
                points = [float(point) for point in parse_range(scales, "--scales")]
                drawing = interference.negate(named, base, others, read, points, run.device, run.threads, batch_size)
        if plot is not None or report is not None:
            from peru_cli.evaluate import draw as evaldraw

            for path, said in evaldraw.draw_one(plot, report, drawing, named.values()):
                console.note(f"{said} {path}")
        return
    if not files and not others:
        raise UsageError("nothing to compare with, and no data to run on", "add --against MODEL, --data FILE, or both")
    if not files and base is None:
        raise UsageError("weights are compared relative to their base", "add --base BASE, or --data FILE to compare outputs")
    examples = _read(files, text or [], max_samples)
    check_gates(gates, examples, bool(others), base is not None)
    pairs = weight_pairs(named, others) if base is not None else {}
    comparisons = check_comparisons(named, examples, others) if files else []
    weights = _weights(pairs, base, run.device, run.threads) if base is not None and pairs else {}
    with trusting(everyone, trust_remote_code):
        scores = _run(comparisons, base, dtype, run.device, run.threads, batch_size, context) if files else []
    inputs.check()
    evalshow.show(scores, weights, every)
    missed = _tell(scores, weights, gates, csv)
    if plot is not None or report is not None:
        from peru_cli.evaluate import draw as evaldraw

        for path, said in evaldraw.draw(plot, report, scores, weights, [gate.option for gate in gates], missed):
            console.note(f"{said} {path}")
    _judge(gates, evalshow.numbers(scores, weights), missed)


def _tell(scores: Sequence[Score], weights: dict[str, WeightsReport], gates: list[Gate], csv: Optional[Path], **more: object) -> list[str]:
    """Write what --json and --csv ask for. Returns a line for each gate that was missed."""
    from peru_cli.evaluate import show as evalshow

    rows = evalshow.numbers(scores, weights)
    missed = evalshow.missed(gates, rows)
    console.result(evalshow.as_json(scores, weights, missed) | more)
    if csv is not None:
        evalshow.write_csv(csv, rows)
    return missed


def _judge(gates: list[Gate], rows: Sequence[Row], missed: list[str]) -> None:
    """Say which gates were passed and missed. Exits with 3 if any was missed."""
    from peru_cli.evaluate import show as evalshow

    for line in evalshow.passed(gates, rows):
        console.note(line)
    for line in missed:
        console.error(line)
    if missed:
        raise typer.Exit(EXIT_GATE)


def _evaluate_routed(
    model: str, place: Place, base: str, examples: dict[str, Examples], gates: list[Gate], csv: Optional[Path],
    how: tuple[str, str, Optional[int], Optional[int]],
) -> None:  # fmt: skip
    """Run routed experts and print what was found; `how` has the dtype, device, threads and batch size."""
    import torch

    from peru_cli.checkpoints.local import inputs
    from peru_cli.evaluate import show as evalshow
    from peru_cli.evaluate.routed import METRICS, evaluate_routed
    from peru_cli.inference.models import pick_device
    from peru_cli.inference.prepare import Settings

    if unmeasured := [gate.option for gate in gates if gate.metric not in METRICS]:
        raise UsageError(f"{unmeasured[0]} will not be measured for routed experts", "gates can be on accuracy and routed")
    dtype, device, threads, batch_size = how
    settings = Settings(getattr(torch, COMPUTE[dtype]), pick_device(device), threads=threads)
    with console.progress(sum(map(len, examples.values())), "eval", "examples") as progress:
        scores = evaluate_routed(model, place, base, examples, settings, batch_size, progress.advance, progress.step)
    inputs.check()
    evalshow.show(scores, {})
    evalshow.show_shares({score.task: score.shares for score in scores})
    missed = _tell(scores, {}, gates, csv, routing={score.task: score.shares for score in scores})
    _judge(gates, evalshow.numbers(scores, {}), missed)


def _check_output(path: Optional[Path], option: str, force: bool) -> None:
    from peru_cli.checkpoints.local.atomic import check_target

    if path is not None:
        try:
            check_target(path, force)
        except UsageError as error:
            raise UsageError(error.message.replace("-o", option), (error.hint or "").replace("-o", option) or None) from error


def _read(files: dict[str, str], texts: list[str], most: Optional[int]) -> dict[str, Examples]:
    from peru_cli.inference.reading import read_examples, read_text, split_data

    plain = set(split_data(texts, "--text").values())
    return {task: read_text(file) if file in plain else read_examples(file, most) for task, file in files.items()}


def _weights(pairs: dict[str, tuple[str, str]], base: str, device: str, threads: Optional[int]) -> dict[str, WeightsReport]:
    """Closeness of weights, by task. All comparisons are planned before anything is read."""
    from peru_cli.checkpoints.names.translated import bring_together
    from peru_cli.checkpoints.resolve import open_model
    from peru_cli.evaluate.weights import Weights
    from peru_cli.finetunes.open import open_fine_tune
    from peru_cli.vectors.settings import streaming

    opened = open_model(base)
    planned = {}
    for task, pair in pairs.items():
        together, said = bring_together([open_fine_tune(model, opened, task) for model in pair], opened)
        for line in dict.fromkeys(said):
            console.note(line)
        planned[task] = Weights(together[0], together[1], opened)
    total = sum(plan.entries for plan in planned.values())
    with console.progress(total, "weights") as progress, streaming(device, threads, None, progress.advance) as how:
        return {task: plan.measure(how) for task, plan in planned.items()}


def _run(
    comparisons: list[Comparison], base: Optional[str], dtype: str, device: str, threads: Optional[int], batch_size: Optional[int],
    context: Optional[int],
) -> list[Score]:  # fmt: skip
    import torch

    from peru_cli.evaluate.run import evaluate
    from peru_cli.inference.models import pick_device
    from peru_cli.inference.prepare import Settings

    settings = Settings(getattr(torch, COMPUTE[dtype]), pick_device(device), context, threads=threads)
    total = sum(len(c.examples) * (1 if c.against is None else 2) for c in comparisons)
    with console.progress(total, "eval", "examples") as progress:
        return evaluate(comparisons, base, settings, batch_size, progress.advance, progress.step)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("eval", cls=options.Command)(evaluate_command)
