"""Methods on whole matrices: what the engine promises them, and DELLA, DARE by L1 norms and parameters by tensor."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peru_cli.kernels.random import words
from peru_cli.merge.passes import matrices as engine
from peru_cli.merge.passes import panels as panels_of
from peru_cli.methods import matrices as panels
from peru_cli.methods.by_tensor import ByTensor
from peru_cli.methods.parameters import Parameters
from peru_cli.methods.philox import stream_key
from peru_cli.methods.table import METHODS, effective_values
from tests.conftest import save
from tests.merge.test_methods import Merged, family

BY_MATRIX = [name for name, method in METHODS.items() if method.statistics is None and "rescale" in method.options]


def drawn(task: str, tensor: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Uniform numbers in [0, 1): the words that decide which entries are kept."""
    n = int(np.prod(shape))
    return words(stream_key(seed, task, tensor), 0, n).reshape(shape) / 2.0**32


def della(tau: list[np.ndarray], uniform: list[np.ndarray], weights: list[float], keep: float, epsilon: float, rescale: str, how: str):
    """DELLA from the paper's and mergekit's equations, in float64; a vector is one row."""
    parts = []
    for vector, chance in zip(tau, uniform, strict=True):
        rows = vector.reshape(1, -1) if vector.ndim < 2 else vector.reshape(len(vector), -1)
        ranks = np.zeros(rows.shape)
        for i, row in enumerate(np.abs(rows)):
            ranks[i, sorted(range(len(row)), key=lambda at, row=row: (row[at], at))] = np.arange(len(row))
        p = keep - epsilon + 2 * epsilon * ranks / max(rows.shape[1] - 1, 1) if rows.shape[1] > 1 else np.full(rows.shape, keep)
        stays = rows * (chance.reshape(rows.shape) < p)
        if rescale == "density":
            stays = stays / p
        elif rescale == "l1" and min(np.abs(rows).sum(), np.abs(stays).sum()) >= 1e-7:
            stays = stays * np.abs(rows).sum() / np.abs(stays).sum()
        parts.append(stays)
    p = np.stack([w * part for w, part in zip(weights, parts, strict=True)])
    if how == "linear":
        return p.sum(0).reshape(tau[0].shape)
    agrees = np.sign(p) == np.where(p.sum(0) >= 0, 1, -1)
    divisor = sum(a * w for a, w in zip(agrees, weights, strict=True)) if how == "mean" else np.ones(p.shape[1:])
    return ((p * agrees).sum(0) / np.where(np.abs(divisor) < 1e-8, 1, divisor)).reshape(tau[0].shape)


@pytest.mark.parametrize("rescale", ["density", "l1", "none"])
@pytest.mark.parametrize("how", ["mean", "sum", "linear"])
def test_della_equals_its_formula(tmp_path: Path, peru, rescale: str, how: str) -> None:
    shapes = {"a.weight": (17, 23), "conv.weight": (5, 3, 2, 2), "bias": (41,), "one": (), "column": (7, 1)}
    noise = torch.Generator().manual_seed(4)
    base = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    fine = [{n: t + 0.1 * torch.randn(t.shape, generator=noise) for n, t in base.items()} for _ in range(3)]
    case = Merged(tmp_path, peru, base, fine)
    options = ["-m", "della-linear" if how == "linear" else "della", "--keep", "0.6", "--epsilon", "0.2", "--rescale", rescale]
    got = case.run(*options, *([] if how == "linear" else ["--reduce", how]), "--scale", "0.7", *case.weights(3))
    for name, shape in shapes.items():
        tau = [(t[name] - base[name]).double().numpy() for t in fine]
        uniform = [drawn(f"t{i}", name, shape) for i in range(3)]
        expected = base[name].double().numpy() + 0.7 * della(tau, uniform, [1.0, -0.5, 2.0], 0.6, 0.2, rescale, how)
        np.testing.assert_allclose(got[name].numpy(), expected, rtol=2e-6, atol=5e-7, err_msg=name)


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_dare_by_norms_equals_its_formula(tmp_path: Path, peru, method: str) -> None:
    base, fine = family(3, ties=False)
    case = Merged(tmp_path, peru, base, fine)
    got = case.run("-m", method, "--keep", "0.3", "--rescale", "l1", *case.weights(3))
    for name in ("a.weight", "b.bias"):
        tau = [(t[name] - base[name]).double().numpy() for t in fine]
        uniform = [drawn(f"t{i}", name, tau[0].shape) for i in range(3)]
        expected = della(tau, uniform, [1.0, -0.5, 2.0], 0.3, 0.0, "l1", "linear" if method == "dare" else "sum")
        np.testing.assert_allclose(got[name].numpy(), base[name].double().numpy() + expected, rtol=2e-6, atol=5e-7)


