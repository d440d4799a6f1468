"""Masks on the sum of task vectors: values against plain float64 formulas, grids against brute force, the same bytes always."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from peru_cli.artifacts.packs.masks import MaskPack, decode_mask, encode_mask
from peru_cli.artifacts.packs.superposed import PackMode
from peru_cli.errors import BadFile
from peru_cli.methods.compact import masking
from peru_cli.methods.compact.masks.magnitude import magnitude_mask
from peru_cli.methods.compact.masks.table import MASKS
from peru_cli.methods.compact.masks.tall import tall_mask
from tests.conftest import FLOATS, raw, run_peru, save
from tests.pack.test_superpose import Packs, Table, family

Peru = Callable[..., str]
Vectors = dict[str, np.ndarray]
GRID = (0.2, 0.3, 0.4, 0.5, 0.6)


@pytest.fixture
def packs(tmp_path: Path, peru: Peru) -> Callable[..., Packs]:
    return lambda tasks, *rest, **more: Packs(tmp_path, peru, *family(tasks, *rest, **more))


def task_vectors(fine: dict[str, Table], base: Table) -> dict[str, np.ndarray]:
    """Differences in float32, as float64, all floating tensors of the base in order of names, flat."""
    names = sorted(name for name, tensor in base.items() if tensor.is_floating_point())
    return {
        task: np.concatenate([(fine[task][n].float() - base[n].float()).numpy().ravel() for n in names]).astype(np.float64)
        for task in sorted(fine)
    }


def plain_tall(vectors: dict[str, np.ndarray], thresholds: dict[str, float]) -> dict[str, np.ndarray]:
    """m_t = [|tau_t| > l_t |tau_MT - tau_t|]."""
    total = sum(vectors.values())
    return {task: np.abs(tau) > thresholds[task] * np.abs(total - tau) for task, tau in vectors.items()}


def plain_magnitude(tau: np.ndarray, kept: int) -> np.ndarray:
    """The largest entries of one task vector; ties: the first."""
    order = np.argsort(-np.abs(tau), kind="stable")
    mask = np.zeros(len(tau), bool)
    mask[order[:kept]] = True
    return mask & (tau != 0)


def read_masks(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Masks by task, sums, and each entry's step; flat."""
    with MaskPack(path) as pack:
        records = [record for record in pack.index.tensors if record.is_sum]
        assert all(record.mode == PackMode.SUM for record in records)
        masks = {task: np.concatenate([pack.mask(task, r, 0, r.info.entries) for r in records]) for task in pack.tasks}
        sums = np.concatenate([pack.sums(r, 0, r.info.entries) for r in records])
        return masks, sums, np.concatenate([np.full(r.info.entries, 2.0**r.exponent) for r in records])


# -- the pure functions -------------------------------------------------------------------------------


def test_ties_and_zeros_are_in_no_mask() -> None:
    own = np.array([0.0, 0.5, 0.5, 0.5000001, 1.0, 0.0])
    rest = np.array([0.0, 1.0, 1.0, 1.0, 0.0, 3.0])
    assert tall_mask(own, rest, 0.5).tolist() == [False, False, False, True, True, False]
    assert tall_mask(own, rest, 0.0).tolist() == [False, True, True, True, True, False]
    assert magnitude_mask(own, 0.5, True).tolist() == [False, True, True, True, True, False]
    assert magnitude_mask(own, 0.5, False).tolist() == [False, False, False, True, True, False]
    assert magnitude_mask(own, 0.0, True).tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.3, 0.5, 0.76, 0.99, 1.0])
