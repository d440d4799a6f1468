"""The methods of mergekit and of 2024 to 2026 against plain float64 programs of their formulas (tests/support/merge_formulas.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peru_cli.methods.angles.karcher import karcher_factors
from peru_cli.methods.table import METHODS
from tests.merge.test_methods import Merged
from tests.support import merge_formulas as formula

SHAPES = {"a.weight": (24, 31), "b.weight": (40, 18), "conv.weight": (12, 3, 2, 2), "bias": (37,), "one": ()}
WEIGHTS = [1.0, 0.5, 2.0]
Arrays = list[np.ndarray[Any, Any]]


def tables(tasks: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 0.1) -> tuple[Any, list[Any]]:
    noise = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=noise).to(dtype) for name, shape in SHAPES.items()}
    return base, [{n: (t.float() + size * torch.randn(t.shape, generator=noise)).to(dtype) for n, t in base.items()} for _ in range(tasks)]


class Case:
    """Merges with peru and with a formula, and compares every tensor."""

    def __init__(self, folder: Path, peru, tasks: int = 3, **how: Any) -> None:
        self.base, self.fine = tables(tasks, **how)
        self.merged = Merged(folder, peru, self.base, self.fine)

    def vectors(self, name: str) -> Arrays:
        return [table[name].double().numpy() - self.base[name].double().numpy() for table in self.fine]

    def models(self, name: str) -> Arrays:
        return [table[name].double().numpy() for table in self.fine]

    def weights(self) -> list[str]:
        return [part for i in range(len(self.fine)) for part in ("--weight", f"t{i}={WEIGHTS[i]}")]

    def check(self, expected: Callable[[str], Any], *options: object, base: bool = True, names: Any = SHAPES, atol: float = 6e-7) -> None:
        got = self.merged.run(*options, base=base)
        for name in names:
            np.testing.assert_allclose(got[name].double().numpy(), expected(name), rtol=2e-6, atol=atol, err_msg=name)

    def on_base(self, merge: Callable[[Arrays], Any]) -> Callable[[str], Any]:
        return lambda name: self.base[name].double().numpy() + merge(self.vectors(name))


@pytest.mark.parametrize(("options", "axis"), [([], None), (["--no-flatten"], 1), (["--no-flatten", "--row-wise"], 0)])
def test_nuslerp_equals_its_formula(tmp_path: Path, peru, options: list[str], axis: int | None) -> None:
    case = Case(tmp_path, peru, 2)
    case.check(case.on_base(lambda tau: formula.nuslerp(tau, WEIGHTS[:2], axis)), "-m", "nuslerp", *options, *case.weights())
    case.check(lambda n: formula.nuslerp(case.models(n), WEIGHTS[:2], axis), "-m", "nuslerp", *options, *case.weights(), base=False)


def test_nuslerp_refuses_rows_of_flattened_tensors(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru, 2)
    peru("merge", *case.merged.models, "-o", tmp_path / "o", "-m", "nuslerp", "--row-wise", code=2)


@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp_equals_its_formula(tmp_path: Path, peru, normalize: bool) -> None:
    case = Case(tmp_path, peru)
    options = ["-m", "multislerp", *([] if normalize else ["--no-normalize"]), *case.weights()]
    case.check(case.on_base(lambda tau: formula.multislerp(tau, WEIGHTS, normalize)), *options)
    case.check(lambda n: formula.multislerp(case.models(n), WEIGHTS, normalize), *options, base=False, atol=2e-6)


def test_karcher_ends_where_no_step_is_left(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru, size=1.0)
    case.check(lambda n: formula.karcher(case.models(n)), "-m", "karcher", "--max-iter", 200, "--tol", "1e-13", base=False)


def test_karcher_of_two_is_slerp_in_the_middle_and_zeros_have_no_direction() -> None:
    a, b = np.array([3.0, 0.0]), np.array([0.0, 1.0])
    factors = karcher_factors([[a @ a, a @ b], [b @ a, b @ b]], 50, 1e-12)
    np.testing.assert_allclose(factors[0] * a + factors[1] * b, 2.0 * np.array([1, 1]) / 2**0.5)
    assert karcher_factors([[0.0, 0.0], [0.0, 4.0]], 10, 1e-5) == [0.0, 1.0]


def test_model_stock_equals_its_formula(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru)
    matrices = [n for n in SHAPES if n != "one"]
    case.check(case.on_base(formula.model_stock), "-m", "model-stock", names=matrices)
    case.check(case.on_base(formula.model_stock_rows), "-m", "model-stock", "--filter-wise", names=matrices)


def test_methods_of_one_model_equal_their_formulas(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru, 1)
    case.check(lambda n: -0.7 * case.models(n)[0], "-m", "passthrough", "--scale", "-0.7", base=False)
    case.check(case.on_base(lambda tau: formula.nearswap(tau[0], 0.05)), "-m", "nearswap", "--t", "0.05")
    case.check(lambda n: formula.arcee_fusion(case.base[n].double().numpy(), case.models(n)[0]), "-m", "arcee-fusion")


@pytest.mark.parametrize("keep", [0.125, 0.375, 1.0])
def test_sce_equals_its_formula(tmp_path: Path, peru, keep: float) -> None:
    case = Case(tmp_path, peru)
    case.check(case.on_base(lambda tau: formula.sce(tau, keep)), "-m", "sce", "--keep", keep, names=[n for n in SHAPES if n != "one"])


def test_ram_equals_its_formula(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru)
    case.check(case.on_base(lambda tau: formula.ram(tau, 0.08)), "-m", "ram", "--epsilon", "0.08")
    options = ["--epsilon", "0.15", "--amplify", "0.3", "--alpha", "0.9"]
    case.check(case.on_base(lambda tau: formula.ram(tau, 0.15, 0.3, 0.9)), "-m", "ramplus-tl", *options)


def test_della_at_density_1_drops_nothing(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru)
    total = case.on_base(lambda tau: sum(weight * vector for weight, vector in zip(WEIGHTS, tau, strict=True)))
    case.check(total, "-m", "della-linear", "--keep", "1", "--epsilon", "0.15", *case.weights())


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_breadcrumbs_ties_equals_its_formula(tmp_path: Path, peru, reduce: str) -> None:
    case = Case(tmp_path, peru)
    options = ["-m", "breadcrumbs-ties", "--keep", "0.75", "--gamma", "0.125", "--scope", "tensor", "--reduce", reduce, *case.weights()]
    case.check(case.on_base(lambda tau: formula.breadcrumbs_ties(tau, WEIGHTS, 0.75, 0.125, reduce == "mean")), *options)


def test_pcb_equals_its_formula(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru)
    case.check(case.on_base(lambda tau: formula.pcb(tau, 0.3)), "-m", "pcb", "--keep", "0.3", names=[n for n in SHAPES if n != "one"])


def weighted(merge: Callable[[Arrays], Any]) -> Callable[[Arrays], Any]:
    """Matrices by the formula of weighted task vectors; all other tensors are their mean."""

    def merged(tau: Arrays) -> Any:
        tau = [w * x for w, x in zip(WEIGHTS, tau, strict=True)]
        return merge(tau) if tau[0].ndim >= 2 else sum(tau) / len(tau)

    return merged


def test_methods_on_singular_values(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru)
    for method, options, merge in (
        ("tsv-m", [], formula.tsv_m), ("iso-c", [], formula.iso_c),
        ("iso-cts", ["--common", "0.55"], lambda tau: formula.iso_cts(tau, 0.55)), ("star", [], lambda tau: formula.star(tau, 0.4)),
    ):  # fmt: skip
        case.check(case.on_base(weighted(merge)), "-m", method, *options, *case.weights())
        plain = ["-m", method, *options, "--plain", "weight", *case.weights()]
        case.check(case.on_base(lambda tau: sum(w * x for w, x in zip(WEIGHTS, tau, strict=True)) / 3), *plain)


def test_wudi_is_where_its_gradient_is_0(tmp_path: Path, peru) -> None:
    case = Case(tmp_path, peru, dtype=torch.float64)
    got = case.merged.run("-m", "wudi", "--ridge", "0")
    for name in ("a.weight", "b.weight", "conv.weight"):
        tau = case.vectors(name)
        merged = got[name].numpy() - case.base[name].numpy()
        scale = np.abs(formula.wudi_gradient(sum(tau), tau)).max()
        assert np.abs(formula.wudi_gradient(merged, tau)).max() < 1e-9 * scale, name
    close = case.merged.run("-m", "wudi", "--ridge", "1e9")  # with the ridge alone, the sum is left
    np.testing.assert_allclose(close["a.weight"].numpy(), case.base["a.weight"].numpy() + sum(case.vectors("a.weight")), atol=1e-7)


def test_tasks_of_low_rank_have_no_invented_directions(tmp_path: Path, peru) -> None:
    base, fine = tables(3)
    noise = torch.Generator().manual_seed(9)
    for table in fine:
        table["a.weight"] = base["a.weight"] + torch.randn(24, 1, generator=noise) @ torch.randn(1, 31, generator=noise)
    case = Merged(tmp_path, peru, base, fine)
    for method in ("tsv-m", "iso-cts", "iso-c"):
        change = (case.run("-m", method)["a.weight"] - base["a.weight"]).double()
        values = torch.linalg.svdvals(change)
        assert int((values > 1e-4 * values[0]).sum()) <= 3, method


def test_one_row_and_unchanged_matrices(tmp_path: Path, peru) -> None:
    base = {"row.weight": torch.randn(1, 8), "same.weight": torch.randn(6, 6)}
    fine = [base | {"row.weight": torch.randn(1, 8)} for _ in range(2)]
    case = Merged(tmp_path, peru, base, fine)
    for method in ("tsv-m", "iso-c", "iso-cts", "wudi", "star", "pcb", "sce", "model-stock", "karcher", "multislerp"):
        got = case.run("-m", method)
        assert torch.isfinite(got["row.weight"]).all() and torch.allclose(got["same.weight"], base["same.weight"], rtol=1e-5), method


NEW = [
    "nuslerp", "multislerp", "karcher", "model-stock", "passthrough", "nearswap", "arcee-fusion", "breadcrumbs-ties", "sce", "ram",
    "ramplus-tl", "pcb", "tsv-m", "iso-c", "iso-cts", "wudi", "star",
]  # fmt: skip


@pytest.mark.parametrize("method", NEW)
def test_same_bytes_for_any_threads_and_tiles(tmp_path: Path, peru, method: str) -> None:
    case = Case(tmp_path, peru, min(METHODS[method].tasks[1] or 3, 3), dtype=torch.bfloat16)
    seen = set()
    for options in ((), ("--threads", 1, "--tile-entries", 16384), ("--threads", 5)):
        case.merged.run("-m", method, *options)
        seen.add(hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest())
    assert len(seen) == 1
