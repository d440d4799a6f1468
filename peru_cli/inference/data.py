"""Examples to evaluate on, and their labels as a model's classes, numbers or independent labels."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.errors import BadFile

Label = int | str | float | list[Any]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Examples:
    """Examples of one task: texts, pairs of texts, texts with targets, or images, with or without labels.

    `images` is an array, uint8 (n, h, w) or (n, h, w, channels) or floats (n, channels, h, w) that are the model's input, or
    a list of files. `places` says where each example comes from, if its number is not enough. Labels are class
    indices, or names that a model's config translates; for a regression, numbers; for independent labels, lists of those
    that apply (indices or names), or a 0 or 1 for each."""

    source: str
    texts: list[str] | None = None
    pairs: list[str] | None = None
    targets: list[str] | None = None
    images: Array | list[Path] | None = None
    labels: list[Label] | None = None
    places: list[str] = field(default_factory=list)
    label_names: list[str] | None = None  # class names from `datasets` or a folder of images

    def __len__(self) -> int:
        return len(self.texts if self.texts is not None else self.images if self.images is not None else ())

    def place(self, i: int) -> str:
        """Where example i comes from, for messages."""
        return f"{self.source}, {self.places[i]}" if self.places else f"{self.source}, example {i + 1}"

    def head(self, count: int) -> Examples:
        """The first `count` examples."""
        cut = {
            name: value[:count] for name in ("texts", "pairs", "targets", "images", "labels") if (value := getattr(self, name)) is not None
        }
        return replace(self, places=self.places[:count], **cut)

    def by_number(self, config: Any) -> bool:
        """Whether labels are the model's own class indices: not names, and not indices of classes that the data names like the model."""
        numbers = any(isinstance(label, int) for label in self.labels or ())
        return numbers and sorted(name.lower() for name in self.label_names or ()) != sorted(_classes(config))

    def class_numbers(self, config: Any) -> Array | None:
        """Labels as a model's class indices, int64 (n,). None without labels.

        Args:
            config: of a transformers classifier: `num_labels` and `label2id`.

        Raises:
            BadFile: a label that the model's head does not have, with its line."""
        if self.labels is None:
            return None
        names, called = _classes(config), [name.lower() for name in self.label_names or ()]
        if called and len(called) == config.num_labels and not _named_classes(config):
            names = {name: number for number, name in enumerate(called)}
        translated = sorted(called) == sorted(names)
        numbers = np.empty(len(self.labels), np.int64)
        for i, label in enumerate(self.labels):
            if translated and isinstance(label, int) and 0 <= label < len(called):
                label = called[label]
            if not isinstance(label, (int, str)):
                raise BadFile(f"{self.place(i)}: the label {label!r} is neither a class number nor a name")
            number = names.get(label.lower()) if isinstance(label, str) else label
            if number is None or not 0 <= number < config.num_labels:
                known = ", ".join(sorted(names, key=lambda name: names[name])[:6]) + (", ..." if len(names) > 6 else "")
                has = f"0 to {config.num_labels - 1}" if isinstance(label, int) else known
                raise BadFile(f"{self.place(i)}: the model's head has no label {label!r}", f"it has {config.num_labels} labels: {has}")
            numbers[i] = number
        return numbers

    def values(self) -> Array | None:
        """Labels of a regression, float64 (n,). None without labels. BadFile for anything but a number, with its line."""
        if self.labels is None:
            return None
        found = np.empty(len(self.labels))
        for i, label in enumerate(self.labels):
            try:
                found[i] = math.nan if isinstance(label, list) else float(label)
            except ValueError:
                found[i] = math.nan
            if not math.isfinite(found[i]):
                raise BadFile(f"{self.place(i)}: the label {label!r} is not a number", "the model predicts a number (a regression)")
        return found

    def label_sets(self, config: Any) -> Array | None:
        """Independent labels, bool (n, labels). None without labels. BadFile for a label that the head does not have, with its line."""
        if self.labels is None:
            return None
        names, count = _classes(config), config.num_labels
        rows = [label if isinstance(label, list) else _as_list(label) for label in self.labels]
        flags = all(len(row) == count and all(not isinstance(v, str) and v in (0, 1) for v in row) for row in rows)
        found = np.zeros((len(rows), count), bool)
        for i, row in enumerate(rows):
            for place, value in enumerate(row):
                number = names.get(value.lower()) if isinstance(value, str) else value
                if flags:
                    found[i, place] = bool(value)
                elif isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count:
                    found[i, number] = True
                else:
                    hint = f"write the names or numbers of the labels that hold, or 0 or 1 for each of the {count} labels"
                    raise BadFile(f"{self.place(i)}: the model's head has no label {value!r}", hint)
        return found

    def check(self, config: Any, problem: str) -> None:
        """BadFile for a label that the model's head does not have. `problem` is from `models.problem_of`."""
        if problem == "a value":
            self.values()
        elif problem == "independent labels":
            self.label_sets(config)
        else:
            self.class_numbers(config)


def _as_list(label: Label) -> list[Any]:
    """A table cell as a list: JSON, or a single label."""
    if isinstance(label, str) and label.strip().startswith("["):
        try:
            parsed = json.loads(label)
        except ValueError:
            return [label]
        return parsed if isinstance(parsed, list) else [label]
    return [label]


def _classes(config: Any) -> dict[str, int]:
    """A classifier's classes by their names, in lower case."""
    return {str(name).lower(): int(number) for name, number in (config.label2id or {}).items()}


def _named_classes(config: Any) -> dict[str, int] | None:
    """The same, or None if the only names are transformers' own LABEL_0 and so on."""
    names = _classes(config)
    return None if all(re.fullmatch(r"label_\d+", name) for name in names) else names


def class_doubts(examples: Examples, config: Any) -> list[str]:
    """Reasons to doubt that the data's classes are the model's, if the data names its classes."""
    called, classes = [name.lower() for name in examples.label_names or ()], config.num_labels
    if not called or examples.labels is None or not any(isinstance(label, int) for label in examples.labels):
        return []
    shown = ", ".join(called[:4]) + (", ..." if len(called) > 4 else "")
    if len(called) != classes:
        return [f"{examples.source} has {len(called)} classes ({shown}), the model's head {classes}"]
    own = _named_classes(config)
    if own is not None and sorted(own) != sorted(called):
        theirs = ", ".join(sorted(own, key=lambda name: own[name])[:4]) + (", ..." if len(own) > 4 else "")
        return [f"{examples.source} calls its classes {shown}, the model {theirs}: peru assumes the same order"]
    return []


def label_order(ours: Any, theirs: Any) -> list[int] | None:
    """The index in the second config of each class of the first, if they have the same names in another order. None otherwise."""
    mine, other = _named_classes(ours), _named_classes(theirs)
    if mine is None or other is None or mine == other or sorted(mine) != sorted(other):
        return None
    order = [other[name] for name, _ in sorted(mine.items(), key=lambda item: item[1])]
    return order if sorted(order) == list(range(len(order))) else None
