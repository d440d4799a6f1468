"""tau-Jp against central differences and a linear model; disentanglement and negation against plain loops over transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peru_cli.inference.taujp import change_norms, features
from tests.support import models
from tests.support.data_family import TASKS, fine_tune, gpt2, sentences, tokens, write_family, write_rows


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"))


def test_of_a_linear_model_it_is_x_tau() -> None:
    model = models.Straight().double().eval()
    x, tau = torch.randn(6, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    got = change_norms(model, dict(model.named_parameters()), {"encoder.weight": tau}, {"x": x})
    torch.testing.assert_close(got, (x @ tau.T).norm(dim=1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_of_transformers_it_is_central_differences(kind: str, tmp_path: Path) -> None:
    """float64, step 1e-6: accurate to about 1e-8. gpt2 has one feature vector a position, and padding does not count.

    vit's attention computes its softmax in float32, and a step divides its rounding: a longer step, and less agreement."""
    step, allowed = (1e-3, 1e-3) if kind == "vit" else (1e-6, 1e-6)
    torch.manual_seed(0)
    model = models.enlarge({"bert": models.bert, "gpt2": gpt2, "vit": models.vit}[kind](), 6.0)
    model.set_attn_implementation("eager")
    model = model.double().eval()
    texts = models.sentences(4)
    batch = {"pixel_values": torch.randn(4, 1, 8, 8, dtype=torch.float64)} if kind == "vit" else dict(
        models.tokenizer()(texts, padding=True, return_tensors="pt")
    )  # fmt: skip
    if kind == "gpt2":
        del batch["token_type_ids"]
    origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
    inner = [name for name in origin if name.startswith(model.base_model_prefix)]
    tau = {name: torch.randn_like(origin[name]) * 0.1 for name in inner}
    with torch.no_grad():
        got = change_norms(model, origin, tau, batch)
        sides = [features(model, origin | {n: origin[n] + s * step * tau[n] for n in inner}, batch) for s in (1, -1)]
    norms = ((sides[0] - sides[1]) / (2 * step)).norm(dim=-1)
    if kind == "gpt2":
        norms = torch.stack([row[: int(mask.sum())].mean() for row, mask in zip(norms, batch["attention_mask"], strict=True)])
    torch.testing.assert_close(got, norms, rtol=allowed, atol=1e-9)
    if kind == "bert":  # the head's inputs, and nothing else
        torch.testing.assert_close(features(model, origin, batch), model.bert(**batch).pooler_output)


def command(family: Path, *options: object) -> list[object]:
    given = [word for task in TASKS for word in ("--data", f"{task}={family / task}.jsonl")]
    return ["eval", *(f"{task}={family / task}" for task in TASKS), "--base", family / "base", *given, "--device", "cpu", *options]


def with_weights(family: Path, head: str, scales: dict[str, float]) -> torch.nn.Module:
    """A task's classifier with base + sum of scale * tau inside."""
    base = load_file(family / "base" / "model.safetensors")
    fine = {task: load_file(family / task / "model.safetensors") for task in scales}
    model = fine_tune(family, head)
    state = {f"bert.{n}": t + sum(s * (fine[task][f"bert.{n}"] - t) for task, s in scales.items()) for n, t in base.items()}
    model.load_state_dict(state, strict=False)
    return model


def predictions(family: Path, model: torch.nn.Module, task: str) -> list[int]:
    return [int(model(**tokens(family, [text])).logits.argmax()) for text in sentences(family, task)]


def test_tau_jp_and_disentanglement_error(family: Path, peru) -> None:
    found = json.loads(peru(*command(family, "--tau-jp", "--scale", "0.8", "--json", "--batch-size", 5)))
    base = {f"bert.{n}": t.double() for n, t in load_file(family / "base" / "model.safetensors").items()}
    for j in TASKS:
        model = with_weights(family, j, {}).double()
        origin = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for i in TASKS:
            tau = {n: load_file(family / i / "model.safetensors")[n].double() - t for n, t in base.items()}
            sums = []
            for text in sentences(family, j):
                pair = [features(model, origin | {n: origin[n] + s * 1e-5 * tau[n] for n in tau}, tokens(family, [text])) for s in (1, -1)]
                sums.append(float(((pair[0] - pair[1]) / 2e-5).norm()))
            assert found["tau_jp"][i][j] == pytest.approx(sum(sums) / len(sums), rel=2e-4)  # float32 there
        alone = predictions(family, with_weights(family, j, {j: 0.8}), j)
        together = predictions(family, with_weights(family, j, dict.fromkeys(TASKS, 0.8)), j)
        expected = sum(x != y for x, y in zip(alone, together, strict=True)) / len(alone)
        assert found["disentanglement_error"][j] == pytest.approx(expected)
    page, plot = family / "r.html", family / "p.svg"
    table = peru(*command(family, "--tau-jp", "--report", page, "--plot", plot, "--batch-size", 5))
    assert "tau-Jp" in table and "disentanglement error" in table
    html, drawn = page.read_text("utf-8"), plot.read_text("utf-8")
    for i in TASKS:
        for j in TASKS:  # numbers are drawn as glyphs, with each number in a comment beside them
            assert f"<!-- {found['tau_jp'][i][j]:.3g} -->" in drawn
            assert f"{found['tau_jp'][i][j]:.4g}</td>" in html
    assert html.count("<svg") == 1 and "src=" not in html


