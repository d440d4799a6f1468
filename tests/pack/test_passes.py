"""Inner products of tiles, against one product of whole tensors in float64."""

from __future__ import annotations

import numpy as np
import pytest

from peru_cli.pack.passes import PIECE, inner_products
from peru_cli.streaming.tiles import CHUNK


@pytest.mark.parametrize("n", [1, PIECE, 2 * CHUNK + 77])
def test_inner_products_add_up_to_those_of_whole_rows(n: int) -> None:
    rows = np.random.default_rng(n).standard_normal((3, n))
    tables = inner_products(rows)
    assert len(tables) == -(-n // PIECE) and all((table == table.T).all() for table in tables)
    assert sum(tables) == pytest.approx(rows @ rows.T, rel=1e-9, abs=1e-9)


def test_any_tile_gives_the_same_pieces_bit_for_bit() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 4 * CHUNK + 5))
    whole = inner_products(rows)
    for width in (CHUNK, 2 * CHUNK, 3 * CHUNK):
        tiles = [table for start in range(0, rows.shape[1], width) for table in inner_products(rows[:, start : start + width])]
        assert len(tiles) == len(whole) and all((a == b).all() for a, b in zip(tiles, whole, strict=True))
