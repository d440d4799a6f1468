"""`peru merge --search --trials`: several options at once, in memory, on examples or by a command."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peru_cli.merge.search.objective import Judge
from tests.support import models
from tests.support.data_family import TASKS, command, fine_tune, tokens, write_family, write_rows

SEED = 7
SPACE = "weight.a=0:1,weight.b=0:1,scale=0.2:1.5"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("family"), count=30)


def search(peru, family: Path, out: Path, *options: object, space: str = SPACE, trials: int = 12, **kinds: bool) -> dict:
    typed = command(family, "task-arithmetic", "--search", space, "--trials", trials, "-o", out, "--json", *options, **kinds)
    return json.loads(peru(*typed))


def test_several_options_are_searched_and_the_card_says_how(family: Path, peru, tmp_path: Path) -> None:
    found = search(peru, family, tmp_path / "best", "--seed", SEED)
    report = found["search"]
    assert len(report["trials"]) == 12 and report["seed"] == SEED and report["objective"] == "normalised"
    best = report["trials"][report["best"]]
    assert best["score"] == max(trial["score"] for trial in report["trials"] if trial["score"] is not None)
    assert found["options"]["scale"] == best["values"]["scale"] and found["options"]["weight a"] == best["values"]["weight.a"]
    assert report["trials"][0]["values"] == {"weight.a": "1", "weight.b": "1", "scale": "0.3"}, "it begins at the defaults"
    card = (tmp_path / "best" / "README.md").read_text()
    assert f"Chosen by mean of accuracy / the fine-tune's accuracy: the best of 12 trials (TPE, seed {SEED}" in card
    assert "over weight.a 0:1, weight.b 0:1, scale 0.2:1.5 on a=a.jsonl, b=b.jsonl; " in card
    assert "on 48 examples, and " in card and "on 12 held out, which the search did not see." in card
    words = shlex.split(card.partition("```sh\n")[2].partition("\n")[0])
    typed = [f"{task}={family / task}" for task in TASKS]
    peru("merge", *typed, "--base", family / "base", *words[6:], "-o", tmp_path / "typed", "--no-sync", "--device", "cpu")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "typed"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_same_seed_gives_the_same_merge(family: Path, peru, tmp_path: Path) -> None:
    one, again = (search(peru, family, tmp_path / name) for name in ("one", "again"))
    assert one["search"] == again["search"] != search(peru, family, tmp_path / "other", "--seed", 1)["search"]
    for name in ("model.safetensors", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_search_that_was_killed_continues_as_if_it_had_not_been(family: Path, peru, tmp_path: Path, monkeypatch) -> None:
    measure, calls = Judge.measure, []

    def killed(self: Judge, weights: object, report: object) -> object:
        calls.append(0)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return measure(self, weights, report)  # type: ignore[arg-type]

    typed = command(
        family, "ties", "--search", "keep=5%:50%,weight.a=0:2", "--trials", 12, "-o", tmp_path / "o", "--study", tmp_path / "study"
    )
    with monkeypatch.context() as patched:
        patched.setattr(Judge, "measure", killed)
        peru(*typed, code=130)
    assert not (tmp_path / "o").exists() and len(calls) == 8
    continued = json.loads(peru(*typed, "--json"))["search"]
    assert "continuing after 7 trials" in peru.stderr
    whole = json.loads(peru(*(word if word != tmp_path / "o" else tmp_path / "w" for word in typed[:-2]), "--json"))["search"]
    assert continued == whole
    peru(*typed, "--force", "--seed", 4, code=2)
    assert "holds trials of another search: --seed differs" in peru.stderr
    peru(*typed, "--force", "--scale", "0.5", code=2)
    assert "holds trials of another search: the merge differs" in peru.stderr


def test_kl_needs_no_labels_and_its_optimum_is_the_fine_tune(family: Path, peru, tmp_path: Path) -> None:
    # b has no weight at the optimum, and a has 1: the merge is a, and its divergence from a is 0.
    for task in TASKS:
        write_rows(tmp_path / f"{task}.jsonl", 8, 0, labels=False)
    words = ["--search", "scale=0:1.5:0.5,weight.b=0:1:0.5", "--trials", 30, "--objective", "kl", "--json", "--hold-out", "25%"]
    same = ["merge", f"a={family}/a", f"b={family}/b", "-b", family / "base", "--no-sync", "--device", "cpu", "-m", "task-arithmetic"]
    data = [word for task in TASKS for word in ("--data", f"{task}={tmp_path / task}.jsonl")]
    report = json.loads(peru(*same, *words, *data, "-o", tmp_path / "both"))["search"]
    alone = {tuple(trial["values"].values()): trial["figures"] for trial in report["trials"]}
    assert alone["1", "0"]["a"] == pytest.approx(0, abs=1e-9) and alone["1", "0"]["b"] > 1e-4
    (tmp_path / "r.yml").write_text(
        f"merge_method: task_arithmetic\nbase_model: {family}/base\nmodels:\n- {{model: {family}/a, parameters: {{weight: 0.25}}}}\n"
        f"- {{model: {family}/b, parameters: {{weight: 0.75}}}}\ndtype: float32\n"
    )
    words[1] = "weight.a=0:1.5:0.5,weight.b=0:1:0.5"
    report = json.loads(peru("merge", tmp_path / "r.yml", "--no-sync", *words, *data[:2], "-o", tmp_path / "one"))["search"]
    best = report["trials"][report["best"]]
    assert list(best["values"].values()) == ["1", "0"] and best["score"] == pytest.approx(0, abs=1e-9)
    assert report["held_out"]["score"] == pytest.approx(0, abs=1e-9) and report["held_out"]["examples"] == 2
    assert "no --data for b: the search does not measure it" in peru.stderr


def test_accuracy_is_transformers_own_on_the_examples_that_are_not_held_out(family: Path, peru, tmp_path: Path) -> None:
    report = search(peru, family, tmp_path / "o", "--objective", "accuracy", "--hold-out", 0, trials=3)["search"]
    best = report["trials"][report["best"]]
    assert report["held_out"] is None and best["score"] == pytest.approx(sum(best["figures"].values()) / 2)
    for task in TASKS:
        rows = [json.loads(line) for line in (family / f"{task}.jsonl").read_text().splitlines()]
        model = fine_tune(family, task)
        model.load_state_dict({f"bert.{name}": t for name, t in load_file(tmp_path / "o" / "model.safetensors").items()}, strict=False)
        right = [int(model(**tokens(family, [row["text"]])).logits.argmax()) == row["label"] for row in rows]
        assert best["figures"][task] == pytest.approx(sum(right) / len(rows), abs=1e-12)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and two fine-tunes of it, with text for each."""
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(0)
    model = models.enlarge(models.llama(), 4.0)
    for number, name in enumerate(("base", *TASKS)):
        with torch.no_grad():
            for parameter in model.parameters() if number else ():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        model.save_pretrained(folder / name)
        models.tokenizer(marks=False).save_pretrained(folder / name)
        write_rows(folder / f"{name}.jsonl", 12, number, labels=False)
    return folder


