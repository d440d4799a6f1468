"""Models that disagree: buffers, configs that compute differently, heads stored in only one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import save

Tensors = dict[str, torch.Tensor]
NOISE = torch.Generator().manual_seed(3)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=NOISE)


def folder(path: Path, tensors: Tensors, **config: object) -> Path:
    path.mkdir()
    save(tensors, path / "model.safetensors")
    if config:
        (path / "config.json").write_text(json.dumps(config))
    return path


def normalised(variance: float, steps: int) -> Tensors:
    """A layer with batch normalisation and fixed frequencies."""
    return {
        "conv.weight": normal(6, 5),
        "bn.running_mean": normal(6),
        "bn.running_var": torch.full((6,), variance),
        "bn.num_batches_tracked": torch.tensor(steps),
        "rope.inv_freq": 1 / torch.arange(1, 5).float(),
    }


METHODS = [
    ("task-arithmetic", ["--scale", 1], (1, 1)),
    ("task-arithmetic", ["--weight", "a=3", "--weight", "b=1"], (3, 1)),
    ("task-arithmetic", ["--weight", "a=-1"], (1, 1)),  # no shares: equal ones
    ("ties", ["--keep", "20%"], (1, 1)),
    ("linear", ["--weight", "a=1", "--weight", "b=3"], (1, 3)),
    ("slerp", ["--t", 0.25], (3, 1)),
]


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_running_statistics_are_averaged_and_stay_valid(tmp_path: Path, peru, number: int) -> None:
    method, options, shares = METHODS[number]
    base, a, b = normalised(0.2, 10), normalised(0.05, 20), normalised(0.03, 20)
    models = [folder(tmp_path / name, t) for name, t in (("base", base), ("a", a), ("b", b))]
    at = [] if method in ("linear", "slerp") else ["-b", models[0]]
    peru("merge", f"a={models[1]}", f"b={models[2]}", *at, "-o", tmp_path / "m", "-m", method, *options, "--no-sync")
    assert "running means and variances" in peru.stderr
    got = load_file(tmp_path / "m" / "model.safetensors")
    assert sorted(got) == sorted(base)
    for name in ("bn.running_mean", "bn.running_var"):
        expected = (shares[0] * a[name].double() + shares[1] * b[name].double()) / sum(shares)
        torch.testing.assert_close(got[name].double(), expected, rtol=1e-6, atol=1e-7)
    assert got["bn.running_var"].min() > 0
    assert torch.equal(got["rope.inv_freq"], base["rope.inv_freq"])


def test_fixed_buffers_that_differ_are_named(tmp_path: Path, peru) -> None:
    base, a = normalised(0.2, 10), normalised(0.1, 10)
    a["rope.inv_freq"] = a["rope.inv_freq"] * 2
    models = [folder(tmp_path / name, t) for name, t in (("base", base), ("a", a))]
    peru("merge", f"a={models[1]}", "-b", models[0], "-o", tmp_path / "m", "-m", "task-arithmetic", code=1)
    assert "rope.inv_freq" in peru.stderr and not (tmp_path / "m").exists()


def test_packs_and_artifacts_keep_statistics_whole(tmp_path: Path, peru) -> None:
    base, a, b = normalised(0.2, 10), normalised(0.05, 10), normalised(0.03, 10)
    models = [folder(tmp_path / name, t) for name, t in (("base", base), ("a", a), ("b", b))]
    at = ["-b", models[0], "--no-sync"]
    peru("shuffle-pack", f"a={models[1]}", f"b={models[2]}", *at, "-o", tmp_path / "p.safetensors")
    peru("unpack", tmp_path / "p.safetensors", "--task", "a", *at, "-o", tmp_path / "pa.safetensors")
    peru("prune", models[1], *at, "-o", tmp_path / "a.safetensors", "--keep", "10%")
    peru("unpack", tmp_path / "a.safetensors", *at, "-o", tmp_path / "aa.safetensors")
    for file in ("pa", "aa"):
        got = load_file(tmp_path / f"{file}.safetensors")
        assert sorted(got) == sorted(a)
        assert all(torch.equal(got[name], a[name]) for name in a if name != "conv.weight")


CONFIG = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 4, "num_hidden_layers": 1, "rope_theta": 10000.0}
DIFFERENT = [
    ({"rope_theta": 1e6}, ("1000000.0", "10000.0")),
    ({"num_attention_heads": 8}, ("num_attention_heads: 4 in", ", 8 in a")),
    ({"hidden_act": "gelu"}, ("'silu'", "'gelu'")),
    ({"rms_norm_eps": 1e-5}, ("rms_norm_eps: 1e-06", "1e-05 in a")),
]


@pytest.mark.parametrize("number", range(len(DIFFERENT)))
def test_configs_that_compute_differently_stop_a_merge_with_both_values(tmp_path: Path, peru, number: int) -> None:
    change, says = DIFFERENT[number]
    base = folder(tmp_path / "base", {"w": normal(4, 4)}, **CONFIG)
    a = folder(tmp_path / "a", {"w": normal(4, 4)}, **CONFIG | change)
    command = ["merge", f"a={a}", "-b", base, "-m", "task-arithmetic", "--no-sync"]
    peru(*command, "-o", tmp_path / "m", code=1)
    assert all(text in peru.stderr for text in (*says, "--config TASK")), peru.stderr
    assert not (tmp_path / "m").exists()
    for chosen, source in (("a", a), ("base", base)):
        peru(*command, "-o", tmp_path / f"m-{chosen}", "--config", chosen)
        written = tmp_path / f"m-{chosen}" / "config.json"
        assert json.loads(written.read_text()) == json.loads((source / "config.json").read_text())
    peru(*command, "-o", tmp_path / "x", "--config", "nobody", code=2)
    assert "no model is called 'nobody'" in peru.stderr


def test_configs_with_equivalent_fields_merge(tmp_path: Path, peru) -> None:
    base = folder(tmp_path / "base", {"w": normal(4, 4)}, **CONFIG)
    same = {"hidden_act": "silu", "attention_dropout": 0.1, "transformers_version": "5", "rope_scaling": None, "id2label": {"0": "x"}}
    newer = {k: v for k, v in CONFIG.items() if k != "rope_theta"} | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    a, b = folder(tmp_path / "a", {"w": normal(4, 4)}, **CONFIG | same), folder(tmp_path / "b", {"w": normal(4, 4)}, **newer)
    peru("merge", f"a={a}", f"b={b}", "-b", base, "-o", tmp_path / "m", "-m", "task-arithmetic", "--no-sync")


def language_model(head: bool | torch.Tensor) -> Tensors:
    tensors = {"model.embed_tokens.weight": normal(20, 8), "model.layers.0.mlp.weight": normal(8, 8)}
    if head is not False:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone() if head is True else head
    return tensors


@pytest.mark.parametrize("holders", [("a",), ("base",), ("a", "b")])
@pytest.mark.parametrize("command", ["merge", "shuffle-pack"])
def test_a_tied_head_that_only_some_models_store_is_dropped(tmp_path: Path, peru, holders: tuple[str, ...], command: str) -> None:
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    models = {name: language_model(name in holders) for name in ("base", "a", "b")}
    paths = {name: folder(tmp_path / name, t, **tied) for name, t in models.items()}
    out = tmp_path / ("m" if command == "merge" else "p.safetensors")
    options = ["-m", "task-arithmetic", "--scale", 0.5] if command == "merge" else []
    peru(command, f"a={paths['a']}", f"b={paths['b']}", "-b", paths["base"], "-o", out, *options, "--no-sync")
    assert "lm_head.weight repeats the embedding" in peru.stderr
    if command == "merge":
        got = load_file(out / "model.safetensors")
        assert "lm_head.weight" not in got and len(got) == 2
        name = "model.embed_tokens.weight"
        expected = models["base"][name] + 0.5 * sum(models[t][name] - models["base"][name] for t in "ab")
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)


def test_a_head_that_differs_from_its_embedding_is_kept(tmp_path: Path, peru) -> None:
    tied = {"model_type": "llama", "tie_word_embeddings": True}
    base, a = folder(tmp_path / "base", language_model(normal(20, 8)), **tied), folder(tmp_path / "a", language_model(False), **tied)
    b = folder(tmp_path / "b", language_model(normal(20, 8)), **tied)
    peru("merge", f"a={a}", f"b={b}", "-b", base, "-o", tmp_path / "m", "-m", "task-arithmetic", code=1)
    assert "lm_head.weight: in b, not in a" in peru.stderr
