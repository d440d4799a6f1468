"""docs/routing.md: a golden file is read by another reader and by peru; damage and misuse are refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peru_cli.artifacts.packs.smile import METADATA, Smile, decode_smile, encode_smile
from peru_cli.artifacts.packs.superposed import OPTIONAL, decode_index
from peru_cli.errors import BadFile, PeruError
from tests.golden.make import from_bf16
from tests.golden.make_routed import HERE, base, fine_tune, write_family
from tests.support.damage import damaged
from tests.support.readers.format_reader import read_safetensors
from tests.support.readers.routed_reader import RoutedReader, floats

Peru = Callable[..., str]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "routing.md").read_text("utf-8").partition("## Gated MLPs")[0]
FILE = HERE / "routed.safetensors"
INDEX = read_safetensors(FILE.read_bytes())[1]["index"][2]


def task_vector(number: int, name: str) -> np.ndarray:
    """Fine-tune minus base in float64."""
    pair = [fine_tune(number)["enc." + name], base()[name]]
    fine, below = (from_bf16(array).astype(np.float64) if kind == "BF16" else array.astype(np.float64) for kind, array in pair)
    return fine - below


def check_experts(reader: RoutedReader) -> None:
    """The experts are NumPy's truncated SVDs of the family's task vectors."""
    assert len(reader.experts) == 6 and reader.transposed == {"c_proj.weight": True, "mlp.weight": False, "out.weight": False}
    for (name, task), (left, right, bias) in reader.experts.items():
        vector = task_vector("ab".index(task), name)
        vector = vector.T if reader.transposed[name] else vector
        u, s, vt = np.linalg.svd(vector)
        rank = min(3, int((s > 1e-7).sum()))
        assert rank == (0 if (name, task) == ("c_proj.weight", "b") else 3) == len(right)
        np.testing.assert_allclose(left @ right, (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-8)
        np.testing.assert_allclose(right @ right.T, np.eye(rank), atol=1e-6)
        if name == "mlp.weight":
            np.testing.assert_allclose(bias, task_vector("ab".index(task), "mlp.bias"), atol=1e-9)
        else:
            assert bias is None


def test_a_reader_from_the_document_finds_the_task_vectors_in_the_golden_file() -> None:
    reader = RoutedReader(FILE.read_bytes())
    check_experts(reader)
    assert [(task["name"], task["prefix"], task["own"][0][:3]) for task in reader.tasks] == [
        ("a", "+enc.", ("head", "F32", (3, 6))),
        ("b", "+enc.", ("head", "F32", (4, 6))),
    ]
    wanted = b"".join(fine_tune(number)["head"][1].astype("<f4").tobytes() for number in (0, 1))
    assert reader.roles["whole"] == wanted and reader.tasks[0]["files"]["vocab.txt"] == b"a\nb\n"


def test_a_reader_from_the_document_reads_what_peru_writes(tmp_path: Path, peru: Peru) -> None:
    peru(*write_family(tmp_path), "-o", tmp_path / "r.safetensors", "--no-sync")
    check_experts(RoutedReader((tmp_path / "r.safetensors").read_bytes()))


def test_peru_reads_the_same_numbers(peru: Peru) -> None:
    reader = RoutedReader(FILE.read_bytes())
    with Smile(FILE) as routed:
        for number, layer in enumerate(routed.layers):
            for task, record in enumerate(routed.index.tasks):
                left, right, bias = reader.experts[layer.weight.name, record.name]
                parts = [right.ravel(), left.T.ravel(), *([bias] if bias is not None else [])]
                np.testing.assert_array_equal(floats(bytes(routed.read_expert(number, task)), "F32"), np.concatenate(parts))
    assert "3 layers' experts and 2 tasks' own tensors are unchanged" in peru("verify", FILE)


def test_the_table_of_metadata_matches_the_code() -> None:
    rows = re.findall(r"^\| `(peru\.[\w.]+)` \| (yes|no) \| `(.*?)` \|", PAGE, re.MULTILINE)
    common = {"peru.format", "peru.base", "peru.base.files"}
    assert {key: form for key, _, form in rows} == {key: form for key, form in METADATA.items() if key not in common}
    assert {need for _, need, _ in rows} == {"yes"} and common - {"peru.format"} <= OPTIONAL


# -- damage and misuse --------------------------------------------------------------------------------


def read_everything(path: Path) -> None:
    with Smile(path) as routed:
        routed.verify()


def test_every_altered_byte_is_detected(tmp_path: Path) -> None:
    whole, noise, path = FILE.read_bytes(), random.Random(3), tmp_path / "r.safetensors"
    read_everything(FILE)
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([(whole[i] + noise.randrange(1, 256)) % 256]) + whole[i + 1 :])
        with pytest.raises(PeruError) as caught:
            read_everything(path)
        assert str(path) in str(caught.value), i


def test_truncated_files_are_refused_by_every_command(tmp_path: Path, peru: Peru) -> None:
    whole, path = FILE.read_bytes(), tmp_path / "r.safetensors"
    for size in (0, 9, 700, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        for command in (["inspect", path], ["verify", path], ["unpack", path, "-b", tmp_path, "-o", tmp_path / "out"]):
            peru(*command, code=1)
        assert not (tmp_path / "out").exists()


def test_the_index_round_trips_and_holds_no_sums() -> None:
    assert encode_smile(decode_smile(INDEX)) == INDEX
    found = decode_smile(INDEX)
    found.pack = decode_index(read_safetensors((HERE.parent / "pack" / "pack.safetensors").read_bytes())[1]["index"][2])
    found.layers = []
    with pytest.raises(BadFile, match="has sums or residuals"):
        decode_smile(encode_smile(found))


@settings(max_examples=600, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_damaged_index_raises_badfile_or_is_another_valid_one(seed: int, mutations: int) -> None:
    noise = random.Random(seed)
    try:
        decoded = decode_smile(damaged(INDEX, noise, mutations))
    except BadFile:
        return
    assert encode_smile(decode_smile(encode_smile(decoded))) == encode_smile(decoded)


def test_commands_that_need_one_checkpoint_say_what_to_do(tmp_path: Path, peru: Peru) -> None:
    write_family(tmp_path)
    of_base = ["-b", tmp_path / "base"]
    for command in (
        ["unpack", FILE, *of_base, "-o", tmp_path / "out"],
        ["unpack", FILE, "--task", "a", *of_base, "-o", tmp_path / "out"],
        ["prune", f"r={FILE}", *of_base, "-o", tmp_path / "out.safetensors", "--keep", "10%"],
        ["merge", f"r={FILE}", tmp_path / "a", *of_base, "-o", tmp_path / "out", "--method", "task-arithmetic"],
        ["shuffle-pack", f"r={FILE}", tmp_path / "a", *of_base, "-o", tmp_path / "out.safetensors"],
        ["svd-lora", FILE, *of_base, "-o", tmp_path / "out", "--rank", 2],
    ):
        peru(*command, code=2)
        assert "holds routed experts" in peru.stderr and "peru_cli.apply" in peru.stderr, command  # type: ignore[attr-defined]
        assert not list(tmp_path.glob("out*"))
