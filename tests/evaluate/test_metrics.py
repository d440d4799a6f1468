"""Metrics against closed forms, scipy and scikit-learn; weights against plain float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peru_cli.checkpoints.resolve import open_model
from peru_cli.evaluate.weights import Weights, WeightsReport
from peru_cli.finetunes.open import open_fine_tune
from peru_cli.inference import metrics
from peru_cli.vectors.settings import streaming
from tests.conftest import random_pair, save

SOME = np.random.default_rng(5)


def test_wilson_equals_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, n in ((0, 7), (7, 7), (1, 9), (790, 800), (5000, 10_000)):
        wanted = stats.binomtest(right, n).proportion_ci(method="wilson")
        got = metrics.wilson(right, n)
        np.testing.assert_allclose((got.low, got.high), (wanted.low, wanted.high), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_f1_and_matthews_equal_scikit_learns(classes: int) -> None:
    scores = pytest.importorskip("sklearn.metrics")
    labels, predicted = SOME.integers(0, classes, (2, 300))
    predicted = np.where(SOME.random(300) < 0.4, labels, predicted)
    table = metrics.confusion(predicted, labels, classes)
    assert (table == scores.confusion_matrix(labels, predicted)).all()
    average = "binary" if classes == 2 else "macro"
    assert metrics.f1(table) == pytest.approx(scores.f1_score(labels, predicted, average=average), rel=1e-12)
    assert metrics.matthews(table) == pytest.approx(scores.matthews_corrcoef(labels, predicted), rel=1e-12)


def test_matthews_and_f1_of_two_classes_by_hand() -> None:
    table = np.array([[50, 10], [5, 35]])  # 50 and 35 right
    assert metrics.f1(table) == pytest.approx(2 * 35 / (2 * 35 + 10 + 5))
    assert metrics.matthews(table) == pytest.approx((50 * 35 - 10 * 5) / np.sqrt(60 * 40 * 55 * 45))
    assert metrics.matthews(np.array([[9, 0], [3, 0]])) == 0.0  # only one class: undefined, counted as 0
    assert metrics.f1(np.array([[9, 0], [0, 0]])) == 0.0


def test_kl_is_the_sum_over_probabilities_and_zero_for_equal_logits() -> None:
    ours, theirs = SOME.normal(size=(2, 50, 6)).astype(np.float32) * 3
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (theirs, ours))
    np.testing.assert_allclose(metrics.kl_divergence(theirs, ours), (p * np.log(p / q)).sum(1), rtol=1e-9)
    assert (metrics.kl_divergence(ours, ours.copy()) == 0).all()
    extreme = np.array([[1e4, -1e4, 0.0]], np.float32)
    assert metrics.kl_divergence(extreme, np.zeros((1, 3), np.float32)) == pytest.approx(np.log(3))


def test_paired_intervals_see_what_unpaired_ones_cannot() -> None:
    # 800 examples, 792 equal for both: 0.2 points less is not significant; 40 of 800 lost and none won is.
    little, much = metrics.Compared(700, 3, 5, 92), metrics.Compared(660, 0, 40, 100)
    assert little.difference().value == -2 / 800 and little.difference().low < 0 < little.difference().high
    # The exact variance of a paired difference is (b + c - (b - c)^2 / n) / n^2; 2,000 replicates come within a tenth.
    for found in (little, much):
        b, c, n = found.ours, found.theirs, found.n
        half = metrics.Z * np.sqrt(b + c - (b - c) ** 2 / n) / n
        got = found.difference()
        assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.1)
    assert much.difference().high < 0 and much.normalised().high < 1
    assert much.normalised().value == pytest.approx(660 / 700)
    same = metrics.Compared(700, 0, 0, 100)
    assert same.difference() == metrics.Estimate(0.0, 0.0, 0.0) and same.normalised() == metrics.Estimate(1.0, 1.0, 1.0)
    assert metrics.mean_normalised([much, same]).value == pytest.approx((660 / 700 + 1) / 2)


def test_compare_right_counts_all_four_cases() -> None:
    ours, theirs = np.array([1, 1, 1, 0, 0, 0], bool), np.array([1, 0, 0, 1, 0, 0], bool)
    assert metrics.compare_right(ours, theirs) == metrics.Compared(1, 2, 1, 2)


@pytest.mark.parametrize("n", [400, 20_000])
def test_the_interval_of_a_mean_is_normal(n: int) -> None:
    values = SOME.exponential(size=n)
    got, half = metrics.bootstrap_mean(values), metrics.Z * values.std() / np.sqrt(n)
    assert got.value == values.mean() and got == metrics.bootstrap_mean(values)  # the same at each call
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.1)


def measure(ours: Path, theirs: Path, base: Path, threads: int = 2) -> WeightsReport:
    opened = open_model(str(base))
    with streaming("cpu", threads, 1 << 14, lambda n: None) as how:
        return Weights(open_fine_tune(str(ours), opened), open_fine_tune(str(theirs), opened), opened).measure(how)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
def test_closeness_of_weights_is_plain_arithmetic(tmp_path: Path, dtype: str) -> None:
    base, fine = random_pair(dtype)
    ours = {n: (t + torch.randn(t.shape).to(t.dtype) * 0.003 if t.is_floating_point() else t) for n, t in fine.items()}
    fine["head"], ours["head"] = torch.ones(3), torch.ones(3)
    paths = [save(tensors, tmp_path / f"{name}.safetensors") for name, tensors in (("x", ours), ("m", fine), ("b", base))]
    report = measure(*paths)
    names = [n for n in base if base[n].is_floating_point()]
    x, m, b = (torch.cat([t[n].double().view(-1) for n in names]) for t in (ours, fine, base))
    total = report.total
    assert total.entries == len(b) and total.changed == int((m != b).sum()) and report.heads == {"head": True}
    assert total.error == pytest.approx(float((x - m).norm() / (m - b).norm()), rel=1e-12)
    assert total.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(x - b, m - b, dim=0)), rel=1e-12)
    assert total.sign == float(((x - b).sign() == (m - b).sign())[m != b].double().mean())
    assert report.tensors == measure(*paths, threads=1).tensors
    one = next(t for t in report.tensors if t.name == "embed.weight")
    wanted = (ours["embed.weight"].double() - fine["embed.weight"].double()).norm() / (
        fine["embed.weight"] - base["embed.weight"]
    ).double().norm()
    assert one.error == pytest.approx(float(wanted), rel=1e-2 if dtype == "bf16" else 1e-6)  # here the denominator was rounded
    same = measure(paths[1], paths[1], paths[2]).total
    assert (same.error, same.sign) == (0.0, 1.0) and same.cosine == pytest.approx(1.0, rel=1e-12)


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path: Path) -> None:
    base, fine = random_pair("fp32")
    ours = {n: t.clone() for n, t in fine.items()}
    ours["embed.weight"][0, 0], fine["embed.weight"][5, 5] = float("nan"), float("inf")
    report = measure(*(save(t, tmp_path / f"{n}.safetensors") for n, t in (("x", ours), ("m", fine), ("b", base))))
    assert report.total.not_finite == 2 and report.total.error == 0.0


def test_an_artifacts_error_is_the_one_that_prune_printed(tmp_path: Path, peru: Callable[..., str]) -> None:
    base, fine = (save(t, tmp_path / f"{n}.safetensors") for t, n in zip(random_pair("fp32"), ("b", "m"), strict=True))
    peru("prune", fine, "-b", base, "-o", tmp_path / "a.safetensors", "--keep", "20%", "--no-sync", "--values", "exact")
    peru("unpack", tmp_path / "a.safetensors", "-b", base, "-o", tmp_path / "r.safetensors", "--no-sync")
    report = measure(tmp_path / "a.safetensors", fine, base)
    assert report.tensors == measure(tmp_path / "r.safetensors", fine, base).tensors
    kept = sum(int((load_file(tmp_path / "r.safetensors")[n] != t).sum()) for n, t in load_file(base).items())
    assert report.total.same_sign == kept  # kept entries are exact, the others are the base's
    # Pythagoras: kept and dropped parts are orthogonal, so error^2 + cosine^2 = 1.
    assert report.total.error**2 + report.total.cosine**2 == pytest.approx(1.0, rel=1e-12)
    wrong = {n: t + 1 if t.is_floating_point() else t for n, t in load_file(base).items()}
    save_file(wrong, tmp_path / "wrong.safetensors")
    peru("eval", tmp_path / "a.safetensors", "-b", tmp_path / "wrong.safetensors", "-a", fine, code=1)
    assert "is not the base" in peru.stderr  # type: ignore[attr-defined]
