"""Searches over numbers of a recipe: their names, the recipe with the best ones, and what is refused."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from peru_cli.errors import UsageError
from peru_cli.merge.recipe.document import Complaints, read_documents
from peru_cli.merge.recipe.plan import read_all
from peru_cli.merge.search.leaves import Leaves
from peru_cli.merge.search.space import parse_ranges
from tests.merge.recipe.models import make_family
from tests.support.data_family import TASKS, write_family

RECIPE = """\
# mine
merge_method: ties
base_model: base
models:
  - model: org/a   # the first
    parameters:
      weight:
        - {filter: mlp, value: 0.7}
        - value: [0.1, 0.9]
      density: 0.5
  - {model: ./b, parameters: {weight: 1, density: 3e-1}}
parameters: {lambda: 1.0, normalize: true, int8_mask: 1}
dtype: bfloat16
"""


def leaves(search: str, text: str = RECIPE, label: str = "r.yml") -> Leaves:
    recipe = read_all(read_documents(text, label), Complaints(label))[-1]
    return Leaves(text, label, recipe, parse_ranges(search, True))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("lambda", "lambda: 1.0", "lambda: 0.25"),
        ("parameters.lambda", "lambda: 1.0", "lambda: 0.25"),
        ("models[1].parameters.density", "density: 0.5", "density: 0.25"),
        ("density.a", "density: 0.5", "density: 0.25"),
        ("density.b", "density: 3e-1", "density: 0.25"),
        ("weight.b", "weight: 1,", "weight: 0.25,"),
        ("weight.a[1].value", "value: 0.7", "value: 0.25"),
        ("weight[2].value[2]", "0.9]", "0.25]"),
        ("weight.a[2].value[1]", "[0.1", "[0.25"),
    ],
)
def test_a_number_is_found_by_its_way_its_end_or_its_model(name: str, before: str, after: str) -> None:
    found = leaves(f"{name}=0.25:0.75")
    assert found.text(found.lowest) == RECIPE.replace(before, after) and RECIPE.count(before) == 1


def test_the_search_begins_at_the_recipes_own_numbers() -> None:
    assert list(map(float, leaves("density.b=0.1:1,lambda=0:0.5").start)) == [0.3, 0.5]


def test_several_numbers_change_at_once_and_the_rest_of_the_text_stays() -> None:
    found = leaves("lambda=0:2,weight.b=0:1,density.a=0.1:1")
    changed = found.text(tuple(d.high for d in found.dimensions))
    assert changed == RECIPE.replace("lambda: 1.0", "lambda: 2").replace("density: 0.5", "density: 1")


def test_numbers_of_a_model_card_are_found_in_its_block() -> None:
    card = f"---\ntags: [merge]\n---\n# A card\n\nlambda: 1.0\n\n```yaml\n{RECIPE}```\n"
    found = leaves("lambda=0.5:1", card, "README.md")
    assert found.text(found.lowest) == card.replace("{lambda: 1.0", "{lambda: 0.5")


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (
            "lamda=0:1",
            "no number in the parameters of r.yml has this name (it has models[1].parameters.weight[1].value (weight.a[1].value)",
        ),
        ("weight.c=0:1", "no number in the parameters"),
        ("normalize=0:1", "no number in the parameters"),
        ("int8_mask=0:1", "no number in the parameters"),
        ("density=0:1", "means 2 numbers of r.yml (name one of models[1].parameters.density (density.a), models[2]"),
        ("lambda=0:1,parameters.lambda=0:1", "names one number of the recipe twice"),
        ("density.a=-1:1", "at an end of the range, r.yml cannot be merged:\n  line 10: density -1 is below 0"),
    ],
)
def test_names_that_mean_none_or_several_are_refused_with_those_there_are(search: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        leaves(search)
    assert says in f"{error.value.message} ({error.value.hint})"


def test_a_recipe_without_numbers_says_what_to_do() -> None:
    text = "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    with pytest.raises(UsageError) as error:
        leaves("t=0:1", text)
    assert error.value.hint == "write one there first: the search begins at it"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"), count=30)


def test_the_recipe_with_the_best_numbers_is_kept_and_gives_the_same_merge(family: Path, peru, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(family)
    parameters = "{weight: 0.5, density: 0.5}"
    models = "".join(f"- {{model: ./{task}, parameters: {parameters}}}\n" for task in TASKS)
    earlier = f"name: soup\nmerge_method: linear\nmodels:\n{models.replace('density: 0.5', 'weights: 1')}---\n"
    for name, text in (("one", ""), ("two", earlier)):
        base = "./base"
        recipe = tmp_path / f"{name}.yml"
        recipe.write_text(
            f"{text}merge_method: ties\nbase_model: {base}\nmodels:\n{models}parameters: {{lambda: 1}} # scale\ndtype: float32\n"
        )
        data = [word for task in TASKS for word in ("--data", f"{task}={task}.jsonl")]
        words = ["--search", "weight.a=0:1,density.b=0.1:1,lambda=0.5:1.5", "--trials", 8, *data, "--seed", 7, "--no-sync"]
        out = tmp_path / name
        found = json.loads(peru("merge", recipe, "-o", out, *words, "--write-recipe", tmp_path / f"{name}-best.yml", "--json"))["search"]
        best = found["trials"][found["best"]]["values"]
        kept = list(yaml.safe_load_all((tmp_path / f"{name}-best.yml").read_text()))[-1]
        assert kept["models"][0]["parameters"]["weight"] == float(best["weight.a"]) and kept["parameters"]["lambda"] == float(
            best["lambda"]
        )
        assert "# scale" in (out / "mergekit_config.yml").read_text() and f"density: {best['density.b']}" in (out / "README.md").read_text()
        assert "the best of 8 trials (TPE, seed 7" in (out / "README.md").read_text()
        peru("merge", tmp_path / f"{name}-best.yml", "-o", tmp_path / f"{name}-again", "--no-sync")
        ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in (name, f"{name}-again"))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_earlier_documents_output_is_merged_once_and_searched_over(tmp_path: Path, peru, monkeypatch) -> None:
    (tmp_path / "f").mkdir()
    make_family(tmp_path / "f")
    monkeypatch.chdir(tmp_path / "f")
    Path("r.yml").write_text(
        "name: soup\nmerge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 1}}\n---\n"
        "merge_method: slerp\nbase_model: base\nmodels: [{model: soup}, {model: base}]\nparameters: {t: [0.1, 0.5]}\n"
    )
    read = "load_file(sys.argv[1] + '/model.safetensors')['model.norm.weight'][0]"
    script = f"import sys; from safetensors.numpy import load_file; print(float({read}))"
    metric = shlex.join([sys.executable, "-c", script])
    found = json.loads(
        peru("merge", "r.yml", "-o", tmp_path / "o", "--search", "t[1]=0:1:0.5", "--metric-command", metric, "--json", "--no-sync")
    )["search"]
    metrics = [point["metric"] for point in found["points"]]
    assert len(metrics) == 3 and float(load_file(tmp_path / "o" / "model.safetensors")["model.norm.weight"][0]) == max(metrics)


STACKED = (
    "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 2], parameters: {scale: 1}}]\n"
    "- sources: [{model: b, layer_range: [1, 4]}]\n"
)


def test_stacked_layers_are_measured_by_a_command_only(tmp_path: Path, peru, monkeypatch) -> None:
    (tmp_path / "f").mkdir()
    make_family(tmp_path / "f")
    monkeypatch.chdir(tmp_path / "f")
    Path("r.yml").write_text(STACKED)
    Path("x.jsonl").write_text('{"text": "a"}\n')
    peru("merge", "r.yml", "-o", tmp_path / "o", "--search", "scale=0:1:1", "--data", "a=x.jsonl", code=2)
    assert "this one stacks layers" in peru.stderr and not (tmp_path / "o").exists()
    metric = shlex.join([sys.executable, "-c", "print(1)"])
    peru("merge", "r.yml", "-o", tmp_path / "o", "--search", "scale.a=0.5:1:0.5", "--metric-command", metric, "--no-sync")
    assert "scale: 0.5" in (tmp_path / "o" / "mergekit_config.yml").read_text(), "of equals the first"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--search", "lambda=0:1:0.5"], "--search needs examples"),
        (["--search", "lambda=0:1:0.5", "--data", "a=x", "--method", "ties"], "--method cannot be combined with a recipe"),
        (["--search", "lambda=0:1:0.5", "--data", "a=x", "--keep", "5%"], "--keep cannot be combined with a recipe"),
        (["--data", "a=x"], "--data cannot be combined with a recipe"),
        (["--write-recipe", "w.yml"], "--write-recipe cannot be combined with a recipe"),
        (["--search", "nothing=0:1:0.5", "--data", "a=x"], "no number in the parameters"),
    ],
)
def test_bad_searches_are_refused_before_a_model_is_opened(options: list[str], says: str, peru, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(RECIPE)
    peru("merge", tmp_path / "r.yml", "-o", tmp_path / "o", *options, code=2)
    assert says in peru.stderr, peru.stderr
