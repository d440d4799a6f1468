"""The tokens of a checkpoint's tokenizer, read from its files without running it.

Reads tokenizer.json (tokenizers), vocab.json, vocab.txt, added_tokens.json and tokenizer_config.json (transformers). If there
is only a binary vocabulary (sentencepiece, tiktoken), the tokens are unknown, and files are compared byte by byte."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import BadFile

FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "added_tokens.json", "tokenizer_config.json")
Tokens = dict[str, int]


def _json(model: Checkpoint, name: str) -> Any:
    path = model.side_files.get(name)
    if path is None:
        return None
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}: not JSON ({error})", "the tokenizer is incomplete: fetch it again") from error


def read_tokens(model: Checkpoint) -> Tokens | None:
    """Ids by token. None if no file lists them. BadFile for invalid files."""
    tokens: Tokens = {}
    whole = _json(model, "tokenizer.json")
    if isinstance(whole, dict):
        vocabulary = whole.get("model", {}).get("vocab") if isinstance(whole.get("model"), dict) else None
        tokens |= _table(vocabulary)
    elif isinstance(plain := _json(model, "vocab.json"), dict):
        tokens |= _table(plain)
    elif (path := model.side_files.get("vocab.txt")) is not None:
        tokens |= {line.rstrip("\r"): number for number, line in enumerate(path.read_text("utf-8").removesuffix("\n").split("\n"))}
    if not tokens:
        return None
    added = _json(model, "added_tokens.json")
    tokens |= _table(added) if isinstance(added, dict) else {}
    settings = _json(model, "tokenizer_config.json")
    decoder = settings.get("added_tokens_decoder") if isinstance(settings, dict) else None
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("content"), str) and str(number).isdecimal():
            tokens[token["content"]] = int(number)
    for token in added_tokens(model):
        tokens[token["content"]] = token["id"]
    return tokens


def added_tokens(model: Checkpoint) -> list[dict[str, Any]]:
    """The added tokens of tokenizer.json, unchanged."""
    whole = _json(model, "tokenizer.json")
    listed = whole.get("added_tokens") if isinstance(whole, dict) else None
    return [
        token
        for token in (listed if isinstance(listed, list) else ())
        if isinstance(token, dict) and isinstance(token.get("content"), str) and isinstance(token.get("id"), int)
    ]


def _table(value: object) -> Tokens:
    """A vocabulary as tokenizers write it: ids by token, or a list of [token, score] in the order of ids."""
    if isinstance(value, dict):
        return {token: number for token, number in value.items() if isinstance(number, int)}
    pairs = enumerate(value) if isinstance(value, list) else ()
    return {pair[0]: number for number, pair in pairs if isinstance(pair, list) and pair and isinstance(pair[0], str)}


def same_files(a: Checkpoint, b: Checkpoint) -> bool:
    """Whether two models' tokenizer files are the same bytes."""
    names = {name for model in (a, b) for name in model.side_files if name in FILES[:-1] or name.endswith((".model", ".tiktoken", ".spm"))}
    return all(
        name in a.side_files and name in b.side_files and a.side_files[name].read_bytes() == b.side_files[name].read_bytes()
        for name in names
    )


def disagreements(named: Sequence[tuple[str, Checkpoint]]) -> list[str]:
    """Where tokenizers give a token another id, or an id another token, than the first model that has one: one line each."""
    lines: list[str] = []
    known: list[tuple[str, Checkpoint, Tokens]] = []
    for name, model in named:
        if known and same_files(known[0][1], model):
            continue
        tokens = read_tokens(model)
        binary = [n for n in model.side_files if n.endswith((".model", ".tiktoken", ".spm"))]
        if tokens is None:
            for other, first, _ in known[:1]:
                lines += [f"{n} in {other} and {name} differ" for n in binary if n in first.side_files and not _same(n, model, first)]
            if binary:
                known.append((name, model, {}))
            continue
        for other, _, theirs in known:
            if theirs:
                lines += _differences(other, theirs, name, tokens)
        known.append((name, model, tokens))
    return list(dict.fromkeys(lines))


def _same(name: str, a: Checkpoint, b: Checkpoint) -> bool:
    return a.side_files[name].read_bytes() == b.side_files[name].read_bytes()


def _differences(one: str, ours: Tokens, other: str, theirs: Tokens) -> list[str]:
    lines = [f"token {t!r}: id {ours[t]} in {one}, {theirs[t]} in {other}" for t in ours if t in theirs and ours[t] != theirs[t]]
    mine, yours = {n: t for t, n in ours.items()}, {n: t for t, n in theirs.items()}
    for number in sorted(mine.keys() & yours.keys()):
        a, b = mine[number], yours[number]
        if a != b and a not in theirs and b not in ours:
            lines.append(f"id {number}: {a!r} in {one}, {b!r} in {other}")
    return lines


def with_ids(config: Mapping[str, Any], old: Tokens, new: Tokens, rows: int | None = None) -> dict[str, Any]:
    """A config with new ids for its special tokens and, if it has `vocab_size`, the new number of rows; also in inner tables."""
    names = {number: token for token, number in old.items()}

    def moved(value: object) -> object:
        if isinstance(value, list):
            return [moved(v) for v in value]
        return new.get(names.get(value, ""), value) if type(value) is int else value

    result: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith(("_token_id", "_token_ids", "_token_index")):
            result[key] = moved(value)
        elif key == "vocab_size" and rows is not None:
            result[key] = rows
        else:
            result[key] = with_ids(value, old, new, rows) if isinstance(value, dict) else value
    return result
