"""`peru eval` as it is typed: on tiny models, on the demo family, and on impossible requests."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from peru_cli import demo
from peru_cli.checkpoints.source import Checkpoint
from peru_cli.errors import PeruError
from peru_cli.evaluate.plan import Comparison
from peru_cli.evaluate.run import evaluate
from peru_cli.inference import eval_model as subjects
from peru_cli.inference.data import Examples
from peru_cli.inference.prepare import Settings
from peru_cli.live.memory import read_tensors
from tests.evaluate.conftest import predictions
from tests.house.test_startup import probe
from tests.support import models

Peru = Callable[..., str]


def run(peru: Peru, *arguments: object, code: int = 0) -> Any:
    return json.loads(peru("eval", *arguments, "--json", "--quiet", code=code))


def value(task: Any, name: str) -> float:
    return float(task["metrics"][name]["value"])


def test_accuracies_equal_those_of_a_plain_loop_to_the_last_example(family: Path, peru: Peru) -> None:
    rows = [json.loads(line) for line in (family / "test.jsonl").read_text().splitlines()]
    texts, labels = [row["text"] for row in rows], np.array([row["label"] for row in rows])
    peru("unpack", family / "a.safetensors", "-b", family / "base", "-o", family / "restored", "--no-sync")
    ours, theirs = predictions(family / "restored", texts), predictions(family / "fine", texts)
    found = run(
        peru, family / "a.safetensors", "-b", family / "base", "-a", family / "fine", "-d", family / "test.jsonl", "--batch-size", 16
    )
    (task,) = found["tasks"]
    assert task["examples"] == 150 and task["kind"] == "text classification"
    assert value(task, "accuracy") == (ours == labels).mean() and value(task, "against_accuracy") == (theirs == labels).mean()
    assert value(task, "agreement") == (ours == theirs).mean() < 1
    assert value(task, "normalised") == pytest.approx((ours == labels).mean() / (theirs == labels).mean())
    assert task["bytes"] == (family / "a.safetensors").stat().st_size and value(task, "kl") > 0
    few = run(peru, family / "fine", "-d", family / "test.jsonl", "--max-samples", 20)["tasks"][0]
    assert few["examples"] == 20 and value(few, "accuracy") == (theirs == labels)[:20].mean() and "kl" not in few["metrics"]


def test_a_lossless_artifact_changes_nothing_at_all(family: Path, peru: Peru) -> None:
    found = run(peru, family / "all.safetensors", "-b", family / "base", "-a", family / "fine", "-d", family / "test.jsonl")
    (task,) = found["tasks"]
    assert (value(task, "kl"), value(task, "kl99"), value(task, "agreement"), value(task, "normalised")) == (0, 0, 1, 1)
    assert value(task, "accuracy") == value(task, "against_accuracy")
    (weights,) = found["weights"].values()
    assert (weights["total"]["error"], weights["total"]["sign"]) == (0, 1) and all(weights["heads_equal"].values())


def test_gates_end_with_exit_code_three(family: Path, peru: Peru, tmp_path: Path) -> None:
    given = [family / "a.safetensors", "-b", family / "base", "-a", family / "fine", "-d", family / "test.jsonl"]
    found = run(peru, *given, "--fail-below", "agreement=10%", "--fail-above", "kl=100", "--csv", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        table = {(row["task"], row["metric"]): row for row in csv.DictReader(file)}
    for name, metric in found["tasks"][0]["metrics"].items():
        assert float(table["a", name]["value"]) == metric["value"] and (table["a", name]["low"] == "") == ("low" not in metric)
    assert float(table["a", "error"]["value"]) == found["weights"]["a"]["total"]["error"]
    missed = run(peru, *given, "--fail-below", "agreement=1", "--fail-above", "error=0.5", "--fail-below", "accuracy=0", code=3)["missed"]
    assert len(missed) == 2 and missed[1].startswith("a: error is 0.")
    assert re.match(r"a: agreement is \d\d(\.\d+)?% \(--fail-below agreement=100%\)", missed[0])
    for option, said in (
        (["--fail-below", "acuracy=1"], "'acuracy' is not one of accuracy"),
        (["--fail-below", "kl=1"], "smaller it is: --fail-above"),
        (["--fail-above", "kl=much"], "'much' is not a number"),
        (["--fail-above", "kl=nan"], "'nan' is not a number"),
        (["--fail-below", "sign=1"], None),
        (["--fail-above", "perplexity=9"], "it needs --text, or data with targets"),
    ):
        peru("eval", *given, *option, code=2 if said else 3)
        assert said is None or said in peru.stderr  # type: ignore[attr-defined]
    peru("eval", *given, "--csv", tmp_path / "out.csv", code=2)
    assert "exists already" in peru.stderr and "another --csv" in peru.stderr  # type: ignore[attr-defined]


def test_sizes_add_up_when_tasks_share_a_merge(tmp_path: Path, peru: Peru) -> None:
    """Heads beside a merge, and PERU-FFT's deltas of one: the merge counts for each task, and once in total."""
    tasks = {"digits": "digits", "fashion": "fashion_mnist"}
    fine = [f"{task}={demo.fine_tune(name)}" for task, name in tasks.items()]
    data = [part for task, name in tasks.items() for part in ("-d", f"{task}={demo.images(name)}")]
    how = ["--method", "task-arithmetic", "--scale", 0.3, "--per-task", "classifier", "--compress", "5%", "--no-sync"]
    peru("merge", *fine, "-b", demo.BASE, "-o", tmp_path / "fft", *how)
    merged = tmp_path / "fft" / "merged"
    shutil.copy(demo.fine_tune("digits") / "preprocessor_config.json", merged)
    weights = (merged / "model.safetensors").stat().st_size
    deltas = {task: tmp_path / "fft" / f"{task}.safetensors" for task in tasks}
    for found, own in (
        (run(peru, merged, *data, "--max-samples", 20), {task: merged / "heads" / f"{task}.safetensors" for task in tasks}),
        (run(peru, *(f"{t}={path}" for t, path in deltas.items()), "-b", merged, *data, "--max-samples", 20), deltas),
        (run(peru, tmp_path / "fft", "-b", merged, *data, "--max-samples", 20), deltas),
    ):
        sizes = {task: path.stat().st_size for task, path in own.items()}
        assert {task["task"]: (task["own_bytes"], task["shared_bytes"]) for task in found["tasks"]} == {
            task: (size, weights) for task, size in sizes.items()
        }
        assert all(task["bytes"] == task["own_bytes"] + task["shared_bytes"] for task in found["tasks"])
        assert found["bytes_in_all"] == weights + sum(sizes.values())
    assert "bytes include what tasks share; in all " in peru("eval", merged, *data, "--max-samples", 20)
    alone = run(peru, demo.fine_tune("digits"), "-d", f"digits={demo.images('digits')}", "--max-samples", 20)
    assert alone["tasks"][0]["shared"] is None and alone["bytes_in_all"] == alone["tasks"][0]["bytes"]


