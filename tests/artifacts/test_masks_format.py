"""docs/masks.md: golden masks are compared literally and read by another reader; damage and misuse; masks in memory."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import peru_cli
from peru_cli import demo
from peru_cli.artifacts.container import ContainerWriter
from peru_cli.artifacts.packs import masks as kind
from peru_cli.artifacts.packs.masks import METADATA, OPTIONAL, MaskPack, decode_masks, encode_masks, open_pack
from peru_cli.artifacts.packs.superposed import decode_index
from peru_cli.checkpoints.resolve import open_model
from peru_cli.errors import BadFile, Mismatch, PeruError, UsageError
from peru_cli.finetunes.open import open_artifact
from peru_cli.finetunes.verify import verify
from peru_cli.streaming.arrays import CPU
from peru_cli.vectors.family import StreamSettings
from tests.artifacts.test_pack_format import change
from tests.conftest import raw, save
from tests.evaluate.test_command import run, value
from tests.golden.make_masks import HERE as GOLDEN
from tests.golden.make_masks import as_read, base, write_family
from tests.live.test_pack import CONFIG, bits
from tests.pack.test_superpose import Packs, family
from tests.support.damage import damaged
from tests.support.readers.format_reader import read_safetensors
from tests.support.readers.pack_reader import MaskReader

Peru = Callable[..., str]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "masks.md").read_text("utf-8")
FILE = GOLDEN / "masks.safetensors"
INDEX = read_safetensors(FILE.read_bytes())[1]["index"][2]


# -- the golden file ----------------------------------------------------------------------------------


def test_the_writer_produces_the_golden_bytes(tmp_path: Path, peru: Peru) -> None:
    peru(*write_family(tmp_path), "-o", tmp_path / "m.safetensors", "--no-sync")
    assert (tmp_path / "m.safetensors").read_bytes() == FILE.read_bytes()


@pytest.mark.parametrize("task", ["a", "b", "c"])
def test_a_reader_from_the_document_and_peru_produce_the_golden_tasks(tmp_path: Path, peru: Peru, task: str) -> None:
    expected = read_safetensors((GOLDEN / f"{task}.safetensors").read_bytes())[1]
    reader = MaskReader(FILE.read_bytes())
    assert reader.retrieve(task, as_read(base())) == expected
    peru("unpack", FILE, "--task", task, "-b", GOLDEN / "base", "-o", tmp_path / "out", "--no-sync")
    assert read_safetensors((tmp_path / "out" / "model.safetensors").read_bytes())[1] == expected
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".json", ".txt")}
    assert files == {"config.json": f'{{"task": {"abc".index(task) + 1}}}\n', "vocab.txt": "a\nb\n", "generation_config.json": "{}\n"}


@pytest.mark.parametrize("method", ["tall-masks", "magnitude-masks"])
def test_a_reader_from_the_document_reads_several_blocks(tmp_path: Path, peru: Peru, method: str) -> None:
    """195,000 entries: two blocks, the second not full."""
    made = Packs(tmp_path, peru, *family("abc", size=40))
    path = made.run("abc", "--method", method)
    reader = MaskReader(path.read_bytes())
    with MaskPack(path) as pack:
        assert len(pack.index.blocks) == 2
        for loaded in (False, True):
            for task in pack.tasks:
                for record in pack.index.tensors:
                    if record.is_sum:
                        n = record.info.entries
                        whole = pack.mask(task, record, 0, n).astype("u1")
                        assert whole.tobytes() == reader.masks[task][record.info.name].tobytes()
                        assert (
                            bytes(pack.mask(task, record, n // 3, n - 5 if n > 20 else n).astype("u1"))
                            == whole.tobytes()[n // 3 : n - 5 if n > 20 else n]
                        )
                        assert pack.sums(record, 0, n).astype("<i4").tobytes() == reader.sums[record.info.name].tobytes()
            if not loaded:
                pack.load()
        assert reader.thresholds == {task: float(mask.threshold) for task, mask in pack.masks.items()}


def test_the_table_of_metadata_matches_the_code() -> None:
    rows = re.findall(r"^\| `(peru\.[\w.]+)` \| (yes|no) \| `(.*?)` \|", PAGE, re.MULTILINE)
    written = {key: (need, form.replace("\\|", "|")) for key, need, form in rows}
    shared = {"peru.format", "peru.scale", "peru.precision", "peru.entries", "peru.sums", "peru.base", "peru.base.files"}
    assert {key: form for key, (_, form) in written.items()} == {key: form for key, form in METADATA.items() if key not in shared}
    assert {key for key, (need, _) in written.items() if need == "no"} == OPTIONAL - shared


# -- damage -------------------------------------------------------------------------------------------


def read_everything(path: Path, model: Path) -> None:
    """Read all tasks without writing anything."""
    with open_pack(path) as opened:
        tasks = list(opened.tasks)
    with open_model(str(model)) as base:
        for task in tasks:
            with open_artifact(path, str(path), base, task) as source:
                source.contents()
                verify(source, StreamSettings(CPU, 1, 1 << 14))


def test_every_altered_byte_is_detected(tmp_path: Path) -> None:
    whole, noise = FILE.read_bytes(), random.Random(3)
    path = tmp_path / "m.safetensors"
    path.write_bytes(whole)
    read_everything(path, GOLDEN / "base")
    for i in range(0, len(whole), 3):  # each digest guards more than three bytes
        path.write_bytes(whole[:i] + bytes([(whole[i] + noise.randrange(1, 256)) % 256]) + whole[i + 1 :])
        with pytest.raises(PeruError) as caught:
            read_everything(path, GOLDEN / "base")
        assert str(path) in str(caught.value), i


def test_truncated_files_are_refused_by_every_command(tmp_path: Path, peru: Peru) -> None:
    whole, path = FILE.read_bytes(), tmp_path / "m.safetensors"
    for size in (0, 7, 9, 500, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for command in (["inspect", path], ["unpack", path, "--task", "a", "-b", GOLDEN / "base", "-o", tmp_path / "out"]):
            peru(*command, code=1)
            assert str(path) in peru.stderr and "defect" not in peru.stderr  # type: ignore[attr-defined]
        assert path.read_bytes() == whole[:size] and not (tmp_path / "out").exists()


def resealed(target: Path, change_mask: Callable[[kind.MaskRecord], None]) -> Path:
    """The golden file with one mask's record changed, sealed again."""
    with MaskPack(FILE) as pack:
        index, masks = decode_masks(pack.container.index)
        change_mask(masks[1])
        sizes = pack.container.sizes
        with ContainerWriter(target, pack.metadata, sync=False) as writer:
            for role in ("blocks", "whole", "files"):
                writer.append(role, pack.container.read(role, 0, sizes[role]))
            writer.finish(pack.metadata, encode_masks(index, masks))
    return target


