"""Recipes on the Hub: a repo's own recipe is run again; models that cannot be merged are not downloaded beyond their headers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import run_peru
from tests.merge.recipe.models import make_family
from tests.support.hub_server import HubServer

RECIPE = """merge_method: ties
base_model: {0}base
parameters: {{weight: 1, density: 0.5}}
models: [{{model: {0}a}}, {{model: {0}b}}]
"""


def test_a_recipe_on_the_hub_downloads_only_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peru) -> None:
    monkeypatch.chdir(tmp_path)
    make_family(tmp_path, "ab")
    (tmp_path / "local.yml").write_text(RECIPE.format(""))
    peru("merge", "local.yml", "-o", "local", "--no-sync")
    with HubServer() as hub:
        for name in ("base", "a", "b"):
            hub.add(f"org/{name}", tmp_path / name)
        text = RECIPE.format("org/")
        hub.add("org/good", {"mergekit_config.yml": text.encode()})
        hub.add("org/bad", {"mergekit_config.yml": text.replace("0.5", "{filter: mpl, value: 1}").encode()})
        arguments = ("-o", "out", "--no-sync")
        bad = run_peru("merge", "hf://models/org/bad/mergekit_config.yml", *arguments, env=hub.env(tmp_path / "home"))
        assert bad.returncode == 2 and "line 3: the filter 'mpl' of density matches no tensor" in bad.stderr
        weights = sum((tmp_path / name / "model.safetensors").stat().st_size for name in ("base", "a", "b"))
        assert 0 < hub.fetched(".safetensors") < weights / 3
        good = run_peru("merge", "hf://models/org/good/mergekit_config.yml", *arguments, env=hub.env(tmp_path / "home"))
        assert good.returncode == 0, good.stderr
    made, wanted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "local"))
    assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in made)