def test_a_pack_scores_like_its_unpacked_tasks(tmp_path: Path, peru: Peru, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = {"digits": "digits", "fashion": "fashion_mnist"}
    fine = [f"{task}={demo.fine_tune(name)}" for task, name in tasks.items()]
    data = [part for task, name in tasks.items() for part in ("-d", f"{task}={demo.images(name)}")]
    against = [part for given in fine for part in ("-a", given)]
    pack, options = tmp_path / "pack.safetensors", ["--max-samples", 120]
    peru("shuffle-pack", *fine, "-b", demo.BASE, "-o", pack, "--scale", 0.5, "--per-task", "classifier", "--no-sync")
    found = run(peru, pack, "-b", demo.BASE, *data, *against, *options)
    packed = found["tasks"]
    assert found["bytes_in_all"] == pack.stat().st_size == packed[0]["shared_bytes"] + sum(task["own_bytes"] for task in packed)
    for task in tasks:
        peru("unpack", pack, "--task", task, "-b", demo.BASE, "-o", tmp_path / task, "--no-sync")
    unpacked = run(peru, *(f"{task}={tmp_path / task}" for task in tasks), *data, *against, *options)["tasks"]
    for ours, theirs in zip(packed, unpacked, strict=True):
        assert ours["bytes"] == ours["own_bytes"] + ours["shared_bytes"] < pack.stat().st_size and value(ours, "kl") > 0
        for name in ("accuracy", "normalised", "agreement", "kl", "kl99"):
            assert value(ours, name) == value(theirs, name)
    read = Counter[str]()

    def count(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        read[checkpoint.label] += 1
        return read_tensors(checkpoint)

    monkeypatch.setattr(subjects, "read_tensors", count)
    run(peru, pack, "-b", demo.BASE, *data, *against, *options)
    assert read.pop(str(demo.BASE)) == 1 and set(read.values()) == {1}, "the base is loaded once for all tasks"
    weights = run(peru, pack, "-b", demo.BASE, *against)["weights"]
    assert weights == run(peru, *(f"{task}={tmp_path / task}" for task in tasks), "-b", demo.BASE, *against)["weights"]
    assert 0 < weights["digits"]["total"]["error"] < 1 and weights["digits"]["heads_equal"]
    peru("eval", pack, "-b", demo.BASE, "-a", f"letters={demo.fine_tune('digits')}", code=2)
    assert "not 'letters'" in peru.stderr  # type: ignore[attr-defined]
    peru("eval", pack, "-b", demo.BASE, "-d", f"letters={demo.images('digits')}", code=2)
    assert "not 'letters'" in peru.stderr  # type: ignore[attr-defined]


def test_several_tasks_one_merge_and_their_mean(tmp_path: Path, peru: Peru) -> None:
    tasks = {"digits": "digits", "fashion": "fashion_mnist"}
    fine = [f"{task}={demo.fine_tune(name)}" for task, name in tasks.items()]
    data = [part for task, name in tasks.items() for part in ("-d", f"{task}={demo.images(name)}")]
    against = [part for given in fine for part in ("-a", given)]
    peru("merge", *fine, "-b", demo.BASE, "-o", tmp_path / "m", "--method", "linear", "--per-task", "classifier", "--no-sync")
    merged = run(peru, tmp_path / "m", *data, *against, "--max-samples", 120)
    assert [task["task"] for task in merged["tasks"]] == list(tasks)
    ratios = [value(task, "accuracy") / value(task, "against_accuracy") for task in merged["tasks"]]
    assert merged["mean_normalised"]["value"] == pytest.approx(np.mean(ratios)) and merged["mean_normalised"]["value"] < 1
    themselves = run(peru, *fine, *data, "--max-samples", 120)
    for task, alone in zip(merged["tasks"], themselves["tasks"], strict=True):
        assert value(alone, "accuracy") == value(task, "against_accuracy")
    for arguments, said in (
        ([*fine, *data[:2]], "no --data for 'fashion'"),
        ([tmp_path / "m", *data, *against[:2]], "nothing to compare 'fashion' with"),
        ([tmp_path / "m", *data[:2], *against], "no data is called 'fashion'"),
        ([*fine, *data, "-d", f"letters={demo.images('digits')}"], "no model is called 'letters'"),
        ([tmp_path / "m", "-d", demo.images("digits")], "has no head for 'm'"),
        ([tmp_path / "m"], "nothing to compare with, and no data to run on"),
        ([tmp_path / "m", *against], "add --base BASE"),
    ):
        peru("eval", *arguments, code=2)
        assert said in peru.stderr, said  # type: ignore[attr-defined]


def test_language_models_perplexity_is_transformers_loss(tmp_path: Path, peru: Peru) -> None:
    base, fine = models.pair(models.llama, tmp_path, change=0.01, marks=False)
    peru("prune", fine, "-b", base, "-o", tmp_path / "lm.safetensors", "--keep", "20%", "--no-sync")
    words = " ".join(models.sentences(30))
    (tmp_path / "wiki.txt").write_text(words)
    given = ["-b", base, "-a", fine, "--text", tmp_path / "wiki.txt", "--context", 10]
    (task,) = run(peru, tmp_path / "lm.safetensors", *given)["tasks"]
    peru("unpack", tmp_path / "lm.safetensors", "-b", base, "-o", tmp_path / "r", "--no-sync")
    ids = torch.tensor(models.tokenizer(False)(words)["input_ids"])
    logs = {}
    for name, folder in (("ours", tmp_path / "r"), ("theirs", fine)):
        model = tr.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            windows = [w for w in ids.split(10) if len(w) > 1]
            logs[name] = torch.cat([model(w[None]).logits[0, :-1].double().log_softmax(-1) for w in windows])
    came = torch.cat([w[1:] for w in windows])
    assert task["tokens"] == len(came) and task["kind"] == "causal language model"
    for metric, name in (("perplexity", "ours"), ("against_perplexity", "theirs")):
        assert math.log(value(task, metric)) == pytest.approx(float(-logs[name].gather(1, came[:, None]).mean()), rel=1e-5)
    kl = (logs["theirs"].exp() * (logs["theirs"] - logs["ours"])).sum(-1)
    assert value(task, "kl") == pytest.approx(float(kl.mean()), rel=1e-3) and value(task, "kl") > 0
    assert value(task, "agreement") == pytest.approx(
        float((logs["ours"].argmax(-1) == logs["theirs"].argmax(-1)).double().mean()), abs=0.01
    )
    (same,) = run(peru, fine, *given)["tasks"]
    assert (value(same, "kl"), value(same, "agreement")) == (0, 1)


def test_a_perplexity_beyond_all_numbers_is_infinite(tmp_path: Path, peru: Peru) -> None:
    _, fine = models.pair(models.llama, tmp_path, marks=False)
    table = load_file(fine / "model.safetensors")
    save_file(table | {"lm_head.weight": table["lm_head.weight"] * 1e5}, fine / "model.safetensors", {"format": "pt"})
    (tmp_path / "wiki.txt").write_text(" ".join(models.sentences(30)))
    (task,) = run(peru, fine, "--text", tmp_path / "wiki.txt")["tasks"]
    assert task["metrics"]["perplexity"]["value"] is None
    peru("eval", fine, "--text", tmp_path / "wiki.txt", "--fail-above", "perplexity=1000", code=3)
    assert "perplexity is inf" in peru.stderr  # type: ignore[attr-defined]


def test_a_missing_untied_head_is_not_invented(tmp_path: Path, peru: Peru) -> None:
    _, fine = models.pair(models.llama, tmp_path, marks=False)
    table = load_file(fine / "model.safetensors")
    del table["lm_head.weight"]
    save_file(table, fine / "model.safetensors", {"format": "pt"})
    (tmp_path / "wiki.txt").write_text(words := "w1 w2 w3 w1 w5 w8 w2")
    peru("eval", fine, "--text", tmp_path / "wiki.txt", code=1)
    assert "no weights for lm_head.weight" in peru.stderr  # type: ignore[attr-defined]
    config = json.loads((fine / "config.json").read_text())
    (fine / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    (task,) = run(peru, fine, "--text", tmp_path / "wiki.txt")["tasks"]
    ids = torch.tensor(models.tokenizer(False)(words)["input_ids"])[None]
    model = tr.AutoModelForCausalLM.from_pretrained(fine, dtype=torch.float32).eval()
    with torch.no_grad():
        assert math.log(value(task, "perplexity")) == pytest.approx(float(model(ids, labels=ids).loss), rel=1e-5)


def test_models_whose_labels_are_in_another_order_are_compared_by_name(family: Path, peru: Peru) -> None:
    """The same model with its classes reordered: every prediction agrees."""
    names, order = ["negative", "neutral", "positive"], [1, 2, 0]
    rows = [json.loads(line) for line in (family / "test.jsonl").read_text().splitlines()]
    (family / "named.jsonl").write_text("".join(json.dumps({**row, "label": names[row["label"]]}) + "\n" for row in rows))
    for folder, moved in (("plain", [0, 1, 2]), ("moved", order)):
        shutil.copytree(family / "fine", family / folder)
        table = load_file(family / folder / "model.safetensors")
        heads = {name: tensor[moved].contiguous() for name, tensor in table.items() if name.startswith("classifier")}
        save_file(table | heads, family / folder / "model.safetensors", {"format": "pt"})
        config = json.loads((family / folder / "config.json").read_text())
        config["id2label"] = {str(i): names[k] for i, k in enumerate(moved)}
        config["label2id"] = {names[k]: i for i, k in enumerate(moved)}
        (family / folder / "config.json").write_text(json.dumps(config))
    (task,) = run(peru, family / "moved", "-a", family / "plain", "-d", family / "named.jsonl")["tasks"]
    (plain,) = run(peru, family / "plain", "-d", family / "named.jsonl")["tasks"]
    assert value(task, "agreement") == 1 and value(task, "kl") == pytest.approx(0, abs=1e-12)  # rounding of a sum in another order
    assert value(task, "accuracy") == value(task, "against_accuracy") == value(plain, "accuracy") > 0.4
    peru("eval", family / "moved", "-a", family / "plain", "-d", family / "test.jsonl", code=1)
    assert "same labels in different orders" in peru.stderr and "test.jsonl" in peru.stderr  # type: ignore[attr-defined]


def test_seq2seq_models_are_run_on_targets(tmp_path: Path, peru: Peru) -> None:
    _, fine = models.pair(models.t5, tmp_path)
    rows = [{"text": t, "target": u} for t, u in zip(models.sentences(9), models.sentences(9, seed=4), strict=True)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (task,) = run(peru, fine, "-d", tmp_path / "t.jsonl")["tasks"]
    model, read = tr.T5ForConditionalGeneration.from_pretrained(fine).eval(), models.tokenizer()
    losses, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            labels = read(row["target"], return_tensors="pt", truncation=True, max_length=512)["input_ids"]
            losses += float(model(**read(row["text"], return_tensors="pt").to("cpu"), labels=labels).loss) * labels.numel()
            tokens += labels.numel()
    assert task["tokens"] == tokens and math.log(value(task, "perplexity")) == pytest.approx(losses / tokens, rel=1e-5)


def test_mistakes_are_found_before_anything_runs(family: Path, peru: Peru, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a forward pass")

    monkeypatch.setattr(torch.nn.Linear, "forward", never)
    (family / "empty.jsonl").write_text("")
    (family / "far.jsonl").write_text('{"text": "w1", "label": 1}\n{"text": "w2", "label": 3}\n')
    (family / "column.jsonl").write_text('{"phrase": "w1", "label": 1}\n')
    _, lm = models.pair(models.llama, family / "lm", marks=False)
    for arguments, said in (
        ([family / "fine", "-d", family / "empty.jsonl"], "empty.jsonl holds no examples"),
        ([family / "fine", "-d", family / "far.jsonl"], "far.jsonl, line 2: the model's head has no label 3"),
        ([family / "fine", "-d", family / "column.jsonl"], "no column 'text'; its columns are 'phrase', 'label'"),
        ([lm, "-d", family / "test.jsonl"], "so a classifier is needed"),
        ([family / "base", "-d", family / "test.jsonl"], "no weights for classifier.bias, classifier.weight"),
        ([family / "fine", "-a", lm, "-d", family / "test.jsonl"], "so a classifier is needed"),
    ):
        peru("eval", *arguments, code=1)
        assert said in peru.stderr, peru.stderr  # type: ignore[attr-defined]
    peru("eval", family / "fine", "-d", family / "test.jsonl", "--device", "cuda:99", code=2)
    assert "there is no such GPU" in peru.stderr  # type: ignore[attr-defined]


def test_a_later_tasks_mistake_is_found_before_the_first_task_runs(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one forward pass, not one tensor of the base: headers and side files show what is wrong with the last task."""

    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(subjects, "read_tensors", never)
    monkeypatch.setattr(torch.nn.Linear, "forward", never)
    fine, good = str(family / "fine"), Examples("good.jsonl", texts=["w1 w2"] * 3, labels=[0, 1, 0])
    bare = Examples("bad.jsonl", texts=["w1"], labels=[99], places=["line 7"])
    for model, examples, said in (
        (fine, bare, "bad.jsonl, line 7: the model's head has no label 99"),
        (str(family / "base"), good, "no weights for classifier"),
        (fine, Examples("targets.jsonl", texts=["a"], targets=["b"]), "a language model is needed"),
    ):
        tasks = [Comparison("a", str(family / "a.safetensors"), good, fine), Comparison("b", model, examples)]
        with pytest.raises(PeruError, match=said):
            evaluate(tasks, str(family / "base"), Settings(), None, lambda n: None, lambda task: None)


def test_weights_alone_are_compared_without_torch(tmp_path: Path, peru: Peru) -> None:
    fine = demo.fine_tune("digits")
    peru("prune", fine, "-b", demo.BASE, "-o", tmp_path / "a.safetensors", "--keep", "10%", "--no-sync")
    out, loaded = probe("eval", str(tmp_path / "a.safetensors"), "--base", str(demo.BASE), "--against", str(fine), "--device", "cpu")
    assert not loaded & {"torch", "transformers", "huggingface_hub", "matplotlib"}
    assert out.splitlines()[0].split() == ["tensor", "error", "cosine", "same", "sign", "%", "changed"]
    assert "2 tensors that the base lacks are equal" in out


def test_plot_and_report_are_drawn_and_need_nothing_else(family: Path, peru: Peru) -> None:
    given = [family / "a.safetensors", "-b", family / "base", "-a", family / "fine", "-d", family / "test.jsonl"]
    page, plot = family / "r.html", family / "p.svg"
    found = run(peru, *given, "--report", page, "--plot", plot, "--fail-below", "accuracy=0", "--fail-above", "error=0.5", code=3)
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    text = page.read_text("utf-8")
    assert text.count("<svg") == 2 and "1 missed" in text and f"{100 * value(found['tasks'][0], 'accuracy'):.2f}" in text
    tags = Tags()
    tags.feed(text)
    assert not tags.open and tags.count["table"] == 3 and tags.count["tr"] == 2 + 2 + len(found["weights"]["a"]["tensors"]) + 2
    assert not tags.outside  # nothing is loaded from elsewhere
    peru("eval", *given, "--report", page, code=2)
    assert "another --report" in peru.stderr  # type: ignore[attr-defined]
    peru("eval", *given, "--plot", family / "p.gif", code=2)
    weights_only = run(peru, *given[:5], "--report", page, "--plot", plot, "--force")
    assert not weights_only["tasks"] and page.read_text("utf-8").count("<svg") == 1


def test_a_name_cannot_write_into_the_report(family: Path, peru: Peru) -> None:
    strange = family / "<b>&.safetensors"
    (family / "a.safetensors").rename(strange)
    peru("eval", strange, "-b", family / "base", "-a", family / "fine", "-d", family / "test.jsonl", "--report", family / "r.html")
    text = (family / "r.html").read_text("utf-8")
    assert "&lt;b&gt;&amp;.safetensors" in text and "<b>" not in text


class Tags(HTMLParser):
    """Open tags, their counts, and references that a browser would follow."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: Counter[str] = Counter()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] += 1
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset") and v and not v.startswith("#")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
