"""`peru prune --max-bytes|--bits|--min-quality`: sizes, errors, and the unpacked result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

Peru = Callable[..., str]


def make_pair(folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, rank: int = 6) -> tuple[Path, Path]:
    """A base and a fine-tune whose differences are of low rank with noise; norms, an embedding with few changed rows, a head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {f"layer.{i}.weight": normal(96, 160) * 0.05 for i in range(3)} | {"embedding.weight": normal(700, 64) * 0.05}
    base |= {f"norm.{i}.weight": torch.ones(160) for i in range(3)} | {"steps": torch.arange(5)}
    fine = {name: tensor.clone() for name, tensor in base.items()}
    for i in range(3):
        spectrum = 0.5 ** torch.arange(rank)
        fine[f"layer.{i}.weight"] += (normal(96, rank) * spectrum) @ normal(rank, 160) * 0.01 + normal(96, 160) * 0.0005
        fine[f"norm.{i}.weight"] += normal(160) * 0.003
    fine["embedding.weight"][::9] += normal(78, 3) @ normal(3, 64) * 0.004
    fine["head.weight"] = normal(4, 160)
    paths = folder / "base.safetensors", folder / "fine.safetensors"
    for path, tensors in zip(paths, (base, fine), strict=True):
        save_file({name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, path)
    return paths


def squared_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], names: set[str]) -> float:
    return sum(float((a[n].double() - b[n].double()).square().sum()) for n in names if a[n].is_floating_point())


@pytest.mark.parametrize("limit", [6000, 8000, 12000])
def test_the_bytes_are_used_up_where_one_direction_is_larger_than_what_is_left(peru: Peru, tmp_path: Path, limit: int) -> None:
    noise = torch.Generator().manual_seed(0)
    base = {"embed": torch.randn(20000, 16, generator=noise)} | {f"layer.{i}": torch.randn(64, 64, generator=noise) for i in range(6)}
    fine = {name: tensor + 0.01 * torch.randn(tensor.shape, generator=noise) for name, tensor in base.items()}
    fine["embed"] = base["embed"] + 0.01 * torch.outer(torch.randn(20000, generator=noise), torch.randn(16, generator=noise))
    save_file(base, tmp_path / "base.safetensors")
    save_file(fine, tmp_path / "fine.safetensors")
    out = tmp_path / "a.safetensors"
    peru("prune", tmp_path / "fine.safetensors", "--base", tmp_path / "base.safetensors", "-o", out, "--max-bytes", limit)
    assert 0.99 * limit < out.stat().st_size <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_unpacked_model_has_the_printed_error(peru: Peru, tmp_path: Path, dtype: torch.dtype) -> None:
    base, fine = make_pair(tmp_path, dtype)
    out = tmp_path / "a.safetensors"
    (said,) = json.loads(peru("prune", fine, "--base", base, "-o", out, "--max-bytes", "16kB", "--json"))
    assert said["file_bytes"] == out.stat().st_size
    assert 0.98 * 16000 < said["file_bytes"] <= 16000
    peru("unpack", out, "--base", base, "-o", tmp_path / "back.safetensors")
    back, wanted, origin = load_file(tmp_path / "back.safetensors"), load_file(fine), load_file(base)
    assert set(back) == set(wanted)
    assert all(back[name].dtype is wanted[name].dtype and back[name].shape == wanted[name].shape for name in wanted)
    assert torch.equal(back["head.weight"], wanted["head.weight"]) and torch.equal(back["steps"], wanted["steps"])
    error = squared_error(back, wanted, set(origin))
    assert error == pytest.approx(said["squared_error"], rel=1e-9)
    assert said["predicted_squared_error"] == pytest.approx(error, rel=0.02)
    assert 1 - error / squared_error(wanted, origin, set(origin)) == pytest.approx(said["quality"], rel=1e-6)
    untouched = torch.ones(700, dtype=torch.bool)
    untouched[::9] = False
    assert torch.equal(back["embedding.weight"][untouched], origin["embedding.weight"][untouched])


