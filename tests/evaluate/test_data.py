"""How each kind of file is read, and where each kind of mistake is reported."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from peru_cli.errors import BadFile, PeruError, UsageError
from peru_cli.inference.reading import read_examples, split_data

ROWS = [
    {"text": "a fine film", "text_pair": "a film", "label": 1},
    {"text": 'with "quotes",\nand lines', "text_pair": "ünï\u2028code", "label": 0},
    {"text": "", "text_pair": "empty on the left", "label": 1},
]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def table(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_every_kind_of_table_gives_the_same_examples(tmp_path: Path) -> None:
    files = [
        lines(tmp_path / "a.jsonl", ROWS),
        table(tmp_path / "a.csv", ROWS),
        table(tmp_path / "a.tsv", ROWS, "\t"),
        parquet(tmp_path / "a.parquet", ROWS),
    ]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(files[0].read_bytes()))
    for file in [*files, packed]:
        read = read_examples(str(file))
        assert (read.texts, read.pairs, read.labels) == tuple([row[key] for row in ROWS] for key in ("text", "text_pair", "label")), file
        assert len(read) == 3 and len(read_examples(str(file), most=2)) == 2
    assert read_examples(str(files[0])).place(2) == f"{files[0]}, line 3"
    assert read_examples(str(files[1])).place(2) == f"{files[1]}, line 5"  # the second row contains a line break


@pytest.mark.parametrize(
    ("row", "texts", "pairs"),
    [
        ({"sentence1": "a", "sentence2": "b", "label": 0, "idx": 7}, ["a"], ["b"]),
        ({"premise": "a", "hypothesis": "b", "label": 0}, ["a"], ["b"]),
        ({"question": "a", "sentence": "b", "label": 0}, ["a"], ["b"]),
        ({"question1": "a", "question2": "b"}, ["a"], ["b"]),
        ({"sentence": "a"}, ["a"], None),
        ({"text": "a", "text_pair": None}, ["a"], None),
    ],
)
def test_columns_of_common_data_sets_are_known(tmp_path: Path, row: dict[str, Any], texts: list[str], pairs: list[str] | None) -> None:
    read = read_examples(str(lines(tmp_path / "a.jsonl", [row])))
    assert (read.texts, read.pairs, read.labels) == (texts, pairs, [0] if "label" in row else None)


def test_images_come_from_arrays_and_folders(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7), np.uint8)
    np.savez(tmp_path / "a.npz", x=pixels, y=np.array([3, 1, 2, 0, 1], np.uint16))
    read = read_examples(str(tmp_path / "a.npz"))
    assert isinstance(read.images, np.ndarray) and (read.images == pixels).all() and read.labels == [3, 1, 2, 0, 1]
    for i, name in enumerate(["dog", "cat", "cat"]):
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(tmp_path / "set" / name / f"{i}.png")
    (tmp_path / "set" / "cat" / "notes.txt").write_text("no image")
    read = read_examples(str(tmp_path / "set"))
    assert read.labels == ["cat", "cat", "dog"] and read.place(0) == f"{tmp_path / 'set'}, cat/1.png"
    # The config's class names if it has any, otherwise the folders in order.
    plain = SimpleNamespace(num_labels=2, label2id={"LABEL_0": 0, "LABEL_1": 1})
    named = SimpleNamespace(num_labels=2, label2id={"Dog": 0, "Cat": 1})
    assert [list(read.class_numbers(config)) for config in (plain, named)] == [[0, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "holds no examples"),
        ("a.jsonl", "\n\n", "holds no examples"),
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.txt", " \n", "holds no examples"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', "a.jsonl, line 2: not an object"),
        ("a.jsonl", '{"txt": "a", "label": 1}\n', "no column 'text'; its columns are 'txt', 'label'"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "a.jsonl, line 2: 'label' is missing, though earlier lines have it"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b", "label": 1}\n', "a.jsonl, line 3: has 'label', though earlier lines lack it"),
        ("a.jsonl", '{"text": 7}\n', "a.jsonl, line 1: 'text' is int, not a string"),
        ("a.jsonl", '{"text": "a", "label": {"x": 1}}\n', "a.jsonl, line 1: the label {'x': 1} is neither"),
        ("a.jsonl", '{"text": "a", "label": true}\n', "a.jsonl, line 1: the label True is neither"),
        ("a.csv", "text,label\na,1\nb\n", "a.csv, line 3: 1 cells, but the first line names 2 columns"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl: not UTF-8 text"),
        ("a.jsonl.gz", b"\x1f\x8b and no more", "a.jsonl.gz: not a complete gzip file"),
        ("a.npz", b"PK and no more", "a.npz: not a readable .npz file"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: not a readable Parquet file"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(BadFile) as caught:
        read_examples(str(tmp_path / name))
    assert said in str(caught.value)


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    image = np.zeros((2, 4, 4), np.uint8)
    for arrays, said in (
        ({"images": image}, "no array 'x'; it holds images"),
        ({"x": image.astype(np.int32)}, "x is int32 [2, 4, 4]"),
        ({"x": image, "y": np.zeros(3, np.int64)}, "y is int64 [3], not one class number for each of 2 images"),
        ({"x": image, "y": np.zeros(3)}, "y is float64"),
        ({"x": np.array([{}])}, "not a readable .npz file"),  # pickled objects are never loaded
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(BadFile, match=r"a\.npz") as caught:
            read_examples(str(tmp_path / "a.npz"))
        assert said in str(caught.value)


def test_labels_outside_the_head_are_found_with_their_line(tmp_path: Path) -> None:
    config = SimpleNamespace(num_labels=2, label2id={"negative": 0, "positive": 1})
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "Negative"}]
    read = read_examples(str(lines(tmp_path / "a.jsonl", rows)))
    assert list(read.class_numbers(config)) == [1, 0]
    assert list(read_examples(str(table(tmp_path / "a.csv", rows))).class_numbers(config)) == [1, 0]
    for label, said in ((2, "no label 2"), (-1, "no label -1"), ("neutral", "no label 'neutral'")):
        read = read_examples(str(lines(tmp_path / "b.jsonl", [*rows, {"text": "c", "label": label}])))
        with pytest.raises(BadFile) as caught:
            read.class_numbers(config)
        assert f"b.jsonl, line 3: the model's head has {said}" in str(caught.value) and "it has 2 labels" in str(caught.value)


def test_class_numbers_of_a_data_set_are_matched_by_name(tmp_path: Path) -> None:
    """As for MNLI: roberta-large-mnli puts contradiction first, the data set entailment."""
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 2}]
    read = read_examples(str(lines(tmp_path / "a.jsonl", rows)))
    read.label_names = ["entailment", "neutral", "contradiction"]
    for names, wanted in (
        (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], [2, 0]),
        (["x", "y", "z"], [0, 2]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [0, 2]),
    ):
        config = SimpleNamespace(num_labels=3, label2id={name: number for number, name in enumerate(names)})
        assert list(read.class_numbers(config)) == wanted
    read.labels = [0, 3]
    with pytest.raises(BadFile, match="line 2: the model's head has no label 3"):
        read.class_numbers(SimpleNamespace(num_labels=3, label2id={"contradiction": 0, "neutral": 1, "entailment": 2}))


def test_data_is_given_by_task(tmp_path: Path) -> None:
    assert split_data(["a=x.jsonl", "b=y.jsonl"]) == {"a": "x.jsonl", "b": "y.jsonl"} and split_data(["x.jsonl"]) == {"": "x.jsonl"}
    for texts, said in ((["a=x", "a=y"], "given twice for 'a'"), (["x", "y"], "given several times"), (["x", "a=y"], "x names no task")):
        with pytest.raises(UsageError) as caught:
            split_data(texts)
        assert said in str(caught.value)
    for source, said in (("missing.jsonl", "no such file"), (str(tmp_path), "holds no examples")):
        with pytest.raises(PeruError) as raised:
            read_examples(source)
        assert said in str(raised.value)
    (tmp_path / "a.pickle").write_bytes(b"x")
    with pytest.raises(UsageError, match="unknown kind of file"):
        read_examples(str(tmp_path / "a.pickle"))


def test_data_sets_by_name_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="need the package `datasets`"):
        read_examples("glue:sst2@validation")


def test_a_data_set_is_loaded_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set in a folder, read by the real package as from the Hub: config, split and class names matter."""
    datasets = pytest.importorskip("datasets", reason="needs `pip install datasets`")
    datasets.disable_progress_bars()
    folder = tmp_path / "owner" / "reviews"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: short\n  data_files:\n  - split: validation\n    path: v.jsonl\n"
        "dataset_info:\n- config_name: short\n  features:\n  - name: sentence\n    dtype: string\n"
        "  - name: label\n    dtype:\n      class_label:\n        names:\n          '0': bad\n          '1': good\n---\n"
    )
    (folder / "v.jsonl").write_text('{"sentence": "fine", "label": 1}\n{"sentence": "dull", "label": 0}\n')
    monkeypatch.chdir(tmp_path)
    found = read_examples("owner/reviews:short@validation")
    assert found.texts == ["fine", "dull"] and found.labels == [1, 0] and found.label_names == ["bad", "good"]
    for source in ("owner/reviews:short@test", "owner/reviews:long@validation", "no-such-owner/no-such-set@test"):
        with pytest.raises(UsageError, match="cannot load it"):
            read_examples(source)
