"""`shuffle-pack --merge-base`: plain sums in a new base cost the pack nothing, and every task is the same as without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tr
from safetensors.torch import load_file

import peru_cli
from peru_cli.artifacts.packs.pack import Pack
from peru_cli.artifacts.packs.superposed import PackMode
from tests.conftest import FLOATS, raw, save
from tests.pack.test_superpose import DEPTH, Packs, family
from tests.support.readers.format_reader import read_safetensors
from tests.support.readers.pack_reader import PackReader

Peru = Callable[..., str]
Table = dict[str, torch.Tensor]
PLAIN = {"embed.weight", "norm.weight", "scalar", "empty"} | {f"layers.{i}.bias" for i in range(DEPTH)}


def unpack(made: Packs, pack: Path, task: str, base: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    out = made.folder / "unpacked.safetensors"
    made.peru("unpack", pack, "--task", task, "-b", base, "-o", out, "--no-sync", "--force")
    return {name: (tensor.dtype, raw(tensor)) for name, tensor in load_file(out).items()}


def new_base(made: Packs) -> Table:
    return load_file(made.folder / "merged" / "model.safetensors")


@pytest.mark.parametrize(
    ("base_dtype", "dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp64", "fp32")]
)
def test_tasks_are_the_same_to_the_bit(tmp_path: Path, peru: Peru, base_dtype: str, dtype: str) -> None:
    base, fine = family("abc")
    base = {name: t.to(FLOATS[base_dtype]) if t.is_floating_point() else t for name, t in base.items()}
    fine = {task: {n: t.to(FLOATS[dtype]) if t.is_floating_point() else t for n, t in table.items()} for task, table in fine.items()}
    made = Packs(tmp_path, peru, base, fine)
    options = ("--seed", 7, "--scale", "0.4", "--tile-entries", 16384)
    plain = made.run("abc", *options, name="plain")
    merged = made.run("abc", *options, "--merge-base", tmp_path / "merged")
    for task in "abc":
        assert unpack(made, merged, task, tmp_path / "merged") == unpack(made, plain, task, made.at["base"])
    with Pack(merged) as a, Pack(plain) as b:
        assert {r.info.name for r in a.index.tensors if r.mode == PackMode.BASE} == PLAIN | {"ids"}
        assert {r.info.name for r in a.index.tensors if r.mode == PackMode.TARGET} == {
            r.info.name for r in b.index.tensors if r.mode == PackMode.TARGET
        }
        assert [(t.norm, t.error, t.cosine) for t in a.index.tasks] == [(t.norm, t.error, t.cosine) for t in b.index.tasks]
        targets = {r.info.name for r in a.index.tensors if r.mode == PackMode.TARGET}
        for name in targets:
            size = a.records[name].info.entries
            assert a.sums(a.records[name], 0, size).tolist() == b.sums(b.records[name], 0, size).tolist()
    # The new base against float64: base plus 0.4 times the sum of differences, to half a step per task and one rounding.
    found = new_base(made)
    epsilon = {"fp32": 2.0**-24, "bf16": 2.0**-8}[dtype]
    with Pack(plain) as pack:
        for name in PLAIN - {"empty"}:
            start = base[name].to(FLOATS[dtype]).double()
            wanted = start + 0.4 * sum(table[name].double() - start for table in fine.values())
            step = 2.0 ** pack.records[name].exponent
            limit = 0.4 * 3 * step / 2 + epsilon * wanted.abs() + 2.0**-24 * 4 * (wanted.abs() + step)
            assert found[name].dtype == FLOATS[dtype] and ((found[name].double() - wanted).abs() <= limit).all(), name
    for name in targets:
        assert raw(found[name]) == raw(base[name].to(FLOATS[dtype])), name
    assert raw(found["ids"]) == raw(base["ids"])


def test_the_documents_reader_accepts_it_too(tmp_path: Path, peru: Peru) -> None:
    made = Packs(tmp_path, peru, *family("ab", "bf16"))
    pack = made.run("ab", "--seed", 7, "--merge-base", tmp_path / "merged")
    reader = PackReader(pack.read_bytes())
    base = read_safetensors((tmp_path / "merged" / "model.safetensors").read_bytes())[1]
    for task in "ab":
        made.peru("unpack", pack, "--task", task, "-o", tmp_path / "out.safetensors", "--force", "--no-sync")  # merged/ is beside it
        assert reader.retrieve(task, base) == read_safetensors((tmp_path / "out.safetensors").read_bytes())[1]


def test_plain_sums_cost_nothing(tmp_path: Path, peru: Peru) -> None:
    made = Packs(tmp_path, peru, *family("ab", size=20))
    plain = Pack(made.run("ab", name="plain")).index
    merged = Pack(made.run("ab", "--merge-base", tmp_path / "merged", "--json")).index
    report = json.loads(made.text)
    targets = sum(r.info.entries for r in plain.tensors if r.mode == PackMode.TARGET)
    assert merged.entries == report["entries"] == targets < plain.entries and report["merge_base"] == str(tmp_path / "merged")
    share = sum(b.nbytes for b in merged.blocks) / sum(b.nbytes for b in plain.blocks)
    assert share == pytest.approx(targets / plain.entries, rel=0.02)


def test_neither_threads_nor_tiles_change_a_byte(tmp_path: Path, peru: Peru) -> None:
    made = Packs(tmp_path, peru, *family("abc", size=30))
    first = made.run("abc", "--merge-base", tmp_path / "merged", "--threads", 1, "--tile-entries", 16384).read_bytes()
    base = (tmp_path / "merged" / "model.safetensors").read_bytes()
    assert made.run("cab", "--merge-base", tmp_path / "merged", "--threads", 4).read_bytes() == first
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == base


def test_a_base_that_transformers_loads_and_a_live_model_takes(tmp_path: Path, peru: Peru) -> None:
    config = tr.BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, num_labels=3)
    torch.manual_seed(0)
    base = tr.BertModel(config)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.txt").write_text("words")
    for number, task in enumerate("ab"):
        torch.manual_seed(10 + number)
        model = tr.BertForSequenceClassification(config)
        model.bert.load_state_dict({n: t + 0.01 * torch.randn(t.shape) for n, t in base.state_dict().items()})
        model.save_pretrained(tmp_path / task)
        (tmp_path / task / "vocab.txt").write_text("words")
    pack = tmp_path / "p.safetensors"
    peru(
        "shuffle-pack",
        tmp_path / "a",
        tmp_path / "b",
        "-b",
        tmp_path / "base",
        "-o",
        pack,
        "--merge-base",
        tmp_path / "new",
        "--scale",
        0.5,
    )
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"README.md", "config.json", "model.safetensors", "vocab.txt"}
    assert (
        "0.5 times the sum" in (tmp_path / "new" / "README.md").read_text()
        and str(tmp_path) not in (tmp_path / "new" / "README.md").read_text()
    )
    peru("unpack", pack, "--task", "b", "-b", tmp_path / "new", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    wanted = tr.BertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    model = tr.BertForSequenceClassification.from_pretrained(tmp_path / "new")
    before = {name: raw(tensor) for name, tensor in model.state_dict().items()}
    with peru_cli.apply(model, peru_cli.open_artifact(pack), task="b") as applied:
        assert {n: raw(t) for n, t in model.state_dict().items()} == {n: raw(t) for n, t in wanted.items()}
        applied.switch("a")
    assert {name: raw(tensor) for name, tensor in model.state_dict().items()} == before
    assert "with the plain sums of these tasks in it" in peru("inspect", pack)


def test_the_base_that_is_named_is_the_new_one(tmp_path: Path, peru: Peru) -> None:
    import hashlib

    made = Packs(tmp_path, peru, *family("ab"))
    pack = made.run("ab", "--merge-base", tmp_path / "merged", "--base-id", "org/new")
    digest = hashlib.sha256((tmp_path / "merged" / "model.safetensors").read_bytes()).hexdigest()
    assert Pack(pack).metadata["peru.base"] == "org/new" and Pack(pack).metadata["peru.base.files"] == digest
    assert "peru.base" not in Pack(made.run("ab", "--merge-base", tmp_path / "merged")).metadata


def test_invalid_requests_are_reported_and_change_nothing(tmp_path: Path, peru: Peru) -> None:
    made = Packs(tmp_path, peru, *family("abc"))
    pack = made.run("ab", "--merge-base", tmp_path / "merged", name="p")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def said(*arguments: object, code: int = 2) -> str:
        made.peru(*arguments, code=code)
        return made.peru.stderr  # type: ignore[attr-defined]

    out = tmp_path / "q.safetensors"
    models = [f"{t}={made.at[t]}" for t in "ab"]
    merged = tmp_path / "merged"
    for option, task in (("--add-to", "c"), ("--remove-from", "b")):
        text = said("shuffle-pack", f"{task}={made.at[task]}", option, pack, "-b", merged, "-o", out)
        assert "its plain sums are in its base (--merge-base)" in text
    text = said("unpack", pack, "--task", "a", "-b", made.at["base"], "-o", out, code=1)
    assert "different contents" in text and "the one that --merge-base wrote" in text
    text = said("shuffle-pack", *models, "-b", made.at["base"], "-o", out, "--merge-base", merged)
    assert f"{merged} exists already" in text
    bare = {n: save({k: t for k, t in made_of.items() if k != "scalar"}, tmp_path / f"bare-{n}.safetensors")
            for n, made_of in {"base": made.base, **made.fine}.items()}  # fmt: skip
    text = said("shuffle-pack", f"a={bare['a']}", "-b", bare["base"], "-o", out, "--merge-base", tmp_path / "n", "--target", ".")
    assert "--merge-base has nothing to write" in text
    text = said("shuffle-pack", *models, "-b", made.at["base"], "-o", out, "--merge-base", tmp_path / "n.safetensors")
    assert "should be a folder" in text
    half = {name: t.half() if t.is_floating_point() else t for name, t in made.fine["a"].items()}
    at = save(half, tmp_path / "half.safetensors")
    text = said("shuffle-pack", f"h={at}", "-b", made.at["base"], "-o", out, "--merge-base", tmp_path / "n", "--scale", "1e9", code=1)
    assert "does not fit F16" in text
    for path in (at, *bare.values()):
        path.unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