def test_masks_are_coded_near_their_entropy(share: float) -> None:
    """Independent entries; gaps come within 1.5% of the order-0 entropy from 5% to 95%, including a block's head (about 40 bytes)."""
    mask = np.random.default_rng(1).random(1 << 17) < share
    block, data = encode_mask(mask)
    assert block.kept == mask.sum() and np.array_equal(decode_mask(data, block, len(mask), 1), mask)
    least = masking.entropy(block.kept, len(mask)) * len(mask) / 8
    p = block.kept / len(mask)
    assert least == pytest.approx(0.0 if p in (0, 1) else len(mask) / 8 * -(p * math.log2(p) + (1 - p) * math.log2(1 - p)))
    if 0.05 <= share <= 0.95:
        assert least < len(data) < 1.015 * least
    else:
        assert len(data) < 1.05 * least + 60
    if block.kept:
        with pytest.raises(BadFile, match="has trailing bytes"):
            decode_mask(data, block, int(np.flatnonzero(mask)[-1]), 1)


def test_the_best_scale_equals_least_squares() -> None:
    rng = np.random.default_rng(1)
    vectors = dict(zip("abc", rng.normal(size=(3, 1000)) * [[1.0], [2.0], [0.5]], strict=True))
    masks, total = plain_tall(vectors, dict.fromkeys("abc", 0.4)), sum(vectors.values())
    overlaps = [masking.Overlap(*(float((total * m) @ x) for x in (total * m, vectors[t])), m.sum()) for t, m in masks.items()]
    left, right = np.concatenate([total * masks[t] for t in "abc"]), np.concatenate([vectors[t] for t in "abc"])
    assert masking.best_scale(overlaps) == pytest.approx(np.linalg.lstsq(left[:, None], right, rcond=None)[0][0])
    assert masking.best_scale([masking.Overlap(0.0, 0.0, 0)]) == 0.0


@pytest.mark.parametrize("tasks", [2, 8, 20])
def test_the_default_precision_does_not_show_in_three_digits(tasks: int) -> None:
    vectors = np.random.default_rng(0).standard_t(4, size=(tasks, 200_000))
    total, step = vectors.sum(axis=0), 2.0 ** -masking.default_precision(tasks) * math.sqrt((vectors**2).mean())
    rounded = (np.rint(vectors / step) * step).sum(axis=0)
    masks = [np.abs(v) > 0.4 * np.abs(total - v) for v in vectors]
    errors = [math.sqrt(sum(np.square(m * s - v).sum() for m, v in zip(masks, vectors, strict=True))) for s in (total, rounded)]
    assert abs(errors[1] / errors[0] - 1) < 5e-4


# -- the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_tall_masks_sums_and_tasks_match_plain_formulas(packs: Callable[..., Packs], dtype: str) -> None:
    made = packs("abc", dtype, 0.3, size=30)
    options = ["--threshold", "0.4", "--threshold", "b=0.25", "--scale", "0.7", "--tile-entries", 16384]
    path = made.run("cab", "--method", "tall-masks", *options)
    vectors = task_vectors(made.fine, made.base)
    expected = plain_tall(vectors, {"a": 0.4, "b": 0.25, "c": 0.4})
    masks, sums, steps = read_masks(path)
    assert all(np.array_equal(masks[task], expected[task]) for task in "abc")
    assert np.array_equal(sums, sum(np.rint(tau / steps) for tau in vectors.values()))
    flat = np.concatenate([made.base[n].float().numpy().ravel() for n in sorted(made.base) if n != "ids"])
    for task in "abc":
        back = made.unpack(path, task)
        assert sorted(back) == sorted(made.fine[task])
        vector = np.where(expected[task], sums, 0).astype(np.float32) * (0.7 * steps).astype(np.float32)
        wanted = torch.from_numpy(flat + vector).to(FLOATS[dtype])
        assert b"".join(raw(back[n]) for n in sorted(made.base) if n != "ids") == raw(wanted)
        for name in ("head.weight", "ids"):
            assert raw(back[name]) == raw(made.fine[task][name])


