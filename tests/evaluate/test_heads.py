"""`peru eval` of heads with independent labels and of regressions, padding that changes nothing, tokenizers that do not fit, and gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk
import torch
import transformers as tr
from safetensors.torch import load_file, save_file

from tests.support import models

Peru = Callable[..., str]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configure(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def run(peru: Peru, *arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(peru("eval", *arguments, "--json"))["tasks"][0]
    return found | {"values": {name: metric["value"] for name, metric in found["metrics"].items()}}


def logits(folder: Path, texts: list[str], one_by_one: bool = True) -> np.ndarray[Any, Any]:
    """transformers' output for each example alone, without any padding."""
    model = tr.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    read = tr.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return (
            torch.cat([model(**read(text, return_tensors="pt", truncation=True, max_length=24)).logits for text in texts]).double().numpy()
        )


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path, list[str]]:
    """A classifier of three outputs, another one, and texts."""
    _, fine = models.pair(models.bert, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    for file in fine.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    table = load_file(fine / "model.safetensors")
    noise = torch.Generator().manual_seed(5)
    changed = {name: tensor + 0.3 * torch.randn(tensor.shape, generator=noise) for name, tensor in table.items() if "classifier" in name}
    save_file(table | changed, other / "model.safetensors", {"format": "pt"})
    return fine, other, models.sentences(60)


def test_independent_labels_are_scored_one_by_one(tmp_path: Path, peru: Peru, two: tuple[Path, Path, list[str]]) -> None:
    """Each label has its own probability: F1 as in scikit-learn, KL of Bernoulli variables in float64."""
    ours, theirs, texts = two
    for folder in (ours, theirs):
        configure(
            folder, problem_type="multi_label_classification", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2}
        )
    got, wanted = logits(ours, texts), logits(theirs, texts)
    labels = np.random.default_rng(0).random((60, 3)) < 0.4
    rows: dict[str, Callable[[Any], Any]] = {
        "flags": lambda row: [int(flag) for flag in row],
        "floats": lambda row: [float(flag) for flag in row],
        "names": lambda row: [name for name, flag in zip("abc", row, strict=True) if flag],
        "numbers": lambda row: [i for i, flag in enumerate(row) if flag],
    }
    found = {}
    for name, of in rows.items():
        file = write(tmp_path / f"{name}.jsonl", [{"text": t, "labels": of(row)} for t, row in zip(texts, labels, strict=True)])
        found[name] = run(peru, ours, "-a", theirs, "-d", file)["values"]
    assert all(values == found["flags"] for values in found.values())
    values, predicted = found["flags"], got > 0
    assert values["f1_micro"] == pytest.approx(sk.f1_score(labels, predicted, average="micro", zero_division=0))
    assert values["f1_macro"] == pytest.approx(sk.f1_score(labels, predicted, average="macro", zero_division=0))
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted))
    p, q = (torch.distributions.Bernoulli(logits=torch.from_numpy(x)) for x in (wanted, got))
    kl = torch.distributions.kl_divergence(p, q).sum(-1).numpy()
    assert values["kl"] == pytest.approx(kl.mean(), rel=1e-4) and values["kl"] > 0.01
    assert values["agreement"] == pytest.approx(((got > 0) == (wanted > 0)).all(-1).mean())
    # a softmax does not see a shift of all labels; a sigmoid does
    table = load_file(ours / "model.safetensors")
    save_file(table | {"classifier.bias": table["classifier.bias"] + 3}, theirs / "model.safetensors", {"format": "pt"})
    assert run(peru, ours, "-a", theirs, "-d", tmp_path / "flags.jsonl")["values"]["kl"] > 0.1
    bad = write(tmp_path / "bad.jsonl", [{"text": "w1", "label": ["a"]}, {"text": "w2", "label": ["d"]}])
    peru("eval", ours, "-d", bad, code=1)
    assert "bad.jsonl, line 2: the model's head has no label 'd'" in peru.stderr  # type: ignore[attr-defined]


