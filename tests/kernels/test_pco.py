"""Blocks encoded by the compiled loop have pcodec's own bytes."""

from __future__ import annotations

import numpy as np
import pytest
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, wrapped

from peru_cli.artifacts import codecs
from peru_cli.kernels import pco

N = 20 * 256


def theirs(values: np.ndarray) -> bytes:
    """What pcodec writes, called as docs/format.md says."""
    config = ChunkConfig(
        compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op(), paging_spec=PagingSpec.equal_pages_up_to(1 << 40)
    )
    chunk = wrapped.FileCompressor().chunk_compressor(values, config)
    return wrapped.FileCompressor().write_header() + chunk.write_meta() + chunk.write_page(0)


def steps(rng: np.random.Generator, scale: float, least: float, n: int) -> np.ndarray:
    """Differences of at least this size, as a threshold leaves them."""
    sizes = rng.exponential(scale, n) + least
    return np.clip(np.round(sizes * rng.choice([-1, 1], n)), -32768, 32767).astype(np.int16)


@pytest.mark.parametrize("n", [pco.LEAST, N, 1 << 17])
def test_it_writes_what_pcodec_writes(n: int) -> None:
    rng = np.random.default_rng(n)
    blocks = [(rng.geometric(p, n) - 1).astype(np.uint32) for p in (0.9, 0.5, 0.1, 0.03, 0.001)]
    blocks += [steps(rng, scale, least, n) for scale in (0.3, 3, 40, 900, 9000) for least in (0, 1, 25)]
    blocks += [rng.choice([-1, 1], n).astype(np.int16), np.sort(rng.integers(-3000, 3000, n)).astype(np.int16)]
    blocks += [np.clip(rng.standard_cauchy(n) * 5, -32768, 32767).astype(np.int16)]
    encoded = [pco.encode(values) for values in blocks]
    for values, data in zip(blocks, encoded, strict=True):
        assert data is None or data == theirs(values)
    assert sum(data is not None for data in encoded) > len(blocks) * 2 // 3


def test_what_it_leaves_to_pcodec() -> None:
    rng = np.random.default_rng(0)
    gaps = (rng.geometric(0.1, N) - 1).astype(np.uint32)
    assert pco.encode(gaps) is not None
    assert pco.encode(gaps[:-1]) is None  # parts of a batch
    assert pco.encode(gaps[:2048]) is None  # fewer bins
    assert pco.encode(gaps.astype(np.uint64)) is None
    assert pco.encode(np.full(N, 7, np.uint32)) is None  # a single bin
    gaps[5] = 1 << 16
    assert pco.encode(gaps) is None
    assert codecs.encode(gaps, codecs.PCO) == theirs(gaps)


def test_runs_of_equal_numbers_that_end_where_a_bin_does() -> None:
    # Whether such a run closes the bin before it depends on how pcodec's quicksort came there.
    rng = np.random.default_rng(1)
    for long in range(20, 180, 7):
        runs = [long, 256 - long, *[20] * 242]
        values = np.repeat(np.arange(len(runs)), np.array(runs)).astype(np.uint32)[:N]
        values = rng.permutation(np.pad(values, (0, N - len(values)), constant_values=len(runs)))
        assert (data := pco.encode(values)) is None or data == theirs(values)
