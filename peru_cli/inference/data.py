"""Examples to evaluate on: JSONL, CSV, Parquet, .npz, a folder of images, plain text, or a name that `datasets` knows.

Everything is read and looked at here, before any model is: what is wrong is said with the file and the line.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.resolve import split_argument
from peru_cli.errors import BadFile, UsageError

# Columns by their names in common data sets, the first that is there: 'text' and 'text_pair' for our own files, then GLUE's.
TEXT = ("text", "question", "sentence", "sentence1", "premise", "question1")
PAIR = ("text_pair", "sentence2", "hypothesis", "question2")
TARGET = ("target", "summary", "answer")
LABEL = ("label", "labels", "y", "class")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_DATASET = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(?::(?P<config>[\w.-]+))?@(?P<split>[\w\[\]:%+.-]+)")

Label = int | str | float | list[Any]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Examples:
    """Examples of one task: texts, pairs of texts, texts with targets, or images; with labels or without.

    `images` is an array, uint8 (n, h, w) or (n, h, w, channels) or floats (n, channels, h, w) that are the
    model's input as they stand, or a list of files. `places` says where each example comes from, if that is
    more than its number. Labels are class numbers, or names that a model's config translates; for a regression numbers; for
    independent labels lists of those that hold (numbers or names), or of a 0 or 1 for each.
    """

    source: str
    texts: list[str] | None = None
    pairs: list[str] | None = None
    targets: list[str] | None = None
    images: Array | list[Path] | None = None
    labels: list[Label] | None = None
    places: list[str] = field(default_factory=list)
    label_names: list[str] | None = None  # what `datasets` or a folder of images calls the classes

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
        """Whether labels are a model's own class numbers, not names, nor numbers of classes that the data names as the model does."""
        numbers = any(isinstance(label, int) for label in self.labels or ())
        return numbers and sorted(name.lower() for name in self.label_names or ()) != sorted(_classes(config))

    def class_numbers(self, config: Any) -> Array | None:
        """Labels as class numbers of a model, int64 (n,); None without labels.

        Args:
            config: of a transformers classifier: `num_labels` and `label2id`.

        Raises:
            BadFile: a label that the model's head does not have, with its line.
        """
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
        """Labels as numbers of a regression, float64 (n,); None without labels. BadFile, with its line, for what is no number."""
        if self.labels is None:
            return None
        found = np.empty(len(self.labels))
        for i, label in enumerate(self.labels):
            try:
                found[i] = math.nan if isinstance(label, list) else float(label)
            except ValueError:
                found[i] = math.nan
            if not math.isfinite(found[i]):
                raise BadFile(f"{self.place(i)}: the label {label!r} is not a number", "the model's head gives a number: a regression")
        return found

    def label_sets(self, config: Any) -> Array | None:
        """Independent labels, bool (n, labels); None without. BadFile, with its line, for a label that the model's head does not have."""
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
                    hint = f"write the names or numbers of those that hold, or {count} times 0 or 1"
                    raise BadFile(f"{self.place(i)}: the model's head has no label {value!r}", hint)
        return found

    def check(self, config: Any, problem: str) -> None:
        """BadFile for a label that the model's head does not have; `problem` as `models.problem_of` has it."""
        if problem == "a value":
            self.values()
        elif problem == "independent labels":
            self.label_sets(config)
        else:
            self.class_numbers(config)


def _as_list(label: Label) -> list[Any]:
    """A cell of a table as a list: JSON, or one label alone."""
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
    """The same, or None where they have no names but transformers' own LABEL_0 and so on."""
    names = _classes(config)
    return None if all(re.fullmatch(r"label_\d+", name) for name in names) else names


def class_doubts(examples: Examples, config: Any) -> list[str]:
    """Why the classes of the data may not be the model's, where the data names its classes."""
    called, classes = [name.lower() for name in examples.label_names or ()], config.num_labels
    if not called or examples.labels is None or not any(isinstance(label, int) for label in examples.labels):
        return []
    shown = ", ".join(called[:4]) + (", ..." if len(called) > 4 else "")
    if len(called) != classes:
        return [f"{examples.source} has {len(called)} classes ({shown}), the model's head {classes}"]
    own = _named_classes(config)
    if own is not None and sorted(own) != sorted(called):
        theirs = ", ".join(sorted(own, key=lambda name: own[name])[:4]) + (", ..." if len(own) > 4 else "")
        return [f"{examples.source} calls its classes {shown}, the model {theirs}: they are taken to be the same in this order"]
    return []


def label_order(ours: Any, theirs: Any) -> list[int] | None:
    """Where the classes of one config are in another that has the same names in another order; None for any other two."""
    mine, other = _named_classes(ours), _named_classes(theirs)
    if mine is None or other is None or mine == other or sorted(mine) != sorted(other):
        return None
    order = [other[name] for name, _ in sorted(mine.items(), key=lambda item: item[1])]
    return order if sorted(order) == list(range(len(order))) else None


