"""Recipes against plain torch: every level, filters, gradients, slices, several documents, tied heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.merge.recipe.models import LAYERS, Tensors, make_family, save, shapes
from tests.merge.recipe.reference import merge, slerp

GRADED = [{"filter": "self_attn", "value": [0, 0.5, 0.3, 1]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}]
RECIPES = {
    "linear": {"merge_method": "linear", "models": [("a", {"weight": 0.7}), ("b", {"weight": 0.4})]},
    "linear by depth": {"merge_method": "linear", "models": [("a", {"weight": [0, 1]}), ("b", {"weight": [1, 0.5, 0.1]})]},
    "linear without sum": {
        "merge_method": "linear", "models": [("a", {"weight": GRADED}), ("b", {"weight": 1})],
        "parameters": {"normalize": False},
    },
    "no match falls to the next level": {
        "merge_method": "linear", "models": [("a", {"weight": {"filter": "mlp", "value": 3}}), ("b", {})], "parameters": {"weight": [1, 2]},
    },
    "slerp": {"merge_method": "slerp", "base_model": "b", "models": [("a", {}), ("b", {})], "parameters": {"t": GRADED}},
    "task arithmetic": {
        "merge_method": "task_arithmetic", "base_model": "base",
        "models": [("base", {}), ("a", {"weight": GRADED}), ("b", {"weight": -0.5})],
        "parameters": {"lambda": [{"filter": "norm", "value": 0}, {"value": 0.6}]},
    },
    "task arithmetic over the sum of weights": {
        "merge_method": "task_arithmetic", "base_model": "base", "models": [("a", {"weight": [0.2, 3]}), ("b", {"weight": 0.5})],
        "parameters": {"normalize": True},
    },
    "ties": {
        "merge_method": "ties", "base_model": "base",
        "models": [("a", {"weight": 1, "density": 0.5}), ("b", {"weight": -0.4, "density": 0.2})],
    },
    "ties by depth and name": {
        "merge_method": "ties", "base_model": "base",
        "models": [
            ("a", {"weight": GRADED, "density": [1, 0.5, 0.1]}), ("b", {"weight": 0.3, "density": 0.05}), ("c", {"weight": [0.9, 0.1]}),
        ],
        "parameters": {"normalize": False, "density": 0.75, "int8_mask": True},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensors]]:
    folder = tmp_path_factory.mktemp("family")
    return folder, make_family(folder)


@pytest.fixture(autouse=True)
def here(home: tuple[Path, dict[str, Tensors]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home[0])


def run(peru, folder: Path, recipe: Any, *options: object) -> Tensors:
    """Merge a recipe. Returns the result's tensors."""
    file, out = folder / "recipe.yml", folder / "out"
    file.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe))
    peru("merge", file, "-o", out, "--no-sync", "--force", *options)
    return load_file(out / "model.safetensors")


