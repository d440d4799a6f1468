"""`peru shuffle-pack --method wemoe`: MLPs that are found, training without labels, the same bytes however it runs, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from peru_cli.artifacts.packs.routed import LinearLayer
from peru_cli.artifacts.packs.wemoe import Wemoe
from peru_cli.checkpoints.dtypes import BY_NAME
from peru_cli.checkpoints.header import TensorInfo
from peru_cli.errors import Mismatch, UsageError
from peru_cli.pack.routed.mlps import find_mlps
from tests.live.test_wemoe import write
from tests.support.models import sentences, tokenizer
from tests.support.readers.routed_reader import GatedReader

Peru = Callable[..., str]


def layer(name: str, outputs: int, inputs: int) -> LinearLayer:
    return LinearLayer(TensorInfo(name + ".weight", BY_NAME["F32"], (outputs, inputs)), None, False)


def found(layers: list[LinearLayer], targeted: bool = False) -> list[list[str]]:
    """The layers of each MLP; those that take its input have a +."""
    mlps = find_mlps(sorted(layers, key=lambda one: one.weight.name), targeted, "m")
    return [[one.weight.name.removesuffix(".weight") + "+" * entry for one, entry in zip(m.layers, m.entries, strict=True)] for m in mlps]


def test_mlps_are_found_in_blocks_and_attention_is_not_one() -> None:
    wide = [layer("l.0.self_attn.q_proj", 64, 32), layer("l.0.self_attn.o_proj", 32, 64), layer("pooler.dense", 32, 32)]
    gated = [layer("l.0.mlp.gate_proj", 48, 32), layer("l.0.mlp.up_proj", 48, 32), layer("l.0.mlp.down_proj", 32, 48)]
    other = [layer("l.1.mlp.0", 48, 32), layer("l.1.mlp.2", 32, 48)]
    assert found([*wide, *gated, *other]) == [["l.0.mlp.down_proj", "l.0.mlp.gate_proj+", "l.0.mlp.up_proj+"], ["l.1.mlp.0+", "l.1.mlp.2"]]
    assert found(wide[:2], targeted=True) == [["l.0.self_attn.o_proj", "l.0.self_attn.q_proj+"]]
    with pytest.raises(Mismatch, match="m has no MLP that can be found"):
        found(wide)
    with pytest.raises(UsageError, match=r"no part of an MLP: pooler\.dense"):
        found([*wide[2:], *gated], targeted=True)
    with pytest.raises(Mismatch, match="has no MLP"):  # two narrow: which belongs to which cannot be told
        found([*gated, layer("l.0.other.down_proj", 32, 48)])


@pytest.fixture
def family(tmp_path: Path) -> Path:
    """A base with a tokenizer, fine-tunes with 3 and 4 classes, and sentences of different words with labels of no class."""
    write(tmp_path)
    tokenizer().save_pretrained(tmp_path / "base")
    for number, task in enumerate(("t0", "t1")):
        rows = [{"text": text, "label": 9} for text in sentences(24, seed=number)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(folder: Path, *more: object) -> list[object]:
    given = [f"{name}={folder / name}" for name in ("t1", "t0")]
    data = [part for name in ("t0", "t1") for part in ("--data", f"{name}={folder / name}.jsonl")]
    options = ["-m", "wemoe", "--bits", 32, "--batch-size", 8, "--learning-rate", 0.02, "--no-sync", "--force"]
    return ["shuffle-pack", *given, "-b", folder / "base", "-o", folder / "w.safetensors", *options, *data, *more]


def test_training_lowers_the_entropy_and_gives_the_same_bytes_however_it_runs(family: Path, peru: Peru) -> None:
    told = json.loads(peru(*arguments(family, "--steps", 20, "--threads", 1, "--json")))
    assert "labels in --data are not used" in peru.stderr  # type: ignore[attr-defined]
    assert told["entropy"]["last"] < told["entropy"]["first"] and told["method"] == "wemoe"
    first = (family / "w.safetensors").read_bytes()
    for task, (_, count, sent) in zip(("t0", "t1"), GatedReader(first).seen, strict=True):
        assert count == sum(sent) == 24 and told["routed_to"][task] == pytest.approx({"t0": sent[0] / 24, "t1": sent[1] / 24})
    shown = json.loads(peru("inspect", family / "w.safetensors", "--json"))
    assert shown["routed_to"] == told["routed_to"] and shown["parts"]["routers"] == told["router_bytes"]
    turned = arguments(family, "--steps", 20, "--threads", 2, "--tile-entries", 16384)
    turned[1], turned[2] = turned[2], turned[1]
    peru(*turned)
    assert (family / "w.safetensors").read_bytes() == first and str(family).encode() not in first
    for task, score in json.loads(peru("eval", family / "w.safetensors", "-b", family / "base", *other(family), "--json"))[
        "routing"
    ].items():
        assert score == pytest.approx(told["routed_to"][task], abs=0.05)
    lines = peru("route", family / "w.safetensors", "-b", family / "base", "--text", family / "t0.jsonl", "--json").splitlines()
    sent_to = [json.loads(line)["task"] for line in lines].count("t0") / 24
    assert sent_to == pytest.approx(told["routed_to"]["t0"]["t0"], abs=0.05)


def other(folder: Path) -> list[object]:
    """The same sentences with labels that are classes."""
    for task in ("t0", "t1"):
        text = (folder / f"{task}.jsonl").read_text()
        (folder / f"{task}-known.jsonl").write_text(text.replace('"label": 9', '"label": 1'))
    return [part for task in ("t0", "t1") for part in ("--data", f"{task}={folder / task}-known.jsonl")]


def test_the_plan_is_shown_without_writing_and_impossible_options_are_refused(family: Path, peru: Peru) -> None:
    told = json.loads(peru(*arguments(family, "--dry-run", "--json")))
    names = [[f"encoder.layer.{i}.{part}.dense.weight" for part in ("intermediate", "output")] for i in (0, 1)]
    assert told["mlps"] == names and "embeddings.word_embeddings.weight" in told["summed"] and not (family / "w.safetensors").exists()
    for more, code, said in (
        (["--rank", 2], 2, "--rank: no meaning with --method wemoe"),
        (["--scale", "auto"], 2, "--scale auto is not a finite number"),
        (["--learning-rate", 0], 2, "--learning-rate should be a number above 0"),
        (["--target", "pooler"], 2, "no part of an MLP: pooler.dense"),
        (["--data", f"x={family / 't0.jsonl'}"], 2, "no model is called 'x'"),
    ):
        peru(*arguments(family, *more), code=code)
        assert said in peru.stderr, peru.stderr  # type: ignore[attr-defined]
    peru(*[part for part in arguments(family) if "jsonl" not in str(part) and part != "--data"], code=2)
    assert "or --steps 0" in peru.stderr  # type: ignore[attr-defined]
    with Wemoe(_untrained(family, peru)) as wemoe:
        assert wemoe.seen == [] and wemoe.steps == 0


def _untrained(family: Path, peru: Peru) -> Path:
    peru(*[part for part in arguments(family, "--steps", 0) if "jsonl" not in str(part) and part != "--data"])
    return family / "w.safetensors"
