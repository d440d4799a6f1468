"""Merges with data, against closed forms, float64 and torch programs; their statistics on disk."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.func import functional_call, grad, vmap

from peru_cli.checkpoints.local.atomic import PartialFile
from peru_cli.merge.data import statistics as on_disk
from peru_cli.methods.examples import adamerging, fisher, regmean
from peru_cli.methods.statistics import TaskModel
from tests.support import models
from tests.support.damage import files
from tests.support.data_family import TASKS, command, fine_tune, gpt2, merged, sentences, tokens, write_family, write_rows


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


# Fisher


def test_sampled_labels_come_as_often_as_they_are_probable() -> None:
    """With evenly spaced draws the mean over draws is the sum over labels, up to one draw for each label."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)
    p = (weight @ x).softmax(-1).detach()
    exact = (p * (1 - p)).unsqueeze(1) * x.square()
    draws = 2000
    total = torch.zeros_like(weight)
    for i in range(draws):
        (found,) = fisher.squared_gradients((weight @ x).unsqueeze(0), [weight], [(i + 0.5) / draws])
        total += found
    torch.testing.assert_close(total / draws, exact, rtol=0, atol=4 / draws)
    drawn = fisher.label_draws(0, 0, 4000)
    assert drawn.min() >= 0 and drawn.max() < 1 and abs(drawn.mean() - 0.5) < 0.02  # 4 standard deviations


def test_fisher_of_a_transformer_is_that_of_vmap_and_grad(family: Path, peru, tmp_path: Path) -> None:
    peru(*command(family, "fisher", "-o", tmp_path / "out", "--stats", tmp_path / "stats"))
    files = sorted((tmp_path / "stats").glob("fisher-*.safetensors"))
    by_task = {safe_open(file, "pt").metadata()["peru.task"]: load_file(file) for file in files}
    assert sorted(by_task) == list(TASKS)
    for task, statistics in by_task.items():
        model = fine_tune(family, task)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def log_chance(parameters, label, ids, model=model):
            return functional_call(model, parameters, (), {"input_ids": ids.unsqueeze(0)}).logits[0].log_softmax(-1) @ label

        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        texts = sentences(family, task)
        for text in texts:  # one length at a time: no padding, so no mask
            ids = tokens(family, [text])["input_ids"]
            chances = model(input_ids=ids).logits.detach()[0].double().softmax(-1)
            found = vmap(grad(log_chance), in_dims=(None, 0, None))(parameters, torch.eye(3), ids[0])
            for name, gradients in found.items():
                total[name] += torch.einsum("y,y...->...", chances, gradients.double().square()) / len(texts)
        assert sum(name.startswith("fisher/") for name in statistics) == len(parameters)
        norm = torch.stack([expected.square().sum() for expected in total.values()]).sum().sqrt()
        largest = max(float(expected.max()) for expected in total.values())
        for name, expected in total.items():
            # float32 sums in another order; keys' biases have no gradient, so theirs is only rounding
            allowed = 1e-5 * float(expected.max()) + 1e-10 * largest
            torch.testing.assert_close(statistics[f"fisher/{name}"].double(), expected, rtol=2e-4, atol=allowed, msg=name)
            torch.testing.assert_close(statistics[f"fisher-norm/{name}"].double(), norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_fisher_merge_is_the_weighted_mean(family: Path, peru, tmp_path: Path, normalize: bool) -> None:
    options = ["--stats", tmp_path / "stats", "--weight", "b=0.5", "--floor", "1e-4", *(["--normalize"] if normalize else [])]
    peru(*command(family, "fisher", "-o", tmp_path / "out", *options))
    by_task = {safe_open(f, "pt").metadata()["peru.task"]: load_file(f) for f in (tmp_path / "stats").iterdir()}
    got = merged(tmp_path / "out")
    fine = {task: load_file(family / task / "model.safetensors") for task in TASKS}
    for name, tensor in got.items():
        above, below = 0.0, 0.0
        for task, weight in (("a", 1.0), ("b", 0.5)):
            importance = by_task[task][f"fisher/bert.{name}"].double().clamp(min=1e-4) * weight
            importance = importance / (by_task[task][f"fisher-norm/bert.{name}"].double() if normalize else 1.0)
            above, below = above + importance * fine[task][f"bert.{name}"].double(), below + importance
        torch.testing.assert_close(tensor, above / below, rtol=2e-6, atol=2e-7, msg=name)
    assert (tmp_path / "out" / "heads" / "a.safetensors").exists()


# RegMean


def test_no_information_without_a_floor_is_said_as_it_is(family: Path, peru, tmp_path: Path) -> None:
    """Positions that no sentence reaches have no Fisher information: their weighted mean is 0 / 0."""
    peru(*command(family, "fisher", "-o", tmp_path / "m", "--floor", "0"), code=1)
    assert "is not a number at entry" in peru.stderr and "raise --floor" in peru.stderr and "wider" not in peru.stderr


def test_mixing_matrices_are_least_squares_and_add_up() -> None:
    noise = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 9, generator=noise, dtype=torch.float64) for n in (40, 30)]
    weights = [torch.randn(5, 9, generator=noise, dtype=torch.float64) for _ in inputs]
    grams = [x.T @ x / len(x) for x in inputs]
    mixing = regmean.mixing_matrices(grams, [1.0, 0.25], 1.0, 0.0)
    tall = torch.cat([x * (share / len(x)) ** 0.5 for x, share in zip(inputs, (1.0, 0.25), strict=True)])
    wanted = torch.cat([x @ w.T * (s / len(x)) ** 0.5 for x, w, s in zip(inputs, weights, (1.0, 0.25), strict=True)])
    expected = torch.linalg.lstsq(tall, wanted).solution.T
    got = sum(w @ m for w, m in zip(weights, mixing, strict=True))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sum(mixing), torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)


