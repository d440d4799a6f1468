"""Warnings about a merge's inputs before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import save

Family = Callable[..., list[str]]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Write a base and fine-tunes whose changes have these sizes. Returns the arguments that name them."""

    def write(*sizes: float, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        noise = torch.Generator().manual_seed(0)
        base = {f"layers.{i}.weight": torch.randn(70, 90, generator=noise) for i in range(3)}
        save({name: tensor.to(dtype) for name, tensor in base.items()}, tmp_path / "base.safetensors")
        for number, size in enumerate(sizes):
            fine = {name: (tensor + size * torch.randn(tensor.shape, generator=noise)).to(dtype) for name, tensor in base.items()}
            save(fine, tmp_path / f"t{number}.safetensors")
        return [*(f"t{i}={tmp_path / f't{i}.safetensors'}" for i in range(len(sizes))), "-b", str(tmp_path / "base.safetensors")]

    return write


@pytest.fixture
def warned(peru, tmp_path: Path) -> Callable[..., str]:
    """The messages of a merge that is only planned."""

    def warn(*words: object) -> str:
        peru("merge", *words, "-o", tmp_path / "m.safetensors", "--dry-run")
        assert not (tmp_path / "m.safetensors").exists()
        return " ".join(peru.stderr.split())

    return warn


def test_plain_fine_tunes_cause_no_warning(family: Family, warned) -> None:
    assert "warning" not in warned(*family(0.1, 0.1, 0.12), "-m", "ties")


def test_a_weight_of_0_and_a_scale_of_0_cause_warnings(family: Family, warned) -> None:
    models = family(0.1, 0.1)
    assert "the weight of t1 is 0" in warned(*models, "-m", "ties", "-w", "t1=0")
    assert "the weight of t0 is 0" in warned(*models, "-m", "ties", "-w", "t0=layers.1:0,0", "-w", "t1=1")
    assert "the weight of t0" not in warned(*models, "-m", "ties", "-w", "t0=layers.1:0.5,0")
    assert "the scale is 0: the result is the base" in warned(*models, "-m", "task-arithmetic", "--scale", 0)


def test_a_weight_of_0_causes_a_warning_before_a_model_is_opened(peru, tmp_path: Path) -> None:
    peru("merge", "a=gone-a", "b=gone-b", "-b", "gone", "-o", tmp_path / "m", "-m", "ties", "-w", "a=0", code=2)
    assert peru.stderr.index("the weight of a is 0") < peru.stderr.index("gone")


def test_equal_models_cause_a_warning(family: Family, warned, tmp_path: Path) -> None:
    models = family(0.1, 0.1, 0.1)
    shutil.copy(tmp_path / "t0.safetensors", tmp_path / "t2.safetensors")
    assert "t0 and t2 are equal" in warned(*models, "-m", "linear")
    shutil.copy(tmp_path / "base.safetensors", tmp_path / "t1.safetensors")
    text = warned(*models, "-m", "ties")
    assert "t1 is equal to the base" in text and "t0 and t1" not in text


def test_models_that_differ_in_one_entry_are_not_equal(family: Family, warned, tmp_path: Path) -> None:
    models = family(0.0, 0.0)
    for number in range(2):
        changed = load_file(tmp_path / "base.safetensors")
        changed["layers.2.weight"][number, 0] += 1  # outside of the sampled run
        save(changed, tmp_path / f"t{number}.safetensors")
    text = warned(*models, "-m", "ties")
    assert "equal" not in text


def test_too_much_to_read_only_looks_equal(family: Family, warned, monkeypatch) -> None:
    monkeypatch.setattr("peru_cli.merge.cautions._WHOLE", 1000)
    text = warned(*family(0.0, 0.1), "-m", "ties")
    assert "t0 looks equal to the base: no sampled weight differs" in text


def test_a_model_in_another_dtype_that_rounds_to_the_base_is_equal_to_it(family: Family, warned, tmp_path: Path) -> None:
    models = family(0.0, 0.1, dtype=torch.float32)
    for name in ("t0", "t1"):
        save({n: t.half() for n, t in load_file(tmp_path / f"{name}.safetensors").items()}, tmp_path / f"{name}.safetensors")
    assert "t0 is equal to the base" in warned(*models, "-m", "task-arithmetic")


@pytest.mark.parametrize("method", ["wudi", "ties", "task-arithmetic", "iso-c"])
def test_very_different_norms_cause_a_warning_with_their_ratio(family: Family, warned, method: str) -> None:
    models = family(0.01, 0.2, 0.02, dtype=torch.float32)
    assert "the task vector of t1 is about 20 times as long as that of t0" in warned(*models, "-m", method)
    assert "times as long" not in warned(*models, "-m", method, "-w", "t1=0.1")


def test_methods_that_ignore_norms_do_not_warn_about_them(family: Family, warned) -> None:
    models = family(0.01, 0.2, dtype=torch.float32)
    for method in ("linear", "slerp", "nuslerp", "multislerp", "karcher"):
        assert "times as long" not in warned(*models, "-m", method)


def folder(at: Path, source: Path, template: str | None, own_file: bool = False) -> Path:
    """A model folder with a chat template in the tokenizer's config, or in its own file."""
    at.mkdir()
    shutil.copy(source, at / "model.safetensors")
    (at / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (at / "tokenizer_config.json").write_text(json.dumps({} if template is None or own_file else {"chat_template": template}))
    if template is not None and own_file:
        (at / "chat_template.jinja").write_text(template)
    return at


def test_different_chat_templates_cause_a_warning(family: Family, warned, tmp_path: Path) -> None:
    family(0.1, 0.1, 0.1)
    for name, template, own in (("base", None, False), ("t0", "{{ a }}", False), ("t1", "{{ a }}\n", True), ("t2", "{{ b }}", False)):
        folder(tmp_path / name, tmp_path / f"{name}.safetensors", template, own)
    models = [f"{name}={tmp_path / name}" for name in ("t0", "t1", "t2")]
    text = warned(*models, "-b", tmp_path / "base", "-m", "ties")
    assert "the chat templates of t0, t1 and t2 differ: no chat template is written" in text
    assert "that of t0, t1 is written" in warned(*models, "-m", "linear")
    assert "chat templates" not in warned(*models[:2], "-m", "linear")


def test_recipes_are_checked_too(family: Family, peru, tmp_path: Path) -> None:
    family(0.1, 0.0, 1.0)
    names = ["t0", "t1", "t2"]
    models = [{"model": str(tmp_path / f"{n}.safetensors"), "parameters": {"weight": int(n != "t0")}} for n in names]
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base.safetensors"), "models": models}
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    peru("merge", tmp_path / "r.yml", "-o", tmp_path / "m")
    text = " ".join(peru.stderr.split())
    assert text.count("the weight of t0 is 0") == 1
    assert text.count("t1 is equal to the base") == 1


def test_an_earlier_document_is_checked_once_it_is_merged(family: Family, peru, tmp_path: Path) -> None:
    family(0.1, 0.1)
    at = {name: str(tmp_path / f"{name}.safetensors") for name in ("base", "t0", "t1")}
    first = {"name": "first", "merge_method": "passthrough", "models": [{"model": at["t0"]}]}
    models = [{"model": name, "parameters": {"weight": 1}} for name in ("first", at["t0"], at["t1"])]
    second = {"merge_method": "ties", "base_model": at["base"], "models": models}
    (tmp_path / "r.yml").write_text("\n---\n".join(json.dumps(part) for part in (first, second)))
    peru("merge", tmp_path / "r.yml", "-o", tmp_path / "m")
    assert "first and t0 are equal" in " ".join(peru.stderr.split())