def test_more_bytes_bring_less_error_and_beat_sparse_deltas_of_the_same_size(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    errors = []
    for size in ("12kB", "16kB", "30kB"):
        (said,) = json.loads(peru("prune", fine, "--base", base, "-o", tmp_path / f"{size}.safetensors", "--max-bytes", size, "--json"))
        errors.append(said["relative_error"])
    assert errors == sorted(errors, reverse=True)
    (sparse,) = json.loads(peru("prune", fine, "--base", base, "-o", tmp_path / "s.safetensors", "--keep", "10%", "--json"))
    peru("unpack", tmp_path / "s.safetensors", "--base", base, "-o", tmp_path / "back.safetensors")
    origin, wanted = load_file(base), load_file(fine)
    missed = squared_error(load_file(tmp_path / "back.safetensors"), wanted, set(origin))
    energy = squared_error(wanted, origin, set(origin))
    assert sparse["file_bytes"] > 16000
    assert errors[1] ** 2 < 0.5 * missed / energy


@pytest.mark.parametrize("size", [9_300, 11_000, 12_345, 16_000, 27_000])
def test_small_models_use_up_the_limit(peru: Peru, tmp_path: Path, size: int) -> None:
    base, fine = make_pair(tmp_path)
    (said,) = json.loads(peru("prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--max-bytes", size, "--json"))
    assert 0.99 * size < said["file_bytes"] <= size


def test_quality_is_reached_and_not_much_exceeded(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    (said,) = json.loads(peru("prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--min-quality", "90%", "--json"))
    assert 0.9 <= said["quality"] < 0.91


def test_bits_count_neither_heads_nor_side_files(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    (said,) = json.loads(peru("prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--bits", "1.2", "--json"))
    assert 1.18 < said["bits_per_parameter"] <= 1.2
    assert said["whole_bytes"] == 4 * 160 * 4


def test_several_tasks_share_one_budget(peru: Peru, tmp_path: Path) -> None:
    base, weak = make_pair(tmp_path)
    tensors, origin = load_file(weak), load_file(base)
    for name, tensor in origin.items():
        if tensor.is_floating_point():
            tensors[name] = tensor + 4 * (tensors[name] - tensor)
    strong = tmp_path / "strong.safetensors"
    save_file(tensors, strong)
    said = json.loads(peru("prune", f"a={weak}", f"b={strong}", "--base", base, "-o", tmp_path / "d/", "--max-bytes", "40kB", "--json"))
    assert 0.98 * 40000 < sum(each["file_bytes"] for each in said) <= 40000
    assert said[1]["file_bytes"] > 1.3 * said[0]["file_bytes"]
    for task, fine in (("a", weak), ("b", strong)):
        peru("unpack", tmp_path / "d" / f"{task}.safetensors", "--base", base, "-o", tmp_path / f"{task}.safetensors")
        assert load_file(tmp_path / f"{task}.safetensors").keys() == load_file(fine).keys()


def test_threads_and_tiles_change_no_byte(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path, torch.bfloat16)
    for name, settings in {"one": ["--threads", 1], "four": ["--threads", 4, "--tile-entries", 16384]}.items():
        peru("prune", f"t={fine}", "--base", base, "-o", tmp_path / f"{name}.safetensors", "--max-bytes", "14kB", *settings)
        peru("unpack", tmp_path / f"{name}.safetensors", "--base", base, "-o", tmp_path / f"{name}-back.safetensors", *settings)
    for name in ("{}.safetensors", "{}-back.safetensors"):
        assert (tmp_path / name.format("one")).read_bytes() == (tmp_path / name.format("four")).read_bytes()


def test_invalid_requests_are_reported(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    command = ["prune", fine, "--base", base, "-o", tmp_path / "a.safetensors"]
    for options, words in {
        ("--max-bytes", "3kB"): "without changes takes",
        ("--max-bytes", "3kB", "--bits", "1"): "give one of them",
        ("--bits", "0"): "--bits '0'",
        ("--min-quality", "99", "--keep", "1%"): "--min-quality",
        ("--min-quality", "100%"): "--lossless",
        ("--bits", "1", "--scope", "tensor"): "go with --keep",
        (): "say how much to keep",
    }.items():
        peru(*command, *options, code=2)
        assert words in peru.stderr  # type: ignore[attr-defined]
    assert not list(tmp_path.glob("*peru*")) and not (tmp_path / "a.safetensors").exists()


def test_a_limit_above_the_need_is_not_used_up(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    (said,) = json.loads(peru("prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--max-bytes", "50MB", "--json"))
    assert "more would not help" in peru.stderr  # type: ignore[attr-defined]
    assert said["relative_error"] < 0.01


def test_another_base_is_refused(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    peru("prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--max-bytes", "16kB")
    tensors = load_file(base)
    tensors["norm.1.weight"][3] += 1
    save_file(tensors, tmp_path / "other.safetensors")
    peru("unpack", tmp_path / "a.safetensors", "--base", tmp_path / "other.safetensors", "-o", tmp_path / "b.safetensors", code=1)
    assert "norm.1.weight: different contents" in peru.stderr  # type: ignore[attr-defined]
    assert not (tmp_path / "b.safetensors").exists()


def test_a_grown_vocabulary_is_restored(peru: Peru, tmp_path: Path) -> None:
    base, fine = tmp_path / "base.safetensors", tmp_path / "fine.safetensors"
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(5000, 16, generator=generator)
    new = torch.cat((old, torch.randn(7, 16, generator=generator)))
    new[10:900] += torch.randn(890, 2, generator=generator) @ torch.randn(2, 16, generator=generator) * 0.1
    save_file({"e.weight": old}, base)
    save_file({"e.weight": new}, fine)
    (said,) = json.loads(peru("prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--min-quality", "95%", "--json"))
    peru("unpack", tmp_path / "a.safetensors", "--base", base, "-o", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")["e.weight"]
    assert torch.equal(back[5000:], new[5000:]) and torch.equal(back[900:5000], old[900:])
    assert float((back - new).square().sum()) == pytest.approx(said["squared_error"], rel=1e-6)


def test_every_command_reads_the_kind(peru: Peru, tmp_path: Path) -> None:
    import peru_cli

    base, fine = make_pair(tmp_path, torch.bfloat16)
    out = tmp_path / "t.safetensors"
    peru("prune", fine, "--base", base, "-o", out, "--max-bytes", "14kB")
    peru("unpack", out, "--base", base, "-o", tmp_path / "back.safetensors")
    back, origin = load_file(tmp_path / "back.safetensors"), load_file(base)
    said = json.loads(peru("inspect", out, "--json"))
    assert said["file_bytes"] == out.stat().st_size
    assert 0.75 < sum(t["bits"] for t in said["tensors"] if t["name"] != "head.weight") / 8 / said["parts"]["blocks"] < 1.1
    peru("inspect", out, "--plot", tmp_path / "plot.png")
    assert "rank" in peru("inspect", out)
    model = {name: tensor.clone() for name, tensor in origin.items()}
    with peru_cli.open_artifact(out) as artifact:
        applied = peru_cli.apply(model, artifact)
        assert model.keys() == back.keys() and all(torch.equal(model[name], back[name]) for name in back)
        applied.restore()
    assert model.keys() == origin.keys() and all(torch.equal(model[name], origin[name]) for name in origin)
    merge = ["--base", base, "--method", "task-arithmetic", "--scale", "0.5", "--merge-heads"]
    peru("merge", f"a={out}", f"b={fine}", "-o", tmp_path / "m1", *merge)
    peru("merge", f"a={tmp_path / 'back.safetensors'}", f"b={fine}", "-o", tmp_path / "m2", *merge)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("m1", "m2"))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_inspect_predicts_size_and_error_and_draws_them(peru: Peru, tmp_path: Path) -> None:
    base, fine = make_pair(tmp_path)
    plot = tmp_path / "frontier.png"
    said = json.loads(peru("inspect", fine, "--base", base, "--plot", plot, "--json"))
    assert plot.read_bytes().startswith(b"\x89PNG")
    (seen,) = (each for each in said["mixed"] if each["bits"] == 1.0)  # smaller budgets do not pay for a header here
    (made,) = json.loads(peru("prune", fine, "--base", base, "-o", tmp_path / "a.safetensors", "--bits", "1", "--json"))
    assert seen["file_bytes"] == pytest.approx(made["file_bytes"], rel=0.1)
    assert seen["relative_error"] == pytest.approx(made["relative_error"], rel=0.15)
    table = peru("inspect", fine, "--base", base, "--plot", plot)
    assert "--bits 1 " in table and "--bits" not in peru("inspect", fine, "--base", base)
