"""`--tokenizer`: bring models to one vocabulary. Embedding and head rows are matched by token, and tokenizer files follow.

For a token that a model lacks, the row is that of the only holder, or the base's, or the holders' mean. The merge method runs on
the result. This is mergekit's rule (`tokenizer: {source: union}`), except for rows without a token: they share one mean row."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from peru_cli.checkpoints.architectures import is_input, is_output
from peru_cli.checkpoints.checks.vocabulary import Tokens, added_tokens, read_tokens, with_ids
from peru_cli.checkpoints.dtypes import BY_NAME, Dtype
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.checkpoints.places import Place
from peru_cli.checkpoints.source import Checkpoint, Over
from peru_cli.errors import Mismatch, UsageError
from peru_cli.methods.compact.delta import cast_bits
from peru_cli.streaming.arrays import BITS, CPU

_F64 = BY_NAME["F64"]
_OF_ROWS = re.compile(r"(^|\.)(lm_head|embed_out|output|predictions|predictions\.decoder)\.bias$|(^|\.)predictions\.decoder\.weight$")
_TOKENIZER = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.\w+|merges\.txt|bpe\.codes\.txt|chat_template\.\w+"
    r"|.*\.(model|tiktoken|spm|jinja)"
)
_PIECE = 1 << 18  # entries processed at once
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Target:
    """The vocabulary that all models get: tokens, rows, and the model whose tokenizer files and special ids are used."""

    tokens: Tokens
    rows: int
    donor: Checkpoint
    files: Mapping[str, bytes]  # tokenizer files


class _Model:
    """A model with its tokens and the tensors that have a row for each token."""

    def __init__(self, name: str, model: Checkpoint) -> None:
        self.name, self.model = name, model
        tokens = read_tokens(model)
        if tokens is None:
            raise UsageError(
                f"{model.label} has no tokenizer.json, vocab.json or vocab.txt, so peru cannot match rows to tokens",
                "save its tokenizer beside it (tokenizer.save_pretrained), or leave --tokenizer out",
            )
        inputs = [t for t in model.tensors.values() if len(t.shape) == 2 and is_input(t.name)]
        if not inputs or len({t.shape[0] for t in inputs}) > 1:
            raise Mismatch(
                f"{model.label}: peru does not recognise its embedding by name", "leave --tokenizer out, and --per-task REGEX for its rows"
            )
        self.rows = inputs[0].shape[0]
        self.tokens = {token: number for token, number in tokens.items() if number < self.rows}
        self.tables = {
            t.name
            for t in model.tensors.values()
            if t.shape[:1] == (self.rows,) and len(t.shape) <= 2 and (is_input(t.name) or is_output(t.name) or _OF_ROWS.search(t.name))
        }


def common_vocabulary(
    named: Sequence[tuple[str, Checkpoint]], has_base: bool, source: str, multiple: int
) -> tuple[list[Checkpoint], list[str]]:
    """All models (the base first, if there is one) under one vocabulary, and a description of it.

    Args:
        source: `union`, or the name of the model whose tokenizer is used.
        multiple: pad the number of rows to a multiple of this.

    Raises UsageError if a model has no readable tokenizer, Mismatch if its embedding cannot be found."""
    models = [_Model(name, model) for name, model in named]
    donor = models[0] if source == "union" else next(m for m in models if m.name == source)
    target, new = _target(models, donor, source == "union", multiple)
    said = [f"vocabulary: {len(target.tokens):,} tokens of {donor.name} in {target.rows:,} rows"]
    if new:
        shown = ", ".join(map(repr, new[:8])) + (", ..." if len(new) > 8 else "")
        said.append(f"  {len(new)} tokens of other models are added: {shown}")
    return [Revocabulary(m, models, has_base, target, donor) for m in models], said


def _target(models: Sequence[_Model], donor: _Model, union: bool, multiple: int) -> tuple[Target, list[str]]:
    tokens = dict(donor.tokens)
    new: list[str] = []
    added: list[dict[str, Any]] = []
    for other in models if union else ():
        described = {t["content"]: t for t in added_tokens(other.model)}
        for token in sorted(other.tokens, key=lambda t: other.tokens[t]):
            if token not in tokens:
                tokens[token] = max(tokens.values(), default=-1) + 1 if not new else tokens[new[-1]] + 1
                new.append(token)
                plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
                added.append({**plain, **described.get(token, {}), "id": tokens[token], "content": token})
    rows = max(donor.rows, max(tokens.values(), default=-1) + 1)
    rows += -rows % multiple
    files = {name: place.read_bytes() for name, place in donor.model.side_files.items() if _TOKENIZER.fullmatch(name)}
    if added:
        files |= _with_added(donor.model, files, added)
    return Target(tokens, rows, donor.model, files), new


def _with_added(donor: Checkpoint, files: Mapping[str, bytes], added: list[dict[str, Any]]) -> dict[str, bytes]:
    """Tokenizer files with further added tokens."""
    if "tokenizer.json" not in files:
        raise UsageError(
            f"{donor.label} has no tokenizer.json to add the other models' tokens to",
            "save its tokenizer again with transformers' fast tokenizers, or choose another: --tokenizer TASK",
        )
    changed: dict[str, Any] = {"tokenizer.json": json.loads(files["tokenizer.json"])}
    changed["tokenizer.json"].setdefault("added_tokens", []).extend(added)
    if "tokenizer_config.json" in files:
        settings = json.loads(files["tokenizer_config.json"])
        if isinstance(settings.get("added_tokens_decoder"), dict):
            settings["added_tokens_decoder"] |= {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added}
            changed["tokenizer_config.json"] = settings
    if "added_tokens.json" in files:
        changed["added_tokens.json"] = json.loads(files["added_tokens.json"]) | {t["content"]: t["id"] for t in added}
    return {name: (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode() for name, table in changed.items()}


class Revocabulary(Over):
    """A model whose row tables follow another vocabulary. All other tensors are unchanged."""

    def __init__(self, own: _Model, models: Sequence[_Model], has_base: bool, target: Target, donor: _Model) -> None:
        model = own.model
        self._own, self._models, self._target = own, models, target
        self._base = models[0] if has_base else None
        self._donor = donor
        super().__init__(model, "")
        self.part = f"{model.part or ''} in {target.rows} rows of {donor.name}"
        self.tensors = {
            name: TensorInfo(name, info.dtype, (target.rows, *info.shape[1:])) if name in own.tables else info
            for name, info in model.tensors.items()
        }
        # For each row the model's own row, or -1: taken from others, or the mean if no token has the row.
        self._source = np.full(target.rows, -1)
        for token, number in target.tokens.items():
            self._source[number] = own.tokens.get(token, -1)
        self._tokens = {number: token for token, number in target.tokens.items()}
        self._means: dict[tuple[int, str], Floats] = {}
        self.side_files = self._side_files()

    def _side_files(self) -> dict[str, Place]:
        model, target = self._own.model, self._target
        contents = dict(target.files)
        for name in ("config.json", "generation_config.json"):
            if name not in model.side_files:
                continue
            try:
                table = json.loads(model.side_files[name].read_bytes())
            except ValueError:
                contents[name] = model.side_files[name].read_bytes()
                continue
            table = with_ids(table, self._own.tokens, target.tokens, target.rows if name == "config.json" else None)
            if self._donor is not self._own and name in target.donor.side_files:
                theirs = with_ids(json.loads(target.donor.side_files[name].read_bytes()), self._donor.tokens, target.tokens)
                table |= {k: v for k, v in theirs.items() if k.endswith(("_token_id", "_token_ids", "_token_index"))}
            contents[name] = (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
        folder = TemporaryDirectory(prefix="peru-vocabulary-")
        weakref.finalize(self, folder.cleanup)
        kept = {name: place for name, place in model.side_files.items() if not _TOKENIZER.fullmatch(name)}
        for name, content in contents.items():
            (Path(folder.name) / name).write_bytes(content)
        return dict(sorted({**kept, **{name: Path(folder.name) / name for name in contents}}.items()))

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        if name not in self._own.tables:
            self._own.model.read_into(name, offset, buffer)
            return
        info = self.tensors[name]
        width = info.nbytes // max(self._target.rows, 1)  # bytes per row
        at = 0
        while at < len(buffer):
            row, inside = divmod(offset + at, width)
            source, rows = int(self._source[row]), 1
            if source >= 0:  # rows that are adjacent in both are read at once
                most = -(-(inside + len(buffer) - at) // width)
                ahead = self._source[row : row + most] == np.arange(source, source + min(most, self._target.rows - row))
                rows = len(ahead) if ahead.all() else int(np.argmin(ahead))
            size = min(rows * width - inside, len(buffer) - at)
            if source >= 0:
                self._own.model.read_into(name, source * width + inside, buffer[at : at + size])
            else:
                buffer[at : at + size] = self._foreign(name, row)[inside : inside + size]
            at += size

    def _foreign(self, name: str, row: int) -> bytes:
        """A row for a token that the model lacks, in the model's dtype."""
        token, dtype = self._tokens.get(row), self.tensors[name].dtype
        if token is None:
            return _bits(self._mean_of_tokens(name), dtype)
        holders = [m for m in self._models if token in m.tokens and self._theirs(m, name) is not None]
        if len(holders) > 1 and self._base in holders:
            holders = [m for m in holders if m is self._base]
        if not holders:
            return _bits(self._mean(self._own, name), dtype)
        rows = [_read_row(m.model, self._theirs(m, name), m.tokens[token]) for m in holders]
        return _bits(np.mean(rows, axis=0) if len(rows) > 1 else rows[0], dtype)

    def _theirs(self, other: _Model, name: str) -> TensorInfo | None:
        """Another model's table of the same name, under any prefix, with rows of the same width."""
        ends = [t for t in other.tables if t == name or t.endswith(f".{name}") or name.endswith(f".{t}")]
        fitting = [
            other.model.tensors[t] for t in sorted(ends, key=len) if other.model.tensors[t].shape[1:] == self.tensors[name].shape[1:]
        ]
        return fitting[0] if fitting else None

    def _mean(self, other: _Model, name: str) -> Floats:
        """The mean of a model's rows, float64 (columns,)."""
        info = self._theirs(other, name) or self._own.model.tensors[name]
        model = other.model if self._theirs(other, name) is not None else self._own.model
        key = (id(model), info.name)
        if key not in self._means:
            rows, columns = info.shape[0], info.entries // max(info.shape[0], 1)
            step, total = max(1, _PIECE // max(columns, 1)), np.zeros(columns)
            for start in range(0, rows, step):
                total += _read_rows(model, info, start, min(step, rows - start)).sum(0)
            self._means[key] = total / max(rows, 1)
        return self._means[key]

    def _mean_of_tokens(self, name: str) -> Floats:
        """The mean of the rows with a token, float64 (columns,), which fills rows without one.

        In every method that sums rows, these rows are also the mean of the merged rows."""
        key = (id(self), name)
        if key not in self._means:
            info, numbers = self.tensors[name], sorted(self._tokens)
            step, total = max(1, _PIECE // max(info.entries // info.shape[0], 1)), np.zeros(info.entries // info.shape[0])
            for first, last in _runs(numbers):
                for start in range(first, last, step):
                    total += _read_rows(self, info, start, min(step, last - start)).sum(0)
            self._means[key] = total / len(numbers)
        return self._means[key]

    def expect(self, ranges: Iterator[tuple[str, int, int]], keep: bool = False) -> None:  # type: ignore[override]
        """Only tensors that are read unchanged can be announced: rows come from elsewhere."""
        self._own.model.expect((r for r in ranges if r[0] not in self._own.tables), keep)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs [first, last)."""
    first = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[first], numbers[at - 1] + 1
            first = at


def _read_rows(model: Checkpoint, info: TensorInfo, start: int, count: int) -> Floats:
    """Rows as float64, (count, columns)."""
    columns = info.entries // info.shape[0]
    raw = bytearray(info.dtype.nbytes(count * columns))
    model.read_into(info.name, info.dtype.nbytes(start * columns), memoryview(raw))
    values = np.frombuffer(cast_bits(CPU, np.frombuffer(raw, BITS[info.dtype.bits]), info.dtype, _F64).data, np.float64)
    rows: Floats = values.reshape(count, columns)
    return rows


def _read_row(model: Checkpoint, info: TensorInfo | None, row: int) -> Floats:
    assert info is not None
    found: Floats = _read_rows(model, info, row, 1)[0]
    return found


def _bits(values: Floats, dtype: Dtype) -> bytes:
    """Values as bytes of a dtype."""
    return bytes(cast_bits(CPU, np.ascontiguousarray(values).view(np.int64), _F64, dtype).tobytes())
