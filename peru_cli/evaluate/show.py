"""What `peru eval` prints and writes."""

from __future__ import annotations

import csv as csvfile
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peru_cli.console import console, count, plural, si_bytes
from peru_cli.evaluate.plan import in_words
from peru_cli.reports.fold import fold

if TYPE_CHECKING:
    from peru_cli.evaluate.plan import Gate
    from peru_cli.evaluate.run import Score
    from peru_cli.evaluate.weights import Closeness, WeightsReport
    from peru_cli.inference.metrics import Estimate

Row = tuple[str, str, float, float, float]  # task, metric, value, bounds of the interval (NaN if there is none)
Table = tuple[str, list[str], list[list[str]]]  # title, columns for console.table, rows
_SHARES = ("accuracy", "routed", "given", "against_accuracy", "normalised", "agreement", "f1", "f1_micro", "f1_macro")
_TITLES = {
    "accuracy": "accuracy %", "routed": "routed right %", "given": "with its own head %",
    "against_accuracy": "against", "difference": "difference", "normalised": "normalised %", "f1": "F1 %",
    "f1_micro": "micro F1 %", "f1_macro": "macro F1 %", "pearson": "Pearson", "against_pearson": "against", "spearman": "Spearman",
    "against_spearman": "against", "mse": "MSE", "against_mse": "against", "distance": "distance", "matthews": "Matthews",
    "agreement": "agreement %", "kl": "KL", "kl99": "KL 99%", "perplexity": "perplexity", "against_perplexity": "against",
}  # fmt: skip
_INTERVALS = (
    "accuracy", "routed", "given", "difference", "normalised", "perplexity", "agreement", "f1_micro", "f1_macro", "pearson", "spearman",
    "mse",
)  # fmt: skip


def numbers(scores: Sequence[Score], weights: dict[str, WeightsReport]) -> list[Row]:
    """Every measured number, one metric a row. The mean over tasks of `normalised` has the task `mean`."""
    rows = [(s.task, name, e.value, e.low, e.high) for s in scores for name, e in s.metrics.items()]
    nan = math.nan
    for task, report in weights.items():
        rows += [(task, name, getattr(report.total, name), nan, nan) for name in ("error", "cosine", "sign")]
    if (mean := mean_of(scores)) is not None:
        rows.append(("mean", "normalised", mean.value, mean.low, mean.high))
    return rows


def mean_of(scores: Sequence[Score]) -> Estimate | None:
    from peru_cli.inference.metrics import mean_normalised

    compared = [score.compared for score in scores if score.compared is not None]
    return mean_normalised(compared) if len(compared) > 1 and len(compared) == len(scores) else None


def missed(gates: Sequence[Gate], rows: Sequence[Row]) -> list[str]:
    """A line for each task that misses a gate. A metric that was not measured counts as missed."""
    lines = []
    for gate in gates:
        found = [(task, value) for task, metric, value, _, _ in rows if metric == gate.metric]
        lines += [
            f"{task}: {gate.metric} is {in_words(gate.metric, value)} ({gate.option})" for task, value in found if gate.missed_by(value)
        ]
        if not found:
            lines.append(f"{gate.metric} was not measured ({gate.option})")
    return lines


def passed(gates: Sequence[Gate], rows: Sequence[Row]) -> list[str]:
    """A line for each gate that every task passed, with the value closest to it."""
    lines = []
    for gate in gates:
        found = [(value, task) for task, metric, value, _, _ in rows if metric == gate.metric]
        if found and not any(gate.missed_by(value) for value, _ in found):
            value, task = min(found) if gate.below else max(found)
            lines.append(
                f"passed {gate.option}: {gate.metric} is {in_words(gate.metric, value)}" + (f" at worst ({task})" if len(found) > 1 else "")
            )
    return lines


def cell(name: str, estimate: Estimate) -> str:
    """A number as shown in the table: shares in per cent, differences in points."""
    scale, digits = (100, 2) if name in (*_SHARES, "difference") else (1, 4)
    sign = "+" if name == "difference" else ""

    def shown(value: float) -> str:
        return f"{scale * value:{sign}.{digits}f}" if scale == 100 else f"{value:.{digits}g}"

    text = shown(estimate.value)
    if name in _INTERVALS and math.isfinite(estimate.low):
        text += f" [{shown(estimate.low)}, {shown(estimate.high)}]"
    return text


def score_tables(scores: Sequence[Score]) -> list[Table]:
    """A table for classifiers and one for language models, if there are any."""
    tables = []
    for language in (False, True):
        chosen = [score for score in scores if ("perplexity" in score.metrics) == language]
        if not chosen:
            continue
        two = any("f1" in score.metrics and score.classes == 2 for score in chosen)
        names = [n for n in _TITLES if any(n in s.metrics for s in chosen) and (n not in ("f1", "matthews") or two)]
        columns = ["task", f">{chosen[0].unit}", *(f">{_TITLES[name]}" for name in names), ">bytes"]
        rows = []
        for score in chosen:
            size = si_bytes(score.nbytes) + (f" of {si_bytes(score.against_bytes)}" if score.against_bytes else "")
            cells = [cell(name, score.metrics[name]) if name in score.metrics else "" for name in names]
            rows.append([score.task, count(score.n), *cells, size])
        tables.append(("", columns, rows))
    return tables


def _closeness(name: str, found: Closeness) -> list[str]:
    return [name, f"{found.error:.4g}", f"{found.cosine:.4f}", f"{100 * found.sign:.2f}", count(found.changed)]


WEIGHT_COLUMNS = [">error", ">cosine", ">same sign %", ">changed"]


