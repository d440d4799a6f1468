"""Sixty broken recipes, each with the message that it gets: the line, what is wrong, and all of it before anything is read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.merge.recipe.models import make_family

AB = "models:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 1}}\n"
TIES = "merge_method: ties\nbase_model: base\n"
B = "- {model: b, parameters: {weight: 1}}\n"
LINEAR = "merge_method: linear\n"
SLICE = "slices:\n- sources:\n  - {model: a, layer_range: %s}\nmerge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n"

BROKEN = [
    # not YAML
    ("", 1, "is empty"),
    ("# nothing\n---\n", 1, "is empty"),
    ("models: [a\nmerge_method: linear\n", 1, "line 2: not valid YAML"),
    ("a: b: c\n", 1, "line 1: not valid YAML"),
    ("\tmodels: []\n", 1, "line 1: not valid YAML"),
    (LINEAR + AB + LINEAR, 1, "line 5: not valid YAML: the key 'merge_method' appears twice"),
    ("? [a]\n: b\n", 1, "line 1: not valid YAML: a key that is not a string"),
    (LINEAR + "models: !!python/object:os.system {}\n", 1, "line 2: not valid YAML"),
    ("a: &a [x]\nb: *c\n", 1, "line 2: not valid YAML"),
    ("a: &a [*a]\nmerge_method: linear\n", 1, "without end"),
    ("just words\n", 2, "line 1: this is not a table of keys"),
    ("- a\n- b\n", 2, "line 1: this is not a table of keys"),
    # the frame
    (AB, 2, "line 1: merge_method is missing"),
    ("merge_method: 3\n" + AB, 2, "line 1: merge_method is not a string"),
    ("merge_method: dare-ties\nbase_model: base\n" + AB, 2, "line 1: merge_method 'dare-ties' is unknown, did you mean 'dare_ties'?"),
    ("merge_method: magic\n" + AB, 2, "line 1: merge_method 'magic' is unknown: mergekit has linear, slerp"),
    (LINEAR, 2, "a recipe needs exactly one of models, slices and modules; this one has none of them"),
    (LINEAR + AB + "slices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n", 2,
     "line 5: a recipe needs exactly one of models, slices and modules"),
    (LINEAR + "models: []\n", 2, "line 2: models is empty"),
    (LINEAR + "models: a\n", 2, "line 2: models is not a list"),
    (LINEAR + "models:\n- a\n- b\n", 2, "line 3: models[1] is not a table"),
    (LINEAR + "models:\n- {parameters: {weight: 1}}\n", 2, "line 3: models[1].model is missing"),
    (LINEAR + "models:\n- {model: 7, parameters: {weight: 1}}\n", 2, "line 3: models[1].model names no model: put it in quotes"),
    (LINEAR + "models:\n- {model: a+, parameters: {weight: 1}}\n", 2, "line 3: 'a+' names no model beside the '+'"),
    (LINEAR + "modules: {}\n", 2, "line 2: modules is empty"),
    (LINEAR + "modules:\n  default: {parameters: {weight: 1}}\n", 2, "line 3: modules.default needs exactly one of models and slices"),
    (LINEAR + AB + "dtype: bfloat\n", 2, "line 5: dtype 'bfloat' is unknown: write bfloat16"),
    (LINEAR + AB + "out_dtype: int8\n", 2, "line 5: out_dtype 'int8' is unknown"),
    (LINEAR + AB + "chat_template: lama3\n", 2, "line 5: chat_template 'lama3' is unknown"),
    (LINEAR + AB + "tokenizer_source: a\ntokenizer: {source: a}\n", 2, "line 5: tokenizer_source and tokenizer mean the same"),
    (LINEAR + AB + "tokenizer_source: c\n", 2, "line 5: the tokenizer source 'c' is not a model of this recipe"),
    (LINEAR + AB + "tokenizer_source: base\n", 2, "line 5: the tokenizer should be the base's, but there is no base_model"),
    (LINEAR + AB + "tokenizer: {pad_to_multiple_of: 0}\n", 2, "line 5: pad_to_multiple_of 0 is below 1"),
    # layers
    (SLICE % "[0]", 2, "line 3: layer_range has 1 numbers: write two, as [0, 32]"),
    (SLICE % "'0-4'", 2, "line 3: slices[1].sources[1].layer_range is not a list: write two numbers"),
    (SLICE % "[0, x]", 2, "layer_range[2] is not a whole number: write two numbers"),
    (SLICE % "[3, 3]", 2, "line 3: layer_range [3, 3] holds no layer"),
    (SLICE % "[-1, 2]", 2, "line 3: layer_range [-1, 2] holds no layer"),
    ("merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n"
     "  - {model: b, layer_range: [0, 5]}\n", 2, "line 5: the sources of a slice have different numbers of layers: [0, 4], [0, 5]"),
    ("merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n- sources:\n  - {model: a, layer_range: [0, 40]}\n"
     "  - {model: b, layer_range: [0, 40]}\n", 2, "line 7: layer_range [0, 40] is out of bounds: b has 4 layers, so [0, 4]"),
    ("merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n- sources:\n  - model: a\n  - model: b\n", 2,
     "line 6: a source of a slice needs a layer_range"),
    (LINEAR + "slices: []\n", 2, "line 2: slices is empty"),
    (LINEAR + "slices:\n- sources: []\n", 2, "line 3: slices[1].sources is empty"),
    ("merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n"
     "  - {model: b, layer_range: [2, 4]}\n", 2, "line 5: the base base is not among the sources, whose layers differ"),
    # parameters
    (LINEAR + "models:\n- {model: a, parameters: {weight: heavy}}\n", 2, "line 3: weight 'heavy' is no number"),
    (LINEAR + "models:\n- {model: a, parameters: {weight: true}}\n", 2, "line 3: weight True is no number"),
    (LINEAR + "models:\n- {model: a, parameters: {weight: .nan}}\n", 2, "line 3: weight nan is no number"),
    (LINEAR + "models:\n- {model: a, parameters: {weight: [0.1, x]}}\n", 2, "line 3: weight 'x' is no number"),
    (LINEAR + "models:\n- {model: a, parameters: {weight: []}}\n", 2, "line 3: the gradient of weight is empty"),
    (LINEAR + "models:\n- {model: a, parameters: {weight: }}\n", 2, "line 3: weight has no value"),
    (LINEAR + "models:\n- {model: a, parameters: [weight, 1]}\n", 2, "line 3: models[1].parameters is not a table"),
    (LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: mlp}\n", 2, "line 6: weight has a filter without a value"),
    (LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: mlp, value: 1}\n    - 0.5\n", 2,
     "line 7: weight mixes tables and bare values"),
    (LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: 3, value: 1}\n", 2,
     "line 6: the filter 3 of weight is not a string"),
    (LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: mpl, value: 1}\n    - {value: 1}\n" + B, 2,
     "line 6: the filter 'mpl' of weight matches no tensor"),
    (LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: mlp, value: 1}\n" + B, 2,
     "line 3: no weight of a is given for lm_head.weight"),
    (LINEAR + "models:\n- model: a\n- {model: b, parameters: {weight: 1}}\n", 2, "line 3: linear needs a weight of a"),
    (LINEAR + AB + "base_model: base\n", 2, "mergekit treats the base as one more input here, so list it with a weight"),
    (LINEAR + AB + "parameters: {normalize: maybe}\n", 2, "line 5: normalize 'maybe' is neither true nor false"),
    (TIES + "models:\n- {model: a, parameters: {weight: 1, density: -0.1}}\n", 2, "line 4: density -0.1 is below 0"),
    (TIES + AB + "parameters: {int8_mask: yes please}\n", 2, "line 6: int8_mask 'yes please' is neither true nor false"),
    ("merge_method: ties\n" + AB, 2, "line 1: ties needs a base: add base_model"),
    ("merge_method: slerp\nparameters: {t: 1}\n" + AB, 2, "line 1: slerp interpolates from the base to the other model: add base_model"),
    ("merge_method: slerp\nbase_model: a\n" + AB, 2, "line 1: slerp needs a t"),
    ("merge_method: slerp\nbase_model: a\nparameters: {t: 1}\n" + AB + "- {model: c}\n", 2, "line 4: slerp takes 2 models, not 3"),
    (TIES + "models: [{model: base}]\n", 2, "line 3: ties takes at least 1 model besides the base, not 0"),
    # models and documents
    (LINEAR + "models:\n- {model: a, parameters: {weight: 1}}\n- {model: ./gone, parameters: {weight: 1}}\n", 2,
     "line 4: ./gone: no such file or folder"),
    (f"name: x\n{LINEAR}{AB}---\nname: x\n{LINEAR}{AB}---\n{LINEAR}{AB}", 2, "two documents are called 'x'"),
    (f"{LINEAR}{AB}---\n{LINEAR}{AB}", 2, "exactly one document, the result, must have no name; 2 have none"),
    (f"name: x\n{LINEAR}models: [{{model: y, parameters: {{weight: 1}}}}]\n---\nname: y\n{LINEAR}"
     f"models: [{{model: x, parameters: {{weight: 1}}}}]\n---\n{LINEAR}models: [{{model: x, parameters: {{weight: 1}}}}]\n", 2,
     "documents depend on each other in a circle: the result -> x -> y -> x"),
]  # fmt: skip
WARNED = [
    (LINEAR + AB + "residual_weight: 0.1\n", "line 5: residual_weight has no effect; mergekit ignores it, too"),
    (LINEAR + AB + "out_dtpye: float16\n", "line 5: out_dtpye has no effect; mergekit ignores it, too, did you mean 'out_dtype'?"),
    (LINEAR + AB + "parameters: {normalise: false}\n",
     "line 5: linear has no parameter 'normalise'; mergekit ignores it, too, did you mean 'normalize'?"),
    (TIES + "models:\n- {model: a, parameters: {weight: 1, lambda: 2}}\n",
     "line 4: lambda belongs to the whole merge: on a single model it has no effect"),
    (TIES + "models:\n- {model: a, parameters: {weight: 1, density: 1.5}}\n", "line 4: density 1.5 is above 1 and counts as 1"),
    (LINEAR + "models:\n- {model: a, layer_range: [0, 2], parameters: {weight: 1}}\n" + B,
     "line 3: layer_range has no effect under models"),
    (LINEAR + "models:\n- {model: a, wieght: 1, parameters: {weight: 1}}\n" + B,
     "line 3: models[1].wieght has no effect"),
    (TIES + "models:\n- model: a\n  parameters:\n    weight:\n    - value: 1\n    - {filter: mlp, value: 0}\n",
     "line 8: weight: this value is never used"),
    (LINEAR + "models:\n- {model: {model: {path: a}, override_architecture: X}, parameters: {weight: 1}}\n" + B,
     "line 3: override_architecture has no effect"),
    (f"name: unused\n{LINEAR}{AB}---\n{LINEAR}{AB}", "line 2: no other document uses 'unused', so it is not merged"),
]  # fmt: skip


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    make_family(folder)
    return folder


@pytest.fixture(autouse=True)
def here(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)


def test_at_least_sixty_broken_recipes_are_tried() -> None:
    assert len(BROKEN) >= 60


@pytest.mark.parametrize(("text", "code", "says"), BROKEN, ids=[f"{n:02}" for n in range(len(BROKEN))])
def test_a_broken_recipe_says_what_is_wrong_and_where(text: str, code: int, says: str, family: Path, tmp_path: Path, peru) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text)
    peru("merge", recipe, "-o", tmp_path / "out", code=code)
    assert says in peru.stderr, peru.stderr
    assert "Traceback" not in peru.stderr and os.listdir(tmp_path) == ["recipe.yml"]


@pytest.mark.parametrize(("text", "says"), WARNED, ids=[f"{n:02}" for n in range(len(WARNED))])
def test_what_has_no_effect_is_a_warning_and_an_error_under_strict(text: str, says: str, tmp_path: Path, peru) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text)
    peru("merge", recipe, "-o", tmp_path / "out", "--dry-run")
    assert f"warning: {recipe}: {says}" in peru.stderr, peru.stderr
    peru("merge", recipe, "-o", tmp_path / "out", "--dry-run", "--strict", code=2)
    assert says in peru.stderr


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path, peru) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(LINEAR + AB + "dtype: half\nout_dtype: quarter\nparameters: {normalize: 3}\n")
    peru("merge", recipe, "-o", tmp_path / "out", code=2)
    assert all(f"line {line}: " in peru.stderr for line in (5, 6, 7))


UNHEARD = [
    ("--rename", "a=b"),
    ("--tokenizer", "union"),
    ("--pad-vocab-to", "8"),
    ("--trust-remote-code",),
    ("--then", "svc"),
]  # dropped without a word once


@pytest.mark.parametrize(
    "option", [("-m", "ties"), ("-b", "base"), ("-w", "a=1"), ("--keep", "10%"), ("--compress", "5%"), *UNHEARD, ("--then", "svc")]
)
def test_a_recipe_and_options_that_say_the_same_are_refused(option: tuple[str, ...], tmp_path: Path, peru) -> None:
    (tmp_path / "recipe.yml").write_text(LINEAR + AB)
    peru("merge", tmp_path / "recipe.yml", "-o", tmp_path / "out", *option, code=2)
    assert "cannot be combined with a recipe" in peru.stderr