def split_data(texts: Sequence[str], option: str = "--data") -> dict[str, str]:
    """`[TASK=]FILE...` as files by task; a single one may go without a task, under the empty name."""
    found: dict[str, str] = {}
    for text in texts:
        argument = split_argument(text)
        task = argument.task or ""
        if task in found:
            said = f"{option} is given twice for {task!r}" if task else f"{option} is given several times"
            raise UsageError(said, f"name the task of each: {option} a=FILE {option} b=FILE")
        found[task] = argument.model
    if "" in found and len(found) > 1:
        raise UsageError(f"{option} {found['']} names no task", f"write {option} TASK={found['']}")
    return found


def read_examples(source: str, most: int | None = None) -> Examples:
    """Read examples.

    Args:
        source: a .jsonl, .csv, .tsv, .parquet, .npz or .txt file (the first three also as .gz), a folder with
            a folder of images for each class, or `NAME[:CONFIG]@SPLIT` for a data set of the package `datasets`.
        most: read no more than the first so many.

    Raises:
        BadFile: there is nothing in it, a column is missing, a line is broken; with the line.
        UsageError: no such file, a kind of file that is not known, or a package that is missing.
    """
    path = Path(source)
    if path.is_dir():
        examples = _folder(path)
    elif path.is_file():
        examples = _file(path)
    elif match := _DATASET.fullmatch(source):
        examples = _named(source, match)
    else:
        raise UsageError(f"{source}: no such file or folder", "a data set of the package `datasets` is written NAME[:CONFIG]@SPLIT")
    if not len(examples):
        raise BadFile(f"{source} holds no examples")
    return examples if most is None else examples.head(most)


def read_text(file: str) -> Examples:
    """A file of running text as one example. BadFile if it is empty or not UTF-8, UsageError if it is not there."""
    path = Path(file)
    if not path.is_file():
        raise UsageError(f"{file}: no such file")
    if not (text := _text(path)).strip():
        raise BadFile(f"{file} holds no text")
    return Examples(file, texts=[text])


def _file(path: Path) -> Examples:
    inputs.note(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else suffixes[-1] if suffixes else ""
    if kind in (".jsonl", ".ndjson"):
        return _rows(str(path), _json_lines(path), "line")
    if kind in (".csv", ".tsv"):
        reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter="\t" if kind == ".tsv" else ",")
        return _rows(str(path), _csv_lines(path, reader), "line", typed=False)
    if kind == ".parquet":
        return _rows(str(path), enumerate(_parquet(path), 1), "row")
    if kind == ".npz":
        return _npz(path)
    if kind == ".txt":
        return Examples(str(path), texts=[text]) if (text := _text(path)).strip() else Examples(str(path))
    raise UsageError(f"{path}: not a kind of file that is read", "known are .jsonl, .csv, .tsv, .parquet, .npz, .txt and folders of images")


def _text(path: Path) -> str:
    inputs.note(path)
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise BadFile(f"{path}: not a gzip file that can be read to its end") from error
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: not UTF-8 text (byte {error.start})") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadFile(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise BadFile(f"{path}, line {number}: not an object", 'write {"text": "...", "label": 0}')
        yield number, row


def _csv_lines(path: Path, reader: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        names: list[str] = next(reader, [])
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(names):
                raise BadFile(f"{path}, line {reader.line_num}: {len(cells)} cells, the first line names {len(names)} columns")
            yield reader.line_num, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise BadFile(f"{path}, line {reader.line_num}: {error}") from error


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise UsageError(f"{path}: reading Parquet needs pyarrow", "pip install 'peru-cli[data]'") from error
    try:
        with ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if name.lower() in (*TEXT, *PAIR, *TARGET, *LABEL)]
            return file.read(columns=wanted).to_pylist()  # type: ignore[no-any-return]
    except (ArrowException, OSError) as error:
        raise BadFile(f"{path}: not a Parquet file that can be read ({error})") from error


def _column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """What one of a few columns is called here."""
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _rows(source: str, rows: Iterable[tuple[int, Mapping[str, Any]]], unit: str, typed: bool = True) -> Examples:
    """Examples out of rows; without `typed`, all cells are texts and whole numbers stand for themselves."""
    examples = Examples(source, texts=[], places=[])
    columns: dict[str, str] = {}
    for number, row in rows:
        place = f"{unit} {number}"
        if not columns:
            columns = _columns(source, row, examples)
        for kind, name in columns.items():
            if name not in row or row[name] is None:
                raise BadFile(f"{source}, {place}: no {name!r}, which earlier lines have")
            value = row[name]
            if kind == "labels":
                value = _label(value, f"{source}, {place}", typed)
            elif not isinstance(value, str):
                raise BadFile(f"{source}, {place}: {name!r} is {type(value).__name__}, not a text")
            getattr(examples, kind).append(value)
        for kind, aliases in (("labels", LABEL), ("pairs", PAIR)):
            if kind not in columns and (late := _column(row, aliases)) is not None and row[late] is not None:
                raise BadFile(f"{source}, {place}: has {late!r}, which earlier lines lack")
        examples.places.append(place)
    return examples