def regression(tmp_path: Path) -> tuple[Path, Path]:
    _, fine = models.pair(lambda: models.bert(1), tmp_path)
    table = load_file(fine / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()
    for file in fine.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    save_file(table | {"classifier.bias": table["classifier.bias"] + 0.5}, other / "model.safetensors", {"format": "pt"})
    return fine, other


def test_regressions_are_scored_by_correlation_and_squared_error(tmp_path: Path, peru: Peru) -> None:
    """Correlations and the mean squared error as in SciPy; ties get their mean rank."""
    ours, theirs = regression(tmp_path)
    texts = models.sentences(50)
    got, wanted = logits(ours, texts)[:, 0], logits(theirs, texts)[:, 0]
    labels = np.round(got + np.random.default_rng(1).normal(size=50), 0)
    file = write(tmp_path / "r.jsonl", [{"text": t, "label": float(y)} for t, y in zip(texts, labels, strict=True)])
    found = run(peru, ours, "-a", theirs, "-d", file)
    values = found["values"]
    assert values["pearson"] == pytest.approx(scipy.stats.pearsonr(got, labels)[0], rel=1e-4)
    assert values["spearman"] == pytest.approx(scipy.stats.spearmanr(got, labels)[0], rel=1e-4)
    assert values["mse"] == pytest.approx(((got - labels) ** 2).mean(), rel=1e-4)
    assert values["against_mse"] == pytest.approx(((wanted - labels) ** 2).mean(), rel=1e-4)
    assert values["against_pearson"] == pytest.approx(values["pearson"], rel=1e-4) and values["distance"] == pytest.approx(0.25, rel=1e-4)
    for name in ("pearson", "spearman", "mse"):
        assert found["metrics"][name]["low"] < values[name] < found["metrics"][name]["high"]
    assert "kl" not in values and "accuracy" not in values
    (tmp_path / "r.csv").write_text("text,label\n" + "".join(f"{t},{y}\n" for t, y in zip(texts, labels, strict=True)))
    assert run(peru, ours, "-d", tmp_path / "r.csv")["values"]["mse"] == values["mse"]
    peru("eval", ours, "-d", file, "--fail-below", "pearson=0.999", code=3)
    assert f"pearson is {values['pearson']:.6g} (--fail-below pearson=0.999)" in peru.stderr  # type: ignore[attr-defined]
    peru("eval", ours, "-a", theirs, "-d", file, "--fail-above", "distance=0.3", "--fail-below", "spearman=-1")
    assert "passed --fail-above distance=0.3: distance is 0.25" in peru.stderr  # type: ignore[attr-defined]
    peru("eval", ours, "-d", file, "--fail-below", "accuracy=50%", code=2)
    bad = write(tmp_path / "bad.jsonl", [{"text": "w1", "label": 1.5}, {"text": "w2", "label": "much"}])
    peru("eval", ours, "-d", bad, code=1)
    assert "bad.jsonl, line 2: the label 'much' is not a number" in peru.stderr  # type: ignore[attr-defined]


def test_correlations_of_many_pairs_have_fishers_interval() -> None:
    from peru_cli.inference.metrics import correlations, ranks

    x = np.random.default_rng(2).normal(size=12_000)
    y = 0.5 * x + np.random.default_rng(3).normal(size=12_000)
    pearson, spearman = correlations(x, y)
    interval = scipy.stats.pearsonr(x, y).confidence_interval()
    assert (pearson.low, pearson.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert spearman.value == pytest.approx(scipy.stats.spearmanr(x, y)[0]) and spearman.low < spearman.value < spearman.high
    assert ranks(np.array([3.0, 1, 3, 2])).tolist() == scipy.stats.rankdata([3.0, 1, 3, 2]).tolist()


DECODERS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tr.GPT2ForSequenceClassification(
        tr.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=24, num_labels=3, bos_token_id=None, eos_token_id=None)
    ),
    "llama": lambda: tr.LlamaForSequenceClassification(
        tr.LlamaConfig(vocab_size=64, num_key_value_heads=2, num_labels=3, bos_token_id=None, eos_token_id=None, **models.SMALL)
    ),
    "bert": models.bert,
    "roberta": lambda: tr.RobertaForSequenceClassification(
        tr.RobertaConfig(vocab_size=64, num_labels=3, pad_token_id=1, **{**models.SMALL, "max_position_embeddings": 30})
    ),
}