def close(found: Tensors, wanted: Tensors, within: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        assert found[name].shape == wanted[name].shape, name
        assert float((found[name].double() - wanted[name].double()).abs().max()) <= within * 4, name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_equals_its_formula(name: str, home: tuple[Path, dict[str, Tensors]], tmp_path: Path, peru) -> None:
    recipe = RECIPES[name] | {"models": [{"model": m, "parameters": p} for m, p in RECIPES[name]["models"]], "dtype": "float32"}
    close(run(peru, tmp_path, recipe), merge(recipe, home[1], LAYERS))


@pytest.mark.parametrize("settings", [(), ("--threads", 1, "--tile-entries", 16384)])
def test_threads_and_tiles_change_nothing(settings: tuple[object, ...], tmp_path: Path, peru) -> None:
    recipe = RECIPES["ties by depth and name"]
    recipe = recipe | {"models": [{"model": m, "parameters": p} for m, p in recipe["models"]]}
    run(peru, tmp_path, recipe, "--threads", 2)
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    run(peru, tmp_path, recipe, *settings)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == first


def test_slices_are_stacked_and_the_config_counts_them(home: tuple[Path, dict[str, Tensors]], tmp_path: Path, peru) -> None:
    text = """
slices:
- sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}, {model: a, layer_range: [1, 4]}]
  parameters: {t: [0.2, 0.4]}
merge_method: slerp
base_model: a
parameters: {t: [0, 1]}
dtype: float32
"""
    found, (a, b) = run(peru, tmp_path, text), (home[1]["a"], home[1]["b"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    for name in shapes(6):
        parts = name.split(".")
        theirs, t = name, 0.2 if name in ("model.norm.weight", "lm_head.weight") else 0.0
        if parts[1] == "layers":
            layer = int(parts[2])
            t = layer / 2 if layer < 3 else 0.2 + 0.1 * (layer - 3)
            theirs = ".".join([*parts[:2], str(layer if layer < 3 else layer - 2), *parts[3:]])
        wanted = slerp(a[theirs].double(), b[theirs].double(), t)
        assert float((found[name] - wanted).abs().max()) < 1e-6, name
    assert found.keys() == shapes(6).keys()


def test_slices_may_have_different_numbers_of_sources(home: tuple[Path, dict[str, Tensors]], tmp_path: Path, peru) -> None:
    text = """
slices:
- sources: [{model: a, layer_range: [0, 2], parameters: {weight: 0.5, density: 0.3}}]
- sources: [{model: c, layer_range: [1, 3], parameters: {weight: 1}}, {model: b, layer_range: [1, 3], parameters: {weight: [1, 3]}}]
merge_method: ties
base_model: base
dtype: float32
"""
    found, family = run(peru, tmp_path, text), home[1]
    name = "model.layers.{}.self_attn.q_proj.weight"
    one = merge(
        {"merge_method": "ties", "base_model": "base", "models": [{"model": "a", "parameters": {"weight": 0.5, "density": 0.3}}]}, family, 4
    )
    both = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "c", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 3}}],
    }
    close(
        {"x": found[name.format(0)], "e": found["model.embed_tokens.weight"]},
        {"x": one[name.format(0)], "e": one["model.embed_tokens.weight"]},
    )
    close({"x": found[name.format(3)]}, {"x": merge(both, family, 4)[name.format(2)]})
    both["models"][1]["parameters"]["weight"] = 1
    close({"x": found["lm_head.weight"]}, {"x": merge(both, family, 4)["lm_head.weight"]})


def test_documents_use_each_other(home: tuple[Path, dict[str, Tensors]], tmp_path: Path, peru) -> None:
    text = """
merge_method: slerp
base_model: soup
models: [{model: soup}, {model: c}]
parameters: {t: 0.25}
dtype: float32
---
name: soup
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]
dtype: float32
"""
    found, family = run(peru, tmp_path, text), home[1]
    soup = {name: (family["a"][name] + 3 * family["b"][name]) / 4 for name in family["a"]}
    close(found, {name: slerp(soup[name].double(), family["c"][name].double(), 0.25) for name in soup})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yml"]  # nothing is left of the first