def test_inputs_that_no_task_has_are_averaged() -> None:
    gram = torch.zeros(4, 4, dtype=torch.float64)
    gram[0, 0] = 2.0
    for grams in ([gram, gram], [torch.zeros(4, 4)] * 2):
        for matrix in regmean.mixing_matrices(grams, [1.0, 1.0], 0.9, 1e-6):
            torch.testing.assert_close(matrix, torch.eye(4, dtype=torch.float64) / 2, rtol=0, atol=1e-12)


def inputs_of(model: torch.nn.Module, name: str, batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The inputs of a layer, float64 (rows, in)."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].detach()))
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen]).double()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_regmean_solves_the_normal_equations(peru, tmp_path: Path, kind: str, alpha: float) -> None:
    """gpt2 stores its weights (in, out). Each sentence is run alone, so nothing is padded."""
    family = write_family(tmp_path, models.bert if kind == "bert" else gpt2)
    peru(*command(family, "regmean", "-o", tmp_path / "out", "--alpha", alpha, "--ridge", "1e-12"))
    got = merged(tmp_path / "out")
    layers = {
        "bert": ("bert.", ["encoder.layer.0.attention.self.key", "encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"]),
        "gpt2": ("transformer.", ["h.0.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_fc", "h.0.mlp.c_proj"]),
    }
    prefix, names = layers[kind]
    fine = {task: fine_tune(family, task) for task in TASKS}
    for name in names:
        left, right = 0.0, 0.0
        for task, model in fine.items():
            x = inputs_of(model, prefix + name, [tokens(family, [text]) for text in sentences(family, task)])
            gram = x.T @ x / len(x)
            gram = alpha * gram + (1 - alpha) * torch.diag(gram.diagonal())
            weight = model.get_submodule(prefix + name).weight.detach().double()
            left, right = left + gram, right + gram @ (weight.T if kind == "bert" else weight)
        solved = torch.linalg.solve(left, right)
        expected = solved.T if kind == "bert" else solved
        # float32 inputs, amplified by the condition of the sum; then float32 storage
        allowed = 1e-6 * float(torch.linalg.cond(left)) * float(expected.abs().max())
        torch.testing.assert_close(got[f"{name}.weight"], expected, rtol=1e-5, atol=min(allowed, 1e-3), msg=f"{name} {alpha}")
        mean = sum(dict(model.named_parameters())[f"{prefix}{name}.bias"].double() for model in fine.values()) / 2
        torch.testing.assert_close(got[f"{name}.bias"], mean, rtol=1e-6, atol=1e-8)


def test_regmean_gives_the_same_bytes_for_any_threads_and_tiles(family: Path, peru, tmp_path: Path) -> None:
    found = set()
    for number, options in enumerate((["--threads", 1], ["--threads", 3], ["--tile-entries", 16384])):
        out = tmp_path / f"{number}"
        peru(*command(family, "regmean", "-o", out, "--stats", tmp_path / "stats", *options))
        found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1


def test_padding_is_no_input(family: Path, peru, tmp_path: Path) -> None:
    grams = []
    for size in (1, 12):
        peru(*command(family, "regmean", "-o", tmp_path / f"o{size}", "--stats", tmp_path / f"s{size}", "--batch-size", size))
        grams.append({f.name: load_file(f) for f in (tmp_path / f"s{size}").iterdir()})
    assert sorted(grams[0]) == sorted(grams[1])
    for name, tensors in grams[0].items():
        for key, gram in tensors.items():
            torch.testing.assert_close(gram, grams[1][name][key], rtol=1e-4, atol=1e-5 * float(gram.abs().max()), msg=key)