def _columns(source: str, row: Mapping[str, Any], examples: Examples) -> dict[str, str]:
    """Which column is what, from the first row; makes room for each."""
    text = _column(row, TEXT)
    if text is None:
        named = ", ".join(map(repr, list(row)[:8])) or "none"
        raise BadFile(f"{source}: no column 'text'; its columns are {named}", f"known names: {', '.join(TEXT)}")
    found = {"texts": text}
    pair = (*PAIR, "sentence") if text.lower() == "question" else PAIR  # GLUE's QNLI
    for kind, aliases in (("pairs", pair), ("targets", TARGET), ("labels", LABEL)):
        name = _column((n for n in row if row[n] is not None), aliases)
        if name is not None:
            found[kind] = name
            setattr(examples, kind, [])
    return found


def _label(value: Any, place: str, typed: bool) -> Label:
    if isinstance(value, str) and not typed and re.fullmatch(r"[+-]?\d+", value.strip()):
        return int(value)
    if isinstance(value, (int, str, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, list) and all(isinstance(part, (int, str, float)) for part in value):
        return value
    raise BadFile(f"{place}: the label {value!r} is neither a class number nor a name")


def _npz(path: Path) -> Examples:
    """Images `x` and class numbers `y`."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in ("x", "y") if name in data.files}
            names = ", ".join(data.files)
    except (OSError, ValueError, EOFError, KeyError, _zip_error()) as error:
        raise BadFile(f"{path}: not an .npz file that can be read ({error})") from error
    if "x" not in arrays:
        raise BadFile(f"{path}: no array 'x'; it holds {names or 'nothing'}", "images are x (n, height, width[, channels]), labels y (n,)")
    x, y = arrays["x"], arrays.get("y")
    if x.dtype.kind == "f" and x.ndim == 4:
        x = x.astype(np.float32, copy=False)
    elif x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise BadFile(
            f"{path}: x is {x.dtype} {list(x.shape)}", "uint8 (n, height, width[, channels]), or floats (n, channels, height, width)"
        )
    if y is not None and y.dtype.kind in "iufb" and y.shape[:1] == (len(x),) and (y.ndim == 2 or (y.ndim == 1 and y.dtype.kind == "f")):
        return Examples(str(path), images=x, labels=y.astype(y.dtype if y.dtype.kind == "f" else np.int64).tolist())
    if y is not None and (y.dtype.kind not in "iu" or y.shape != (len(x),)):
        raise BadFile(f"{path}: y is {y.dtype} {list(y.shape)}, not one class number for each of {len(x)} images")
    return Examples(str(path), images=x, labels=None if y is None else [int(label) for label in y])


def _zip_error() -> type[Exception]:
    import zipfile

    return zipfile.BadZipFile


def _folder(path: Path) -> Examples:
    """FOLDER/CLASS/IMAGE, as torchvision's ImageFolder; or images without labels in FOLDER itself."""
    classes = sorted(folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    found = [(file, name) for name in classes or [""] for file in sorted((path / name).rglob("*") if name else path.iterdir())]
    found = [(file, name) for file, name in found if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
    for file, _ in found:
        inputs.note(file, small=False)
    labels: list[Label] | None = [int(name) if name.isdecimal() else name for _, name in found] if classes else None
    places = [str(file.relative_to(path)) for file, _ in found]
    return Examples(str(path), images=[file for file, _ in found], labels=labels, places=places, label_names=classes or None)


def _named(source: str, match: re.Match[str]) -> Examples:
    """A split of a data set that the package `datasets` loads."""
    try:
        import datasets
    except ImportError as error:
        hint = "pip install datasets, or name a file"
        raise UsageError(f"{source}: no such file, and data sets by name need the package `datasets`", hint) from error
    try:
        table = datasets.load_dataset(match["name"], match["config"], split=match["split"])
    except Exception as error:  # whatever the package raises for names, configs, splits and networks
        raise UsageError(f"{source}: `datasets` cannot load it: {error}") from error
    examples = _rows(source, enumerate(table, 1), "row")
    feature = table.features.get(_column(table.column_names, LABEL) or "")
    examples.label_names = list(getattr(feature, "names", None) or []) or None
    return examples
