"""`peru eval`: plan the comparisons, check everything that headers and data show, then run the models task by task."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch

from peru_cli.errors import Mismatch
from peru_cli.evaluate.plan import Comparison
from peru_cli.inference import metrics
from peru_cli.inference.data import Array, Examples, class_doubts, label_order
from peru_cli.inference.eval_model import Base, open_eval_model
from peru_cli.inference.inputs import BATCH_SIZES, class_logits
from peru_cli.inference.metrics import Compared, Estimate
from peru_cli.inference.models import IMAGE, LABELS, TEXT, VALUE, problem_of
from peru_cli.inference.prepare import Loaded, Prepared, Settings, prepare
from peru_cli.inference.tokens import TokenSums, token_logits
from peru_cli.streaming.engine import available_threads

Advance = Callable[[int], None]
_SMALL = 4_000_000  # parameters; for smaller models one thread is faster than several that wait for each other
_MOST_NATS = math.log(sys.float_info.max)  # its exponential is still finite
_ENOUGH = 30  # examples needed before an accuracy near chance means anything


@dataclass
class Score:
    """The results for a task. Metrics have the names that --fail-below takes. Shares are between 0 and 1, KL is in nats."""

    task: str
    model: str
    against: str | None
    kind: str
    n: int  # examples, or tokens for a language model
    unit: str
    nbytes: int  # everything needed to rebuild it, except a base that is not a merge
    place: str  # where its own bytes are
    shared_bytes: int  # the part that other tasks need too
    shared: str  # where that part is: a pack or a merge, or ""
    against_bytes: int | None
    metrics: dict[str, Estimate] = field(default_factory=dict)
    compared: Compared | None = None
    classes: int = 0  # for a classifier that picks one of several classes
    warnings: list[str] = field(default_factory=list)


def evaluate(
    comparisons: Sequence[Comparison],
    base: str | None,
    settings: Settings,
    batch_size: int | None,
    advance: Advance,
    step: Callable[[str], None],
) -> list[Score]:
    """Run all comparisons. The base is read once. One task's models are in memory at a time.

    Raises BadFile, Mismatch or UsageError before the first forward pass for everything that headers and side files show."""
    found, threads = [], torch.get_num_threads()
    with Base(base) if base is not None else nullcontext() as opened:
        prepared = [_prepare(comparison, opened, settings) for comparison in comparisons]
        try:
            for comparison, (ours, theirs) in zip(comparisons, prepared, strict=True):
                step(comparison.task)
                found.append(_evaluate(comparison, ours, theirs, settings, batch_size, advance))
        finally:
            torch.set_num_threads(threads)
    return found


def _threads(parameters: int) -> int:
    """The best number of threads for a model of this size."""
    return 1 if parameters < _SMALL else available_threads()


@contextmanager
def threads_for(parameters: int, wanted: int | None) -> Iterator[None]:
    """Let torch use the threads that the user asks for, or those that suit the model's size."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or _threads(parameters))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(comparison: Comparison, base: Base | None, settings: Settings) -> tuple[Prepared, Prepared | None]:
    """A task's models by their headers, with encoded examples."""
    examples, task = comparison.examples, comparison.task
    subject = open_eval_model(comparison.model, task, base)
    other = open_eval_model(comparison.against, task, base) if comparison.against is not None else None
    others = [other.files] if other is not None else []
    if base is not None:
        others.append({name: path.read_bytes() for name, path in base.checkpoint.side_files.items()})
    ours = prepare(subject, examples, others, settings.context)
    if ours.kind in (TEXT, IMAGE) and problem_of(ours.config) == VALUE and ours.config.num_labels != 1:
        raise Mismatch(f"{ours.label} predicts {ours.config.num_labels} values at once", "peru measures regressions of one value")
    if other is None:
        return ours, None
    theirs = prepare(other, examples, others[1:], settings.context, like=ours)
    if theirs.kind != ours.kind:
        raise Mismatch(f"{ours.label} is run as a {ours.kind}, {theirs.label} as a {theirs.kind}: they cannot be compared")
    if ours.kind in (TEXT, IMAGE) and theirs.config.num_labels != ours.config.num_labels:
        raise Mismatch(f"{ours.label} has {ours.config.num_labels} labels, {theirs.label} has {theirs.config.num_labels}")
    if ours.kind in (TEXT, IMAGE) and problem_of(theirs.config) != problem_of(ours.config):
        said = f"{ours.label} gives {problem_of(ours.config)}, {theirs.label} {problem_of(theirs.config)}"
        raise Mismatch(f"{said}: they cannot be compared", "problem_type in their config.json decides")
    if ours.kind in (TEXT, IMAGE) and examples.by_number(ours.config) and label_order(ours.config, theirs.config) is not None:
        raise Mismatch(
            f"{ours.label} and {theirs.label} have the same labels in different orders, so the numbers in {examples.source} are ambiguous",
            "write the labels' names instead of their numbers",
        )
    return ours, theirs