def test_a_tied_head_falls_back_to_the_embedding(home: tuple[Path, dict[str, Tensors]], tmp_path: Path, peru) -> None:
    noise = torch.Generator().manual_seed(3)
    tied = {name: torch.randn(shape, generator=noise) for name, shape in shapes(tied=True).items()}
    save(tmp_path / "tied", tied, tie_word_embeddings=True)
    text = f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{{model: {tmp_path / 'tied'}}}, {{model: a}}]\n"
    found = run(peru, tmp_path, text)
    wanted = (tied["model.embed_tokens.weight"] + home[1]["a"]["lm_head.weight"]) / 2
    close({"head": found["lm_head.weight"]}, {"head": wanted})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_the_output_and_its_card_contain_the_recipe(tmp_path: Path, peru) -> None:
    text = f"# mine\nmerge_method: linear\nparameters: {{weight: 1}}\nmodels:\n- model: {Path.cwd() / 'a'}\n- model: b\n"
    run(peru, tmp_path, text, "--dtype", "bf16")
    kept = (tmp_path / "out" / "mergekit_config.yml").read_text()
    assert kept == text.replace(str(Path.cwd() / "a"), "a")  # no path of this machine
    card = (tmp_path / "out" / "README.md").read_text()
    assert kept.rstrip() in card and "peru merge mergekit_config.yml -o merged/ --dtype bf16" in card and str(Path.cwd()) not in card
    peru("merge", tmp_path / "out" / "README.md", "-o", tmp_path / "again", "--dtype", "bf16", "--no-sync")  # a card is a recipe
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_a_dry_run_says_what_was_understood(tmp_path: Path, peru) -> None:
    recipe = RECIPES["ties by depth and name"]
    (tmp_path / "r.yml").write_text(json.dumps(recipe | {"models": [{"model": m, "parameters": p} for m, p in recipe["models"]]}))
    shown = json.loads(peru("merge", tmp_path / "r.yml", "-o", tmp_path / "out", "--dry-run", "--json"))
    (document,) = shown["documents"]
    assert document["mergekit_method"] == "ties" and document["tasks"] == ["a", "b", "c"] and document["bytes_read"] > document["bytes"]
    groups = {name: group for group in document["groups"] for name in group["names"]}
    assert groups["model.layers.0.mlp.up_proj.weight"]["weights"] == pytest.approx([1, 0.3, 0.9])
    assert groups["model.layers.3.self_attn.q_proj.weight"]["own"]["keep"] == ["10%", "5%", "75%"]
    assert "normalize no" in peru.stderr and "lambda 1 (default)" in peru.stderr and "int8_mask is accepted without effect" in peru.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("-w", "a=mlp:0.7,self_attn:0.3", "-k", "a=0..3:[10%,50%,10%]", "-k", "b=30%")])