def test_a_mask_that_differs_from_the_recorded_one_is_detected(tmp_path: Path) -> None:
    read_everything(resealed(tmp_path / "same.safetensors", lambda mask: None), GOLDEN / "base")
    path = resealed(tmp_path / "m.safetensors", lambda mask: setattr(mask, "digest", bytes(32)))
    with pytest.raises(BadFile, match="the mask of b is not the one that was written"):
        read_everything(path, GOLDEN / "base")
    with pytest.raises(BadFile, match="a mask keeps 3 entries, its blocks keep others"):
        MaskPack(resealed(tmp_path / "n.safetensors", lambda mask: setattr(mask, "kept", 3)))


def test_the_index_round_trips() -> None:
    assert encode_masks(*decode_masks(INDEX)) == INDEX
    with pytest.raises(BadFile, match="moves tensors"):
        _, masks = decode_masks(INDEX)
        pack = read_safetensors((GOLDEN.parent / "pack" / "pack.safetensors").read_bytes())[1]["index"][2]
        decode_masks(encode_masks(decode_index(pack), masks))


@settings(max_examples=600, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_damaged_index_raises_badfile_or_is_another_valid_one(seed: int, mutations: int) -> None:
    data = damaged(INDEX, random.Random(seed), mutations)
    try:
        decoded = decode_masks(data)
    except BadFile:
        return
    assert encode_masks(*decode_masks(encode_masks(*decoded))) == encode_masks(*decoded)


# -- wrong use ----------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path, peru: Peru) -> Path:
    """A folder with a base, fine-tunes a, b, c, a pack p of a and b, and masks m of them."""
    noise = torch.Generator().manual_seed(0)
    shapes = {"embed": (30, 8), **{f"layers.{i}.w": (16, 8) for i in range(3)}}
    tables = {"base": {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}}
    for task in "abc":
        tables[task] = {name: t + 0.01 * torch.randn(t.shape, generator=noise) for name, t in tables["base"].items()}
    for name, table in tables.items():
        save(table, tmp_path / f"{name}.safetensors")
    models = [f"a={tmp_path}/a.safetensors", f"b={tmp_path}/b.safetensors", "-b", tmp_path / "base.safetensors"]
    peru("shuffle-pack", *models, "-o", tmp_path / "p.safetensors")
    peru("shuffle-pack", *models, "-o", tmp_path / "m.safetensors", "--method", "tall-masks")
    return tmp_path


def test_invalid_options_and_models_are_refused(made: Path, peru: Peru) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    a, b, c = (f"{task}={made}/{task}.safetensors" for task in "abc")
    tall, magnitude, at = ["--method", "tall-masks"], ["--method", "magnitude-masks"], ["-b", made / "base.safetensors"]
    broken = change(made, "b", embed=torch.full((30, 8), float("nan")))
    cases: list[tuple[list[object], int, str]] = [
        ([a, b, *at, "--method", "masks"], 2, "is not superpose, tall-masks, magnitude-masks, emr, smile or wemoe"),
        ([a, b, *at, "--threshold", "0.3"], 2, "--threshold has no meaning with --method superpose"),
        ([a, b, *at, *magnitude, "--threshold", "0.3"], 2, "it belongs to --method tall-masks"),
        ([a, b, *at, *tall, "--keep", "10%"], 2, "it belongs to --method magnitude-masks"),
        ([a, b, *at, "--keep", "10%"], 2, "--keep has no meaning with --method superpose"),
        ([a, b, *at, *magnitude, "--keep", "5"], 2, "did you mean --keep 5%?"),
        ([a, b, *at, *magnitude, "--keep", "0.0001"], 2, "keeps nothing"),
        ([a, b, *at, *tall, "--threshold", "x=0.3"], 2, "no model is called 'x'"),
        ([a, b, *at, *tall, "--threshold", "a=much"], 2, "a finite number"),
        ([a, b, *at, *tall, "--threshold", "-1"], 2, "a finite number"),
        ([a, b, *at, *tall, "--threshold", "0.2", "--threshold", "0.3"], 2, "twice for all tasks"),
        ([a, b, *at, *tall, "--seed", 3, "--no-signs"], 2, "--seed, --signs: no meaning with --method tall-masks"),
        ([a, b, *at, *tall, "--max-error", 3], 2, "--max-error: no meaning"),
        ([a, b, *at, *tall, "--merge-base", made / "new", "--residual", "1%"], 2, "--merge-base, --residual: no meaning"),
        ([c, *at, *tall, "--add-to", made / "p.safetensors"], 2, "change packs, not masks"),
        ([c, *at, "--add-to", made / "m.safetensors"], 2, "holds masks, and every mask depends on the sum of all task vectors"),
        ([a, *at, "--remove-from", made / "m.safetensors"], 2, "make new masks from all fine-tunes"),
        ([a, f"b={broken}", *at, *tall], 1, "differs from the base by NaN or infinity"),
        ([a, f"b={broken}", *at, *magnitude], 1, "differs from the base by NaN or infinity"),
        ([a, f"d={made}/a.safetensors", *at, *tall], 1, "are the same model"),
        ([f"m={made}/m.safetensors", b, *at, *tall], 2, "holds a, b: choose one"),
    ]  # fmt: skip
    for arguments, code, says in cases:
        peru("shuffle-pack", *arguments, "-o", made / "q.safetensors", code=code)
        assert says in peru.stderr and "defect" not in peru.stderr, peru.stderr  # type: ignore[attr-defined]
    assert {path.name: path.read_bytes() for path in made.iterdir() if path != broken} == before


def test_wrong_bases_and_tasks_are_refused(made: Path, peru: Peru) -> None:
    out, path, at = made / "out.safetensors", made / "m.safetensors", made / "base.safetensors"
    peru("unpack", path, "--task", "c", "-b", at, "-o", out, code=2)
    assert "holds a, b, not 'c'" in peru.stderr  # type: ignore[attr-defined]
    torch.manual_seed(1)
    wrong = change(made, "base", **{"layers.1.w": torch.randn(16, 8)})
    peru("unpack", path, "--task", "a", "-b", wrong, "-o", out, code=1)
    assert "layers.1.w: different contents" in peru.stderr and not out.exists()  # type: ignore[attr-defined]
    longer = change(made, "base", "longer", embed=torch.randn(31, 8))
    peru("unpack", path, "--task", "a", "-b", longer, "-o", out, code=1)
    assert "embed: F32 [31, 8]" in peru.stderr and not out.exists()  # type: ignore[attr-defined]
    peru("inspect", path, "--plot", made / "x.png", code=2)
    assert "cannot draw masks" in peru.stderr  # type: ignore[attr-defined]


# -- in memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_module_goes_from_task_to_task_and_back_to_the_base(tmp_path: Path, peru: Peru, dtype: torch.dtype, loaded: bool) -> None:
    import transformers as tr

    torch.manual_seed(0)
    bare = tr.BertModel(CONFIG).to(dtype)
    bare.save_pretrained(tmp_path / "base")
    for task in "abc":
        model = tr.BertForSequenceClassification(CONFIG).to(dtype)
        model.bert.load_state_dict({n: t + (0.01 * torch.randn(t.shape)).to(t.dtype) for n, t in bare.state_dict().items()})
        model.save_pretrained(tmp_path / task)
    path = tmp_path / "m.safetensors"
    peru("shuffle-pack", *(tmp_path / t for t in "abc"), "-b", tmp_path / "base", "-o", path, "--method", "tall-masks", "--scale", 0.6)
    expected = {}
    for task in "abc":
        peru("unpack", path, "--task", task, "-b", tmp_path / "base", "-o", tmp_path / f"out-{task}", "--no-sync")
        expected[task] = bits(tr.BertForSequenceClassification.from_pretrained(tmp_path / f"out-{task}", dtype="auto").state_dict())
    model = tr.BertForSequenceClassification.from_pretrained(tmp_path / "base", dtype="auto")
    before = bits(model.state_dict())
    masks = peru_cli.open_artifact(path)
    assert isinstance(masks, MaskPack)
    if loaded:
        masks.load()
        path.unlink()
    first = peru_cli.apply(model, masks, task="a")
    assert bits(model.state_dict()) == expected["a"] != before
    (tmp_path / "base" / "model.safetensors").unlink()
    second = peru_cli.apply(model, masks, task="b")
    assert second is first and bits(model.state_dict()) == expected["b"] != expected["a"]
    first.switch("c")
    assert bits(model.state_dict()) == expected["c"]
    first.restore()
    assert bits(model.state_dict()) == before
    with pytest.raises(UsageError, match="holds a, b, c"):
        peru_cli.apply(model, masks, task="d")
    with torch.no_grad():
        model.bert.encoder.layer[2].output.dense.bias[3] += 1
    with pytest.raises(Mismatch, match=r"the model is not the base of .*encoder.layer.2.output.dense.bias"):
        peru_cli.apply(model, masks, task="a")


def test_a_damaged_mask_puts_the_base_back(made: Path) -> None:
    path = made / "m.safetensors"
    data = bytearray(path.read_bytes())
    with MaskPack(path) as pack:
        at = pack._mask_at["b"][0] + pack.container.header_bytes
    data[at + 20] ^= 1
    path.write_bytes(data)
    state = load_file(made / "base.safetensors")
    before = bits(state)
    masks = peru_cli.open_artifact(path)
    with peru_cli.apply(state, masks, task="a") as applied, pytest.raises(BadFile, match="block 0 of the mask of b was altered"):
        applied.switch("b")
    assert bits(state) == before


def test_eval_takes_masks(tmp_path: Path, peru: Peru) -> None:
    """Each task from the masks, in memory, gets the same scores as its unpacked checkpoint."""
    names = ("digits", "sign_digits")
    fine = [f"{task}={demo.fine_tune(task)}" for task in names]
    data = [part for task in names for part in ("-d", f"{task}={demo.images(task)}")]
    against = [part for given in fine for part in ("-a", given)]
    path = tmp_path / "m.safetensors"
    peru("shuffle-pack", *fine, "-b", demo.BASE, "-o", path, "--method", "tall-masks", "--per-task", "classifier", "--no-sync")
    masked = run(peru, path, "-b", demo.BASE, *data, *against, "--max-samples", 120)["tasks"]
    for task in names:
        peru("unpack", path, "--task", task, "-b", demo.BASE, "-o", tmp_path / task, "--no-sync")
    unpacked = run(peru, *(f"{task}={tmp_path / task}" for task in names), *data, *against, "--max-samples", 120)["tasks"]
    for ours, theirs in zip(masked, unpacked, strict=True):
        assert ours["bytes"] == ours["own_bytes"] + ours["shared_bytes"] < path.stat().st_size and value(ours, "kl") > 0
        for name in ("accuracy", "normalised", "agreement", "kl", "kl99"):
            assert value(ours, name) == value(theirs, name)
    weights = run(peru, path, "-b", demo.BASE, *against)["weights"]
    assert weights == run(peru, *(f"{task}={tmp_path / task}" for task in names), "-b", demo.BASE, *against)["weights"]
    shown = json.loads(peru("inspect", path, "--json"))["tasks"]
    for task in shown:  # the weights are bfloat16: rounding base + tau^ adds a small error
        assert weights[task["task"]]["total"]["error"] == pytest.approx(task["error"], rel=0.01)


def test_no_local_paths_are_recorded(tmp_path: Path, peru: Peru) -> None:
    peru(*write_family(tmp_path), "-o", tmp_path / "m.safetensors", "--no-sync")
    data = (tmp_path / "m.safetensors").read_bytes()
    assert str(tmp_path).encode() not in data and b"example/base@0123abc" in data
    assert raw(load_file(GOLDEN / "a.safetensors")["head"]) in data