def plain_emr(vectors: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    """EMR-Merging's elect, mask and rescale as in the authors' program (and fusion_bench's `emr_merge`), over one flat vector."""
    flag = np.where(sum(vectors.values()) > 0, 1, -1)
    masks = {task: tau * flag > 0 for task, tau in vectors.items()}
    unified = flag * np.max([np.abs(tau) * masks[task] for task, tau in vectors.items()], axis=0)
    return unified, masks, {task: np.abs(tau).sum() / np.abs(unified * masks[task]).sum() for task, tau in vectors.items()}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_emr_equals_the_authors_formula_and_every_task_has_its_scale(packs: Callable[..., Packs], peru: Peru, dtype: str) -> None:
    made = packs("abc", dtype, 0.3, size=30)
    path = made.run("cab", "--method", "emr", "--precision", 8, "--tile-entries", 16384, "--json")
    told = {task["task"]: task for task in json.loads(made.text)["packed"]}
    vectors = task_vectors(made.fine, made.base)
    unified, expected, scales = plain_emr(vectors)
    masks, sums, steps = read_masks(path)
    assert all(np.array_equal(masks[task], expected[task]) for task in "abc")
    assert np.array_equal(sums, np.rint(unified / steps))
    flat = np.concatenate([made.base[n].float().numpy().ravel() for n in sorted(made.base) if n != "ids"])
    inspected = {task["task"]: task for task in json.loads(peru("inspect", path, "--json"))["tasks"]}
    for task in "abc":
        assert told[task]["scale"] == inspected[task]["scale"] == pytest.approx(scales[task], rel=1e-8)
        back = made.unpack(path, task)
        vector = np.where(expected[task], sums, 0).astype(np.float32) * (told[task]["scale"] * steps).astype(np.float32)
        wanted = torch.from_numpy(flat + vector).to(FLOATS[dtype])
        assert b"".join(raw(back[n]) for n in sorted(made.base) if n != "ids") == raw(wanted)
        exact = np.linalg.norm(scales[task] * unified * masks[task] - vectors[task]) / np.linalg.norm(vectors[task])
        assert told[task]["error"] == pytest.approx(exact, abs=0.003) and told[task]["predicted_error"] == pytest.approx(exact, abs=0.003)


def test_emr_takes_neither_thresholds_nor_a_share(packs: Callable[..., Packs]) -> None:
    made = packs("ab")
    for options in (["--threshold", "0.4"], ["--keep", "10%"]):
        made.run("ab", "--method", "emr", *options, code=2)


def test_exact_ties_and_unchanged_entries(tmp_path: Path, peru: Peru) -> None:
    """Values with few bits: |tau_a| = 0.5 |tau_b| exactly, tau = 0, and tau_MT = 0 where tasks cancel."""
    base = {"w": torch.zeros(6)}
    fine = {"a": {"w": torch.tensor([1.0, 1.25, 0.0, -1.0, 0.0, 2.0])}, "b": {"w": torch.tensor([2.0, 2.0, 3.0, 2.0, 0.0, -2.0])}}
    made = Packs(tmp_path, peru, base, fine)
    masks, sums, steps = read_masks(made.run("ab", "--method", "tall-masks", "--threshold", "0.5", "--precision", 10))
    assert masks["a"].tolist() == [False, True, False, False, False, True]
    assert masks["b"].tolist() == [True, True, True, True, False, True]
    assert (sums * steps).tolist() == [3.0, 3.25, 3.0, 1.0, 0.0, 0.0]
    assert made.unpack(made.folder / "pack.safetensors", "a")["w"].tolist() == [0.0, 3.25, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("keep", ["10%", "0.333", "100%"])
def test_magnitude_masks_keep_exactly_the_largest(packs: Callable[..., Packs], dtype: str, keep: str) -> None:
    """bf16 differences have very many equals: the first of them are kept, in order of names."""
    made = packs("abc", dtype, size=30)
    made.run("abc", "--method", "magnitude-masks", "--keep", keep, "--json", "--tile-entries", 16384)
    vectors = task_vectors(made.fine, made.base)
    share = {"10%": 0.1, "0.333": 0.333, "100%": 1.0}[keep]
    masks, sums, steps = read_masks(made.folder / "pack.safetensors")
    for task in json.loads(made.text)["packed"]:
        tau = vectors[task["task"]]
        expected = plain_magnitude(tau, int(share * len(tau)))
        assert np.array_equal(masks[task["task"]], expected) and task["kept"] == expected.sum()
        assert task["threshold"] == (np.abs(tau[expected]).min() if task["kept"] < (tau != 0).sum() else 0.0)
        got = np.where(expected, sums * steps, 0.0)
        assert task["error"] == pytest.approx(np.linalg.norm(got - tau) / np.linalg.norm(tau), rel=1e-9)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
def test_the_grids_choice_matches_brute_force(packs: Callable[..., Packs], scale: float) -> None:
    made = packs("abcd", shared=0.3, size=10)
    b = made.fine["b"]
    save(b | {n: t + (b[n] - t) * 3 for n, t in made.base.items() if t.is_floating_point()}, made.at["b"])
    made.fine["b"] = b | {n: t + (b[n] - t) * 3 for n, t in made.base.items() if t.is_floating_point()}
    made.run("abcd", "--method", "tall-masks", "--scale", scale, "--json", "--threshold", "d=0.1")
    vectors = task_vectors(made.fine, made.base)
    total = sum(vectors.values())
    chosen = set()
    for task in json.loads(made.text)["packed"]:
        tau = vectors[task["task"]]
        if task["task"] == "d":
            assert task["threshold"] == 0.1 and not task["from_grid"]
            continue
        errors = [np.linalg.norm(scale * total * (np.abs(tau) > level * np.abs(total - tau)) - tau) for level in GRID]
        assert task["threshold"] == GRID[int(np.argmin(errors))] and task["from_grid"]
        assert task["predicted_error"] == pytest.approx(min(errors) / np.linalg.norm(tau), rel=1e-3)
        chosen.add(task["threshold"])
    assert (chosen == {0.6}) is (scale == 1.0)  # at scale 1, of thresholds up to 1 the largest has the least error


def test_measured_error_scale_and_bytes_match_the_unpacked_tasks(packs: Callable[..., Packs]) -> None:
    made = packs("abc", size=20)
    path = made.run("abc", "--json", "--scale", "0.5", "--method", "tall-masks")
    report = json.loads(made.text)
    vectors, parts = task_vectors(made.fine, made.base), {}
    masks, sums, steps = read_masks(path)
    for task in report["packed"]:
        name = task["task"]
        back = made.unpack(path, name)
        tau, got = vectors[name], task_vectors({name: back}, made.base)[name]
        # The weights are float32: rounding base + tau^ once adds 2^-24 of 0.1 to differences of 0.01.
        assert task["error"] == pytest.approx(np.linalg.norm(got - tau) / np.linalg.norm(tau), rel=1e-4)
        assert task["predicted_error"] == pytest.approx(task["error"], rel=1e-3)
        assert task["cosine"] == pytest.approx(got @ tau / np.linalg.norm(got) / np.linalg.norm(tau), rel=1e-4)
        assert task["kept"] == masks[name].sum() and task["kept_share"] == pytest.approx(masks[name].mean())
        parts[name] = masks[name] * sums * steps
    top, bottom = sum(parts[t] @ vectors[t] for t in "abc"), sum(parts[t] @ parts[t] for t in "abc")
    assert report["best_scale"] == pytest.approx(top / bottom, rel=1e-9)
    made.peru("inspect", path, "--json")
    shown = json.loads(made.peru("inspect", path, "--json"))
    for task, other in zip(report["packed"], shown["tasks"], strict=True):
        assert all(task[key] == other[key] for key in ("task", "threshold", "kept", "mask_bytes", "mask_entropy"))
    assert shown["parts"]["masks"] == sum(task["mask_bytes"] for task in report["packed"])
    assert sum(shown["parts"].values()) == path.stat().st_size
    assert shown["parts"]["sums"] == report["sums_bytes"]
    apart = shown["parts"]["tasks' own tensors"] + shown["parts"]["side files"]
    assert shown["delta_bytes"] == report["delta_bytes"] == path.stat().st_size - apart
    assert shown["bits_per_parameter"] == report["bits_per_parameter"] == 8 * shown["delta_bytes"] / shown["entries"]
    table = made.peru("inspect", path)
    assert "tall-masks, scale 0.5, precision 5" in table and "0.6" in table


def test_a_single_task_is_retrieved_to_half_a_step(packs: Callable[..., Packs]) -> None:
    made = packs("a")
    path = made.run("a", "--method", "tall-masks")
    back, (_, _, steps) = made.unpack(path, "a"), read_masks(path)
    missed = np.abs(task_vectors({"a": back}, made.base)["a"] - task_vectors(made.fine, made.base)["a"])
    assert (missed <= steps / 2 + 1e-8).all()  # and base + tau^ is rounded to float32 once
    assert "precision 10" in made.text


@pytest.mark.parametrize("method", list(MASKS))
def test_neither_order_threads_tiles_nor_hash_seed_change_a_byte(packs: Callable[..., Packs], method: str) -> None:
    made = packs("abc", "bf16", size=60)
    expected = made.run("abc", "--method", method).read_bytes()
    assert made.run("bca", "--method", method, "--threads", 1, "--tile-entries", 16384, name="other").read_bytes() == expected
    out = made.folder / "fresh.safetensors"
    models = [f"{task}={made.at[task]}" for task in "cba"]
    more = ["--threads", 5, "--tile-entries", 32768, "--method", method]
    done = run_peru("shuffle-pack", *models, "-b", made.at["base"], "-o", out, *more, env={"PYTHONHASHSEED": "77"})
    assert done.returncode == 0 and out.read_bytes() == expected, done.stderr
    here = made.unpack(out, "b")
    restored = made.folder / "r.safetensors"
    more = ["--threads", 3, "--tile-entries", 16384]
    done = run_peru("unpack", out, "--task", "b", "-b", made.at["base"], "-o", restored, *more, env={"PYTHONHASHSEED": "3"})
    assert done.returncode == 0, done.stderr
    from safetensors.torch import load_file

    assert {name: raw(tensor) for name, tensor in load_file(restored).items()} == {name: raw(tensor) for name, tensor in here.items()}


def test_wide_models_and_other_dtypes(packs: Callable[..., Packs]) -> None:
    """For float64 models with a float32 tensor, magnitudes are compared in float64 everywhere."""
    made = packs("ab", "fp64", size=10)
    for name in ("base", "a", "b"):
        table = made.base if name == "base" else made.fine[name]
        table["embed.weight"] = table["embed.weight"].float()
        save(table, made.at[name])
    made.run("ab", "--method", "magnitude-masks", "--json")
    masks, _, _ = read_masks(made.folder / "pack.safetensors")
    names = sorted(name for name, tensor in made.base.items() if tensor.is_floating_point())
    for task in "ab":
        tau = np.concatenate([(made.fine[task][n].double() - made.base[n].double()).numpy().ravel() for n in names])
        assert np.array_equal(masks[task], plain_magnitude(tau, len(tau) // 10))
    half = made.unpack(made.run("ab", "--method", "tall-masks", "--dtype", "fp16"), "a")
    assert half["layers.0.mlp.weight"].dtype == torch.float16


def test_dry_run_names_thresholds_and_writes_nothing(packs: Callable[..., Packs]) -> None:
    made = packs("ab")
    made.run("ab", "--dry-run", "--method", "tall-masks", "--threshold", "b=0.3")
    assert not (made.folder / "pack.safetensors").exists()
    assert [line.split(maxsplit=1) for line in made.text.splitlines()[1:]] == [["a", "one of 0.2, 0.3, 0.4, 0.5, 0.6"], ["b", "0.3"]]
    made.run("ab", "--dry-run", "--method", "magnitude-masks")
    entries = sum(tensor.numel() for tensor in made.base.values() if tensor.is_floating_point())
    assert f"its {entries // 10} largest of {entries:,} entries" in made.text and not (made.folder / "pack.safetensors").exists()