def test_the_smallest_perplexity_is_best(language: Path, peru, tmp_path: Path) -> None:
    words = command(language, "linear", "--search", "weight.a=0:1,weight.b=0:1", "--trials", 8, "-o", tmp_path / "o", base=False)
    words = [word for word in words if word not in ("--per-task", "classifier")]
    report = json.loads(peru(*words, "--objective", "perplexity", "--json", "--plot", tmp_path / "p.svg"))["search"]
    finished = [trial for trial in report["trials"] if trial["score"] is not None]
    best = report["trials"][report["best"]]
    assert best["score"] == min(trial["score"] for trial in finished)
    for trial in finished:
        a, b = trial["figures"].values()
        assert trial["score"] == pytest.approx((a * b) ** 0.5)
    assert "<svg" in (tmp_path / "p.svg").read_text()
    peru(*words, "--force", code=1)
    assert "a.jsonl has no labels" in peru.stderr and "--objective kl or perplexity" in peru.stderr
    report = json.loads(peru(*words, "--objective", "kl", "--force", "--json", "--hold-out", 0))["search"]
    assert all(value > 0 for trial in report["trials"] for value in trial["figures"].values())


METRIC = """
import sys
from safetensors.numpy import load_file
from pathlib import Path
one, base = (load_file(Path(folder) / "model.safetensors") for folder in (sys.argv[2], sys.argv[1]))
name = sorted(one)[0]
print("measuring")
print(-abs(float(abs(one[name] - base[name]).sum()) - 3))
"""