def test_negation_keeps_the_control_task(family: Path, peru, tmp_path: Path) -> None:
    data = ["--data", f"target={family}/a.jsonl", "--data", f"control={family}/b.jsonl"]
    models_ = [f"a={family / 'a'}", "--base", family / "base", "--against", f"control={family / 'b'}"]
    found = json.loads(peru("eval", *models_, *data, "--negate", "--json", "--device", "cpu", "--scales", "0:2:0.5"))
    assert [point["scale"] for point in found["points"]] == [0, 0.5, 1, 1.5, 2]
    for point in found["points"]:
        for head, name in (("a", "target"), ("b", "control")):
            model = with_weights(family, head, {"a": -point["scale"]})
            rows = [json.loads(line) for line in (family / f"{head}.jsonl").read_text().splitlines()]
            right = [p == row["label"] for p, row in zip(predictions(family, model, head), rows, strict=True)]
            assert point[name] == pytest.approx(sum(right) / len(right))
    kept = [p for p in found["points"] if p["control"] >= 0.95 * found["points"][0]["control"]]
    assert found["best"] == min(kept, key=lambda p: p["target"])
    page = tmp_path / "r.html"
    assert "best" in peru("eval", *models_, *data, "--negate", "--plot", tmp_path / "n.png", "--report", page)
    assert (tmp_path / "n.png").read_bytes().startswith(b"\x89PNG") and f"{100 * found['best']['target']:.2f}</td>" in page.read_text()


def test_unmeasurable_requests_are_refused(family: Path, peru, tmp_path: Path) -> None:
    data = ["--data", f"target={family}/a.jsonl", "--data", f"control={family}/b.jsonl"]
    for arguments, words in (
        (["eval", f"a={family / 'a'}", "--tau-jp", "--data", f"a={family}/a.jsonl"], "--base BASE"),
        (["eval", f"a={family / 'a'}", "--base", family / "base", "--tau-jp"], "--data"),
        (["eval", f"a={family / 'a'}", "--base", family / "base", "--negate", "--data", f"a={family}/a.jsonl"], "target=FILE"),
        (["eval", f"a={family / 'a'}", f"b={family / 'b'}", "--base", family / "base", "--negate", *data], "one model"),
        (["eval", f"a={family / 'a'}", "--base", family / "base", "--negate", "--tau-jp", *data], "one of"),
    ):
        peru(*arguments, code=2)
        assert words in peru.stderr
    peru("eval", f"a={family / 'a'}", "--base", family / "base", "--negate", *data, code=1)  # a bare encoder has no head
    assert "--against control=MODEL" in peru.stderr
    bare = write_rows(tmp_path / "bare.jsonl", 3, 0, labels=False)
    peru(
        "eval", f"a={family / 'a'}", "--base", family / "base", "--negate", "--against", f"control={family / 'b'}",
        "--data", f"target={bare}", "--data", f"control={family}/b.jsonl", code=1,
    )  # fmt: skip
    assert "bare.jsonl has no labels" in peru.stderr


def test_a_base_with_a_head_of_its_own_is_the_control(family: Path, peru, tmp_path: Path) -> None:
    model = fine_tune(family, "b")
    model.save_pretrained(tmp_path / "base")
    models.tokenizer().save_pretrained(tmp_path / "base")
    data = ["--data", f"target={family}/a.jsonl", "--data", f"control={family}/b.jsonl"]
    found = json.loads(
        peru("eval", f"a={family / 'a'}", "--base", tmp_path / "base", "--negate", *data, "--scales", "0:1:1", "--json", "--device", "cpu")
    )
    right = [p == i % 3 for i, p in enumerate(predictions(family, model, "b"))]
    assert found["points"][0]["control"] == pytest.approx(sum(right) / len(right))
