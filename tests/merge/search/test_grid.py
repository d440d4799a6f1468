"""Merges whose options are chosen on data: the curve against transformers' own accuracies; and invalid data and options."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peru_cli.merge import command as merge_command
from tests.support.data_family import TASKS, command, fine_tune, tokens, write_family, write_rows


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


# Search


def test_search_takes_the_best_value_and_measures_as_transformers_does(family: Path, peru, tmp_path: Path) -> None:
    found = json.loads(peru(*command(family, "task-arithmetic", "--search", "scale=0:1:0.25", "-o", tmp_path / "best", "--json")))
    points = found["search"]["points"]
    assert [point["value"] for point in points] == ["0", "0.25", "0.5", "0.75", "1"]
    best = max(points, key=lambda point: point["normalised"])
    assert found["options"]["scale"] == best["value"]
    peru(*command(family, "task-arithmetic", "--scale", best["value"], "-o", tmp_path / "same", data=False))
    ours, theirs = ((tmp_path / n / "model.safetensors") for n in ("best", "same"))
    assert all(torch.equal(tensor, load_file(theirs)[name]) for name, tensor in load_file(ours).items())
    for task in TASKS:
        rows = [json.loads(line) for line in (family / f"{task}.jsonl").read_text().splitlines()]
        model = fine_tune(family, task)
        for out, reported in ((None, found["search"]["fine_tunes"][task]), (ours, best["accuracy"][task])):
            if out is not None:
                model.load_state_dict({f"bert.{name}": tensor for name, tensor in load_file(out).items()}, strict=False)
            right = [int(model(**tokens(family, [row["text"]])).logits.argmax()) == row["label"] for row in rows]
            assert reported == pytest.approx(sum(right) / len(rows), abs=1e-12)


def test_search_over_other_options(family: Path, peru, tmp_path: Path) -> None:
    for method, text, words in (
        ("ties", "keep=20%:60%:20%", ["20%", "40%", "60%"]),
        ("regmean", "alpha=0:1:0.5", ["0", "0.5", "1"]),
        ("adamerging", "steps=0:1:1", ["0", "1"]),
    ):
        out = peru(*command(family, method, "--search", text, "-o", tmp_path / method, "--json"))
        assert [point["value"] for point in json.loads(out)["search"]["points"]] == words
    table = peru(*command(family, "ties", "--search", "scale=0:0.5:0.5", "-o", tmp_path / "table"))
    assert "normalised" in table and "best" in table and "fine-tunes" in table


@pytest.mark.parametrize(("method", "option"), [("task-arithmetic", "scale=0:1:0.25"), ("regmean", "alpha=0:1:0.5")])
def test_the_first_examples_equal_a_file_that_ends_there(family: Path, peru, tmp_path: Path, method: str, option: str) -> None:
    def search(name: str, *more: object) -> tuple[dict, dict[str, torch.Tensor]]:
        out = tmp_path / name
        found = json.loads(peru(*command(family, method, "--search", option, "-o", out, "--json", *more, data=name != "cut")))
        return found["search"], load_file(out / "model.safetensors")

    for task in TASKS:
        lines = (family / f"{task}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{task}.jsonl").write_text("".join(lines[:5]))
    cut, tensors = search("cut", *(word for task in TASKS for word in ("--data", f"{task}={tmp_path / task}.jsonl")))
    few, same = search("few", "--max-samples", 5)
    assert few == cut != search("all")[0] and all(torch.equal(tensor, tensors[name]) for name, tensor in same.items())
    card = (tmp_path / "few" / "README.md").read_text()
    assert f"{option.replace('=', ', the best of ', 1)} on a=a.jsonl, b=b.jsonl, the first 5 examples of each." in card
    assert ("--data" in card) is (method == "regmean")


def test_the_command_on_the_card_makes_the_same_merge(family: Path, peru, tmp_path: Path) -> None:
    peru(*command(family, "ties", "--search", "keep=20%:60%:20%", "-o", tmp_path / "searched"))
    card = (tmp_path / "searched" / "README.md").read_text()
    words = shlex.split(card.partition("```sh\n")[2].partition("\n")[0])
    models = [f"{task}={family / task}" for task in TASKS]
    assert words[:6] == ["peru", "merge", *TASKS, "--base", "base"]
    peru("merge", *models, "--base", family / "base", *words[6:], "-o", tmp_path / "typed", "--no-sync", "--device", "cpu")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("searched", "typed"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_folder_for_statistics_is_created_only_if_some_are_collected(family: Path, peru, tmp_path: Path, monkeypatch) -> None:
    def never(**options: object) -> None:
        raise AssertionError("a folder is made")

    monkeypatch.setattr(merge_command, "TemporaryDirectory", never)
    peru(*command(family, "ties", "-o", tmp_path / "plain", data=False))
    peru(*command(family, "ties", "-o", tmp_path / "searched", "--search", "scale=0:1:1"))
    peru(*command(family, "regmean", "-o", tmp_path / "kept", "--stats", tmp_path / "stats"))
    assert len(list((tmp_path / "stats").iterdir())) == 2
    with pytest.raises(AssertionError, match="a folder is made"):
        peru(*command(family, "regmean", "-o", tmp_path / "collected"))


# Invalid requests


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", "ties", "--search", "scale=0:1"], "FROM:TO:STEP"),
        (["-m", "ties", "--search", "scope=0:1:1"], "no numeric option --scope"),
        (["-m", "ties", "--search", "alpha=0:1:1"], "no numeric option --alpha"),
        (["-m", "ties", "--search", "scale=0:x:1"], "three numbers"),
        (["-m", "ties", "--search", "scale=1:0:0.1"], "has no values"),
        (["-m", "ties", "--search", "scale=0:1:0"], "has no values"),
        (["-m", "ties", "--search", "scale=0:1:1e-9"], "STEP larger"),
        (["-m", "ties", "--search", "keep=0%:10%:5%"], "must be above 0"),
        (["-m", "consensus", "--search", "min-tasks=1:2:0.5"], "whole number"),
        (["-m", "consensus", "--search", "min-tasks=0:2:1"], "at least 1"),
        (["-m", "ties", "--scale", "1", "--search", "scale=0:1:1"], "both given and searched"),
        (["-m", "ties"], "uses no data"),
        (["-m", "ties", "--max-samples", "5"], "ties does not know --max-samples"),
        (["-m", "fisher", "--expectation", "both"], "exact or sampled"),
        (["-m", "fisher", "--alpha", "1"], "fisher does not know --alpha"),
    ],
)
def test_invalid_options_are_refused(family: Path, peru, tmp_path: Path, options: list[str], words: str) -> None:
    peru(*command(family, "ties", "-o", tmp_path / "out", *options), code=2)
    assert words in peru.stderr and not (tmp_path / "out").exists()


def test_invalid_data_is_refused(family: Path, peru, tmp_path: Path) -> None:
    out = ["-o", tmp_path / "out"]
    peru(*command(family, "regmean", *out, data=False), code=2)
    assert "--data TASK=FILE" in peru.stderr
    peru(*command(family, "regmean", *out, "--data", f"a={family}/a.jsonl", data=False), code=2)
    assert "--data b=FILE" in peru.stderr
    peru(*command(family, "regmean", *out, "--data", f"c={family}/a.jsonl"), code=2)
    assert "no model is called 'c'" in peru.stderr
    bare = write_rows(tmp_path / "bare.jsonl", 3, 0, labels=False)
    peru(*command(family, "ties", *out, "--search", "scale=0:1:1", "--data", f"a={bare}", "--data", f"b={bare}", data=False), code=1)
    assert "bare.jsonl has no labels" in peru.stderr
    (tmp_path / "file").write_text("")
    peru(*command(family, "regmean", *out, "--stats", tmp_path / "file"), code=2)
    assert "is a file" in peru.stderr and not (tmp_path / "out").exists()