def _evaluate(
    comparison: Comparison, ours: Prepared, theirs: Prepared | None, settings: Settings, batch_size: int | None, advance: Advance
) -> Score:
    subject, examples = ours.subject, comparison.examples
    torch.set_num_threads(settings.threads or _threads(subject.parameters))
    score = Score(
        comparison.task, comparison.model, comparison.against, ours.kind, len(examples), "examples",
        subject.nbytes + subject.shared_bytes, subject.place, subject.shared_bytes, subject.shared,
        theirs.subject.nbytes + theirs.subject.shared_bytes if theirs is not None else None,
    )  # fmt: skip
    built = ours.build(settings), theirs.build(settings) if theirs is not None else None
    size = batch_size or BATCH_SIZES[ours.kind]
    if ours.kind in (TEXT, IMAGE):
        _score_logits(score, *built, examples, size, advance)
    else:
        _score_tokens(score, *built, examples, size, advance)
    return score


def _score_logits(score: Score, ours: Loaded, theirs: Loaded | None, examples: Examples, batch_size: int, advance: Advance) -> None:
    """Evaluate a classifier or a regression on all examples, according to the type of its head."""
    config = ours.model.config
    got = class_logits(ours.model, ours.inputs, batch_size, advance)
    _require_finite(got, ours.label)
    wanted = None
    if theirs is not None:
        wanted = class_logits(theirs.model, theirs.inputs, batch_size, advance)
        if (order := label_order(config, theirs.model.config)) is not None:
            wanted = wanted[:, order]
        _require_finite(wanted, theirs.label)
    problem = problem_of(config)
    if problem == VALUE:
        _score_values(score, got[:, 0].astype(np.float64), None if wanted is None else wanted[:, 0].astype(np.float64), examples.values())
    elif problem == LABELS:
        _score_labels(score, got, wanted, examples.label_sets(config))
    else:
        score.classes = config.num_labels
        _score_classes(score, got, wanted, examples.class_numbers(config))
        score.warnings += class_doubts(examples, config)


def _score_classes(score: Score, got: Array, wanted: Array | None, labels: Array | None) -> None:
    """One class of several: logits (n, classes) of both models, class indices (n,)."""
    predicted = got.argmax(-1)
    if labels is not None:
        table = metrics.confusion(predicted, labels, score.classes)
        accuracy = score.metrics["accuracy"] = metrics.wilson(int(np.trace(table)), len(labels))
        score.metrics["f1"] = Estimate(metrics.f1(table))
        score.metrics["matthews"] = Estimate(metrics.matthews(table))
        if len(labels) >= _ENOUGH and accuracy.low <= 1 / score.classes:
            score.warnings.append(
                f"{100 * accuracy.value:.1f}% is near chance, {100 / score.classes:.1f}% for {score.classes} classes: "
                "is this the model for this task, and are the classes numbered as in the model?"
            )
    if wanted is None:
        return
    decided = wanted.argmax(-1)
    if labels is not None:
        _compare_right(score, predicted == labels, decided == labels)
    score.metrics["agreement"] = metrics.wilson(int(np.count_nonzero(predicted == decided)), len(predicted))
    _add_kl(score, metrics.kl_divergence(wanted, got))


