"""Every method against programs that share no code with peru, on checkpoints full of ties, zeros and opposite signs."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from peft.utils import merge_utils
from safetensors import safe_open
from safetensors.torch import load_file

from tests.conftest import raw, run_peru, save
from tests.support.merge_reference import Table, breadcrumbs, consensus, flatten, slerp, ties_authors, ties_mergekit

SHAPES = {"a.weight": (61, 40), "b.weight": (300, 130), "b.bias": (130,), "c.scalar": (), "d.empty": (0, 3)}
NEGATIVE = [1.0, -0.5, 2.0, -1.0, 0.25]


def family(tasks: int, seed: int = 0, ties: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Table, list[Table]]:
    """A base and fine-tunes. With `ties`, differences are a few small multiples of a power of two, so sums are exact."""
    noise = torch.Generator().manual_seed(seed)
    base = {name: torch.randint(-64, 65, shape, generator=noise).float().to(dtype) / 64 for name, shape in SHAPES.items()}
    fine = []
    for _ in range(tasks):
        table = {}
        for name, shape in SHAPES.items():
            steps = torch.randint(-4, 5, shape, generator=noise).float() if ties else torch.randn(shape, generator=noise)
            table[name] = (base[name].float() + steps / 128).to(dtype)
        fine.append(table)
    base["ids"] = torch.arange(9)
    for table in fine:
        table["ids"] = torch.arange(9)
    return base, fine


class Merged:
    """Saves a family, merges it with peru, and returns results as flat vectors."""

    def __init__(self, folder: Path, peru, base: Table, fine: list[Table]) -> None:
        self.folder, self.peru, self.base, self.fine = folder, peru, base, fine
        save(base, folder / "base.safetensors")
        self.models = [f"t{i}={save(table, folder / f'f{i}.safetensors')}" for i, table in enumerate(fine)]
        self.vectors = [flatten(table) - flatten(base) for table in fine]

    def run(self, *options: object, base: bool = True, name: str = "out") -> Table:
        at = ["--base", self.folder / "base.safetensors"] if base else []
        out = self.folder / f"{name}.safetensors"
        self.peru("merge", *self.models, *at, "-o", out, "--no-sync", "--force", *options)
        return load_file(out)

    def vector(self, *options: object) -> torch.Tensor:
        return flatten(self.run(*options)) - flatten(self.base)

    def weights(self, count: int) -> list[str]:
        return [part for i, w in enumerate(NEGATIVE[:count]) for part in ("--weight", f"t{i}={w}")]

    def by_tensor(self, merge) -> torch.Tensor:
        """A function of the task vectors of one tensor, applied to each."""
        parts = []
        for name in sorted(n for n in self.base if self.base[n].is_floating_point()):
            own = [table[name].float().view(-1) - self.base[name].float().view(-1) for table in self.fine]
            parts.append(merge(own) if own[0].numel() else own[0])
        return torch.cat(parts)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal within float32 rounding of weights of size 1."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-6, atol=3e-7)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5])
def test_ties_equals_its_authors(tmp_path: Path, peru, tasks: int) -> None:
    case = Merged(tmp_path, peru, *family(tasks, seed=tasks))
    n = len(case.vectors[0])
    for share, reduce in (("20%", "mean"), ("0.55", "sum"), ("100%", "mean")):
        k = int(n * {"20%": 0.2, "0.55": 0.55, "100%": 1}[share])
        got = case.vector("-m", "ties", "--keep", share, "--reduce", reduce)
        close(got, ties_authors(case.vectors, k, reduce))


@pytest.mark.parametrize("seed", range(4))
def test_ties_zero_sums_take_the_majority_sign(tmp_path: Path, peru, seed: int) -> None:
    base, fine = family(2, seed=seed)
    fine[0] = {n: t.float() + (seed % 2 - 0.5) / 32 if t.is_floating_point() else t for n, t in fine[0].items()}  # a clear majority
    case = Merged(tmp_path, peru, base, fine)
    k = int(len(case.vectors[0]) * 0.8)
    assert int((sum(case.vectors) == 0).sum()) > 500
    close(case.vector("-m", "ties", "--keep", "80%"), ties_authors(case.vectors, k))


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_ties_equals_mergekit_written_out_and_peft(tmp_path: Path, peru, tasks: int) -> None:
    case = Merged(tmp_path, peru, *family(tasks, seed=10 + tasks))
    weights = NEGATIVE[:tasks]
    for normalize, reduce in ((True, "mean"), (False, "sum")):
        got = case.vector("-m", "ties", "--variant", "mergekit", "--keep", "0.4", "--reduce", reduce, *case.weights(tasks))
        close(got, case.by_tensor(lambda own, n=normalize: ties_mergekit(own, weights, max(1, int(0.4 * len(own[0]))), n)))
    # peft picks among ties as topk does, so there are none here
    base, fine = family(tasks, seed=tasks, ties=False)
    base = {name: torch.zeros_like(tensor) if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    case = Merged(tmp_path, peru, base, fine)
    got = case.vector("-m", "ties", "--variant", "peft", "--keep", "0.4", *case.weights(tasks))
    close(got, case.by_tensor(lambda own: merge_utils.ties(own, torch.tensor(weights), 0.4)))


def test_ties_divides_by_tiny_sums_of_weights_as_mergekit_does(tmp_path: Path, peru) -> None:
    """mergekit's `divisor[divisor.abs() < 1e-8] = 1`: below it nothing is left of the vector, above it all of it."""
    case = Merged(tmp_path, peru, *family(1))
    options = ("-m", "ties", "--variant", "mergekit", "--keep", "100%", "--weight")
    close(case.vector(*options, "t0=0.000000011"), case.vectors[0])
    close(case.vector(*options, "t0=0.000000009"), torch.zeros_like(case.vectors[0]))


