"""Models with different tokenizers: rows of the same token are merged, never rows of the same number; all files are written to match."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import save

Tensors = dict[str, torch.Tensor]
NOISE = torch.Generator().manual_seed(11)
WORDS = {f"w{i}": i for i in range(10)} | {"</s>": 10}
SIZE = 6


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=NOISE)


def model(path: Path, added: dict[str, int], rows: int, words: dict[str, int] = WORDS, dtype: torch.dtype = torch.float32) -> Tensors:
    """A language model of few words, with its tokenizer, in a folder; its tensors."""
    path.mkdir()
    tensors = {
        "model.embed_tokens.weight": normal(rows, SIZE),
        "model.layers.0.weight": normal(SIZE, SIZE),
        "lm_head.weight": normal(rows, SIZE),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save(tensors, path / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": rows, "eos_token_id": words["</s>"], "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [words["</s>"]]}))
    listed = [
        {"id": n, "content": t, "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for t, n in added.items()
    ]
    vocabulary = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    table = {"version": "1.0", "added_tokens": listed, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": vocabulary}
    (path / "tokenizer.json").write_text(json.dumps(table))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": f"template of {path.name}"}))
    return tensors


def tokens(folder: Path) -> dict[str, int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def row(table: str, token: str, own: str, models: dict[str, tuple[Tensors, dict[str, int]]]) -> torch.Tensor:
    """The rule in plain torch: the model's own row, or the only holder's, or the base's, or the holders' mean."""
    holders = {m: t[table][ids[token]].double() for m, (t, ids) in models.items() if token in ids}
    if own in holders:
        return holders[own]
    if len(holders) > 1 and "base" in holders:
        return holders["base"]
    return torch.stack(list(holders.values())).mean(0)


def test_conflicting_token_ids_stop_merges_and_packs_with_a_list(tmp_path: Path, peru) -> None:
    for name, added in (("base", {}), ("a", {"<a>": 11, "<b>": 12}), ("b", {"<b>": 11, "<a>": 12})):
        model(tmp_path / name, added, 16)
    models = [f"{n}={tmp_path / n}" for n in "ab"]
    for command, out, options in (("merge", "m", ["-m", "linear"]), ("shuffle-pack", "p.safetensors", [])):
        peru(command, *models, "-b", tmp_path / "base", "-o", tmp_path / out, *options, code=1)
        assert "token '<a>': id 11 in a, 12 in b; token '<b>': id 12 in a, 11 in b" in peru.stderr and not (tmp_path / out).exists()
        assert ("--tokenizer" in peru.stderr) == (command == "merge")


def test_other_tokens_under_one_id_conflict_and_more_tokens_do_not(tmp_path: Path, peru) -> None:
    for name, added in (("base", {}), ("a", {"<a>": 11}), ("b", {"<b>": 11}), ("c", {"<a>": 11, "<c>": 12})):
        model(tmp_path / name, added, 16)
    merge = ["merge", "-b", tmp_path / "base", "-m", "task-arithmetic", "--no-sync"]
    peru(*merge, f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}", "-o", tmp_path / "m", code=1)
    assert "id 11: '<a>' in a, '<b>' in b" in peru.stderr
    peru(*merge, f"a={tmp_path / 'a'}", f"c={tmp_path / 'c'}", "-o", tmp_path / "m")


CASES = [
    ("union", 1, ["task-arithmetic", "--scale", 0.5]),
    ("union", 8, ["task-arithmetic", "--scale", 0.5]),
    ("base", 1, ["task-arithmetic", "--scale", 0.5]),
    ("b", 1, ["linear"]),
    ("union", 64, ["linear"]),
]


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_matched_by_token(tmp_path: Path, peru, number: int, dtype: torch.dtype) -> None:
    source, multiple, method = CASES[number]
    # A base with two rows without a token; one model with an extra word and other ids, one with more rows.
    given = {
        "base": ({}, 13),
        "a": ({"<a>": 11, "<x>": 12}, 13),
        "b": ({"<x>": 11, "<b>": 12, "<a>": 13}, 14),
        "c": ({"<a>": 11, "<c>": 12}, 16),
    }
    models = {n: (model(tmp_path / n, added, rows, dtype=dtype), WORDS | added) for n, (added, rows) in given.items()}
    command = ["merge", *(f"{n}={tmp_path / n}" for n in "abc"), "-b", tmp_path / "base", "-o", tmp_path / "m", "-m", *method]
    peru(*command, "--tokenizer", source, "--pad-vocab-to", multiple, "--dtype", "fp32", "--no-sync")
    expected_ids = dict(models["base" if source == "union" else source][1])
    if source == "union":
        expected_ids |= {"<a>": 11, "<x>": 12, "<b>": 13, "<c>": 14}
    rows = max(given["base" if source == "union" else source][1], max(expected_ids.values()) + 1)
    rows += -rows % multiple
    got = load_file(tmp_path / "m" / "model.safetensors")
    assert tokens(tmp_path / "m") == expected_ids
    names = {number: token for token, number in expected_ids.items()}
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        assert got[table].shape == (rows, SIZE)
        for number in range(rows):
            token = names.get(number)
            if token is None:
                continue
            own = {m: row(table, token, m, models) for m in models}
            weights = {m: own[m].to(dtype).double() for m in own}
            tasks = [weights[m] for m in "abc"]
            expected = sum(tasks) / 3 if method[0] == "linear" else weights["base"] + 0.5 * sum(t - weights["base"] for t in tasks)
            torch.testing.assert_close(got[table][number].double(), expected, rtol=1e-5, atol=1e-6, msg=f"{table} {number} {token}")
        # Rows without a token: the mean of those with one, which mergekit writes.
        spare = [number for number in range(rows) if number not in names]
        mean = got[table][sorted(names)].double().mean(0).expand(len(spare), SIZE)
        torch.testing.assert_close(got[table][spare].double(), mean, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["vocab_size"] == rows and config["eos_token_id"] == 10
    donor = "base" if source == "union" else source
    assert f"template of {donor}" in (tmp_path / "m" / "tokenizer_config.json").read_text()


def test_special_ids_follow_their_tokens(tmp_path: Path, peru) -> None:
    model(tmp_path / "base", {}, 11)
    turned = {token: 10 - number for token, number in WORDS.items()}
    tensors = model(tmp_path / "a", {}, 11, turned)
    out = tmp_path / "m"
    peru(
        "merge",
        f"a={tmp_path / 'a'}",
        "-b",
        tmp_path / "base",
        "-o",
        out,
        "-m",
        "task-arithmetic",
        "--scale",
        1,
        "--tokenizer",
        "base",
        "--no-sync",
    )
    got = load_file(out / "model.safetensors")
    torch.testing.assert_close(got["lm_head.weight"], tensors["lm_head.weight"].flip(0), rtol=1e-5, atol=1e-6)
    peru(
        "merge",
        f"a={tmp_path / 'a'}",
        "-b",
        tmp_path / "base",
        "-o",
        tmp_path / "n",
        "-m",
        "task-arithmetic",
        "--tokenizer",
        "a",
        "--no-sync",
    )
    assert json.loads((tmp_path / "n" / "config.json").read_text())["eos_token_id"] == turned["</s>"] == 0
    assert json.loads((tmp_path / "n" / "generation_config.json").read_text())["eos_token_id"] == [0]
    assert tokens(tmp_path / "n") == turned


def test_models_without_a_tokenizer_are_refused_by_name(tmp_path: Path, peru) -> None:
    model(tmp_path / "base", {}, 11)
    model(tmp_path / "a", {}, 11)
    (tmp_path / "a" / "tokenizer.json").unlink()
    command = ["merge", f"a={tmp_path / 'a'}", "-b", tmp_path / "base", "-o", tmp_path / "m", "-m", "ties"]
    peru(*command, "--tokenizer", "union", code=2)
    assert f"{tmp_path / 'a'} has no tokenizer.json" in peru.stderr
    peru(*command, "--tokenizer", "nobody", code=2)
    peru(*command, "--pad-vocab-to", 8, code=2)