@pytest.mark.parametrize("padding", ["none", "config only", "tokenizer only", "two", "left", "not in the vocabulary"])
@pytest.mark.parametrize("kind", DECODERS)
def test_results_do_not_depend_on_the_batch(tmp_path: Path, peru: Peru, kind: str, padding: str) -> None:
    """Each example gets transformers' output for it alone, whatever config and tokenizer say about padding."""
    torch.manual_seed(1)
    fine = tmp_path / "fine"
    model = models.enlarge(DECODERS[kind]())
    model.save_pretrained(fine)
    made = models.tokenizer(kind == "bert")
    made.padding_side = "left" if padding == "left" else "right"
    if padding in ("none", "config only"):
        made.pad_token = None
    made.save_pretrained(fine)
    configured = {"none": None, "config only": 3, "tokenizer only": None, "two": 5, "left": 0, "not in the vocabulary": -1}[padding]
    if kind != "roberta":  # its positions begin after the padding id
        configure(fine, pad_token_id=configured)
    texts = [text + end for text, end in zip(models.sentences(24), ["", " w1", " [PAD]", " [SEP]"] * 6, strict=True)]
    wanted = logits(fine, texts)
    file = write(tmp_path / "t.jsonl", [{"text": text, "label": int(row.argmax())} for text, row in zip(texts, wanted, strict=True)])
    for size in (1, 7, 24):
        found = run(peru, fine, "-d", file, "--batch-size", size)
        assert found["values"]["accuracy"] == 1, (size, found["values"])
    # compares all digits, not only the choice
    from peru_cli.inference.eval_model import open_eval_model
    from peru_cli.inference.inputs import class_logits
    from peru_cli.inference.prepare import Settings, load
    from peru_cli.inference.reading import read_examples

    loaded = load(open_eval_model(str(fine), "", None), read_examples(str(file)), [], Settings())
    np.testing.assert_allclose(class_logits(loaded.model, loaded.inputs, 7), wanted, rtol=1e-3, atol=1e-3)


def test_a_tokenizer_that_does_not_fit_its_model(tmp_path: Path, peru: Peru) -> None:
    _, fine = models.pair(models.bert, tmp_path)
    made = models.tokenizer()
    made.add_tokens(["new", "newer"])
    made.save_pretrained(fine)
    file = write(tmp_path / "t.jsonl", [{"text": "w1 w2", "label": 0}])
    peru("eval", fine, "-d", file, code=1)
    said = peru.stderr  # type: ignore[attr-defined]
    assert "its tokenizer has 66 tokens, the embedding 64 rows: 2 tokens have no row" in said


def test_shares_are_in_per_cent_and_a_bare_95_gets_a_hint(tmp_path: Path, peru: Peru, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fine = models.pair(models.bert, tmp_path)
    texts = models.sentences(40)
    labels = logits(fine, texts).argmax(-1)
    file = write(tmp_path / "t.jsonl", [{"text": t, "label": int(y)} for t, y in zip(texts, labels, strict=True)])
    given = ("eval", fine, "-a", fine, "-d", file)
    peru(*given, "--fail-below", "normalised=95%", "--fail-below", "accuracy=0.5", "--fail-below", "difference=-1%")
    said = peru.stderr  # type: ignore[attr-defined]
    assert "passed --fail-below normalised=95%: normalised is 100%" in said and "passed --fail-below accuracy=50%: accuracy is 100%" in said
    assert "passed --fail-below difference=-1%: difference is 0%" in said
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda *_: pytest.fail("a forward pass"))
    for typed in ("normalised=95", "accuracy=99.5", "agreement=2"):
        peru(*given, "--fail-below", typed, code=2)
        assert f"did you mean {typed}%?" in peru.stderr  # type: ignore[attr-defined]


def test_an_accuracy_near_chance_and_foreign_classes_cause_warnings(tmp_path: Path, peru: Peru) -> None:
    from peru_cli.inference.data import Examples, class_doubts

    _, fine = models.pair(models.bert, tmp_path)
    texts = models.sentences(60)
    right = logits(fine, texts).argmax(-1)
    for shift, warned in ((0, False), (1, True)):
        rows = [{"text": t, "label": int((y + shift) % 3)} for t, y in zip(texts, right, strict=True)]
        peru("eval", fine, "-d", write(tmp_path / "t.jsonl", rows))
        assert ("is near chance, 33.3% for 3 classes" in peru.stderr) is warned  # type: ignore[attr-defined]
    config = tr.BertConfig(num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    three = Examples("x@test", texts=["a"], labels=[0], label_names=["a", "b", "c"])
    assert class_doubts(three, config) == ["x@test has 3 classes (a, b, c), the model's head 2"]
    two = Examples("x@test", texts=["a"], labels=[0], label_names=["bad", "good"])
    assert "calls its classes bad, good, the model no, yes" in class_doubts(two, config)[0]
    assert class_doubts(Examples("x", texts=["a"], labels=[0], label_names=["yes", "no"]), config) == []