@pytest.mark.parametrize(("keep", "ones"), [("20%", []), ("30%", [0]), ("40%", [0, 2]), ("50%", [0, 2, 3]), ("70%", [0, 2, 3, 4, 5])])
def test_equals_of_the_threshold_are_kept_in_canonical_order(tmp_path: Path, peru, keep: str, ones: list[int]) -> None:
    """Two entries of 2 among ten, all others 1: exactly floor(keep * 10) stay."""
    vector = torch.tensor([1.0, 2, 1, 1, 1, 1, 2, 1, 1, 1])
    case = Merged(tmp_path, peru, {"a": torch.zeros(4), "b": torch.zeros(6)}, [{"a": vector[:4], "b": vector[4:]}] * 2)
    expected = torch.where(vector == 2, 2.0, 0.0)
    expected[ones] = 1.0
    got = case.run("-m", "ties", "--keep", keep, "--scale", "1")
    assert torch.cat([got["a"], got["b"]]).tolist() == expected.tolist()


def test_trimming_equals_peft_magnitude_pruning(tmp_path: Path, peru) -> None:
    case = Merged(tmp_path, peru, *family(1, ties=False))
    close(case.vector("-m", "ties", "--keep", "0.1"), merge_utils.magnitude_based_pruning(case.vectors[0], 0.1))


@pytest.mark.parametrize("tasks", [1, 3, 5])
def test_sums_and_averages_equal_their_formulas(tmp_path: Path, peru, tasks: int) -> None:
    case = Merged(tmp_path, peru, *family(tasks, ties=False))
    weights = torch.tensor(NEGATIVE[:tasks])
    got = case.vector("-m", "task-arithmetic", "--scale", "0.3", *case.weights(tasks))
    close(got, 0.3 * merge_utils.task_arithmetic(case.vectors, weights))
    close(case.vector("-m", "task-arithmetic", "--scale", "-0.5"), -0.5 * sum(case.vectors))
    if tasks > 1:
        models = torch.stack([flatten(table) for table in case.fine])
        close(flatten(case.run("-m", "linear", base=False)), models.mean(dim=0))
        close(flatten(case.run("-m", "linear", *case.weights(tasks))), (models * weights.view(-1, 1)).sum(0) / weights.sum())
        close(flatten(case.run("-m", "linear", "--no-normalize", *case.weights(tasks))), (models * weights.view(-1, 1)).sum(0))
        close(case.vector("-m", "consensus", "--scale", "1"), consensus(case.vectors, 0.4, 2))