def test_values_by_tensor_on_the_command_line(
    options: tuple[str, ...], home: tuple[Path, dict[str, Tensors]], tmp_path: Path, peru
) -> None:
    peru("merge", "a=./a", "b=./b", "-b", "base", "-o", tmp_path / "o", "-m", "ties", "--variant", "mergekit", "--no-sync", *options)
    density = [{"filter": "layers", "value": [0.1, 0.5, 0.1]}, {"value": 0.2}]
    weight = [{"filter": "mlp", "value": 0.7}, {"filter": "self_attn", "value": 0.3}, {"value": 1}]
    models = [
        {"model": "a", "parameters": {"weight": weight, "density": density}},
        {"model": "b", "parameters": {"weight": 1, "density": 0.3}},
    ]
    close(
        load_file(tmp_path / "o" / "model.safetensors"),
        merge({"merge_method": "ties", "base_model": "base", "models": models}, home[1], LAYERS),
    )
    card = (tmp_path / "o" / "README.md").read_text()
    assert "--weight a=mlp:0.7,self_attn:0.3" in card and "--keep 'a=0..3:[10%,50%,10%]'" in card


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("-w", "a=mpl:0.7"), "--weight: 'mpl' matches no tensor"),
        (("-w", "a=0..4:[1,2]"), "layers 0..4 go beyond the last layer, 3"),
        (("-w", "a=3..1:[1,2]"), "layers 3..1 are in the wrong order"),
        (("-w", "a=mlp:"), "cannot be read"),
        (("-w", "a=[1,]"), "lacks a value"),
        (("-w", "a=1,"), "ends in a comma"),
        (("-w", "a=mlp:x"), "'x' is not a number"),
        (("-w", "0.5"), "--weight 0.5 names no task"),
        (("-k", "a=20%", "-k", "a=10%"), "--keep is given twice for a"),
        (("-k", "z=20%"), "no model is called 'z'"),
        (("-k", "a=mlp:200%"), "is more than 100%"),
        (("-k", "mlp:20%", "--scope", "global"), "cannot differ between tensors"),
        (("-m", "fisher", "-w", "a=mlp:1", "-d", "a=x.jsonl", "-d", "b=x.jsonl"), "fisher takes one value for all tensors"),
    ],
)
def test_invalid_values_by_tensor_are_refused(option: tuple[str, ...], says: str, tmp_path: Path, peru) -> None:
    peru("merge", "a=./a", "b=./b", "-b", "base", "-o", tmp_path / "o", "-m", "ties", *option, code=2)
    assert says in peru.stderr, peru.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ("-m", "ties", "--variant", "mergekit", "-w", "a=mlp:0.7,0.2", "-k", "a=0..3:[10%,50%,10%],20%", "-k", "b=30%", "-s", "0.5"),
            None,
        ),
        (("-m", "task-arithmetic", "-w", "b=-0.5", "--scale", "mlp:[0.1,1],0.3"), None),
        (("-m", "linear", "-w", "a=1..2:3"), None),
        (("-m", "slerp", "--t", "self_attn:[0,1],0.25"), None),
        (("-m", "ties", "-k", "40%"), "--variant authors: mergekit has mergekit"),
    ],
)
def test_the_command_line_is_written_as_a_recipe(options: tuple[str, ...], says: str | None, tmp_path: Path, peru) -> None:
    base = () if options[1] in ("linear", "slerp") else ("-b", "base")
    typed = ("merge", "a=./a", "b=./b", *base, *options, "--no-sync")
    peru(*typed, "-o", tmp_path / "typed", "--write-recipe", tmp_path / "r.yml")
    assert says is None or f"warning: {tmp_path / 'r.yml'}: {says}" in peru.stderr
    text = (tmp_path / "r.yml").read_text()
    assert "dtype: float32" in text and (says is None or text.startswith(f"# {says}"))
    peru(*typed, "-o", tmp_path / "other", "--write-recipe", tmp_path / "r.yml", "--dry-run", code=2)
    assert "exists already" in peru.stderr
    peru("merge", tmp_path / "r.yml", "-o", tmp_path / "again", "--no-sync")
    if says is None:
        close(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "typed" / "model.safetensors"), 1e-7)


def test_a_method_that_mergekit_lacks_has_no_recipe(tmp_path: Path, peru) -> None:
    peru("merge", "a=./a", "b=./b", "-b", "base", "-o", tmp_path / "o", "-m", "consensus", "--write-recipe", tmp_path / "r.yml", code=2)
    assert "mergekit has no method like consensus" in peru.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "key", "density", "kept"), [("ties", "density", 0.29, 28), ("sce", "select_topk", 0.29, 29)])
def test_shares_are_counted_as_mergekit_counts_them(method: str, key: str, density: float, kept: int, tmp_path: Path, peru) -> None:
    # mergekit 0.1.5 keeps this many of 100 entries: it multiplies in doubles, for sce in single precision.
    noise = torch.Generator().manual_seed(0)
    base = {"layers.0.weight": torch.randn(10, 10, generator=noise)}
    for name in ("base", "a", "b"):
        changed = {key: tensor + (name != "base") * torch.randn(10, 10, generator=noise) for key, tensor in base.items()}
        save(tmp_path / name, changed, layers=1)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0} if method == "ties" else {}} for name in "ab"]
    recipe = {"merge_method": method, "base_model": str(tmp_path / "base"), "models": models[: 1 if method == "ties" else 2]}
    (tmp_path / "r.yml").write_text(json.dumps(recipe | {"parameters": {key: density}}))
    peru("merge", tmp_path / "r.yml", "-o", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["layers.0.weight"]
    assert int((found != base["layers.0.weight"]).sum()) == kept