def test_dellas_probabilities_stay_between_0_and_1(tmp_path: Path, peru) -> None:
    case = Merged(tmp_path, peru, *family(2))
    peru("merge", *case.models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "o", "-m", "della", "--keep", "10%", code=2)
    assert "lower --epsilon" in peru.stderr and not (tmp_path / "o").exists()


@pytest.mark.parametrize("method", BY_MATRIX)
@pytest.mark.parametrize("rescale", ["density", "l1"])
def test_same_bytes_for_any_threads_tiles_and_dtype(tmp_path: Path, peru, method: str, rescale: str, monkeypatch) -> None:
    monkeypatch.setattr(engine, "PANEL", 1000)
    monkeypatch.setattr(panels, "PANEL", 1000)
    case = Merged(tmp_path, peru, *family(3, dtype=torch.bfloat16))
    seen = set()
    for options in ((), ("--threads", 1, "--tile-entries", 16384), ("--threads", 5)):
        case.run("-m", method, "--rescale", rescale, *options)
        seen.add(hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest())
    assert len(seen) == 1


def test_a_value_that_is_not_finite_is_refused_by_the_tensors_name(tmp_path: Path, peru) -> None:
    base, fine = family(2)
    fine[1]["b.weight"][7, 9] = float("nan")
    save(base, tmp_path / "base.safetensors")
    models = [f"t{i}={save(table, tmp_path / f'f{i}.safetensors')}" for i, table in enumerate(fine)]
    peru("merge", *models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "o.safetensors", "-m", "della", code=1)
    assert "'b.weight' is NaN or infinite at entry 919" in peru.stderr and "f1" in peru.stderr and "defect" not in peru.stderr


def test_masks_of_infinities_that_all_models_share_stay(tmp_path: Path, peru) -> None:
    base, fine = family(2)
    for table in (base, *fine):
        table["mask"] = torch.full((6, 6), float("-inf")).triu(1)
    got = Merged(tmp_path, peru, base, fine).run("-m", "della")
    assert torch.equal(got["mask"], base["mask"])


def test_a_matrix_that_memory_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, peru, monkeypatch) -> None:
    monkeypatch.setattr(panels_of, "free_memory", lambda: 1000)
    case = Merged(tmp_path, peru, *family(2))
    peru("merge", *case.models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "o", "-m", "della", code=2)
    assert "a.weight (61 x 40) takes" in peru.stderr and not (tmp_path / "o").exists()


def test_tensors_may_have_parameters_of_their_own(tmp_path: Path, peru, monkeypatch) -> None:
    """By tensor, against a merge with the same parameters everywhere: trims, weights and sampled entries."""
    for method, given in (
        ("ties", {"scope": "tensor", "variant": "mergekit"}), ("della", {}), ("slerp", {}), ("breadcrumbs", {"scope": "tensor"}),
    ):  # fmt: skip
        case = Merged(tmp_path, peru, *family(2, ties=False))
        build = METHODS[method].build
        names = sorted(n for n in case.base if case.base[n].is_floating_point())

        def by_slot(self, parameters: Parameters, method=method, given=given, build=build, names=names):
            rules = []
            for name in names:
                other = {"keep": Fraction(7, 10)} if "keep" in METHODS[method].options else {"t": 0.9}
                values = effective_values(METHODS[method], given | (other if name == "b.weight" else {}))
                rules.append(build(Parameters(parameters.tasks, parameters.weights, values)))
            return ByTensor(rules, list(range(len(names))))

        typed = [part for name, value in given.items() for part in (f"--{name}", value)]
        alone = case.run("-m", method, *typed)
        other = case.run("-m", method, *typed, *(["--keep", "70%"] if method != "slerp" else ["--t", "0.9"]))
        with monkeypatch.context() as patched:
            patched.setattr(type(METHODS[method]), "build", by_slot)
            got = case.run("-m", method, *typed)
        for name in got:
            assert torch.equal(got[name], (other if name == "b.weight" else alone)[name]), (method, name)
        assert not torch.equal(other["b.weight"], alone["b.weight"])
        assert load_file(tmp_path / "out.safetensors").keys() == case.base.keys()
