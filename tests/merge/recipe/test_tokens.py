"""Tokenizers of recipes: rows are merged by token, and the output gets the requested files, config and chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.merge.test_tokenizers import model, tokens

ROWS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """`a` and `b` give the same id to different tokens."""
    monkeypatch.chdir(tmp_path)
    return {name: model(tmp_path / name, {token: 11}, 12) for name, token in (("a", "<x>"), ("b", "<y>"))}


def merged(peru, extra: str, *options: str) -> dict[str, torch.Tensor]:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]\n"
    Path("r.yml").write_text(text + extra)
    peru("merge", "r.yml", "-o", "out", "--no-sync", *options)
    return load_file("out/model.safetensors")


def test_a_union_merges_rows_by_token(pair: dict[str, dict[str, torch.Tensor]], peru) -> None:
    found = merged(peru, "tokenizer_source: union\n")
    ids = tokens(Path("out"))
    assert set(ids) == set(tokens(Path("a"))) | {"<y>"}
    for name in ROWS:
        a, b = pair["a"][name], pair["b"][name]
        assert torch.allclose(found[name][:11], (a + 3 * b)[:11] / 4, atol=1e-6)
        assert torch.allclose(found[name][ids["<x>"]], a[11], atol=1e-6)  # b lacks it, and takes the only holder's row
        assert torch.allclose(found[name][ids["<y>"]], b[11], atol=1e-6)
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == len(found[ROWS[0]])


@pytest.mark.parametrize(("extra", "rows"), [("tokenizer: {source: b}\n", 12), ("tokenizer: {source: b, pad_to_multiple_of: 8}\n", 16)])
def test_the_tokenizer_of_a_model_decides_which_rows_there_are(
    extra: str, rows: int, pair: dict[str, dict[str, torch.Tensor]], peru
) -> None:
    found = merged(peru, extra)
    assert tokens(Path("out")) == tokens(Path("b"))
    for name in ROWS:
        assert len(found[name]) == rows and torch.allclose(found[name][11], pair["b"][name][11], atol=1e-6)


def test_different_tokens_of_one_id_are_never_averaged_silently(pair: dict[str, dict[str, torch.Tensor]], peru) -> None:
    Path("r.yml").write_text("merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n")
    peru("merge", "r.yml", "-o", "out", code=1)
    assert "tokenizers disagree" in peru.stderr


@pytest.mark.parametrize(
    ("asked", "holds"), [("auto", "template of a"), ("chatml", "<|im_start|>"), ("'{{ messages[0] }}'", "{{ messages[0] }}")]
)
def test_the_chat_template_that_is_asked_for_is_written(asked: str, holds: str, pair: dict[str, dict[str, torch.Tensor]], peru) -> None:
    merged(peru, f"tokenizer_source: union\nchat_template: {asked}\n")
    assert holds in Path("out/chat_template.jinja").read_text()
    assert "chat_template" not in json.loads(Path("out/tokenizer_config.json").read_text())


def test_rows_of_single_tokens_are_refused_by_name(pair: dict[str, dict[str, torch.Tensor]], peru) -> None:
    Path("r.yml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
        "tokenizer: {source: union, tokens: {<x>: {source: a}}}\n"
    )
    peru("merge", "r.yml", "-o", "out", code=2)
    assert "line 4: tokenizer.tokens chooses the rows of single tokens, which peru cannot do yet" in peru.stderr