def together(name: str, tensors: Sequence[Closeness]) -> Closeness:
    """Several tensors combined into one."""
    total = replace(tensors[0], name=name)
    for tensor in tensors[1:]:
        total.add(tensor)
    return total


def weight_tables(weights: dict[str, WeightsReport], by_tensor: bool, every: bool = True) -> list[Table]:
    """Closeness by task. With `by_tensor`, a table of tensors for each task, the total first.

    Repeated layers share a row unless `every`."""
    tables = []
    if by_tensor:
        for task, report in weights.items():
            groups = fold(report.tensors, lambda tensor: tensor.name, lambda tensor: tensor.name if every else tensor.entries)
            rows = [_closeness(name, together(name, members)) for name, members in groups]
            tables.append((task if len(weights) > 1 else "", ["tensor", *WEIGHT_COLUMNS], [_closeness("total", report.total), *rows]))
    else:
        tables.append(("", ["weights", *WEIGHT_COLUMNS], [_closeness(task, report.total) for task, report in weights.items()]))
    return tables


def show(scores: Sequence[Score], weights: dict[str, WeightsReport], every: bool = False) -> None:
    """Print the tables. Tables of tensors are printed only if no model was run."""
    for title, columns, rows in [*score_tables(scores), *(weight_tables(weights, not scores, every) if weights else [])]:
        console.table(columns, rows, title)
    for task, report in weights.items():
        if not scores and report.heads:
            different = [name for name, equal in report.heads.items() if not equal]
            said = f"differ: {', '.join(different[:4])}" if different else "are equal"
            console.line(f"{task}: {plural(len(report.heads), 'tensor')} that the base lacks {said}")
        if report.total.not_finite:
            console.line(f"{task}: {plural(report.total.not_finite, 'difference')} not finite and not counted")
    if (mean := mean_of(scores)) is not None:
        console.line(f"mean normalised accuracy {cell('normalised', mean)} %")
    for note in notes(scores, bool(weights)):
        console.remark(note)
    for score in scores:
        for warning in score.warnings:
            console.warn(f"{score.task}: {warning}" if score.task else warning)


def show_shares(shares: dict[str, dict[str, float]]) -> None:
    """Print which task answered, in per cent of each data set's inputs."""
    tasks = list(next(iter(shares.values())))
    rows = [[data, *(f"{100 * found[task]:.1f}" for task in tasks)] for data, found in shares.items()]
    console.table(["routed to, % of inputs", *(f">{task}" for task in tasks)], rows)


def notes(scores: Sequence[Score], weights: bool) -> list[str]:
    """What a reader of the tables should know."""
    said = []
    if any("distance" in score.metrics for score in scores):
        said.append("distance is the mean squared difference of both models' outputs")
    if any("kl" in score.metrics for score in scores):
        said.append("95% intervals; KL in nats, from the predictions of --against to those of the model")
    elif scores:
        said.append("95% intervals")
    if any(score.shared for score in scores):
        said.append(f"bytes include what tasks share; in all {si_bytes(bytes_in_all(scores))}")
    if weights:
        said.append("weights relative to the base: error 0 is equal, 1 is as far off as the base itself")
        said.append("same sign %: of the entries that the fine-tune changed, the share that moves the same way")
    return said


def bytes_in_all(scores: Sequence[Score]) -> int:
    """Bytes of all models that were run. A pack or a merge counts once for all its tasks, a model run on several data sets once."""
    shared = {score.shared: score.shared_bytes for score in scores if score.shared}
    own = {score.place: score.nbytes - score.shared_bytes for score in scores}
    return sum(shared.values()) + sum(own.values())


def as_json(scores: Sequence[Score], weights: dict[str, WeightsReport], failed: Sequence[str]) -> dict[str, Any]:
    """Everything for machines. NaN becomes null."""
    mean = mean_of(scores)
    return {
        "tasks": [
            {
                "task": s.task, "model": s.model, "against": s.against, "kind": s.kind, s.unit: s.n, "bytes": s.nbytes,
                "own_bytes": s.nbytes - s.shared_bytes, "shared_bytes": s.shared_bytes, "shared": s.shared or None,
                "against_bytes": s.against_bytes, "metrics": {name: _estimate(e) for name, e in s.metrics.items()},
                "warnings": s.warnings,
            }
            for s in scores
        ],
        "bytes_in_all": bytes_in_all(scores),
        "mean_normalised": None if mean is None else _estimate(mean),
        "weights": {
            task: {
                "total": _json_closeness(report.total),
                "tensors": [_json_closeness(tensor) for tensor in report.tensors],
                "heads_equal": report.heads,
            }
            for task, report in weights.items()
        },
        "missed": list(failed),
    }  # fmt: skip


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _estimate(estimate: Estimate) -> dict[str, float | None]:
    return {name: _number(value) for name, value in asdict(estimate).items() if name == "value" or math.isfinite(value)}


def _json_closeness(found: Closeness) -> dict[str, Any]:
    return {
        "name": found.name, "entries": found.entries, "error": _number(found.error), "cosine": _number(found.cosine), "sign": found.sign,
        "changed": found.changed, "not_finite": found.not_finite,
    }  # fmt: skip


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write task, metric, value, low, high. Bounds are empty if there is no interval."""
    text = io.StringIO(newline="")
    writer = csvfile.writer(text, lineterminator="\n")
    writer.writerow(["task", "metric", "value", "low", "high"])
    for task, metric, *values in rows:
        writer.writerow([task, metric, *("" if math.isnan(value) else repr(value) for value in values)])
    path.write_text(text.getvalue(), "utf-8")
