"""Metrics on predictions and logits, with confidence intervals, in float64 NumPy.

Every interval is for 95%. Shares get Wilson's interval (Wilson 1927). Differences and ratios of two models on the
same examples are bootstrapped in pairs (Efron 1979, percentiles). Means are bootstrapped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Z = 1.959963984540054  # the normal distribution's 97.5% point
REPLICATES = 2000
_TAILS = (0.025, 0.975)
_SEED = 0
_MANY = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number and the bounds of its 95% confidence interval (NaN if there is none)."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


def wilson(right: int, n: int) -> Estimate:
    """A share of n examples with Wilson's score interval."""
    share = right / n
    middle = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * np.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low, high = float(middle - half), float(middle + half)
    return Estimate(share, 0.0 if right == 0 else low, 1.0 if right == n else high)


def _generator() -> np.random.Generator:
    return np.random.Generator(np.random.Philox(_SEED))


def _interval(value: float, replicates: Array) -> Estimate:
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return Estimate(value)
    low, high = np.quantile(finite, _TAILS)
    return Estimate(value, float(low), float(high))


def bootstrap_mean(values: Array) -> Estimate:
    """Mean of values (n,) with a bootstrap interval. Above 10,000 values the normal interval is used, which is then equal."""
    n, made = len(values), np.empty(REPLICATES)
    if n > _MANY:
        mean, half = float(values.mean()), Z * float(values.std(ddof=1)) / np.sqrt(n)
        return Estimate(mean, mean - half, mean + half)
    generator = _generator()
    for i in range(REPLICATES):
        made[i] = values[generator.integers(0, n, n)].mean()
    return _interval(float(values.mean()), made)


@dataclass(frozen=True)
class Compared:
    """Accuracies of two models on the same examples: how many both, only ours, only theirs, and neither got right."""

    both: int
    ours: int
    theirs: int
    neither: int

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.both + self.ours + self.theirs + self.neither

    def replicates(self) -> Array:
        """Bootstrapped pairs of accuracies (ours, theirs), (REPLICATES, 2): resampling examples resamples these four counts."""
        counts = np.array([self.both, self.ours, self.theirs, self.neither])
        drawn = _generator().multinomial(self.n, counts / self.n, REPLICATES)
        return np.stack([drawn[:, 0] + drawn[:, 1], drawn[:, 0] + drawn[:, 2]], axis=1) / self.n

    def difference(self) -> Estimate:
        """Our accuracy - theirs."""
        made = self.replicates()
        return _interval((self.ours - self.theirs) / self.n, made[:, 0] - made[:, 1])

    def normalised(self) -> Estimate:
        """Our accuracy / theirs; NaN if theirs is 0."""
        return mean_normalised([self])


def compare_right(ours: Array, theirs: Array) -> Compared:
    """Count agreement of two bool arrays (n,) that say which examples were right."""
    both = int(np.count_nonzero(ours & theirs))
    return Compared(both, int(ours.sum()) - both, int(theirs.sum()) - both, int(np.count_nonzero(~(ours | theirs))))


def mean_normalised(tasks: list[Compared]) -> Estimate:
    """Mean over tasks of our accuracy / theirs, as the PERU paper reports it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = [np.float64(t.both + t.ours) / np.float64(t.both + t.theirs) for t in tasks]
        made = np.stack([ratio[:, 0] / ratio[:, 1] for ratio in (t.replicates() for t in tasks)])
    return _interval(float(np.mean(values)), made.mean(axis=0))


def confusion(predicted: Array, labels: Array, classes: int) -> Array:
    """Counts by label (rows) and prediction (columns), int64 (classes, classes)."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def f1(table: Array) -> float:
    """F1 of class 1 for two classes, otherwise the mean over all classes (macro). An undefined F1 counts as 0.

    Classes that occur neither as label nor as prediction are left out of the mean."""
    hits, either = np.diag(table), table.sum(axis=0) + table.sum(axis=1)
    if len(table) == 2:
        return float(2 * hits[1] / either[1]) if either[1] else 0.0
    seen = either > 0
    return float((2 * hits[seen] / either[seen]).mean())