def test_wise_ft_merges_the_base_as_one_of_the_models(tmp_path: Path, peru) -> None:
    case = Merged(tmp_path, peru, *family(1))
    at = tmp_path / "base.safetensors"
    options = ["-m", "linear", "--weight", "t0=0.25", "--weight", "zero=0.75", "--no-sync"]
    peru("merge", f"zero={at}", *case.models, "-b", at, "-o", tmp_path / "w.safetensors", *options)
    close(flatten(load_file(tmp_path / "w.safetensors")), flatten(case.base) + 0.25 * case.vectors[0])


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_breadcrumbs_drop_both_ends(tmp_path: Path, peru, scope: str) -> None:
    case = Merged(tmp_path, peru, *family(3, seed=3))

    def expected(own: list[torch.Tensor]) -> torch.Tensor:
        n = len(own[0])
        return 0.5 * sum(breadcrumbs(v, int(0.3 * n), int(0.1 * n)) for v in own)

    got = case.vector("-m", "breadcrumbs", "--keep", "30%", "--gamma", "10%", "--scope", scope, "--scale", "0.5")
    close(got, expected(case.vectors) if scope == "global" else case.by_tensor(expected))


def test_breadcrumbs_leave_a_tensor_that_nobody_changed(tmp_path: Path, peru) -> None:
    base, fine = family(3, seed=3)
    for table in fine:
        table["b.bias"] = base["b.bias"]
    got = Merged(tmp_path, peru, base, fine).run("-m", "breadcrumbs-ties", "--scope", "tensor")
    assert torch.equal(got["b.bias"], base["b.bias"]) and not torch.equal(got["b.weight"], base["b.weight"])


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_equals_its_formula(tmp_path: Path, peru, t: float) -> None:
    base, fine = family(2, ties=False)
    noise = torch.Generator().manual_seed(5)
    fine[1] = {n: torch.randn(x.shape, generator=noise) if x.is_floating_point() else x for n, x in fine[1].items()}
    case = Merged(tmp_path, peru, base, fine)
    got = case.run("-m", "slerp", "--t", t, base=False)
    for name in SHAPES:
        close(got[name].view(-1), slerp(fine[0][name].view(-1), fine[1][name].view(-1), t))


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_dare_against_its_expectation(tmp_path: Path, peru, method: str) -> None:
    base, fine = family(2, ties=False)
    case = Merged(tmp_path, peru, base, fine)
    draws = [case.vector("-m", method, "--keep", "50%", "--seed", seed) for seed in range(30)]
    mean = torch.stack(draws).mean(dim=0)
    if method == "dare":
        # each draw is 2 tau or 0 with probability 1/2: its variance is tau^2
        deviation = sum(v.square() for v in case.vectors).sqrt() / 30**0.5
        score = ((mean - sum(case.vectors)) / deviation.clamp(min=1e-12))[deviation > 1e-9]
        assert abs(float(score.mean())) < 0.03 and 0.95 < float(score.std()) < 1.05
    # a single task's kept entry is 0 or the entry over the density
    alone = Merged(tmp_path, peru, base, fine[:1]).vector("-m", method, "--keep", "50%")
    kept = alone != 0
    assert 0.49 < float(kept.float().mean()) < 0.51
    close(alone[kept], 2 * case.vectors[0][kept])


def test_same_bytes_for_any_threads_tiles_and_hash_seed(tmp_path: Path, peru) -> None:
    base, fine = family(3, dtype=torch.bfloat16)
    wide = torch.randn(300, 400, generator=torch.Generator().manual_seed(1))
    base["wide"] = wide.bfloat16()
    for i, table in enumerate(fine):
        table["wide"] = (wide + torch.randn(300, 400, generator=torch.Generator().manual_seed(i)) * 0.02).bfloat16()
    case = Merged(tmp_path, peru, base, fine)
    for method in ("task-arithmetic", "ties", "dare", "dare-ties", "breadcrumbs", "consensus", "linear"):
        seen = set()
        for options in ((), ("--threads", 1, "--tile-entries", 16384), ("--threads", 5, "--tile-entries", 32768)):
            case.run("-m", method, *options)
            seen.add(hashlib.sha256((tmp_path / "out.safetensors").read_bytes()).hexdigest())
        assert len(seen) == 1, method
    run_peru(
        "merge", *case.models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "other.safetensors", "-m", "dare", "--no-sync",
        env={"PYTHONHASHSEED": "77"},
    )  # fmt: skip
    case.run("-m", "dare", name="dare")
    assert (tmp_path / "other.safetensors").read_bytes() == (tmp_path / "dare.safetensors").read_bytes()


def test_dare_bytes_are_pinned(tmp_path: Path, peru) -> None:
    """The same on every machine: recorded once."""
    base = {"w": torch.zeros(64)}
    case = Merged(tmp_path, peru, base, [{"w": torch.ones(64)}])
    kept = (case.run("-m", "dare", "--keep", "25%", "--seed", 3)["w"] != 0).int().tolist()
    assert "".join(map(str, kept)) == PINNED


