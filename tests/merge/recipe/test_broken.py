"""Sixty broken recipes, each with the message that it gets: the line, what is wrong, what to do, before anything is read."""

from __future__ import annotations

import os
import re
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
    ("", 1, "recipe.yml is empty\n  a recipe needs a merge_method and models"),
    ("# nothing\n---\n", 1, "recipe.yml is empty\n  a recipe needs a merge_method and models"),
    (
        "models: [a\nmerge_method: linear\n",
        1,
        "line 2: not valid YAML: expected ',' or ']', but got ':'\n  look at the brackets, colons and indentation there",
    ),
    ("a: b: c\n", 1, "line 1: not valid YAML: mapping values are not allowed here\n  look at the brackets, colons and indentation there"),
    (
        "\tmodels: []\n",
        1,
        "line 1: not valid YAML: found character '\\t' that cannot start any token\n  look at the brackets, colons and indentation there",
    ),
    (LINEAR + AB + LINEAR, 1, "line 5: not valid YAML: the key 'merge_method' appears twice: keep one of them"),
    ("? [a]\n: b\n", 1, "line 1: not valid YAML: a key that is not a string: put it in quotes"),
    (
        LINEAR + "models: !!python/object:os.system {}\n",
        1,
        "line 2: not valid YAML: the tag tag:yaml.org,2002:python/object:os.system is not supported: write a plain value",
    ),
    (
        "a: &a [x]\nb: *c\n",
        1,
        "line 2: not valid YAML: found undefined alias 'c'\n  an alias such as *name repeats what &name marks before it",
    ),
    (
        "a: &a [*a]\nmerge_method: linear\n",
        1,
        "line 1: not valid YAML: too many values or levels (aliases that expand without end?): write them out",
    ),
    ("just words\n", 2, "line 1: this is not a table of keys: a recipe needs a merge_method and models"),
    ("- a\n- b\n", 2, "line 1: this is not a table of keys: a recipe needs a merge_method and models"),
    # the frame
    (AB, 2, "line 1: merge_method is missing: name one, as merge_method: ties"),
    ("merge_method: 3\n" + AB, 2, "line 1: merge_method is not a string: name one, as merge_method: ties"),
    ("merge_method: dare-ties\nbase_model: base\n" + AB, 2, "line 1: merge_method 'dare-ties' is unknown, did you mean 'dare_ties'?"),
    ("merge_method: magic\n" + AB, 2, "line 1: merge_method 'magic' is unknown: mergekit has linear, slerp"),
    (LINEAR, 2, "line 1: a recipe needs exactly one of models, slices and modules; this one has none of them: add models"),
    (
        LINEAR + AB + "slices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n",
        2,
        "line 5: a recipe needs exactly one of models, slices and modules; this one has models and slices: keep one",
    ),
    (LINEAR + "models: []\n", 2, "line 2: models is empty: list the models, each as - model: org/name"),
    (LINEAR + "models: a\n", 2, "line 2: models is not a list: list the models, each as - model: org/name"),
    (LINEAR + "models:\n- a\n- b\n", 2, "line 3: models[1] is not a table: list the models, each as - model: org/name"),
    (LINEAR + "models:\n- {parameters: {weight: 1}}\n", 2, "line 3: models[1].model is missing: name it, as model: org/name"),
    (LINEAR + "models:\n- {model: 7, parameters: {weight: 1}}\n", 2, "line 3: models[1].model names no model: put it in quotes"),
    (LINEAR + "models:\n- {model: a+, parameters: {weight: 1}}\n", 2, "line 3: 'a+' names no model beside the '+': write MODEL+LORA"),
    (LINEAR + "modules: {}\n", 2, "line 2: modules is empty: name modules, each with its slices, or write models"),
    (LINEAR + "modules:\n  default: {parameters: {weight: 1}}\n", 2, "line 3: modules.default needs exactly one of models and slices"),
    (LINEAR + AB + "dtype: bfloat\n", 2, "line 5: dtype 'bfloat' is unknown: write bfloat16, float16 or float32"),
    (LINEAR + AB + "out_dtype: int8\n", 2, "line 5: out_dtype 'int8' is unknown: write bfloat16, float16 or float32"),
    (
        LINEAR + AB + "chat_template: lama3\n",
        2,
        "line 5: chat_template 'lama3' is unknown: write auto, chatml, llama3, mistral, alpaca, exaone, or a Jinja template",
    ),
    (
        LINEAR + AB + "tokenizer_source: a\ntokenizer: {source: a}\n",
        2,
        "line 5: tokenizer_source and tokenizer mean the same: keep one of them",
    ),
    (
        LINEAR + AB + "tokenizer_source: c\n",
        2,
        "line 5: the tokenizer source 'c' is not a model of this recipe: write union or one of a, b",
    ),
    (
        LINEAR + AB + "tokenizer_source: base\n",
        2,
        "line 5: the tokenizer should be the base's, but there is no base_model: add one, or write union",
    ),
    (LINEAR + AB + "tokenizer: {pad_to_multiple_of: 0}\n", 2, "line 5: pad_to_multiple_of 0 is below 1: write the multiple, as 64"),
    # layers
    (SLICE % "[0]", 2, "line 3: layer_range has 1 numbers: write two, as [0, 32]"),
    (SLICE % "'0-4'", 2, "line 3: slices[1].sources[1].layer_range is not a list: write two numbers, as [0, 32]"),
    (SLICE % "[0, x]", 2, "line 3: slices[1].sources[1].layer_range[2] is not a whole number: write two numbers, as [0, 32]"),
    (SLICE % "[3, 3]", 2, "line 3: layer_range [3, 3] holds no layer: the second number is the first layer that is not taken"),
    (SLICE % "[-1, 2]", 2, "line 3: layer_range [-1, 2] holds no layer: the second number is the first layer that is not taken"),
    (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n- sources:\n  - {model: a, layer_range: [0, 4]}\n"
        "  - {model: b, layer_range: [0, 5]}\n",
        2,
        "line 5: the sources of a slice have different numbers of layers, [0, 4], [0, 5]: write ranges of one length",
    ),
    (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n- sources:\n  - {model: a, layer_range: [0, 40]}\n"
        "  - {model: b, layer_range: [0, 40]}\n",
        2,
        "line 6: layer_range [0, 40] is out of bounds: a has 4 layers, so [0, 4] takes all of them",
    ),
    (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\nslices:\n- sources:\n  - model: a\n  - model: b\n",
        2,
        "line 6: a source of a slice needs a layer_range, such as [0, 32]",
    ),
    (LINEAR + "slices: []\n", 2, "line 2: slices is empty: list the slices, each with its sources"),
    (
        LINEAR + "slices:\n- sources: []\n",
        2,
        "line 3: slices[1].sources is empty: list the sources, each as - {model: org/name, layer_range: [0, 32]}",
    ),
    (
        "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nslices:\n- sources:\n  - {model: a, layer_range: [0, 2]}\n"
        "  - {model: b, layer_range: [2, 4]}\n",
        2,
        "line 5: the base model base is not among the sources, whose layers differ: list it with its own layer_range",
    ),
    # parameters
    (LINEAR + "models:\n- {model: a, parameters: {weight: heavy}}\n", 2, "line 3: weight 'heavy' is no number: write a number, as 0.5"),
    (LINEAR + "models:\n- {model: a, parameters: {weight: true}}\n", 2, "line 3: weight True is no number: write a number, as 0.5"),
    (LINEAR + "models:\n- {model: a, parameters: {weight: .nan}}\n", 2, "line 3: weight nan is no number: write a number, as 0.5"),
    (LINEAR + "models:\n- {model: a, parameters: {weight: [0.1, x]}}\n", 2, "line 3: weight 'x' is no number: write a number, as 0.5"),
    (
        LINEAR + "models:\n- {model: a, parameters: {weight: []}}\n",
        2,
        "line 3: the gradient of weight is empty: write its numbers, as [0, 0.5, 1]",
    ),
    (LINEAR + "models:\n- {model: a, parameters: {weight: }}\n", 2, "line 3: weight has no value: write a number, as 0.5"),
    (
        LINEAR + "models:\n- {model: a, parameters: [weight, 1]}\n",
        2,
        "line 3: models[1].parameters is not a table: write it as parameters: {weight: 0.5}",
    ),
    (
        LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: mlp}\n",
        2,
        "line 6: weight has a filter without a value: write {filter: mlp, value: 0.5}",
    ),
    (
        LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: mlp, value: 1}\n    - 0.5\n",
        2,
        "line 7: weight mixes tables and bare values: write {value: 0.5}",
    ),
    (
        LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: 3, value: 1}\n",
        2,
        "line 6: the filter 3 of weight is not a string: put it in quotes",
    ),
    (
        LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: mpl, value: 1}\n    - {value: 1}\n" + B,
        2,
        "line 6: the filter 'mpl' of weight matches no tensor: `peru inspect MODEL` lists the names",
    ),
    (
        LINEAR + "models:\n- model: a\n  parameters:\n    weight:\n    - {filter: mlp, value: 1}\n" + B,
        2,
        "line 3: no weight of a is given for lm_head.weight: add one without a filter",
    ),
    (
        LINEAR + "models:\n- model: a\n- {model: b, parameters: {weight: 1}}\n",
        2,
        "line 3: linear needs a weight of a: add parameters: {weight: 1}",
    ),
    (
        LINEAR + AB + "base_model: base\n",
        2,
        "line 2: linear needs a weight of base: mergekit treats the base as one more input here, so list it with a weight",
    ),
    (
        LINEAR + AB + "parameters: {normalize: maybe}\n",
        2,
        "line 5: normalize 'maybe' is neither true nor false: write true or false, without quotes",
    ),
    (
        TIES + "models:\n- {model: a, parameters: {weight: 1, density: -0.1}}\n",
        2,
        "line 4: density -0.1 is below 0: a density is a share of the entries, from 0 to 1",
    ),
    (
        TIES + AB + "parameters: {int8_mask: yes please}\n",
        2,
        "line 6: int8_mask 'yes please' is neither true nor false: write one of the two, without quotes",
    ),
    ("merge_method: ties\n" + AB, 2, "line 1: ties needs a base: add base_model"),
    (
        "merge_method: slerp\nparameters: {t: 1}\n" + AB,
        2,
        "line 1: slerp interpolates from the base to the other model: add base_model, one of the two models",
    ),
    ("merge_method: slerp\nbase_model: a\n" + AB, 2, "line 1: slerp needs a t: add top-level parameters: {t: 0.5}"),
    (
        "merge_method: slerp\nbase_model: a\nparameters: {t: 1}\n" + AB + "- {model: c}\n",
        2,
        "line 4: slerp takes 2 models, not 3: list fewer",
    ),
    (TIES + "models: [{model: base}]\n", 2, "line 3: ties takes at least 1 model besides the base, not 0: list more"),
    # models and documents
    (
        LINEAR + "models:\n- {model: a, parameters: {weight: 1}}\n- {model: ./gone, parameters: {weight: 1}}\n",
        2,
        "line 4: ./gone: no such file or folder",
    ),
    (f"name: x\n{LINEAR}{AB}---\nname: x\n{LINEAR}{AB}---\n{LINEAR}{AB}", 2, "line 8: two documents are called 'x': rename one"),
    (
        f"{LINEAR}{AB}---\n{LINEAR}{AB}",
        2,
        "exactly one document, the result, must have no name; 2 have none (merge_method in line 1, 6): name all but one, or remove them",
    ),
    (
        f"name: x\n{LINEAR}models: [{{model: y, parameters: {{weight: 1}}}}]\n---\nname: y\n{LINEAR}"
        f"models: [{{model: x, parameters: {{weight: 1}}}}]\n---\n{LINEAR}models: [{{model: x, parameters: {{weight: 1}}}}]\n",
        2,
        "line 2: documents depend on each other in a circle, the result -> x -> y -> x: name a model in one of them",
    ),
]
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


def test_at_least_sixty_broken_recipes_get_messages_of_their_own_with_a_line_and_what_to_do() -> None:
    assert len({text for text, _, _ in BROKEN}) == len(BROKEN) and len({says for _, _, says in BROKEN}) >= 60
    assert [says for _, _, says in BROKEN if not says.startswith("line ")] == [BROKEN[0][2], BROKEN[1][2], BROKEN[-2][2]], "of no line"
    told = re.compile(
        r"(: |\n  )(write|name|list|add|put|keep|rename|look|remove|a recipe needs|mergekit has|mergekit treats|the second number)"
        r"|did you mean|such as|lists the names|takes all of them|exactly one of|from 0 to 1|no such file|an alias"
    )
    assert [says for _, _, says in BROKEN if not told.search(says)] == []


@pytest.mark.parametrize(("text", "code", "says"), BROKEN, ids=[f"{n:02}" for n in range(len(BROKEN))])
def test_a_broken_recipe_says_what_is_wrong_and_where(text: str, code: int, says: str, family: Path, tmp_path: Path, peru) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(text)
    peru("merge", recipe, "-o", tmp_path / "out", code=code)
    assert says in peru.stderr and "recipe.yml" in peru.stderr, peru.stderr
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
