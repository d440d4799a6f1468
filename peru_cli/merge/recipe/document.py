"""Read a YAML file as plain values with line numbers, and collect all errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from peru_cli.errors import BadFile, UsageError

MAX_BYTES = 1_000_000
_MOST_NODES = 50_000  # a recipe has dozens; aliases could expand to billions
_MOST_LEVELS = 40
BLOCK = re.compile(r"^(`{3,})ya?ml[^\n]*\n(.*?)^\1", re.MULTILINE | re.DOTALL)

Path = tuple[str | int, ...]


@dataclass
class Complaints:
    """All errors and warnings, with their lines. `strict` turns warnings into errors."""

    label: str
    strict: bool = False
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def error(self, line: int | None, text: str) -> None:
        """Record an error."""
        self.errors.append(f"{self._where(line)}{text}")

    def warn(self, line: int | None, text: str) -> None:
        """Record something that has no effect."""
        known = f"{self._where(line)}{text}"
        if known not in self.warnings and known not in self.errors:
            (self.errors if self.strict else self.warnings).append(known)

    def _where(self, line: int | None) -> str:
        return f"line {line}: " if line is not None else ""

    def settle(self) -> None:
        """Raise UsageError with all errors, if there are any."""
        if self.errors:
            raise UsageError(f"{self.label} cannot be merged:\n  " + "\n  ".join(dict.fromkeys(self.errors)))


@dataclass
class Document:
    """One document of the file: plain values, and by its path of keys and indices the line of each, and the characters of scalars."""

    data: Any
    lines: Mapping[Path, int]
    spans: Mapping[Path, tuple[int, int]]

    def line(self, path: Iterable[str | int]) -> int:
        """The line of a value, or of the nearest enclosing one."""
        keys = tuple(path)
        while keys not in self.lines:
            keys = keys[:-1]
        return self.lines[keys]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean X?` if a known word is close."""
    close = difflib.get_close_matches(word, list(known), 1, 0.7)
    return f", did you mean {close[0]!r}?" if close else ""


def read_documents(text: str, label: str) -> list[Document]:
    """All documents of a file, without empty ones. Of a model card, the first YAML block with a merge_method.

    Raises BadFile for invalid YAML, with its line: equal keys, tags, aliases that expand without end."""
    offset = before = 0
    if label.endswith(".md"):
        blocks = [match for match in BLOCK.finditer(text) if "merge_method" in match.group(2)]
        if not blocks:
            raise BadFile(f"{label}: no YAML block of this card has a merge_method", "name a recipe, such as mergekit_config.yml")
        before = blocks[0].start(2)
        offset = text.count("\n", 0, before)
        text = blocks[0].group(2)
    try:
        loader = yaml.SafeLoader(text)
        documents = []
        while loader.check_node():
            node = loader.get_node()
            documents.append(_Reader(loader, offset, before).read(node))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1 + offset}: " if mark is not None else ""
        hint = "an alias such as *name repeats what &name marks before it" if isinstance(error, yaml.composer.ComposerError) else None
        if isinstance(error, yaml.scanner.ScannerError | yaml.parser.ParserError):
            hint = "look at the brackets, colons and indentation there"
        raise BadFile(f"{label}: {where}not valid YAML: {error.problem or error.context}", hint) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()
        raise BadFile(f"{label}: not valid YAML: {reason[0] if reason else type(error).__name__}") from error
    found = [document for document in documents if document.data is not None]
    if not found:
        raise BadFile(f"{label} is empty", "a recipe needs a merge_method and models")
    return found


class _Reader:
    """Turns a document's nodes into plain values."""

    def __init__(self, loader: yaml.SafeLoader, offset: int, before: int) -> None:
        """`offset` and `before` are the lines and characters of the file before the loader's text."""
        self._loader, self._offset, self._before = loader, offset, before
        self._lines: dict[Path, int] = {}
        self._spans: dict[Path, tuple[int, int]] = {}

    def read(self, node: yaml.Node) -> Document:
        return Document(self._plain(node, ()), self._lines, self._spans)

    def _plain(self, node: yaml.Node, path: Path) -> Any:
        self._lines[path] = node.start_mark.line + 1 + self._offset
        if len(self._lines) > _MOST_NODES or len(path) > _MOST_LEVELS:
            raise yaml.MarkedYAMLError(
                problem="too many values or levels (aliases that expand without end?): write them out", problem_mark=node.start_mark
            )
        if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is not supported: write a plain value", problem_mark=node.start_mark)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(child, (*path, number)) for number, child in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._table(node, path)
        self._spans[path] = (node.start_mark.index + self._before, node.end_mark.index + self._before)
        if node.tag == "tag:yaml.org,2002:timestamp":  # a model's name may look like a date
            return node.value
        return self._loader.construct_object(node)

    def _table(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for number, (key, _) in enumerate(node.value):
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key that is not a string: put it in quotes", problem_mark=key.start_mark)
            if key.tag != "tag:yaml.org,2002:merge" and key.value in own[: own.index(key.value)] + own[own.index(key.value) + 1 :]:
                again = max(i for i, (k, _) in enumerate(node.value) if k.value == key.value)
                if again == number:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} appears twice: keep one of them", problem_mark=key.start_mark
                    )
        self._loader.flatten_mapping(node)
        table: dict[str, Any] = {}
        for key, value in node.value:
            table[str(key.value)] = self._plain(value, (*path, str(key.value)))
            self._lines[(*path, str(key.value))] = key.start_mark.line + 1 + self._offset
        return table