PINNED = "1001000101010011100000011010000100100100001000000000100000000000"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_is_rounded_once(tmp_path: Path, peru, dtype: torch.dtype) -> None:
    base, fine = family(3, ties=False, dtype=dtype)
    case = Merged(tmp_path, peru, base, fine)
    got = case.run("-m", "task-arithmetic")
    for name in SHAPES:
        kind = torch.float64 if dtype is torch.float64 else torch.float32
        total = (fine[0][name].to(kind) - base[name].to(kind)) + (fine[1][name].to(kind) - base[name].to(kind))
        total = total + (fine[2][name].to(kind) - base[name].to(kind))
        assert raw(got[name]) == raw((base[name].to(kind) + total * 0.3).to(dtype)), name
    wider = case.run("-m", "task-arithmetic", "--dtype", "fp32")
    assert {t.dtype for n, t in wider.items() if n != "ids"} == {torch.float32}


def test_pruning_against_scale_0_is_post_pruning(tmp_path: Path, peru) -> None:
    base, fine = family(2, dtype=torch.bfloat16)
    case = Merged(tmp_path, peru, base, fine)
    merged = case.run("-m", "task-arithmetic", "--scale", "0", name="merged")
    assert all(raw(merged[name]) == raw(tensor) for name, tensor in base.items())
    for against in ("base", "merged"):
        peru("prune", tmp_path / "f0.safetensors", "-b", tmp_path / f"{against}.safetensors", "-o", tmp_path / f"{against}-a.safetensors",
             "--keep", "7%", "--no-sync")  # fmt: skip
        peru("unpack", tmp_path / f"{against}-a.safetensors", "-b", tmp_path / f"{against}.safetensors", "-o",
             tmp_path / f"{against}-r.safetensors", "--no-sync")  # fmt: skip
    assert (tmp_path / "base-r.safetensors").read_bytes() == (tmp_path / "merged-r.safetensors").read_bytes()
    with safe_open(tmp_path / "base-a.safetensors", "pt") as a, safe_open(tmp_path / "merged-a.safetensors", "pt") as b:
        assert raw(a.get_tensor("blocks")) == raw(b.get_tensor("blocks"))


def test_effective_parameters_are_printed_and_recorded(tmp_path: Path, peru) -> None:
    case = Merged(tmp_path, peru, *family(2))
    peru("merge", *case.models, "-b", tmp_path / "base.safetensors", "-o", tmp_path / "dir", "-m", "ties", "--variant", "peft",
         "--weight", "t1=-2", "--no-sync", "--base-id", "org/base@abc")  # fmt: skip
    assert "scale 1, keep 20%, scope tensor, reduce mean, variant peft, weight t0 1, weight t1 -2" in peru.stderr
    with safe_open(tmp_path / "dir" / "model.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["peru.merge.options"])
        assert file.metadata()["format"] == "pt"
    assert recorded["weight t1"] == "-2" and recorded["scope"] == "tensor"
    card = (tmp_path / "dir" / "README.md").read_text()
    assert 'base_model: "org/base"\n' in card and "at `abc`" in card and "base_model_relation: merge" in card and "--weight t1=-2" in card
    assert str(tmp_path) not in card and os.sep + "f0" not in card


def test_the_cards_command_makes_the_same_merge(tmp_path: Path, peru, monkeypatch) -> None:
    case = Merged(tmp_path, peru, *family(2))
    for name, path in (("t0", case.models[0]), ("t1", case.models[1]), ("base", tmp_path / "base.safetensors")):
        (tmp_path / "again" / name).mkdir(parents=True)
        shutil.copy(str(path).partition("=")[2] or path, tmp_path / "again" / name / "model.safetensors")
    monkeypatch.chdir(tmp_path / "again")
    peru(
        "merge", "t0", "t1", "-b", "base", "-o", "first", "-m", "ties", "--keep", "30%", "--weight", "t1=-2", "--dtype", "bf16", "--no-sync"
    )
    (line,) = [line for line in Path("first/README.md").read_text().splitlines() if line.startswith("peru merge ")]
    peru(*shlex.split(line)[1:], "--no-sync")
    assert Path("merged/model.safetensors").read_bytes() == Path("first/model.safetensors").read_bytes()


def test_list_methods_names_each_method_and_paper(peru) -> None:
    from peru_cli.methods.table import METHODS

    printed = peru("merge", "--list-methods")
    for method in METHODS.values():
        assert method.name in printed and method.paper in printed
