"""`--rename`: a checkpoint under other names, for names that changed between versions of a library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence

from peru_cli.checkpoints.header import TensorInfo, check_tensor_name
from peru_cli.checkpoints.names.converted import Converted
from peru_cli.checkpoints.quantized.fp8 import Dequantized
from peru_cli.checkpoints.source import Checkpoint, Over
from peru_cli.errors import BadFile, Mismatch, UsageError

RENAME = "peru.rename"  # in an artifact's metadata: the rules of --rename, as JSON
CONVERTED = "peru.converted"  # the base's tensors that were put together from others by transformers' tables, as JSON
Rule = tuple[re.Pattern[str], str]


def parse_renames(texts: Sequence[str]) -> list[Rule]:
    """Parse each `REGEX=REPLACEMENT` for `re.sub`, split at the last `=`. UsageError if one is invalid."""
    rules = []
    for text in texts:
        pattern, sign, replacement = text.rpartition("=")
        if not sign or not pattern:
            raise UsageError(f"--rename {text!r} is not REGEX=REPLACEMENT", r"for example --rename '^visual\.=model.visual.'")
        try:
            rule = re.compile(pattern)
            rule.sub(replacement, "")
        except (re.error, IndexError) as error:
            raise UsageError(f"--rename {text!r} is not REGEX=REPLACEMENT: {error}") from error
        rules.append((rule, replacement))
    return rules


def decode_rules(metadata: Mapping[str, str]) -> list[str]:
    """The rules that an artifact records. Empty if it records none, or not a list of texts."""
    try:
        found = json.loads(metadata.get(RENAME, "[]"))
    except (ValueError, RecursionError):
        return []
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


class Renamed(Over):
    """The same tensors with each name changed by the rules, in order. Mismatch if two names become equal."""

    def __init__(self, model: Checkpoint, rules: Sequence[Rule]) -> None:
        self.rules = [f"{p.pattern}={new}" for p, new in rules]
        self._old: dict[str, str] = {}
        for name in sorted(model.tensors):
            new = name
            for pattern, replacement in rules:
                new = pattern.sub(replacement, new)
            if new in self._old:
                raise Mismatch(f"--rename gives {self._old[new]} and {name} of {model.label} the same name, {new}")
            try:
                check_tensor_name(new)
            except BadFile as error:
                raise UsageError(f"--rename would give {name!r} an invalid name: {error.message}") from error
            self._old[new] = name
        self.renamed = [(old, new) for new, old in self._old.items() if new != old]
        super().__init__(model, f", {len(self.renamed)} tensors renamed")
        infos = ((new, model.tensors[old]) for new, old in self._old.items())
        self.tensors = {new: TensorInfo(new, info.dtype, info.shape, info.begin) for new, info in infos}

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        self.below.read_into(self._old[name], offset, buffer)

    def expect(self, ranges: Iterable[tuple[str, int, int]], keep: bool = False) -> None:
        self.below.expect(((self._old[name], offset, nbytes) for name, offset, nbytes in ranges), keep)


def record_rules(models: Iterable[Checkpoint], before: Mapping[str, str] | None = None) -> dict[str, str]:
    """Metadata for what is made of models: their rules, after those that `before` records, and the converted tensors."""
    rules = decode_rules(before or {})
    converted: set[str] = set()
    for model in models:
        own: list[str] = []
        while isinstance(model, (Renamed, Converted)):
            own = [*(model.rules if isinstance(model, Renamed) else []), *own]
            converted |= model.converted if isinstance(model, Converted) else set()
            model = model.below
        rules += own
    found = {RENAME: json.dumps(list(dict.fromkeys(rules)), ensure_ascii=False)} if rules else {}
    return found | ({CONVERTED: json.dumps(sorted(converted), ensure_ascii=False)} if converted else {})


def rename(models: Sequence[Checkpoint], texts: Sequence[str]) -> tuple[list[Checkpoint], list[str]]:
    """Models with renamed tensors, and messages. Only models that a rule changes are wrapped, never adapters or artifacts.

    Raises UsageError for a rule that changes no name of any model, Mismatch if names become equal."""
    rules = parse_renames(texts)
    for text, (pattern, replacement) in zip(texts, rules, strict=True):
        earlier = rules[: rules.index((pattern, replacement))]
        names = {name for model in models if is_full(model) for name in Renamed(model, earlier).tensors}
        if all(pattern.sub(replacement, name) == name for name in names):
            raise UsageError(f"--rename {text!r} changes no tensor's name", "`peru inspect` lists the names")
    result: list[Checkpoint] = []
    said = []
    for model in models:
        changed = Renamed(model, rules if is_full(model) else [])
        result.append(changed if changed.renamed else model)
        for old, new in changed.renamed[:1]:
            said.append(f"{model.label}: {len(changed.renamed)} tensors renamed, such as {old} to {new}")
    return result, said


def is_full(model: Checkpoint) -> bool:
    """Whether a model is a checkpoint of its own: adapters and artifacts use their base's names."""
    while isinstance(model, (Renamed, Converted)):
        model = model.below
    return not model.expanded or isinstance(model, Dequantized)