def _score_labels(score: Score, got: Array, wanted: Array | None, labels: Array | None) -> None:
    """Independent labels, each with probability sigmoid(logit): logits (n, labels) of both models, bool (n, labels)."""
    predicted = got > 0
    if labels is not None:
        right = (predicted == labels).all(-1)
        score.metrics["accuracy"] = metrics.wilson(int(right.sum()), len(right))
        score.metrics["f1_micro"], score.metrics["f1_macro"] = metrics.f1_of_labels(predicted, labels)
    if wanted is None:
        return
    decided = wanted > 0
    if labels is not None:
        _compare_right(score, right, (decided == labels).all(-1))
    score.metrics["agreement"] = metrics.wilson(int((predicted == decided).all(-1).sum()), len(predicted))
    _add_kl(score, metrics.kl_bernoulli(wanted, got))


def _compare_right(score: Score, ours: Array, theirs: Array) -> None:
    score.compared = metrics.compare_right(ours, theirs)
    score.metrics["against_accuracy"] = metrics.wilson(score.compared.both + score.compared.theirs, score.compared.n)
    score.metrics["difference"] = score.compared.difference()
    score.metrics["normalised"] = score.compared.normalised()


def _score_values(score: Score, got: Array, wanted: Array | None, labels: Array | None) -> None:
    """A regression: float64 (n,) of both models and of the labels."""
    if labels is not None:
        score.metrics["pearson"], score.metrics["spearman"] = metrics.correlations(got, labels)
        score.metrics["mse"] = metrics.bootstrap_mean((got - labels) ** 2)
    if wanted is None:
        return
    if labels is not None:
        score.metrics["against_pearson"], score.metrics["against_spearman"] = metrics.correlations(wanted, labels)
        score.metrics["against_mse"] = metrics.bootstrap_mean((wanted - labels) ** 2)
    score.metrics["distance"] = metrics.bootstrap_mean((got - wanted) ** 2)


def _add_kl(score: Score, kl: Array) -> None:
    score.metrics["kl"] = metrics.bootstrap_mean(kl)
    score.metrics["kl99"] = Estimate(float(np.quantile(kl, 0.99)))


def _require_finite(logits: Array, label: str) -> None:
    if not np.isfinite(logits).all():
        raise Mismatch(f"{label}: some outputs are NaN or infinite", "try --dtype fp32; if that does not help, the weights are broken")


def _score_tokens(score: Score, ours: Loaded, theirs: Loaded | None, examples: Examples, batch_size: int, advance: Advance) -> None:
    """Both models run on each batch together: probabilities of a whole vocabulary for every token would not fit in memory."""
    device = next(ours.model.parameters()).device
    sums = TokenSums()
    with torch.inference_mode():
        for numbers, batch in ours.inputs.batches(batch_size, device):
            mine, came = token_logits(ours, batch)
            reference = token_logits(theirs, batch)[0] if theirs is not None else None
            if reference is not None and reference.shape != mine.shape:
                raise Mismatch(f"{ours.label} has a vocabulary of {mine.shape[1]} tokens, the other of {reference.shape[1]}")
            sums.add(came, mine, reference)
            advance(len(numbers))
    loss = sums.all("ours")
    _require_finite(loss, ours.label)
    score.n, score.unit = len(loss), "tokens"
    score.metrics["perplexity"] = _exponential(metrics.bootstrap_mean(loss))
    if theirs is not None:
        _require_finite(sums.all("theirs"), theirs.label)
        score.metrics["against_perplexity"] = _exponential(metrics.bootstrap_mean(sums.all("theirs")))
        agreed = sums.all("same")
        score.metrics["agreement"] = metrics.wilson(int(agreed.sum()), len(agreed))
        _add_kl(score, sums.all("kl"))


def _exponential(mean: Estimate) -> Estimate:
    return Estimate(*(math.exp(nats) if nats < _MOST_NATS else math.inf for nats in (mean.value, mean.low, mean.high)))
