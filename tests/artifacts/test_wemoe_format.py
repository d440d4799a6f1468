"""docs/routing.md, gated MLPs: a golden file is read by another reader and by peru; damage is noticed."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peru_cli.artifacts.packs.routed import open_routed
from peru_cli.artifacts.packs.wemoe import METADATA, Seen, Wemoe, decode_wemoe, encode_wemoe
from peru_cli.errors import BadFile, PeruError
from tests.golden.make import from_bf16
from tests.golden.make_wemoe import HERE, MLPS, SHAPES, base, fine_tune, write_family
from tests.support.damage import damaged
from tests.support.readers.format_reader import read_safetensors
from tests.support.readers.mixed_reader import read_mixed
from tests.support.readers.routed_reader import GatedReader

Peru = Callable[..., str]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "routing.md").read_text("utf-8")
FILE = HERE / "wemoe.safetensors"
INDEX = read_safetensors(FILE.read_bytes())[1]["index"][2]


def wide(found: tuple[str, Any]) -> np.ndarray[Any, Any]:
    return from_bf16(found[1]).astype(np.float64) if found[0] == "BF16" else found[1].astype(np.float64)


def check(reader: GatedReader) -> None:
    """Differences are those of the family, routers start at lambda."""
    below = base()
    raw = {n: (kind, a.shape, a.astype("<u2" if kind == "BF16" else "<f4").tobytes()) for n, (kind, a) in below.items() if n != "ids"}

    def read(number: int, names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
        found = read_mixed(reader.parts[number], {name: raw[name] for name in names})
        assert sorted(found) == sorted(names)
        kinds = {"BF16": "<u2", "F32": "<f4"}
        return {n: wide((kind, np.frombuffer(data, kinds[kind]).reshape(shape))) for n, (kind, shape, data) in found.items()}

    for number in (0, 1):
        fine = fine_tune(number)
        for name, found in read(number + 1, MLPS).items():
            np.testing.assert_allclose(found, wide(fine["enc." + name]), atol=1e-5)
    others = [name for name in SHAPES if name not in MLPS]
    for name, found in read(0, others).items():
        start = wide(below[name])
        wanted = start + 0.3 * sum(wide(fine_tune(number)["enc." + name]) - start for number in (0, 1))
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert reader.mlps == [
        [("h.0.fc1.weight", "h.0.fc1.bias", False, True), ("h.0.fc2.weight", None, False, False)],
        [("h.1.mlp.c_fc.weight", None, True, True), ("h.1.mlp.c_proj.weight", None, True, False)],
    ]
    for (first, zero), (second, scale) in reader.routers.values():
        assert first.shape == (6, 6) and second.shape == (2, 6) and np.abs(scale - 0.3).max() < 1e-3 and not zero.any()
        assert 0.005 < first.std() < 0.015


def test_a_reader_from_the_document_finds_differences_and_routers_in_the_golden_file() -> None:
    reader = GatedReader(FILE.read_bytes())
    check(reader)
    assert [(task["name"], task["prefix"]) for task in reader.tasks] == [("a", "+enc."), ("b", "+enc.")] and reader.seen == []
    assert reader.roles["whole"] == b"".join(fine_tune(number)["head"][1].astype("<f4").tobytes() for number in (0, 1))


def test_a_reader_from_the_document_reads_what_peru_writes(tmp_path: Path, peru: Peru) -> None:
    peru(*write_family(tmp_path), "-o", tmp_path / "w.safetensors", "--no-sync")
    check(GatedReader((tmp_path / "w.safetensors").read_bytes()))
    assert "2 routers, differences of 2 tasks and 2 tasks' own tensors are unchanged" in peru("verify", FILE)


def test_the_table_of_metadata_matches_the_code() -> None:
    section = PAGE[PAGE.index("## Gated MLPs: metadata") : PAGE.index("## Gated MLPs: index")]
    rows = re.findall(r"^\| `(peru\.[\w.]+)` \| (yes|no) \| `(.*?)` \|", section.replace("\\|", "|"), re.MULTILINE)
    common = {"peru.format", "peru.kind", "peru.base", "peru.base.files"}
    assert {key: form for key, _, form in rows} == {key: form for key, form in METADATA.items() if key not in common}


def test_altered_bytes_are_detected(tmp_path: Path) -> None:
    whole, noise, path = FILE.read_bytes(), random.Random(3), tmp_path / "w.safetensors"
    with open_routed(FILE) as routed:
        assert isinstance(routed, Wemoe)
        routed.verify()
    for i in range(noise.randrange(11), len(whole), 11):  # every byte takes eleven times as long
        path.write_bytes(whole[:i] + bytes([(whole[i] + noise.randrange(1, 256)) % 256]) + whole[i + 1 :])
        with pytest.raises(PeruError) as caught, open_routed(path) as routed:
            routed.verify()
        assert str(path) in str(caught.value), i


def test_the_index_round_trips_with_what_became_of_examples() -> None:
    found = decode_wemoe(INDEX)
    assert encode_wemoe(found) == INDEX
    found.seen = [Seen(bytes(16), 7, [3, 4]), Seen(bytes(range(16)), 300, [0, 300])]
    assert decode_wemoe(encode_wemoe(found)).seen == found.seen
    found.seen[0].sent = [3, 3]
    with pytest.raises(BadFile, match="other examples"):
        decode_wemoe(encode_wemoe(found))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3))
def test_a_damaged_index_raises_badfile_or_is_another_valid_one(seed: int, mutations: int) -> None:
    try:
        decoded = decode_wemoe(damaged(INDEX, random.Random(seed), mutations))
    except BadFile:
        return
    assert encode_wemoe(decode_wemoe(encode_wemoe(decoded))) == encode_wemoe(decoded)


def test_unpack_says_what_to_do(tmp_path: Path, peru: Peru) -> None:
    peru("unpack", FILE, "-b", tmp_path, "-o", tmp_path / "out", code=2)
    assert "no single checkpoint" in peru.stderr and not (tmp_path / "out").exists()  # type: ignore[attr-defined]
