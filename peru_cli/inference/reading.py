"""Read examples from files: JSONL, CSV, Parquet, .npz, a folder of images, plain text, or a name that `datasets` knows.

Everything is read and checked here, before any model is. Errors name the file and the line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peru_cli.checkpoints.local import inputs
from peru_cli.checkpoints.resolve import split_argument
from peru_cli.errors import BadFile, UsageError
from peru_cli.inference.data import Examples, Label
from peru_cli.shown import listed

# Column names in common data sets; the first one present is used: 'text' and 'text_pair' for our own files, then GLUE's.
TEXT = ("text", "question", "sentence", "sentence1", "premise", "question1")
PAIR = ("text_pair", "sentence2", "hypothesis", "question2")
TARGET = ("target", "summary", "answer")
LABEL = ("label", "labels", "y", "class")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm")
_DATASET = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(?::(?P<config>[\w.-]+))?@(?P<split>[\w\[\]:%+.-]+)")


def split_data(texts: Sequence[str], option: str = "--data") -> dict[str, str]:
    """Parse `[TASK=]FILE...` into files by task. A single file may have no task; it gets the empty name."""
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
        most: the largest number of examples to read.

    Raises:
        BadFile: the file is empty, lacks a column or has a broken line; with the line.
        UsageError: the file does not exist, its kind is unknown, or a package is missing."""
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
    """A file of running text as one example. BadFile if it is empty or not UTF-8, UsageError if it does not exist."""
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
    raise UsageError(f"{path}: unknown kind of file", "peru reads .jsonl, .csv, .tsv, .parquet, .npz, .txt and folders of images")


def _text(path: Path) -> str:
    inputs.note(path)
    data = path.read_bytes()
    try:
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise BadFile(f"{path}: not a complete gzip file") from error
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
                raise BadFile(f"{path}, line {reader.line_num}: {len(cells)} cells, but the first line names {len(names)} columns")
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
        raise BadFile(f"{path}: not a readable Parquet file ({error})") from error


def _column(names: Iterable[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted columns that exists here."""
    by_lower = {name.lower(): name for name in names}
    return next((by_lower[name] for name in wanted if name in by_lower), None)


def _rows(source: str, rows: Iterable[tuple[int, Mapping[str, Any]]], unit: str, typed: bool = True) -> Examples:
    """Examples from rows. Without `typed`, all cells are texts, and whole numbers stand for themselves."""
    examples = Examples(source, texts=[], places=[])
    columns: dict[str, str] = {}
    for number, row in rows:
        place = f"{unit} {number}"
        if not columns:
            columns = _columns(source, row, examples)
        for kind, name in columns.items():
            if name not in row or row[name] is None:
                raise BadFile(f"{source}, {place}: {name!r} is missing, though earlier lines have it")
            value = row[name]
            if kind == "labels":
                value = _label(value, f"{source}, {place}", typed)
            elif not isinstance(value, str):
                raise BadFile(f"{source}, {place}: {name!r} is {type(value).__name__}, not a string")
            getattr(examples, kind).append(value)
        for kind, aliases in (("labels", LABEL), ("pairs", PAIR)):
            if kind not in columns and (late := _column(row, aliases)) is not None and row[late] is not None:
                raise BadFile(f"{source}, {place}: has {late!r}, though earlier lines lack it")
        examples.places.append(place)
    return examples


def _columns(source: str, row: Mapping[str, Any], examples: Examples) -> dict[str, str]:
    """The role of each column, from the first row. Prepares the lists of examples."""
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
    """Images `x` and class indices `y`."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in ("x", "y") if name in data.files}
            names = listed(data.files)
    except (OSError, ValueError, EOFError, KeyError, _zip_error()) as error:
        raise BadFile(f"{path}: not a readable .npz file ({error})") from error
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
    """FOLDER/CLASS/IMAGE, as in torchvision's ImageFolder, or images without labels in FOLDER itself."""
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