# AdaMerging


def test_derivative_by_the_scales_is_that_of_central_differences(family: Path) -> None:
    """float64, so differences with step 1e-5 are accurate to about 1e-9."""
    base = {f"bert.{name}": tensor.double() for name, tensor in load_file(family / "base" / "model.safetensors").items()}
    batches = [tokens(family, sentences(family, task)[:4]) for task in TASKS]
    for by_tensor in (True, False):
        tasks = []
        for task in TASKS:
            model = fine_tune(family, task).double().requires_grad_(False)
            names = {name: name for name, _ in model.named_parameters()}
            tasks.append(TaskModel(task, model, None, names, base.get, 4))  # type: ignore[arg-type]
        merge = adamerging.Merged(tasks, by_tensor)
        width = max(merge.columns) + 1
        assert width == (len(base) if by_tensor else 1)
        at = 0.3 + 0.1 * torch.randn(2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        merge.put(at)
        _, gradient = merge.gradient(batches)
        for task, column in ((0, 0), (1, width - 1), (1, width // 2)):
            step = torch.zeros_like(at)
            step[task, column] = 1e-5
            values = []
            for moved in (at + step, at - step):
                merge.put(moved)
                values.append(merge.gradient(batches)[0])
            torch.testing.assert_close(float(gradient[task, column]), (values[0] - values[1]) / 2e-5, rtol=1e-5, atol=1e-8)


def test_entropy_is_that_of_torch() -> None:
    logits = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(adamerging.entropy(logits), torch.distributions.Categorical(logits=logits).entropy().mean())


def test_adamerging_starts_from_task_arithmetic_and_makes_the_model_surer(family: Path, peru, tmp_path: Path) -> None:
    peru(*command(family, "task-arithmetic", "-o", tmp_path / "ta", "--scale", "0.3", data=False))
    peru(*command(family, "adamerging", "-o", tmp_path / "zero", "--steps", 0))
    start, unmoved = merged(tmp_path / "ta"), merged(tmp_path / "zero")
    for name, tensor in start.items():  # the scale is applied to each vector instead of their sum
        torch.testing.assert_close(unmoved[name], tensor, rtol=3e-7, atol=1e-7)

    def total_entropy(out: Path) -> float:
        found = 0.0
        for task in TASKS:
            model = fine_tune(family, task)
            weights = {f"bert.{name}": tensor for name, tensor in load_file(out / "model.safetensors").items()}
            model.load_state_dict(weights, strict=False)
            found += float(adamerging.entropy(model(**tokens(family, sentences(family, task))).logits.detach()))
        return found

    for scope in ("tensor", "global"):
        options = ["--steps", 20, "--learning-rate", "0.02", "--scope", scope, "--stats", tmp_path / scope, "--seed", 3]
        peru(*command(family, "adamerging", "-o", tmp_path / f"o-{scope}", *options))
        assert total_entropy(tmp_path / f"o-{scope}") < total_entropy(tmp_path / "ta") - 0.01
        for file in (tmp_path / scope).iterdir():
            assert (len({float(value) for value in load_file(file).values()}) == 1) == (scope == "global")
    peru(*command(family, "adamerging", "-o", tmp_path / "again", *options, "--stats", tmp_path / "other"))
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "o-global" / "model.safetensors").read_bytes()


def test_order_of_examples_is_a_permutation_each_epoch() -> None:
    stream = adamerging.shuffled(0, "a", 10, 4)
    epochs = [[int(n) for _ in range(3) for n in next(stream)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]


# Statistics on disk


def test_statistics_are_collected_once(family: Path, peru, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    peru(*command(family, "fisher", "-o", tmp_path / "1", "--stats", stats))
    before = {file.name: file.stat().st_mtime_ns for file in stats.iterdir()}
    assert len(before) == 2 and "collecting" in peru.stderr
    peru(*command(family, "fisher", "-o", tmp_path / "2", "--stats", stats, "--floor", "1e-3"))
    assert {file.name: file.stat().st_mtime_ns for file in stats.iterdir()} == before and "collecting" not in peru.stderr
    peru(*command(family, "fisher", "-o", tmp_path / "3", "--stats", stats, "--expectation", "sampled"))
    assert len(list(stats.iterdir())) == 4
    peru(*command(family, "fisher", "-o", tmp_path / "4", "--stats", stats, "--max-samples", 5))
    assert len(list(stats.iterdir())) == 6
    metadata = safe_open(tmp_path / "4" / "model.safetensors", "pt").metadata()
    assert {f"fisher-{key}.safetensors" for key in json.loads(metadata["peru.merge.statistics"])} <= {f.name for f in stats.iterdir()}
    (damaged := stats / next(iter(before))).write_bytes(b"no")
    peru(*command(family, "fisher", "-o", tmp_path / "5", "--stats", stats), code=1)
    assert damaged.name in peru.stderr and "remove it" in peru.stderr and not (tmp_path / "5").exists()


def test_two_users_of_one_folder_of_statistics(family: Path, tmp_path: Path, peru, monkeypatch) -> None:
    """Both collect, one writes first: the other waits for it and leaves its file alone, which somebody may be reading."""
    peru(*command(family, "fisher", "-o", tmp_path / "1", "--stats", tmp_path / "first"))
    (shared := tmp_path / "shared").mkdir()
    ours, theirs = sorted((tmp_path / "first").iterdir())
    other, waited = PartialFile(shared / theirs.name, sync=False), []

    def finish(seconds: float) -> None:
        waited.append((shared / theirs.name).exists())
        other.write_at(0, theirs.read_bytes())
        other.commit()

    monkeypatch.setattr(on_disk, "time", SimpleNamespace(sleep=finish))
    peru(*command(family, "fisher", "-o", tmp_path / "2", "--stats", shared))
    assert waited == [False] and sorted(path.name for path in shared.iterdir()) == [ours.name, theirs.name]
    assert files(tmp_path / "1") == files(tmp_path / "2") and (shared / ours.name).read_bytes() == ours.read_bytes()


@pytest.mark.parametrize("method", ["fisher", "regmean", "adamerging"])
def test_labels_are_not_needed_and_change_nothing(family: Path, peru, tmp_path: Path, method: str) -> None:
    options = ["--steps", 2] if method == "adamerging" else []
    peru(*command(family, method, "-o", tmp_path / "with", "--stats", tmp_path / "stats", *options))
    for number, task in enumerate(TASKS):
        write_rows(tmp_path / f"{task}.jsonl", 12, number, labels=False)
    data = [word for task in TASKS for word in ("--data", f"{task}={tmp_path / task}.jsonl")]
    peru(*command(family, method, *data, "-o", tmp_path / "without", "--stats", tmp_path / "stats", *options, data=False))
    assert "collecting" not in peru.stderr
    assert (tmp_path / "with" / "model.safetensors").read_bytes() == (tmp_path / "without" / "model.safetensors").read_bytes()


def test_methods_without_a_base_need_none(family: Path, peru, tmp_path: Path) -> None:
    peru(*command(family, "regmean", "-o", tmp_path / "with", "--stats", tmp_path / "stats"))
    peru(*command(family, "regmean", "-o", tmp_path / "without", "--stats", tmp_path / "stats", base=False))
    assert "collecting" not in peru.stderr
    ours, theirs = load_file(tmp_path / "without" / "model.safetensors"), load_file(tmp_path / "with" / "model.safetensors")
    assert dict.fromkeys(ours, True) == {f"bert.{name}": True for name in theirs}
    assert all(torch.equal(ours[f"bert.{name}"], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("method", ["regmean", "fisher", "adamerging"])
def test_tensors_that_transformers_renames_are_followed(peru, tmp_path: Path, method: str) -> None:
    """The demo's checkpoints have names of an earlier transformers: every trained weight has statistics under its own name."""
    from peru_cli import demo

    tasks = ("digits", "notmnist")
    data = [word for task in tasks for word in ("--data", f"{task}={demo.images(task)}")]
    options = ["--max-samples", 4, *(["--steps", 1, "--batch-size", 2] if method == "adamerging" else [])]
    models_ = [f"{task}={demo.fine_tune(task)}" for task in tasks]
    at = ["--base", demo.BASE, "--per-task", "^classifier", "-o", tmp_path / "out", "--stats", tmp_path / "stats", "--device", "cpu"]
    peru("merge", *models_, *at, *data, "-m", method, "--no-sync", *options)
    own = load_file(demo.fine_tune("digits") / "model.safetensors")
    for file in (tmp_path / "stats").iterdir():
        found = {name.partition("/")[2] for name in load_file(file) if not name.startswith("fisher-norm")}
        if method == "regmean":
            assert found == {name for name in own if name.endswith("weight") and own[name].dim() == 2}
        else:
            assert found | {name for name in own if name.startswith("classifier")} == set(own)