def matthews(table: Array) -> float:
    """Matthews' correlation for any number of classes (Gorodkin 2004); 0 if it is undefined."""
    table = table.astype(np.float64)
    n, right = table.sum(), np.trace(table)
    predicted, labels = table.sum(axis=0), table.sum(axis=1)
    below = (n * n - predicted @ predicted) * (n * n - labels @ labels)
    return float((right * n - predicted @ labels) / np.sqrt(below)) if below > 0 else 0.0


def log_softmax(logits: Array) -> Array:
    """Natural logarithms of probabilities over the last axis, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]


def kl_divergence(reference: Array, other: Array) -> Array:
    """KL(reference || other) of each row of logits (n, labels), in nats; exactly 0 for equal logits."""
    p, q = log_softmax(reference), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(axis=-1)  # type: ignore[no-any-return]


def kl_bernoulli(reference: Array, other: Array) -> Array:
    """KL(reference || other) of independent labels, summed over labels, for each row of logits (n, labels), in nats."""

    def logs(logits: Array) -> tuple[Array, Array]:
        wide = logits.astype(np.float64)
        return -np.logaddexp(0, -wide), -np.logaddexp(0, wide)

    (yes, no), (other_yes, other_no) = logs(reference), logs(other)
    return (np.exp(yes) * (yes - other_yes) + np.exp(no) * (no - other_no)).sum(axis=-1)  # type: ignore[no-any-return]


def f1_of_labels(predicted: Array, wanted: Array) -> tuple[Estimate, Estimate]:
    """Micro and macro F1 of independent labels, bool (n, labels), with examples bootstrapped.

    Micro counts all decisions together. Macro is the mean over labels, without those neither wanted nor predicted."""
    hits, either = (predicted & wanted).astype(np.float64), predicted.astype(np.float64) + wanted

    def both(hits: Array, either: Array) -> tuple[float, float]:
        seen = either > 0
        macro = float((2 * hits[seen] / either[seen]).mean()) if seen.any() else 0.0
        return (float(2 * hits.sum() / either.sum()) if seen.any() else 0.0), macro

    micro, macro = both(hits.sum(0), either.sum(0))
    n, generator, made = len(hits), _generator(), np.empty((REPLICATES, 2))
    if n > _MANY:
        return Estimate(micro), Estimate(macro)
    for i in range(REPLICATES):
        counts = np.bincount(generator.integers(0, n, n), minlength=n).astype(np.float64)
        made[i] = both(counts @ hits, counts @ either)
    return _interval(micro, made[:, 0]), _interval(macro, made[:, 1])


def ranks(values: Array) -> Array:
    """Ranks from 1 on, ties with their mean rank; float64 (n,)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def correlation(x: Array, y: Array) -> float:
    """Pearson's correlation, float64; NaN if one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def correlations(x: Array, y: Array) -> tuple[Estimate, Estimate]:
    """Pearson's and Spearman's correlation of float64 (n,), with pairs bootstrapped.

    Above 10,000 pairs the intervals come from Fisher's z (for Spearman's with the error of Bonett and Wright 2000)."""
    found, n = (correlation(x, y), correlation(ranks(x), ranks(y))), len(x)
    if n > _MANY:
        return _by_fisher(found[0], math.sqrt(1 / (n - 3))), _by_fisher(found[1], math.sqrt((1 + found[1] ** 2 / 2) / (n - 3)))
    generator, made = _generator(), np.empty((REPLICATES, 2))
    for i in range(REPLICATES):
        drawn = generator.integers(0, n, n)
        made[i] = correlation(x[drawn], y[drawn]), correlation(ranks(x[drawn]), ranks(y[drawn]))
    return _interval(found[0], made[:, 0]), _interval(found[1], made[:, 1])


def _by_fisher(r: float, error: float) -> Estimate:
    """A correlation with its interval, given the standard error of its atanh."""
    if not abs(r) < 1:
        return Estimate(r)
    return Estimate(r, math.tanh(math.atanh(r) - Z * error), math.tanh(math.atanh(r) + Z * error))