def test_a_metric_of_ones_own_gets_each_trials_model_and_the_largest_number_wins(family: Path, peru, tmp_path: Path) -> None:
    (tmp_path / "metric.py").write_text(METRIC)
    metric = shlex.join([sys.executable, str(tmp_path / "metric.py"), str(family / "base")])
    found = search(
        peru, family, tmp_path / "o", "--metric-command", metric, "--write-recipe", tmp_path / "r.yml", space="scale=0:1,weight.a=0:1",
        trials=4, data=False,
    )  # fmt: skip
    trials = found["search"]["trials"]
    assert found["search"]["best"] == max(range(4), key=lambda i: trials[i]["score"])
    assert "Chosen by a metric of the user's own: the best of 4 trials" in (tmp_path / "o" / "README.md").read_text()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    peru("merge", tmp_path / "r.yml", "-o", tmp_path / "again", "--no-sync")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("o", "again"))
    assert all(torch.allclose(tensor, theirs[name], atol=1e-6) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("import sys; sys.exit('no GPU')", "ended with code 1: no GPU"),
        ("print('good')", "printed 'good', not a number"),
        ("", "printed nothing, not a number"),
        ("print('nan')", "printed nan"),
    ],
)
def test_a_metric_that_gives_no_number_ends_the_search(script: str, says: str, family: Path, peru, tmp_path: Path) -> None:
    metric = shlex.join([sys.executable, "-c", script])
    peru(*command(family, "ties", "--search", "scale=0:1:1", "--metric-command", metric, "-o", tmp_path / "o", data=False), code=1)
    assert says in peru.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--search", "scale=0:1,weight.a=0:1"], "--search of several options needs --trials"),
        (["--search", "scale=0:1", "--trials", "0"], "--trials"),
        (["--search", "scale=1:0", "--trials", "5"], "has no values"),
        (["--search", "weight=0:1", "--trials", "5"], "--search weight names no task"),
        (["--search", "weight.z=0:1", "--trials", "5"], "no model is called 'z'"),
        (["--search", "scale.a=0:1", "--trials", "5"], "--scale is the same for all tasks"),
        (["--search", "alpha=0:1", "--trials", "5"], "ties has no numeric option --alpha"),
        (["--search", "keep.a=0:1", "--trials", "5"], "must be above 0 and at most 100%"),
        (["--search", "weight.a=0:1", "--weight", "a=1", "--trials", "5"], "--weight of a is both given and searched"),
        (["--search", "scale=0:1", "--scale", "1", "--trials", "5"], "--scale is both given and searched"),
        (["--search", "scale=0:1", "--trials", "5", "--objective", "best"], "--objective 'best' is unknown"),
        (["--search", "scale=0:1", "--trials", "5", "--hold-out", "100%"], "leaves no example to search on"),
        (["--search", "scale=0:1:1", "--study", "s"], "--study keeps trials, but --trials is missing"),
        (["--search", "scale=0:1:1", "--plot", "p.txt"], "should end in"),
        (["--search", "scale=0:1:1", "--metric-command", "no-such-program x"], "no-such-program: no such program"),
        (["--search", "scale=0:1:1", "--metric-command", "a 'b"], "cannot be read"),
        (["--search", "scale=0:1:1", "--metric-command", "ls"], "--metric-command cannot be combined with --data"),
        (["--trials", "5"], "--trials is for searches"),
        (["--objective", "kl", "--hold-out", "5%"], "--objective, --hold-out are for searches"),
        (["--search", "scale=0:1", "--trials", "5", "--then", "svc"], "--then and --search exclude each other"),
    ],
)
def test_bad_searches_are_refused_before_a_model_is_opened(options: list[str], says: str, peru, tmp_path: Path) -> None:
    data = [word for task in TASKS for word in ("--data", f"{task}=gone.jsonl")]
    peru("merge", "a=./gone-a", "b=./gone-b", "-b", "./gone", "-m", "ties", *data, "-o", tmp_path / "o", *options, code=2)
    assert says in peru.stderr and not list(tmp_path.iterdir()), peru.stderr


def test_without_optuna_one_message_says_what_to_install(peru, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    peru("merge", "a=./x", "b=./y", "-b", "./z", "-m", "ties", "--search", "scale=0:1", "--trials", 5, "-o", tmp_path / "o", code=2)
    assert "--trials needs optuna" in peru.stderr and "pip install 'peru-cli[search]'" in peru.stderr


def test_a_fine_tune_that_gets_no_held_out_example_right_is_refused(family: Path, peru, tmp_path: Path) -> None:
    peru(*command(family, "ties", "--search", "scale=0:1", "--trials", 2, "--seed", 5, "-o", tmp_path / "o"), code=1)
    assert "the fine-tune a gets none of its held-out examples right" in peru.stderr and "--hold-out 0" in peru.stderr


def test_too_few_examples_to_hold_some_out_are_refused(family: Path, peru, tmp_path: Path) -> None:
    peru(*command(family, "ties", "--search", "scale=0:1", "--trials", 2, "--max-samples", 4, "-o", tmp_path / "o"), code=2)
    assert "has too few examples to hold some out: 4" in peru.stderr
