"""docs/mixed.md: a golden artifact is compared literally and read by another reader; damage; sums that would round."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from peru_cli.artifacts.mixed.index import decode_mixed, encode_mixed
from peru_cli.artifacts.mixed.reader import Mixed
from peru_cli.errors import BadFile, PeruError
from peru_cli.methods.mixed.scales import MANTISSAS, is_exact, scale_of
from tests.golden.make_mixed import HERE, write
from tests.support.damage import damaged
from tests.support.readers.format_reader import read_safetensors
from tests.support.readers.mixed_reader import read_mixed

Peru = Callable[..., str]
ARTIFACT, BASE = HERE / "artifact.safetensors", HERE / "base.safetensors"


def test_the_writer_produces_the_golden_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == ARTIFACT.read_bytes()


def test_another_reader_and_unpack_agree(tmp_path: Path, peru: Peru) -> None:
    peru("unpack", ARTIFACT, "--base", BASE, "-o", tmp_path / "back.safetensors")
    mine = read_safetensors((tmp_path / "back.safetensors").read_bytes())[1]
    theirs = read_mixed(ARTIFACT.read_bytes(), read_safetensors(BASE.read_bytes())[1])
    assert {name: mine[name] for name in sorted(mine)} == theirs


def test_every_byte_is_guarded(tmp_path: Path, peru: Peru) -> None:
    """Flips one bit of each byte in turn: unpack refuses, or the bit was in the header's padding, which the seal covers too."""
    data, path = bytearray(ARTIFACT.read_bytes()), tmp_path / "a.safetensors"
    from peru_cli.checkpoints.resolve import open_model
    from peru_cli.finetunes.open import open_artifact
    from peru_cli.finetunes.verify import verify
    from peru_cli.streaming.arrays import CPU
    from peru_cli.vectors.family import StreamSettings

    base, how = open_model(str(BASE)), StreamSettings(CPU, 1, 1 << 14)
    config = read_safetensors(bytes(data))[1]["files"][2]
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with contextlib.suppress(PeruError):
            with open_artifact(path, "a", base, None) as source:
                verify(source, how)
                contents = source.contents()
            pytest.fail(f"byte {at} was altered and {len(contents)} came back: {config!r}")
        data[at] ^= 1 << at % 8


def test_an_impossible_index_is_refused() -> None:
    index, noise = read_safetensors(ARTIFACT.read_bytes())[1]["index"][2], random.Random(5)
    assert encode_mixed(decode_mixed(index)) == index
    for _ in range(3000):
        with contextlib.suppress(BadFile):
            decode_mixed(damaged(index, noise, 1 + noise.randrange(3)))


def test_runs_of_a_tensor_are_pieces_of_it() -> None:
    with Mixed(ARTIFACT) as artifact:
        for record in artifact.index.tensors:
            if record.parts & 3:
                n = record.base_entries
                whole = artifact.difference(record, 0, n)
                assert whole is not None
                for start, stop in ((0, 1), (n - 1, n), (1, n - 1), (n // 3, n // 2)):
                    assert np.array_equal(artifact.difference(record, start, stop), whole[start:stop])  # type: ignore[arg-type]


def test_scales_are_quarter_octaves_and_sums_that_would_round_are_known() -> None:
    g = np.arange(-80, 80)
    assert np.abs(np.log2(scale_of(g)) - g / 4).max() < 0.024
    assert scale_of(np.array([-3]))[0] == MANTISSAS[1] * 2.0**-5
    largest = np.array([1 << 14])
    assert is_exact(largest, largest, np.array([0]))
    assert is_exact(np.array([1, 1]), np.array([1, 1]), np.array([0, 4 * 47])) and not is_exact(
        np.array([1, 1]), np.array([1, 1]), np.array([0, 4 * 49])
    )
